"""What the plain search asks of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nodeagent.core.model import options as opt
from nodeagent.core.model.memo import kept_by
from nodeagent.core.model.request import Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.cpu_choice import Limits, allowed, tastes
from nodeagent.core.placement.index import MachineIndex

if TYPE_CHECKING:
    from nodeagent._fastpath import Choice

Near = Sequence[tuple[int, int]]
"""(mask of CPUs, cost of each of them)."""


def cpus_of(machine: MachineIndex, nodes: Iterable[NodeId]) -> int:
    """Return the mask of the CPUs of some NUMA nodes."""
    return sum(_masks(machine).get(node, 0) for node in nodes)


def nodes_of(machine: MachineIndex, mask: int) -> frozenset[NodeId]:
    """Return the nodes of some CPUs; NO_NODE if any has none."""
    return frozenset(node for node, cpus in _masks(machine).items() if cpus & mask)


def spread(machine: MachineIndex, nodes: Iterable[NodeId]) -> int:
    """Return the sum of the distances between nodes, in both directions."""
    some = list(nodes)
    return sum(machine.proximity.node_distance(a, b) for a in some for b in some if a != b)


def _masks(machine: MachineIndex) -> Mapping[NodeId, int]:
    def masks() -> dict[NodeId, int]:
        found: dict[NodeId, int] = {}
        for cpu in machine.inventory.cpus:
            found[cpu.numa_node] = found.get(cpu.numa_node, 0) | 1 << cpu.id
        return found

    return kept_by(machine.inventory, "_plain_masks", masks)


def search_cpus(machine: MachineIndex, free: int, request: Request, near: Near, limits: Limits) -> Choice | None:
    """Search for the best CPUs; None if no choice is possible within the limits."""
    chosen = request.options
    found = machine.layout.choose(
        free & allowed(machine, request) | request.must_cpus.mask,
        request.cpus,
        must=request.must_cpus.mask,
        whole_cores=opt.FULL_PCPUS in chosen,
        spread_cores=opt.SPREAD_CORES in chosen,
        spread_nodes=opt.SPREAD_NUMA in chosen,
        groups_first=opt.REQUIRE_L3 in chosen,
        most_packages=limits.packages,
        most_nodes=limits.nodes,
        near=near,
        taste=tastes(machine, chosen),
    )
    if found is not None and limits.groups and found[6] > limits.groups:
        return None
    return found
