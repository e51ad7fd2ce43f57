"""GPUs: NVIDIA's from PCI, NVML and the kernel driver, AMD's from DRM and KFD, Intel's from DRM (xe, i915).

A GPU's id is its PCI address whatever NVML reports, so its identity survives a missing driver. A display controller
that cannot compute (a server's on-board VGA, bochs, qxl: no render node) is not a GPU and stays a PCI function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, DEGRADED, PRESENT, KindState
from nodeagent.host.devices.base import Attributes, Context, Found, node_edits, pci_device
from nodeagent.host.devices.gpus.groups import with_members
from nodeagent.host.devices.gpus.links import nvlinks, with_domains, xgmi_links
from nodeagent.host.devices.kfd import KfdNode, kfd_nodes
from nodeagent.host.nvml.client import Failure, NvGpu, Snapshot
from nodeagent.host.nvml.driver import driver_gpus, driver_version
from nodeagent.host.nvml.mig_devices import mig_devices
from nodeagent.host.pci import AMD, INTEL, NVIDIA, Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_DISPLAY, _PROCESSING = "03", "12"
_COMPUTE_DRIVERS = frozenset({"amdgpu", "i915", "nvidia", "xe"})
_NVIDIA_COMMON = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
_NO_LIBRARY = (
    ", so neither the health of NVIDIA's GPUs nor their MIG instances are known: make the driver's libraries visible to"
    " the agent (a mount at /run/nvidia/driver or below /host, LD_LIBRARY_PATH, or the NVIDIA container runtime)"
)
_NO_NODE = (
    "neither NVML nor the driver shows a device node, so the GPU is not offered: run nvidia-modprobe -u -c MINOR on the"
    " host, and make /dev and /proc/driver/nvidia of the host visible to the agent"
)


class Gpu:
    """The kind `gpu`."""

    name = "gpu"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        kfd = kfd_nodes(reader, context.function_by_address)
        nvidia = _nvidia_gpus(reader, context.nvml)
        devices = [
            device
            for function in context.functions
            for device in _devices(reader, context, function, kfd, nvidia.get(function.address))
        ]
        links = (*nvlinks(nvidia.values()), *xgmi_links(kfd))
        return Found(
            state=_state(context, devices),
            devices=tuple(with_domains(devices, links)),
            links=links,
            warnings=(*reader.warnings, *(context.nvml.errors if isinstance(context.nvml, Snapshot) else ())),
        )

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the nodes; for NVIDIA also the variable that its container runtime and libraries read."""
        edits = with_members(node_edits(device, devices), devices)
        uuids = [str(found) for one in devices if (found := one.attributes.get("uuid") or one.attributes.get("uuids"))]
        if device.vendor != NVIDIA or not uuids or any(path.startswith("/dev/vfio/") for path in device.paths):
            return edits
        return replace(edits, env=MappingProxyType({**edits.env, "NVIDIA_VISIBLE_DEVICES": ",".join(uuids)}))


def _nvidia_gpus(reader: Tolerant, nvml: Snapshot | Failure | None) -> Mapping[str, NvGpu]:
    """Return the GPUs that NVML shows, by PCI address; without NVML those of the kernel driver whose nodes exist."""
    if isinstance(nvml, Snapshot):
        return {gpu.pci_address: gpu for gpu in nvml.gpus}
    exists = reader.sysfs.exists
    return {address: gpu for address, gpu in driver_gpus(reader).items() if exists(f"dev/nvidia{gpu.minor}")}


def _devices(
    reader: Tolerant, context: Context, function: Function, nodes: Mapping[str, Sequence[KfdNode]], nvidia: NvGpu | None
) -> Iterator[Device]:
    kfd = nodes.get(function.address, ())
    if not kfd and nvidia is None and not function.is_class(_DISPLAY, _PROCESSING):
        return
    drm = reader.names(f"{function.path}/drm")
    if not kfd and nvidia is None and not _computes(function, drm):
        return
    by_nvidia = _nvidia_attributes(reader, context, function, nvidia)
    attributes = {**_drm_attributes(drm), **_kfd_attributes(kfd), **by_nvidia}
    paths = _paths(reader, function, drm, kfd, nvidia)
    device = pci_device(context, function, "gpu", paths=paths, attributes=attributes)
    yield device
    if nvidia is not None:
        yield from mig_devices(reader, context.partitions, device, nvidia)
    if len(kfd) > 1:
        yield from (_partition(reader, device, kfd, node) for node in kfd)


def _computes(function: Function, drm: list[str]) -> bool:
    """Return whether a function has a render node or a driver that makes one, or is bound to vfio for a guest."""
    if function.has_vfio:
        return function.is_class(_DISPLAY) and function.vendor in (NVIDIA, AMD, INTEL)
    if function.is_class(_PROCESSING):
        return function.driver in _COMPUTE_DRIVERS
    return (
        function.vendor == NVIDIA
        or function.driver in _COMPUTE_DRIVERS
        or any(name.startswith("renderD") for name in drm)
    )


