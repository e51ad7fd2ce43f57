"""What is asked of placement, and where it goes. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import NodeId

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


class PlacementCost(NamedTuple):
    """What a placement costs, part by part, the most important first; docs/placement.md says each in words."""

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
    """What was computed for a request, and what it cost. core.placement.describe says more about one."""

    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    """(node, bytes)."""
    devices: tuple[str, ...] = ()
    cost: PlacementCost = NO_COST
    exact: bool = True
    """False: the search ran out of steps and this is the best it saw."""
