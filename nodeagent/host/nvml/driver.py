"""What NVIDIA's kernel driver shows without NVML: each GPU's model, UUID and minor number.

Source: kernel-open/nvidia/nv-procfs.c (open-gpu-kernel-modules) and the driver's README, chapter "The /proc Filesystem
Interface". It shows no memory, no health and no details of MIG instances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nodeagent.host.nvml.values import NvGpu
from nodeagent.host.pci import is_address
from nodeagent.host.sysfs.lenient import Tolerant

_DRIVER = "proc/driver/nvidia"


def driver_gpus(reader: Tolerant) -> Mapping[str, NvGpu]:
    """Return the driver's GPUs by PCI address, except those that it was configured to exclude."""
    return {gpu.pci_address: gpu for gpu in _gpus(reader)}


def driver_version(reader: Tolerant) -> str:
    """Return the version of the kernel driver, or "" if it is not loaded."""
    return reader.text("sys/module/nvidia/version") or ""


def _gpus(reader: Tolerant) -> Iterator[NvGpu]:
    for address in filter(is_address, reader.names(f"{_DRIVER}/gpus")):
        path = f"{_DRIVER}/gpus/{address}/information"
        lines = (line.partition(":") for line in (reader.text(path) or "").splitlines())
        shown = {name.strip(): value.strip() for name, _, value in lines}
        if shown.get("GPU Excluded", "No") == "No":
            yield _gpu(reader, path, address, shown)


def _gpu(reader: Tolerant, path: str, address: str, shown: Mapping[str, str]) -> NvGpu:
    minor, uuid = shown.get("Device Minor", ""), shown.get("GPU UUID", "")
    if not (minor.isascii() and minor.isdigit()):
        reader.warn(path, f"Device Minor {minor[:80]!r} is not a number")
        return NvGpu(pci_address=address, uuid="", name=shown.get("Model", ""), mig_enabled=None)
    instances = reader.names(f"{_DRIVER}/capabilities/gpu{minor}/mig")
    return NvGpu(
        pci_address=address,
        uuid="" if "?" in uuid else uuid,  # "GPU-????????-…" until the GPU is opened for the first time
        name=shown.get("Model", ""),
        minor=int(minor),
        mig_enabled=True if any(name.startswith("gi") for name in instances) else None,
    )
