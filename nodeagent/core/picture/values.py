"""What a picture of a machine consists of. Frozen values.

Every online CPU, every device but bridges, and every hugepage pool is in a picture exactly once. What is held refers to
its holders by their index in `Picture.holders`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import NodeId


class PartState(StrEnum):
    """Whether a CPU or device can be granted."""

    FREE = "free"
    HELD = "held"
    PLACED = "placed"
    """Free, and part of the placement that is being tried."""
    RESERVED = "reserved"
    """Reserved for the system."""
    OUTSIDE = "outside"
    """No pod can run on it (Inventory.cpus_outside)."""
    EXCLUDED = "excluded"
    """Not held itself; a device that is held excludes it (core/ledger/exclusion.py)."""


FREE, HELD, PLACED, RESERVED, OUTSIDE, EXCLUDED = PartState


class PictureHolder(msgspec.Struct, frozen=True, kw_only=True):
    """A pod, claim or container, and all that it holds."""

    letter: str
    """One character that stands for it."""
    name: str
    api: str
    namespace: str = ""
    pod: str = ""
    claim: str = ""
    uids: tuple[str, ...] = ()
    """UIDs of its claim and its pods, as far as they are known."""
    grants: tuple[str, ...] = ()
    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    """(node, bytes)."""
    devices: tuple[str, ...] = ()


class PictureCpu(msgspec.Struct, frozen=True, kw_only=True):
    """One online CPU."""

    id: int
    state: PartState
    holders: tuple[int, ...] = ()
    isolated: bool = False


class PictureCore(msgspec.Struct, frozen=True, kw_only=True):
    """The CPUs of one core, in order of number."""

    core: int
    kind: str
    """Cpu.kind of its CPUs."""
    cpus: tuple[PictureCpu, ...]


class PictureGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The cores of one package that share an L3 cache, as far as they are on one NUMA node."""

    package: int
    l3: int | None
    """Cpu.l3, or None for CPUs without such a cache."""
    cores: tuple[PictureCore, ...]


class PictureDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device."""

    id: str
    kind: str
    name: str
    """What the kernel calls it, such as eth0, or ""."""
    state: PartState
    holders: tuple[int, ...] = ()
    """Several if they share it."""
    health: str = "healthy"
    reason: str = ""
    """Why it is not healthy."""


class PicturePool(msgspec.Struct, frozen=True, kw_only=True):
    """The hugepages of one size on one NUMA node."""

    page_bytes: int
    total_pages: int
    free_pages: int
    """Free according to the kernel; a holder may not use all that it holds."""
    held: tuple[tuple[int, int], ...] = ()
    """(holder, pages)."""


class PictureNode(msgspec.Struct, frozen=True, kw_only=True):
    """One NUMA node. NO_NODE stands for CPUs and devices without one, and may be in several packages."""

    node: NodeId
    kind: str
    memory_bytes: int
    memory_held: tuple[tuple[int, int], ...]
    """(holder, bytes)."""
    hugepages: tuple[PicturePool, ...]
    devices: tuple[PictureDevice, ...]
    """In order of kind, then id."""
    groups: tuple[PictureGroup, ...]

    def cpus(self) -> Iterator[PictureCpu]:
        """Return its CPUs in the order of the drawing."""
        return (cpu for group in self.groups for core in group.cores for cpu in core.cpus)


class PicturePackage(msgspec.Struct, frozen=True, kw_only=True):
    """One package, or several that have a NUMA node in common."""

    packages: tuple[int, ...]
    """Cpu.package; none for NUMA nodes without CPUs and for devices without a node."""
    nodes: tuple[PictureNode, ...]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A machine and who holds which part of it."""

    generation: int
    packages: tuple[PicturePackage, ...]
    offline: CpuSet
    holders: tuple[PictureHolder, ...]
    """In the order of their first grants; a placement that is being tried is the last."""

    def nodes(self) -> Iterator[PictureNode]:
        """Return its NUMA nodes in the order of the drawing."""
        return (node for package in self.packages for node in package.nodes)

    def cpus(self) -> Iterator[PictureCpu]:
        """Return its CPUs in the order of the drawing."""
        return (cpu for node in self.nodes() for cpu in node.cpus())
