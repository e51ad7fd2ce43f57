"""Devices and the links between them, and what a container gets of a device. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class PciFacts:
    """What a PCI function is and where it lies; None: it does not say."""

    pci_class: str | None = None
    """Six hexadecimal digits: class, subclass, programming interface."""
    vendor: str | None = None
    device: str | None = None
    driver: str | None = None
    numa_node: NodeId | None = None
    """None: the firmware does not say."""
    local_cpus: CpuSet = EMPTY
    pcie_root: str | None = None
    """pciDDDD:BB, as the kernel names the outermost root bus: drives behind a VMD controller count as where that is."""
    bridges: tuple[str, ...] = ()
    """PCI addresses of the bridges above, the one nearest the root first."""
    iommu_group: int | None = None

    def pci_facts(self) -> dict[str, Any]:
        """Return these fields by name, to make another value of them."""
        return {one.name: getattr(self, one.name) for one in fields(PciFacts)}


SHARED_NODES = frozenset(
    {
        "/dev/dri",
        "/dev/infiniband/rdma_cm",
        "/dev/iommu",
        "/dev/kfd",
        "/dev/nvidia-modeset",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
        "/dev/nvidiactl",
        "/dev/vfio/vfio",
    }
)
"""Device nodes that every holder of a device gets and that belong to no device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(PciFacts):
    """One thing that can be given away whole. `id` is stable over reboots and driver failures."""

    kind: str
    id: str
    pci_address: str | None = None
    """dddd:bb:dd.f, lower case; the domain may have more than four digits."""
    paths: tuple[str, ...] = ()
    """Device nodes a container needs, below /dev."""
    parent: str | None = None
    """id of the device this is a part of (PF of a VF, GPU of a MIG instance)."""
    exclusive: tuple[str, ...] | None = None
    """What only one holder may have of it: device nodes, "wwid:…". None: all of `paths` but SHARED_NODES."""
    attributes: Mapping[str, str | int | bool] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def exclusive_parts(self) -> tuple[str, ...]:
        """Return what is handed over with the device and belongs to its holder alone, besides the device itself."""
        if self.exclusive is not None:
            return self.exclusive
        return tuple(path for path in self.paths if path not in SHARED_NODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How two devices reach each other. A larger weight is a nearer pair."""

    a: str
    b: str
    type: str
    weight: int


LINK_WEIGHTS: Mapping[str, int] = MappingProxyType(
    {"system": 10, "socket": 20, "numa": 30, "pcie-root": 40, "pcie-switch": 50, "nvlink": 100}
)
"""Weight of a link type; each NVLink beyond the first adds NVLINK_STEP."""


NVLINK_STEP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNode:
    """A device file for a container. permissions: some of "rwm"."""

    host_path: str
    container_path: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A file or folder of the host for a container; with a type, a file system of its own (CDI alone can say that)."""

    host_path: str
    container_path: str
    read_only: bool = True
    type: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerEdits:
    """What a container must get so that it can use what it was granted."""

    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    cdi_devices: tuple[str, ...] = ()
    """CDI names, vendor/class=name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertised:
    """One entry of what a device-plugin resource shows to kubelet."""

    id: str
    healthy: bool
    numa_nodes: tuple[NodeId, ...] = ()
    device: str = ""
    """The device behind it; "": there is none (a CPU, a block of pages, or what is there no more)."""
    reason: str = ""
    """Why it is not healthy, where that is not its device's illness."""
