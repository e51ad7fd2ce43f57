"""Describes a placement for admins, in numbers and in sentences: packages, NUMA nodes, L3 groups, and the reasons."""

from __future__ import annotations

from collections.abc import Iterable, Set

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.model.topology import NO_NODE, Cpu, NodeId
from nodeagent.core.placement.index import machine_of


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A placement as sorted ids. numa_nodes are those of CPUs, pages and memory, or else of the devices; CPUs without
    a node add none."""

    packages: tuple[int, ...]
    numa_nodes: tuple[NodeId, ...]
    l3: tuple[int, ...]
    split_cores: int
    """Number of cores of which the placement has some, but not all, CPUs."""
    why: tuple[str, ...]


def describe(inventory: Inventory, request: Request, placement: Placement) -> Description:
    """Return the description of a placement that was computed for this request on this inventory."""
    machine = machine_of(inventory)
    cpus = [inventory.cpu_by_id[one] for one in placement.cpus]
    packages = tuple(sorted({cpu.package for cpu in cpus}))
    nodes = _nodes(inventory, cpus, placement)
    cores = (machine.cores[core] for core in {cpu.core for cpu in cpus})
    split = sum(1 for core in cores if core & ~placement.cpus.mask)
    where = f"{_where({cpu.numa_node for cpu in cpus}, nodes)}, {_count(len(packages), 'socket')}" if cpus else ""
    return Description(
        packages=packages,
        numa_nodes=nodes,
        l3=tuple(sorted({cpu.l3 for cpu in cpus if cpu.l3 is not None})),
        split_cores=split,
        why=(*_of_cpus(placement, where, split), *_of_rest(request, placement)),
    )


def _nodes(inventory: Inventory, cpus: Iterable[Cpu], placement: Placement) -> tuple[NodeId, ...]:
    nodes = {cpu.numa_node for cpu in cpus} - {NO_NODE}
    nodes |= {pages.node for pages in placement.hugepages} | {node for node, _ in placement.memory}
    if not nodes:
        found = (inventory.device_by_id[one].numa_node for one in placement.devices)
        nodes = {node for node in found if node is not None}
    return tuple(sorted(nodes))


def _of_cpus(placement: Placement, where: str, split: int) -> list[str]:
    """Return the sentences about the CPUs of a placement. split: how many cores are only partly in it."""
    if not placement.cpus:
        return []
    return [
        f"{len(placement.cpus)} CPUs ({placement.cpus}) on {where}",
        "whole cores only" if not split else f"{_count(split, 'core')} only in part",
    ]


def _of_rest(request: Request, placement: Placement) -> list[str]:
    """Return the sentences about everything but the CPUs."""
    out = []
    for pages in placement.hugepages:
        out.append(f"{pages.pages} pages of {format_size(pages.page_bytes)} on NUMA node {pages.node}")
    for node, size in placement.memory:
        out.append(f"{format_size(size)} of memory on NUMA node {node}")
    if placement.devices:
        out.append(f"devices {', '.join(placement.devices)}: the best linked set that is free")
    if request.near or (placement.devices and placement.cpus):
        near = placement.cost.near
        out.append("as near as can be: all local" if near == 0 else f"distance to the devices summed over CPUs: {near}")
    if not placement.exact:
        out.append("the search ran out of steps: this is the best placement it saw, a better one may exist")
    return out


def _where(of_cpus: Set[NodeId], nodes: tuple[NodeId, ...]) -> str:
    """Return the nodes of a placement in words. of_cpus: those of its CPUs, with NO_NODE if any has none."""
    if of_cpus == {NO_NODE}:
        return "no NUMA node"
    known = f"NUMA node {nodes[0]}" if len(nodes) == 1 else f"NUMA nodes {CpuSet(nodes)}"
    return f"{known} and on no node" if NO_NODE in of_cpus else known


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
