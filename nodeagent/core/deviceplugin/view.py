"""The device-plugin view: the ids of a resource, which of them are healthy, and which are best for a container.

Pure functions of (inventory, ledger, health), with one class per family of resources: CPUs and hugepages here, devices
in devices.py. Ids stay the same across restarts, have at most 63 characters, and are listed in a fixed order.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.free import grantable
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.offline import outside_of
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.device import Advertised
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, Pages, Placement, Request
from nodeagent.core.model.topology import HugepagePool, NodeId
from nodeagent.core.placement.index import machine_of
from nodeagent.core.placement.place import find, place
from nodeagent.errors import InputError, Refused


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What some ids of a resource stand for."""

    cpus: CpuSet = msgspec.field(default_factory=CpuSet)
    hugepages: tuple[Pages, ...] = ()
    devices: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()


class Near(msgspec.Struct, frozen=True, kw_only=True):
    """What the same pod is thought to hold already."""

    devices: tuple[str, ...] = ()
    cpus: CpuSet = msgspec.field(default_factory=CpuSet)
    nodes: tuple[NodeId, ...] = ()


class ResourceKind(Protocol):
    """One resource. `name` is the full name of the extended resource, including its domain."""

    @property
    def name(self) -> str:
        """Return the full name of the extended resource, including its domain."""

    @property
    def kind(self) -> str:
        """Return the name of the kind, as in the configuration."""

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        """Return every id, in a fixed order."""
        ...

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        """Return what the ids stand for. Raise InputError naming those that are not ids of this resource."""
        ...

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        """Return the best `size` ids of `available`, including those of `must`. Raise Refused if there are too few."""
        ...


# ---------------------------------------------------------------- CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuResource:
    """CPUs: each CPU that can be granted is one id, "cpu12"."""

    name: str
    kind: str = "cpu"
    options: frozenset[str] = frozenset()
    numa: str = BEST_EFFORT
    claimed: bool = field(default=False, compare=False)
    """Whether claims are granted CPUs too. The scheduler allocates them from the first group that has enough. Kubelet
    is told nothing of it: a resource that differs in it alone is the same resource."""

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {number for (resource, one) in ledger.by_id if resource == self.name for number in _cpu_numbers(one)}
        elsewhere = union(grant.cpus for grant in ledger.grants.values() if grant.holder.resource != self.name)
        outside = inventory.cpus_outside
        shown = {
            cpu.id: Advertised(
                id=f"cpu{cpu.id}",
                healthy=cpu.id not in elsewhere and cpu.id not in outside,
                held=cpu.id in elsewhere and cpu.id not in outside,
                numa_nodes=_node(cpu.numa_node),
                reason=outside_of(inventory) if cpu.id in outside else "",
            )
            for cpu in inventory.cpus
            if cpu.id not in ledger.reserved
        }
        # A held CPU that went offline stays in the list, so that its pod is notified.
        shown.update({one: Advertised(id=f"cpu{one}", healthy=False) for one in held - shown.keys()})
        return tuple(shown[one] for one in sorted(shown))

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        numbers = [number for one in ids for number in _cpu_numbers(one) if number in inventory.cpu_by_id]
        if len(numbers) < len(ids):
            refuse_unknown(self.name, ids, {f"cpu{number}" for number in numbers})
        if outside := CpuSet(numbers) & inventory.cpus_outside:
            raise InputError(f"cannot allocate CPUs {outside} of {self.name}: {outside_of(inventory)}")
        return Parts(cpus=CpuSet(numbers))

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        free = CpuSet(number for one in available for number in _cpu_numbers(one)) & inventory.cpus_online
        request = Request(
            cpus=size,
            options=self.options,
            numa=self.numa,
            within_cpus=free,
            must_cpus=self.parts(inventory, must).cpus,
            near=near.devices,
            near_cpus=near.cpus,
            near_nodes=near.nodes,
        )
        found = find(inventory, ledger, request)
        if found is None:
            # Kubelet fails the pod on an error, and has already decided: scattered CPUs are better than none.
            request = replace(request, options=frozenset(), numa=BEST_EFFORT)
            found = place(inventory, ledger, request)
        if self.claimed:
            found = _from_the_end(inventory, ledger, request, free, found)
        return [f"cpu{one}" for one in found.cpus]


def _from_the_end(inventory: Inventory, ledger: Ledger, request: Request, free: CpuSet, first: Placement) -> Placement:
    """Return an equally good placement on the last NUMA node that has one, or the first placement if there is none: so
    that a container takes what the scheduler, which may not know of it yet, would allocate to a claim last."""
    for node in reversed(inventory.numa_nodes):
        within = free & node.cpus
        if len(within) < request.cpus or not request.must_cpus <= within:
            continue
        found = find(inventory, ledger, replace(request, within_cpus=within))
        if found is not None and found.cost[:-1] == first.cost[:-1]:  # all but the CPUs' numbers
            return found
    return first


def _cpu_numbers(one: str) -> tuple[int, ...]:
    """Return the CPU number in an id, or nothing if it is not an id in the form that this module uses."""
    return (int(one[3:]),) if re.fullmatch(r"cpu(0|[1-9][0-9]{0,6})", one, re.ASCII) else ()


