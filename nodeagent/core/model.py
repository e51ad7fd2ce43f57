"""The words of the house as frozen values: what the machine is. Nothing here decides or reads anything.

Ids are the kernel's own (CPU numbers, NUMA node numbers, PCI addresses). package, die, cluster, core, l2 and l3 of a
CPU are indices, unique on the whole machine and numbered by lowest member CPU: the kernel's own core_id repeats on
every package and is never used as an identity. Sizes are in bytes and say so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import NamedTuple

from nodeagent.core.claim import Result
from nodeagent.core.cpuset import EMPTY, CpuSet

NodeId = int
NO_NODE = -1
"""The NUMA node of what has none."""

PERFORMANCE, BALANCED, EFFICIENCY = "performance", "balanced", "efficiency"
"""Cpu.kind on hybrid machines, fastest first; "" where all CPUs are alike."""

PRESENT, ABSENT, DEGRADED = "present", "absent", "degraded"
"""KindState.state: devices could be looked for; nothing here can have any; looking for them failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """One online CPU (hardware thread)."""

    id: int
    package: int
    die: int
    cluster: int | None = None
    core: int
    numa_node: NodeId
    l2: int | None = None
    l3: int | None = None
    kind: str = ""
    isolated: bool = False
    capacity: int | None = None
    """cpu_capacity: 1024 is the fastest CPU of the machine."""
    base_khz: int | None = None
    max_khz: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """One data or unified cache and the online CPUs that share it."""

    level: int
    index: int
    """Unique within the level; equals Cpu.l2 or Cpu.l3 for those levels."""
    cpus: CpuSet
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepagePool:
    """Pages of one size on one NUMA node (Documentation/admin-guide/mm/hugetlbpage.rst)."""

    node: NodeId
    page_bytes: int
    total_pages: int
    free_pages: int
    reserved_pages: int = 0
    """Promised to a mapping, not yet faulted. Only the machine-wide number exists in most kernels: then it stands on
    the pool of the node that holds most free pages."""
    surplus_pages: int = 0
    overcommit_pages: int = 0
    own_used_pages: int | None = None
    """Faulted by our holders; None: nobody can tell them from others."""
    own_reserved_pages: int | None = None
    """Of the reserved ones those that our holders' mappings wait for; known where own_used_pages is."""

    @property
    def persistent_pages(self) -> int:
        """Those that stay when they are given back."""
        return self.total_pages - self.surplus_pages

    @property
    def foreign_pages(self) -> int | None:
        """In use by none of our holders; None: nobody can tell."""
        if self.own_used_pages is None:
            return None
        return max(0, self.total_pages - self.free_pages - self.own_used_pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """One NUMA node, with or without CPUs, with or without memory."""

    id: NodeId
    cpus: CpuSet = EMPTY
    memory_bytes: int = 0
    kind: str = "dram"
    """dram, hbm, cxl, gpu, pmem or "none" (no memory)."""
    distances: Mapping[NodeId, int] = field(default_factory=lambda: MappingProxyType({}))
    """SLIT distance to each node by its id; empty where the kernel has none."""
    hugepages: tuple[HugepagePool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One thing that can be given away whole. `id` is stable over reboots and driver failures."""

    kind: str
    id: str
    pci_address: str | None = None
    """dddd:bb:dd.f, lower case; the domain may have more than four digits."""
    pci_class: str | None = None
    """Six hexadecimal digits: class, subclass, programming interface."""
    vendor: str | None = None
    device: str | None = None
    driver: str | None = None
    numa_node: NodeId | None = None
    """None: the firmware does not say."""
    local_cpus: CpuSet = EMPTY
    pcie_root: str | None = None
    """pciDDDD:BB, as the kernel names the root bus."""
    bridges: tuple[str, ...] = ()
    """PCI addresses of the bridges above, the one nearest the root first."""
    iommu_group: int | None = None
    paths: tuple[str, ...] = ()
    """Device nodes a container needs, below /dev."""
    parent: str | None = None
    """id of the device this is a part of (PF of a VF, GPU of a MIG instance)."""
    attributes: Mapping[str, str | int | bool] = field(default_factory=lambda: MappingProxyType({}))


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
class KindState:
    """Whether devices of one kind could be looked for on this machine, and if not, why."""

    kind: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodsCgroup:
    """The control group of all pods. Nothing in it runs on other CPUs, whatever is written below."""

    path: str
    """Below the root of the hierarchy."""
    cpus: CpuSet
    """Those in effect there, and those that it lets through to partitions below it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """One snapshot of the machine. A change is a new snapshot with a higher generation.

    Two snapshots are compared with `same_machine`; == is identity, so that what is worked out of one can be kept by it.
    """

    generation: int = 0
    cpus: tuple[Cpu, ...] = ()
    """Online CPUs in order of id."""
    cpus_possible: CpuSet = EMPTY
    cpus_online: CpuSet = EMPTY
    cpus_offline: CpuSet = EMPTY
    cpus_isolated: CpuSet = EMPTY
    cpus_nohz_full: CpuSet = EMPTY
    numa_nodes: tuple[NumaNode, ...] = ()
    """In order of id."""
    caches: tuple[CacheGroup, ...] = ()
    """In order of level, then index."""
    devices: tuple[Device, ...] = ()
    """In order of kind, then id."""
    links: tuple[Link, ...] = ()
    kinds: tuple[KindState, ...] = ()
    warnings: tuple[str, ...] = ()
    """What could not be read, each with file and value."""
    pods_cgroup: PodsCgroup | None = None
    """None: there is none, or nothing in it says which CPUs it has."""

    @functools.cached_property
    def cpus_outside(self) -> CpuSet:
        """Online CPUs on which no pod can run."""
        return self.cpus_online - self.pods_cgroup.cpus if self.pods_cgroup is not None else EMPTY

    @functools.cached_property
    def cpus_usable(self) -> CpuSet:
        """Online CPUs on which pods can run: what is offered, granted and shared is among them."""
        return self.cpus_online - self.cpus_outside

    @functools.cached_property
    def device_by_id(self) -> Mapping[str, Device]:
        return MappingProxyType({device.id: device for device in self.devices})

    @functools.cached_property
    def parts_of(self) -> Mapping[str, tuple[str, ...]]:
        """What is a part of a device, directly or not, by the device's id."""
        parts: dict[str, list[str]] = {}
        for device in self.devices:
            parent = device.parent
            while parent is not None and device.id not in parts.get(parent, ()):
                parts.setdefault(parent, []).append(device.id)
                above = self.device_by_id.get(parent)
                parent = above.parent if above is not None else None
        return MappingProxyType({one: tuple(found) for one, found in parts.items()})

    @functools.cached_property
    def cpu_by_id(self) -> Mapping[int, Cpu]:
        return MappingProxyType({cpu.id: cpu for cpu in self.cpus})

    @functools.cached_property
    def node_by_id(self) -> Mapping[NodeId, NumaNode]:
        return MappingProxyType({node.id: node for node in self.numa_nodes})


def same_machine(a: Inventory, b: Inventory) -> bool:
    """Whether two snapshots show the same, their generations left aside."""
    return all(getattr(a, one.name) == getattr(b, one.name) for one in fields(Inventory) if one.name != "generation")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What kubelet says that one container holds of one device-plugin resource."""

    namespace: str
    pod: str
    container: str
    resource: str
    ids: tuple[str, ...]


BEST_EFFORT, RESTRICTED, SINGLE = "best-effort", "restricted", "single"
"""Request.numa: as close as can be; never over more NUMA nodes than an empty machine would need; one node or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for in one decision. Everything left out is not asked for."""

    cpus: int = 0
    hugepages: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Pages by page_bytes."""
    memory_bytes: int = 0
    devices: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Devices by kind."""
    near: tuple[str, ...] = ()
    """Ids of devices that the CPUs, pages and devices are to lie near."""
    near_cpus: CpuSet = EMPTY
    """CPUs that the CPUs asked for are to lie near."""
    near_nodes: tuple[NodeId, ...] = ()
    """NUMA nodes that everything asked for is to lie near."""
    options: frozenset[str] = frozenset()
    """Names from core.options."""
    numa: str = BEST_EFFORT
    within_cpus: CpuSet | None = None
    """Choose among these CPUs only."""
    must_cpus: CpuSet = EMPTY
    within_devices: frozenset[str] | None = None
    must_devices: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Hugepages of one size on one NUMA node."""

    node: NodeId
    page_bytes: int
    pages: int


class Placement(NamedTuple):
    """What was computed for a request, and what it cost. core.describe says more about one."""

    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    """(node, bytes)."""
    devices: tuple[str, ...] = ()
    cost: tuple[int, ...] = ()
    """In the order of core.placement.COST_ORDER."""
    exact: bool = True
    """False: the search ran out of steps and this is the best it saw."""


DEVICE_PLUGIN, CLAIM, KUBELET = "device-plugin", "claim", "kubelet"
"""Holder.api: which protocol a grant came through, or that it was taken over from kubelet's own managers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a grant: a ResourceClaim, or a container, known by name only once kubelet lists it."""

    api: str
    resource: str = ""
    """The extended resource, or the device class KIND.DRIVER."""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    """Name of the claim."""
    uid: str = ""
    """Of the claim; of what was taken over from kubelet, of the pod."""

    def __str__(self) -> str:
        if self.api == CLAIM:
            return f"claim {self.namespace}/{self.claim}"
        if self.api == KUBELET:
            return f"kubelet's pod {self.uid}" + (f"/{self.container}" if self.container else "")
        where = "/".join(part for part in (self.namespace, self.pod, self.container) if part)
        return where or f"a container not yet listed ({self.resource})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one holder holds. ids are the names its API knows the parts by."""

    id: str
    holder: Holder
    ids: tuple[str, ...] = ()
    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    devices: tuple[str, ...] = ()
    """Devices held whole."""
    shares: tuple[str, ...] = ()
    """Devices held by some of several shares."""
    granted_at: float = 0.0
    """Seconds since the epoch."""
    confirmed: bool = False
    """Kubelet has listed the holder."""
    boot_id: str = ""
    result: Result | None = None
    """Of a claim: what the scheduler allocated, that this grant gives."""
    settings: str = ""
    """Of a claim: the configuration that applies (core/settings.py), as JSON."""
    pods: tuple[str, ...] = ()
    """UIDs of the pods that hold it: those that its claim was reserved for when that was last read, or those that
    kubelet's device checkpoint last had its ids with."""

    @property
    def pod_uids(self) -> tuple[str, ...]:
        """UIDs of the pods that hold it, as far as they are known."""
        return (self.holder.uid,) if self.holder.api == KUBELET else self.pods