def _state(context: Context, devices: list[Device]) -> KindState:
    nvml = context.nvml
    bound = [device for device in devices if device.driver == "nvidia"]
    if reasons := () if isinstance(nvml, Snapshot) else tuple(_faults(nvml, bound)):
        return KindState(kind="gpu", state=DEGRADED, reason="; ".join(reasons))
    if not isinstance(nvml, Failure):
        return KindState(kind="gpu", state=PRESENT)
    without_nvml = any(device.vendor != NVIDIA or "/dev/vfio/vfio" in device.paths for device in devices)
    return KindState(kind="gpu", state=PRESENT if without_nvml else ABSENT, reason=nvml.reason)


def _faults(nvml: Failure | None, bound: list[Device]) -> Iterator[str]:
    """Yield what is missing without NVML, each with its remedy. bound: the GPUs that NVIDIA's driver holds."""
    if nvml is not None and (bound or not nvml.absent):
        yield nvml.reason + (_NO_LIBRARY if nvml.absent else "")
    if lacking := [device.id for device in bound if device.lacks_node]:
        yield f"{', '.join(lacking)}: {_NO_NODE}"


def _paths(
    reader: Tolerant, function: Function, drm: list[str], kfd: Sequence[KfdNode], nvidia: NvGpu | None
) -> tuple[str, ...]:
    """Return the nodes through which a GPU computes. The DRM nodes of NVIDIA's driver only draw."""
    if nvidia is not None:
        return _nvidia_paths(reader, nvidia)
    return () if function.driver == "nvidia" else _drm_paths(drm, kfd)


def _drm_paths(drm: list[str], kfd: Sequence[KfdNode]) -> tuple[str, ...]:
    """Return the nodes of a function and, if it is partitioned, the render nodes of all partitions."""
    names = [name for name in drm if name.startswith(("card", "renderD"))]
    names += [node.render for node in kfd if len(kfd) > 1 and node.render]
    nodes = tuple(f"/dev/dri/{name}" for name in dict.fromkeys(names))
    return ("/dev/kfd", *nodes) if kfd else nodes


def _nvidia_paths(reader: Tolerant, gpu: NvGpu) -> tuple[str, ...]:
    own = () if gpu.minor is None else (f"/dev/nvidia{gpu.minor}",)
    return (*own, *(path for path in _NVIDIA_COMMON if reader.sysfs.exists(path[1:])))


def _drm_attributes(drm: list[str]) -> Attributes:
    cards = ",".join(name for name in drm if name.startswith("card"))
    render = ",".join(name for name in drm if name.startswith("renderD"))
    return {key: value for key, value in (("drm_card", cards), ("drm_render", render)) if value}


def _kfd_attributes(kfd: Sequence[KfdNode]) -> Attributes:
    """Return the attributes of a GPU or of one partition. Its nodes share the memory and may share the unique id."""
    found = {
        "kfd_node": kfd[0].number if len(kfd) == 1 else None,
        "partitions": len(kfd) if len(kfd) > 1 else None,
        "memory_bytes": sum(node.memory_bytes for node in kfd) or None,
        "uuid": f"{kfd[0].unique_id:016x}" if kfd and kfd[0].unique_id and _share_id(kfd) else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _share_id(kfd: Sequence[KfdNode]) -> bool:
    return len({node.unique_id for node in kfd}) == 1


def _nvidia_attributes(reader: Tolerant, context: Context, function: Function, gpu: NvGpu | None) -> Attributes:
    """Return a GPU's attributes. One that the driver holds but NVML does not show (it fell off the bus) is marked."""
    by_nvml = isinstance(context.nvml, Snapshot)
    if gpu is None:
        return {"nvml": "does not show this GPU"} if by_nvml and function.driver == "nvidia" else {}
    found: dict[str, str | int | bool | None] = {
        "uuid": gpu.uuid or None,
        "product": gpu.name or None,
        "driver_version": _driver_version(reader, context) or None,
        "memory_bytes": gpu.memory_bytes,
        "minor": gpu.minor,
        "mig": gpu.mig_enabled,
        "ecc_uncorrected": gpu.ecc_uncorrected,
        "fabric_cluster": gpu.fabric.cluster if gpu.fabric is not None else None,
        "fabric_clique": gpu.fabric.clique if gpu.fabric is not None else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _driver_version(reader: Tolerant, context: Context) -> str:
    return context.nvml.driver_version if isinstance(context.nvml, Snapshot) else driver_version(reader)


def _partition(reader: Tolerant, gpu: Device, kfd: Sequence[KfdNode], node: KfdNode) -> Device:
    """Return one partition of AMD's GPU (drivers/gpu/drm/amd/amdgpu/amdgpu_xcp.c), with its own render node.

    All partitions may have the unique id of the GPU, which then identifies none of them.
    """
    found = {"drm_render": node.render, "platform": _platform(reader, node.render)}
    attributes = {**_kfd_attributes([node]), **{key: value for key, value in found.items() if value}}
    if _share_id(kfd):
        attributes.pop("uuid", None)
    return replace(
        gpu,
        id=f"{gpu.id}/xcp-{node.partition}",
        parent=gpu.id,
        paths=("/dev/kfd", *([f"/dev/dri/{node.render}"] if node.render else [])),
        attributes=MappingProxyType(attributes),
    )


def _platform(reader: Tolerant, render: str) -> str:
    """Return the name of the platform device of a render node, by which AMD's device plugin names a partition, or "" of
    one that the PCI function itself has."""
    real = reader.sysfs.entry("sys/class/drm", render) if render else ""
    return real.split("/")[3] if real.startswith("sys/devices/platform/") else ""