# ---------------------------------------------------------------- hugepages


_IN_USE = "its pages are in use or reserved by processes without a grant"


class HugepageResource(msgspec.Struct, frozen=True, kw_only=True):
    """Hugepages: each id, "node0-2Mi-17", is a block of pages_per_block pages on one NUMA node."""

    name: str
    page_bytes: int
    pages_per_block: int = 1
    kind: str = "hugepages"

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {one for (resource, one) in ledger.by_id if resource == self.name}
        shown = [one for pool in self._pools(inventory) for one in self._blocks(pool, ledger, held)]
        known = {one.id for one in shown}
        return (*shown, *(Advertised(id=one, healthy=False) for one in sorted(held - known)))

    def _blocks(self, pool: HugepagePool, ledger: Ledger, held: Container[str]) -> Iterator[Advertised]:
        """Yield the blocks of a pool. Of those that cannot be granted, as many count as held as other grants have; the
        pages of the rest are in use or reserved by processes without a grant."""
        spare, elsewhere = grantable(pool, ledger) // self.pages_per_block, self._held_elsewhere(pool, ledger)
        for one in self._ids(pool):
            spare -= one not in held
            healthy = one in held or spare >= 0
            others = not healthy and -spare > elsewhere
            yield Advertised(
                id=one,
                healthy=healthy,
                held=not healthy and not others,
                numa_nodes=_node(pool.node),
                reason=_IN_USE if others else "",
            )

    def _held_elsewhere(self, pool: HugepagePool, ledger: Ledger) -> int:
        """Return how many blocks' pages of a pool are granted through other resources, rounded up."""
        others = (grant for grant in ledger.grants.values() if grant.holder.resource != self.name)
        same = (one for grant in others for one in grant.hugepages if one.node == pool.node)
        return -(-sum(one.pages for one in same if one.page_bytes == self.page_bytes) // self.pages_per_block)

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        nodes = {one: node for one in ids for node in self._node_of(inventory, one)}
        refuse_unknown(self.name, ids, nodes.keys())
        counts: dict[NodeId, int] = {}
        for one in ids:
            counts[nodes[one]] = counts.get(nodes[one], 0) + self.pages_per_block
        return Parts(
            hugepages=tuple(
                Pages(node=node, page_bytes=self.page_bytes, pages=count) for node, count in sorted(counts.items())
            )
        )

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        """Return ids node by node: nodes of `must` first, then the nodes nearest to what the pod holds.

        At equal distance, nodes that can give all come first, those with the fewest blocks to spare before others.
        """
        nodes: dict[NodeId, list[str]] = {}
        free = frozenset(available) - frozenset(must)
        for pool in self._pools(inventory):
            nodes[pool.node] = [one for one in self._ids(pool) if one in free]
        home = {pool.node for pool in self._pools(inventory) for one in self._ids(pool) if one in must}
        machine = machine_of(inventory)
        want = size - len(must)

        def rank(node: NodeId) -> tuple[bool, int, bool, int, NodeId]:
            far = sum(machine.proximity.node_distance(node, other) for other in near.nodes)
            return bool(home) and node not in home, far, len(nodes[node]) < want, len(nodes[node]), node

        rest = [one for node in sorted(nodes, key=rank) for one in nodes[node]]
        if len(rest) < want:
            raise Refused(
                f"cannot prefer {size} blocks: too few are available",
                want=size,
                free=len(rest) + len(must),
                unit="blocks",
            )
        return [*must, *rest[:want]]

    def _pools(self, inventory: Inventory) -> list[HugepagePool]:
        """Return the pools of this page size on nodes that serve ordinary requests: a container cannot name a kind."""
        nodes = (node for node in inventory.numa_nodes if node.serves())
        return [pool for node in nodes for pool in node.hugepages if pool.page_bytes == self.page_bytes]

    def _node_of(self, inventory: Inventory, one: str) -> tuple[NodeId, ...]:
        """Return the node of a block, or nothing if there is no such block, without listing all blocks."""
        found = re.fullmatch(rf"node([0-9]+)-{format_size(self.page_bytes)}-(0|[1-9][0-9]*)", one, re.ASCII)
        if found is None:
            return ()
        blocks = {f"{pool.node}": pool.total_pages // self.pages_per_block for pool in self._pools(inventory)}
        return (int(found[1]),) if int(found[2]) < blocks.get(found[1], 0) else ()

    def _ids(self, pool: HugepagePool) -> list[str]:
        size = format_size(pool.page_bytes)
        return [f"node{pool.node}-{size}-{i}" for i in range(pool.total_pages // self.pages_per_block)]


def _node(node: NodeId) -> tuple[NodeId, ...]:
    return (node,) if node >= 0 else ()


def refuse_unknown(name: str, ids: Iterable[str], known: Container[str]) -> None:
    """Raise InputError naming the ids that are unknown."""
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise InputError(f"cannot allocate {', '.join(unknown)} of {name}: unknown")
