"""What each library and file of NVIDIA's driver is for.

Source: the driver's README, chapter "Installed Components". What is unknown is for computing: a library that a newer
driver adds is given rather than missing.
"""

from __future__ import annotations

from nodeagent.core.model.device import DriverUse

_GRAPHICS = (
    "libEGL_nvidia",
    "libGLESv1_CM_nvidia",
    "libGLESv2_nvidia",
    "libGLX_nvidia",
    "libglxserver_nvidia",
    "libnvidia-egl",
    "libnvidia-fbc",
    "libnvidia-glcore",
    "libnvidia-glsi",
    "libnvidia-glvkspirv",
    "libnvidia-gtk",
    "libnvidia-ngx",
    "libnvidia-present",
    "libnvidia-rtcore",
    "libnvidia-tls",
    "libnvidia-vksc",
    "libnvidia-vulkan",
    "libnvidia-wayland",
    "libnvoptix",
)
_VIDEO = ("libnvcuvid", "libnvidia-encode", "libnvidia-opticalflow", "libvdpau_nvidia")
PROGRAMS = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
)
SOCKETS = ("run/nvidia-persistenced/socket", "run/nvidia-fabricmanager/socket")
"""Through which programs reach the driver's services."""
SETTINGS = (
    "etc/vulkan/icd.d/nvidia_icd.json",
    "etc/vulkan/implicit_layer.d/nvidia_layers.json",
    "usr/share/vulkan/icd.d/nvidia_icd.json",
    "usr/share/vulkan/implicit_layer.d/nvidia_layers.json",
    "usr/share/glvnd/egl_vendor.d/10_nvidia.json",
    "usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json",
    "usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json",
    "usr/share/nvidia/nvoptix.bin",
)
"""Files by which the loaders of Vulkan and EGL find the driver, and the data of OptiX."""
EXPECTED = ("libcuda.so", "libnvidia-ml.so", "libnvidia-ptxjitcompiler.so")
"""Libraries without which programs fail that every driver has."""

ALSO_ASKED = {
    "libcuda": "libcuda.so",
    "libGLX_nvidia": "libGLX_indirect.so.0",
    "libnvidia-opticalflow": "libnvidia-opticalflow.so",
}
"""Names under which programs ask for a library although an installation may lack the link."""


def use_of(library: str) -> DriverUse:
    """Return what a library is for, by its file name."""
    if library.startswith(_VIDEO):
        return DriverUse.VIDEO
    return DriverUse.GRAPHICS if library.startswith(_GRAPHICS) else DriverUse.COMPUTE
