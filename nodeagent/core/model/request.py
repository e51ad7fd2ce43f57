"""A request to placement and the resulting placement. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import DRAM, NodeId

BEST_EFFORT, RESTRICTED, SINGLE = "best-effort", "restricted", "single"
"""Values of Request.numa: as close together as possible; never on more NUMA nodes than an empty machine would need; on
one node or not at all."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is requested in one decision. Whatever is left out is not requested."""

    cpus: int = 0
    hugepages: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Number of pages by page_bytes."""
    memory_bytes: int = 0
    memory_kind: str = DRAM
    """The kind of the nodes that memory and hugepages may come from, one of MEMORY_KINDS."""
    devices: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Number of devices by kind."""
    near: tuple[str, ...] = ()
    """Ids of devices that the CPUs, pages and devices should be close to."""
    near_cpus: CpuSet = EMPTY
    """CPUs that the requested CPUs should be close to."""
    near_nodes: tuple[NodeId, ...] = ()
    """NUMA nodes that everything requested should be close to."""
    options: frozenset[str] = frozenset()
    """Names from core.model.options."""
    numa: str = BEST_EFFORT
    within_cpus: CpuSet | None = None
    """Choose only among these CPUs."""
    must_cpus: CpuSet = EMPTY
    within_devices: frozenset[str] | None = None
    """Choose only among these devices; None: among all that are not withheld (Device.withheld_for)."""
    must_devices: frozenset[str] = frozenset()


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """A number of hugepages of one size on one NUMA node."""

    node: NodeId
    page_bytes: int
    pages: int


class PlacementCost(NamedTuple):
    """The cost of a placement by component, the most significant first; docs/placement.md explains each, and the order
    of requests whose options distribute their CPUs."""

    device_links: int = 0
    near: int = 0
    preference: int = 0
    packages: int = 0
    numa_nodes: int = 0
    numa_distance: int = 0
    l3: int = 0
    split_cores: int = 0
    nodes_broken: int = 0
    l3_broken: int = 0
    cores_broken: int = 0
    links_cut: int = 0
    cpu_ids: int = 0


NO_COST = PlacementCost()


class Placement(NamedTuple):
    """The computed placement of a request and its cost. core.placement.describe explains it in detail."""

    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    """(node, bytes)."""
    devices: tuple[str, ...] = ()
    cost: PlacementCost = NO_COST
    exact: bool = True
    """False if the search ran out of steps, and this is the best placement it found."""
