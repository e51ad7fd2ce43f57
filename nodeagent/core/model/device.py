"""Devices, the links between them, and what a container needs to use one. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import NodeId


class PciFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and location of a PCI function. A field is None if the value is not available."""

    pci_class: str | None = None
    """Six hexadecimal digits: class, subclass, programming interface."""
    vendor: str | None = None
    device: str | None = None
    driver: str | None = None
    numa_node: NodeId | None = None
    """None if the firmware does not report a node."""
    local_cpus: CpuSet = EMPTY
    pcie_root: str | None = None
    """pciDDDD:BB, the kernel's name of the outermost root bus. Drives behind a VMD controller get the controller's
    root."""
    bridges: tuple[str, ...] = ()
    """PCI addresses of the upstream bridges, starting at the root."""
    iommu_group: int | None = None

    def pci_facts(self) -> dict[str, Any]:
        """Return these fields by name, for constructing another value from them."""
        return {name: getattr(self, name) for name in PciFacts.__struct_fields__}


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


NODE_KINDS = frozenset({"accel", "block", "char", "dsa", "fpga", "gpu", "imex", "nvme", "qat", "sgx", "usb", "vdpa"})
"""Kinds whose devices reach a container only through their device nodes."""

HOST_USES = ("in_use", "default_route")
"""Attributes that show that the host itself uses a device."""
WITHHELD = (*HOST_USES, "mig", "group", "type")
"""Attributes of a device that a request for devices of its kind does not mean: the host itself uses it, or it is a GPU
in MIG mode, which computes only through its instances, whether it has any or not (NVIDIA Multi-Instance GPU User
Guide), or it stands for several, or it is a part of a disk."""


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a device that need not exist: it is made when it is granted, and destroyed afterwards."""

    rank: int
    """Its place in the order in which the parts of one device are offered."""
    profile: int
    """The driver's number for its size."""
    start: int
    """The first of the memory slices on which it lies."""
    size: int
    """How many memory slices these are."""
    draws: Mapping[str, int]
    """What it takes of the counters of the whole."""
    counters: Mapping[str, int]
    """The counters of the whole."""
    made: bool = False
    """Whether it exists. In an inventory it says nothing of that; what a container gets is rendered with it."""


class Draws(msgspec.Struct, frozen=True, kw_only=True):
    """What a device takes of counters that it shares with others, such as the cores of the card of which it is a
    partition. All devices with the same `of` are granted only as far as the counters last, whichever they are."""

    of: str
    """What has the counters, such as the id of the card."""
    takes: Mapping[str, int]
    """By counter, a DNS label."""
    has: Mapping[str, int]
    """All that there is of each counter; every device with the same `of` says the same."""


