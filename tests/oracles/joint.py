"""The plain oracle of joint requests: every set of devices, every set of CPUs and every set of nodes for pages and
memory. Written from docs/placement.md alone; small machines only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from nodeagent.core.model import options as opt
from nodeagent.core.model.device import LINK_WEIGHTS, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, SINGLE, Request
from nodeagent.core.model.topology import NodeId
from tests.oracles import placement as oracle

Cost = tuple[int, ...]
"""device_links, near, preference, packages, numa_nodes, numa_distance; then the last three of the CPUs by themselves;
then l3 to cpu_ids; then by how much the shares of nodes differ."""


class Oracle:
    """One inventory, some CPUs held, one request."""

    def __init__(self, inventory: Inventory, held: Iterable[int], gone: Iterable[str], request: Request) -> None:
        self.inventory, self.request = inventory, request
        self.only = "require-isolated-cpus" in request.options
        self.free = {cpu.id for cpu in inventory.cpus if cpu.isolated or not self.only} - set(held)
        held_things = {thing for one in inventory.devices if one.id in set(gone) for thing in self.things(one)}
        self.devices = [one for one in inventory.devices if held_things.isdisjoint(self.things(one))]
        self.nodes = [node.id for node in inventory.numa_nodes]
        self.near = [inventory.device_by_id[one] for one in request.near]
        self.near += [Device(kind="node", id=f"node {one}", numa_node=one) for one in request.near_nodes]
        self.links = {frozenset({link.a, link.b}): link.weight for link in inventory.links}
        self.heaviest = max([*LINK_WEIGHTS.values(), *self.links.values()])
        with_cpus = [node.id for node in inventory.numa_nodes if node.cpus]
        index = {node: i for i, node in enumerate(with_cpus)}
        isolated = sum(1 << cpu.id for cpu in inventory.cpus if not cpu.isolated)
        self.case = oracle.Case(
            rows=tuple(
                (cpu.id, cpu.package, index[cpu.numa_node], -1 if cpu.l3 is None else cpu.l3, cpu.core)
                for cpu in inventory.cpus
            ),
            distances=tuple(self.distance(a, b) for a in with_cpus for b in with_cpus),
            free=frozenset(self.free),
            want=request.cpus,
            whole_cores=opt.FULL_PCPUS in request.options,
            spread_cores=opt.SPREAD_CORES in request.options,
            spread_nodes=opt.SPREAD_NUMA in request.options,
            taste=((isolated, 1),) if "prefer-isolated-cpus" in request.options else (),
        )

    def best(self) -> Cost | None:
        """The least cost, with what the CPUs span by themselves behind numa_distance; None where nothing fits."""
        found = [one for nodes in self.universes() for one in [self.best_within(nodes)] if one is not None]
        return min(found, default=None, key=self.ranked)

    def ranked(self, cost: Cost) -> Cost:
        """The parts as the options rank them."""
        links, near, taste, packages, nodes, distance, *own, l3, split, nodes_broken, l3_broken, cores_broken = cost[
            :14
        ]
        cut, ids, uneven = cost[14:]
        cores = (split, l3) if self.case.spread_cores else (l3, split)
        spread = (packages, nodes, uneven, distance, *own)
        return (links, uneven > 0, near, taste, *spread, *cores, nodes_broken, l3_broken, cores_broken, cut, ids)

    def universes(self) -> list[frozenset[NodeId]]:
        if self.request.numa == BEST_EFFORT:
            return [frozenset(self.nodes)]
        units = [frozenset({node}) for node in self.nodes]
        if opt.ALIGN_SOCKET in self.request.options:
            packages = sorted({cpu.package for cpu in self.inventory.cpus})
            units = [frozenset(c.numa_node for c in self.inventory.cpus if c.package == p) for p in packages]
        most = 1 if self.request.numa == SINGLE else self.least(units)
        return [frozenset().union(*some) for some in itertools.combinations(units, most)]

    def least(self, units: Sequence[frozenset[NodeId]]) -> int:
        """How many units an empty machine needs."""
        for most in range(1, len(units) + 1):
            for some in itertools.combinations(units, most):
                nodes = frozenset().union(*some)
                cpus = sum(
                    1 for cpu in self.inventory.cpus if cpu.numa_node in nodes and (cpu.isolated or not self.only)
                )
                devices = [d for d in self.inventory.devices if d.numa_node is None or d.numa_node in nodes]
                kinds = self.fit_together(devices)
                if cpus >= self.request.cpus and kinds and self.enough(nodes):
                    return most
        return len(units)

    def fit_together(self, devices: Sequence[Device]) -> bool:
        """Whether as many of each kind as are asked for can be given away together."""
        kinds = [
            itertools.combinations([one for one in devices if one.kind == kind], count)
            for kind, count in self.request.devices.items()
        ]
        return any(self.together([*itertools.chain.from_iterable(some)]) for some in itertools.product(*kinds))

    def enough(self, nodes: Iterable[NodeId]) -> bool:
        """Whether the nodes have the pages and the memory."""
        there = [node for node in self.inventory.numa_nodes if node.id in set(nodes)]
        pools = [pool for node in there for pool in node.hugepages]
        memory = sum(n.memory_bytes - sum(p.page_bytes * p.total_pages for p in n.hugepages) for n in there)
        sizes = self.request.hugepages.items()
        return memory >= self.request.memory_bytes and all(
            sum(pool.free_pages for pool in pools if pool.page_bytes == size) >= count for size, count in sizes
        )

    def best_within(self, nodes: frozenset[NodeId]) -> Cost | None:
        """Part by part: of all choices those with the least first part, of these those with the least second."""
        sets = self.device_sets(nodes)
        if not sets or not self.enough(nodes):
            return None
        links = min(self.device_links(one) for one in sets)
        sets = [one for one in sets if self.device_links(one) == links]
        spans = [s for n in range(len(nodes) + 1) for s in itertools.combinations(sorted(nodes), n) if self.enough(s)]
        if not self.request.cpus:
            found = [(links, *self.pages_cost(one, span), self.cut(one), 0, 0) for one in sets for span in spans]
            return min(found, key=self.ranked)
        cpus = self.cpu_sets(nodes)
        if not cpus:
            return None
        pairs = [((c.uneven > 0, self.nearness(one, d), c.taste), one, d, c) for one, c in cpus.items() for d in sets]
        least = min(pair[0] for pair in pairs)
        found = [
            (links, *self.joint_cost(one, near, cost, span), self.cut(d), sum(one), cost.uneven)
            for (uneven, near, taste), one, d, cost in pairs
            if (uneven, near, taste) == least
            for span in spans
        ]
        return min(found, key=self.ranked)

    def joint_cost(self, cpus: Sequence[int], near: int, cost: oracle.Parts, span: Sequence[NodeId]) -> Cost:
        """near to cores_broken; packages, nodes and distance of the union, then those of the CPUs alone."""
        used = {self.inventory.cpu_by_id[one].numa_node for one in cpus} | set(span)
        packages = cost.packages if len(used) == cost.nodes else max(cost.packages, len(self.packages(used)))
        return near, cost.taste, packages, len(used), self.spread(used), *cost[2:10]

    def pages_cost(self, devices: Sequence[Device], span: Sequence[NodeId]) -> Cost:
        near = max((self.node_nearness(node, devices) for node in span), default=0)
        return near, 0, len(self.packages(span)), len(span), self.spread(span), 0, 0, 0, *(0,) * 5

    def packages(self, nodes: Iterable[NodeId]) -> set[int]:
        return {cpu.package for cpu in self.inventory.cpus if cpu.numa_node in set(nodes)}

    def spread(self, nodes: Iterable[NodeId]) -> int:
        some = list(nodes)
        return sum(self.distance(a, b) for a in some for b in some if a != b)

    def cpu_sets(self, nodes: frozenset[NodeId]) -> dict[tuple[int, ...], oracle.Parts]:
        free = [one for one in sorted(self.free) if self.inventory.cpu_by_id[one].numa_node in nodes]
        costs = {one: oracle.parts_of(self.case, one) for one in itertools.combinations(free, self.request.cpus)}
        return {one: cost for one, cost in costs.items() if cost is not None}

    # ---------------------------------------------------------------- devices

    def things(self, device: Device) -> set[str]:
        """What a device hands over: itself, its nodes, and all that its parts hand over."""
        parts = [one for one in self.inventory.devices if one.parent == device.id]
        return {device.id, *device.paths}.union(*map(self.things, parts))

    def together(self, devices: Sequence[Device]) -> bool:
        """Whether no two of some devices hand over the same thing."""
        every = [thing for one in devices for thing in self.things(one)]
        return len(every) == len(set(every))

    def device_sets(self, nodes: frozenset[NodeId]) -> list[tuple[Device, ...]]:
        kinds = [
            itertools.combinations(
                [d for d in self.devices if d.kind == kind and (d.numa_node is None or d.numa_node in nodes)], count
            )
            for kind, count in self.request.devices.items()
        ]
        sets = [tuple(itertools.chain.from_iterable(some)) for some in itertools.product(*kinds)]
        return [one for one in sets if self.together(one)]

    def device_links(self, devices: Sequence[Device]) -> int:
        pairs = [*itertools.combinations(devices, 2), *itertools.product(devices, self.near)]
        return sum((self.heaviest - self.weight(a, b)) * 51 + 50 - self.place_weight(a, b) for a, b in pairs)

    def cut(self, devices: Sequence[Device]) -> int:
        rest = [one for one in self.devices if one not in devices]
        return sum(self.weight(a, b) for a in devices for b in rest if a.kind == b.kind)

    def weight(self, a: Device, b: Device) -> int:
        return self.links.get(frozenset({a.id, b.id}), self.place_weight(a, b))

    def place_weight(self, a: Device, b: Device) -> int:
        if a.pcie_root and a.pcie_root == b.pcie_root:
            return 50 if a.bridges and b.bridges and a.bridges[0] == b.bridges[0] else 40
        if a.numa_node is None or b.numa_node is None:
            return 10
        if a.numa_node == b.numa_node:
            return 30
        one, other = self.package_of(a.numa_node), self.package_of(b.numa_node)
        return 20 if one is not None and one == other else 10

    # ---------------------------------------------------------------- distances

    def distance(self, a: NodeId, b: NodeId) -> int:
        return self.inventory.node_by_id[a].distances[b]

    def package_of(self, node: NodeId) -> int | None:
        return next((cpu.package for cpu in self.inventory.cpus if cpu.numa_node == node), None)

    def nearness(self, cpus: Iterable[int], devices: Sequence[Device]) -> int:
        return sum(self.cpu_distance(cpu, device) for cpu in cpus for device in (*devices, *self.near))

    def cpu_distance(self, cpu: int, device: Device) -> int:
        at, local = self.inventory.cpu_by_id[cpu], cpu in device.local_cpus
        if device.numa_node is None:
            return 0 if local or not device.local_cpus else 40
        if at.numa_node == device.numa_node:
            return 0 if local or not device.local_cpus else 1
        if local:
            return 1
        return 2 * self.distance(at.numa_node, device.numa_node) + (at.package != self.package_of(device.numa_node))

    def node_nearness(self, node: NodeId, devices: Sequence[Device]) -> int:
        every = [*devices, *self.near]
        return sum(self.distance(node, d.numa_node) - 10 for d in every if d.numa_node is not None)
