"""Inventories built straight from numbers, for tests that need no sysfs below them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import Cpu, HugepagePool, NumaNode
from tests.oracles.placement import Row

GIB = 1 << 30


def even_rows(packages: int, nodes: int, groups: int, cores: int, threads: int, *, adjacent: bool = False) -> list[Row]:
    """(cpu, package, node, l3, core) of an even machine: nodes per package, groups per node, cores per group. CPUs are
    numbered as on most servers, first one thread of every core; `adjacent`: siblings side by side."""
    count = packages * nodes * groups * cores
    return [
        (
            core * threads + thread if adjacent else core + thread * count,
            core // (cores * groups * nodes),
            core // (cores * groups),
            core // cores,
            core,
        )
        for core in range(count)
        for thread in range(threads)
    ]


def even_distances(packages: int, nodes: int) -> dict[tuple[int, int], int]:
    """10 on a node, 12 inside a package, 32 beyond."""
    every = range(packages * nodes)
    return {(a, b): 10 if a == b else 12 if a // nodes == b // nodes else 32 for a in every for b in every}


def inventory_of(
    rows: Iterable[Row],
    *,
    distances: Mapping[tuple[int, int], int] | None = None,
    ids: Mapping[int, int] | None = None,
    more_nodes: Iterable[int] = (),
    pages: Mapping[tuple[int, int], int] | None = None,
    memory: Mapping[int, int] | None = None,
    devices: Sequence[Device] = (),
    links: Sequence[Link] = (),
    core_kinds: Mapping[int, str] | None = None,
    isolated: Iterable[int] = (),
) -> Inventory:
    """A machine with these rows. ids: the NUMA id of each node of the rows, itself where not given; all else goes by
    these ids. pages: (node, page bytes) -> free pages. core_kinds: kind by CPU."""
    ids, kinds, apart = ids or {}, core_kinds or {}, frozenset(isolated)
    cpus = [
        Cpu(
            id=cpu,
            package=package,
            die=package,
            core=core,
            numa_node=ids.get(node, node),
            l3=None if l3 < 0 else l3,
            kind=kinds.get(cpu, ""),
            isolated=cpu in apart,
        )
        for cpu, package, node, l3, core in sorted(rows)
    ]
    nodes = sorted({cpu.numa_node for cpu in cpus} | set(more_nodes))
    return Inventory(
        cpus=tuple(cpus),
        cpus_online=CpuSet(cpu.id for cpu in cpus),
        cpus_isolated=CpuSet(apart),
        numa_nodes=tuple(
            _node(node, nodes, cpus, distances or {}, pages or {}, (memory or {}).get(node, 16 * GIB)) for node in nodes
        ),
        devices=tuple(devices),
        links=tuple(links),
    )


def _node(
    node: int,
    nodes: Iterable[int],
    cpus: Iterable[Cpu],
    distances: Mapping[tuple[int, int], int],
    pages: Mapping[tuple[int, int], int],
    memory_bytes: int,
) -> NumaNode:
    pools = [
        HugepagePool(node=node, page_bytes=size, total_pages=count, free_pages=count)
        for (where, size), count in sorted(pages.items())
        if where == node
    ]
    return NumaNode(
        id=node,
        cpus=CpuSet(cpu.id for cpu in cpus if cpu.numa_node == node),
        memory_bytes=memory_bytes + sum(pool.page_bytes * pool.total_pages for pool in pools),
        distances=MappingProxyType(
            {other: distances.get((node, other), 10 if node == other else 20) for other in nodes}
        ),
        hugepages=tuple(pools),
    )