class Device(PciFacts, frozen=True, kw_only=True):
    """A device that can be granted as a whole. `id` stays the same across reboots and driver failures."""

    kind: str
    id: str
    pci_address: str | None = None
    """dddd:bb:dd.f in lower case; the domain may have more than four digits."""
    paths: tuple[str, ...] = ()
    """Device nodes below /dev that a container needs."""
    parent: str | None = None
    """id of the device this is a part of (PF of a VF, GPU of a MIG instance)."""
    exclusive: tuple[str, ...] | None = None
    """What only one holder may have of it: device nodes, "wwid:…". None: all of `paths` but SHARED_NODES."""
    attributes: Mapping[str, str | int | bool] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    partition: Partition | None = None
    """Set for a part that need not exist: it has no device nodes before it is made."""
    draws: Draws | None = None
    """None if it shares no counters."""
    prepared: PreparedFor | None = None
    """What its kind's `prepare` said. An inventory says nothing of that; what a container gets is rendered with it."""

    @property
    def exclusive_parts(self) -> tuple[str, ...]:
        """Return what is handed over with the device and belongs to its holder alone, besides the device itself."""
        if self.exclusive is not None:
            return self.exclusive
        return tuple(path for path in self.paths if path not in SHARED_NODES)

    @property
    def members(self) -> tuple[str, ...]:
        """Return the ids of the devices that are handed over together as this one; none if it is a device itself."""
        found = self.attributes.get("members")
        return tuple(found.split(",")) if isinstance(found, str) and "group" in self.attributes else ()

    @property
    def withheld_for(self) -> tuple[str, ...]:
        """Return the attributes for which it is given to no request that does not name one of them; () if it is."""
        return tuple(name for name in WITHHELD if self.attributes.get(name))

    @property
    def used_by_host(self) -> bool:
        """Return whether the host itself uses it."""
        return any(self.attributes.get(name) for name in HOST_USES)

    @property
    def lacks_node(self) -> bool:
        """Return whether a container would get nothing: the kind needs device nodes, and there is none that is not
        shared by all holders. A part that is made when it is granted gets its nodes then."""
        if self.partition is not None and not self.partition.made:
            return False
        only_shared = not self.exclusive and SHARED_NODES.issuperset(self.paths)
        return self.kind in NODE_KINDS and (only_shared or not self.paths)


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A connection between two devices. A larger weight means that they are closer."""

    a: str
    b: str
    type: str
    weight: int


LINK_WEIGHTS: Mapping[str, int] = MappingProxyType(
    {"system": 10, "socket": 20, "numa": 30, "pcie-root": 40, "pcie-switch": 50, "xgmi": 90, "nvlink": 100}
)
"""Weight by link type; each NVLink beyond the first adds NVLINK_STEP. The kernel shows no number of XGMI links."""


NVLINK_STEP = 10


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True):
    """A device node for a container. `permissions` is a combination of "r", "w" and "m"."""

    host_path: str
    container_path: str
    permissions: str = "rw"


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A host file or directory to mount in a container; with a type, a separate file system (only CDI can express
    that)."""

    host_path: str
    container_path: str
    read_only: bool = True
    type: str = ""
    options: tuple[str, ...] = ()


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """A program of the host that the container runtime runs when it has made a container's mounts (OCI's
    createContainer; only CDI can express that). args: with the program's name first."""

    path: str
    args: tuple[str, ...]


class DriverUse(StrEnum):
    """What a file of a driver is for."""

    COMPUTE = "compute"
    GRAPHICS = "graphics"
    VIDEO = "video"


class DriverFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a driver: its path on the host, and the paths under which containers get it."""

    host_path: str
    container_paths: tuple[str, ...]
    use: DriverUse = DriverUse.COMPUTE

    @property
    def has_cuda(self) -> bool:
        """Return whether it is the library that every CUDA program needs."""
        return any(path.rpartition("/")[2].startswith("libcuda.so.") for path in self.container_paths)


class DriverFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The user-space files of the NVIDIA driver that is loaded."""

    version: str
    root: str = ""
    """Path on the host of the file system in which they are, or "" if there are none."""
    searched: tuple[str, ...] = ()
    """Library folders on the host that were searched."""
    files: tuple[DriverFile, ...] = ()
    hook: Hook | None = None
    """What renews a container's loader cache, if the host has such a program."""

    @property
    def has_cuda(self) -> bool:
        """Return whether CUDA programs can run with these files."""
        return any(one.has_cuda for one in self.files)


class ContainerEdits(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must be added to a container so that it can use what it was granted."""

    env: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    annotations: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    cdi_devices: tuple[str, ...] = ()
    """CDI device names, vendor/class=name."""
    hooks: tuple[Hook, ...] = ()
    """Not expressed by the device plugin API."""


class PreparedFor(msgspec.Struct, frozen=True, kw_only=True):
    """A device was prepared by its kind for a grant."""

    grant: str
    """Grant.id."""
    edits: ContainerEdits
    """What its container gets besides what the kind says of the device itself."""


class Advertised(msgspec.Struct, frozen=True, kw_only=True):
    """One device-plugin id as advertised to kubelet."""

    id: str
    healthy: bool
    numa_nodes: tuple[NodeId, ...] = ()
    device: str = ""
    """Id of the underlying device; "" if there is none (a CPU, a block of pages, or a device that has disappeared)."""
    held: bool = False
    """Whether, if it is not healthy, that is only because a grant holds it that kubelet does not know it to be of."""
    reason: str = ""
    """Why it is unhealthy, or "" if it is merely held."""
