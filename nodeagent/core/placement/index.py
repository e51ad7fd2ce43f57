"""An inventory in the form that placement uses: masks, indices and the compiled layout, computed once per snapshot."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from nodeagent._fastpath import Layout, Machine, Pool
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import LINK_WEIGHTS, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.model.request import Request
from nodeagent.core.model.topology import NO_NODE, NodeId
from nodeagent.core.placement.proximity import Place, Proximity


class MachineIndex:
    """Lookup tables of one inventory; sets of CPUs are bit masks of CPU ids."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.usable = sum(1 << cpu.id for cpu in inventory.cpus) & ~inventory.cpus_outside.mask
        """CPUs that pods can run on. The layout and the cores include all online CPUs: a core is not whole if pods
        cannot run on one of its threads."""
        self.isolated = self.usable & sum(1 << cpu.id for cpu in inventory.cpus if cpu.isolated)
        self._cpus: dict[NodeId, int] = dict.fromkeys(inventory.node_order, 0)
        self._packages: dict[NodeId, int] = {}
        for cpu in inventory.cpus:
            self._cpus[cpu.numa_node] |= 1 << cpu.id
            self._packages[cpu.numa_node] = self._packages.get(cpu.numa_node, 0) | 1 << cpu.package
        self.nodes: tuple[NodeId, ...] = tuple(sorted(node.id for node in inventory.numa_nodes))
        self.on_nodes = self.usable & ~self._cpus.get(NO_NODE, 0)
        """Usable CPUs whose NUMA node is known; the others may be on any node, and on different ones."""
        self._pools: dict[tuple[str, ...], DeviceIndex] = {}

    @functools.cached_property
    def device_kinds(self) -> frozenset[str]:
        """Return the kinds of devices that the machine can have."""
        return frozenset({*self.inventory.devices_by_kind, *(one.kind for one in self.inventory.kinds)})

    @functools.cached_property
    def page_sizes(self) -> frozenset[int]:
        """Return the sizes of hugepages that the machine has, in bytes."""
        return frozenset(pool.page_bytes for node in self.inventory.numa_nodes for pool in node.hugepages)

    @functools.cached_property
    def proximity(self) -> Proximity:
        """Return how near the devices and CPUs of the inventory are to each other."""
        return Proximity(self.inventory)

    @functools.cached_property
    def layout(self) -> Layout:
        """Return the compiled view of the CPUs. NUMA nodes with CPUs are numbered in order of id; others are left
        out. CPUs without a node count as one more node."""
        nodes = [node for node in sorted(self._cpus) if self._cpus[node]]
        index = {node: i for i, node in enumerate(nodes)}
        rows = [
            (cpu.id, cpu.package, index[cpu.numa_node], -1 if cpu.l3 is None else cpu.l3, cpu.core)
            for cpu in self.inventory.cpus
        ]
        distances = [self.proximity.node_distance(a, b) for a in nodes for b in nodes]
        return Layout(rows, max(1, len(nodes)), distances or [10])

    @functools.cached_property
    def compiled(self) -> Machine:
        """Return the compiled view of all NUMA nodes, numbered as in `Inventory.node_order`."""
        order = self.inventory.node_order
        number = {node: i for i, node in enumerate(order)}
        return Machine(
            self.layout,
            [self._cpus[node] for node in order],
            [self._packages.get(node, 0) for node in order],
            [self.proximity.node_distance(a, b) for a in order for b in order],
            [[number[node]] for node in self.nodes],
            [sorted(number[node] for node in some) for some in self.nodes_of_packages()],
        )

    @functools.cached_property
    def heaviest_link(self) -> int:
        """Return the largest link weight on the machine."""
        return max([*LINK_WEIGHTS.values(), *(link.weight for link in self.inventory.links)])

    def far(self, a: Device, b: Device) -> int:
        """Return the cost of a pair of devices: by link weight first, then by their distance on PCIe and NUMA."""
        nearest = LINK_WEIGHTS["pcie-switch"]
        links = self.heaviest_link - self.proximity.weight(a, b)
        return links * (nearest + 1) + nearest - self.proximity.place_weight(a, b)

    @functools.cached_property
    def cores(self) -> dict[int, int]:
        """Return the mask of CPUs of each core."""
        cores: dict[int, int] = {}
        for cpu in self.inventory.cpus:
            cores[cpu.core] = cores.get(cpu.core, 0) | 1 << cpu.id
        return cores

    @functools.cached_property
    def _groups(self) -> dict[int | None, int]:
        """Return the mask of CPUs of each L3 group; CPUs without one are left out."""
        groups: dict[int | None, int] = {}
        for cpu in self.inventory.cpus:
            if cpu.l3 is not None:
                groups[cpu.l3] = groups.get(cpu.l3, 0) | 1 << cpu.id
        return groups

    def place(self, cpus: CpuSet) -> Place:
        """Return the place of CPUs that something should be close to: the CPUs of their L3 groups."""
        known = self.inventory.cpu_by_id
        some = [known[one] for one in cpus if one in known]
        nodes, near = {cpu.numa_node for cpu in some}, 0
        for cpu in some:
            near |= self._groups.get(cpu.l3, 1 << cpu.id)
        return near, min(nodes) if len(nodes) == 1 and NO_NODE not in nodes else None

    def of_kind(self, kind: str) -> int:
        """Return the mask of the CPUs of a core kind, or of all usable CPUs if the machine has only one kind."""
        if not any(cpu.kind for cpu in self.inventory.cpus):
            return self.usable
        return sum(1 << cpu.id for cpu in self.inventory.cpus if cpu.kind == kind)

    def packages_of(self, nodes: Iterable[NodeId]) -> int:
        """Return a mask of the packages with CPUs on some nodes."""
        mask = 0
        for node in nodes:
            mask |= self._packages.get(node, 0)
        return mask

    def nodes_of_packages(self) -> list[frozenset[NodeId]]:
        """Return the nodes of each package; a node without CPUs belongs to none."""
        packages = CpuSet.of_mask(self.packages_of(self.nodes))
        return [frozenset(n for n in self.nodes if self._packages.get(n, 0) >> one & 1) for one in packages]

    def pool(self, kinds: tuple[str, ...]) -> DeviceIndex:
        """Return the devices of some kinds, with the weights and costs of their pairs."""
        if kinds not in self._pools:
            self._pools[kinds] = DeviceIndex.of(self, kinds)
        return self._pools[kinds]


class DeviceIndex(msgspec.Struct, frozen=True):
    """All devices of some kinds, grouped into classes of interchangeable devices."""

    kinds: tuple[str, ...]
    firsts: tuple[Device, ...]
    """One device of each class."""
    ids: frozenset[str]
    compiled: Pool
    withheld: frozenset[str] = frozenset()
    """Those that a request does not mean unless it names the devices to choose among (Device.withheld_for)."""

    @classmethod
    def of(cls, machine: MachineIndex, kinds: tuple[str, ...]) -> DeviceIndex:
        """Return the index of some kinds, in order of their names."""
        near, inventory = machine.proximity, machine.inventory
        devices = sorted(inventory.devices, key=lambda device: (device.kind, device.id))
        classes = near.classes([device for device in devices if device.kind in kinds])
        members = [device.id for some in classes for device in some]
        places = list(dict.fromkeys(near.place(some[0]) for some in classes))
        pairs = [(a[0], b[-1]) for a in classes for b in classes]
        number = {node: i for i, node in enumerate(inventory.node_order)}
        compiled = Pool(
            members,
            len(kinds),
            [
                (kinds.index(some[0].kind), len(some), places.index(near.place(some[0])), _number(number, some[0]))
                for some in classes
            ],
            array("q", [machine.far(a, b) for a, b in pairs]),
            array("q", [near.weight(a, b) for a, b in pairs]),
            [near.cpu_weights([place]) for place in places],
            [near.node_weights([place]) for place in places],
            _exclusions(inventory, members),
        )
        withheld = frozenset(one.id for some in classes for one in some if one.withheld_for or one.members)
        return cls(kinds, tuple(some[0] for some in classes), frozenset(members), compiled, withheld)


def may_have(request: Request, device: Device) -> bool:
    """Return whether a request may be given a device as far as it is not held: it is one of those that the request
    names, or is not withheld."""
    if device.id in request.must_devices:
        return True
    if request.within_devices is None:
        return not (device.withheld_for or device.members)
    return device.id in request.within_devices


def _number(numbers: Mapping[NodeId, int], device: Device) -> int:
    """Return the number of a device's node; -1 if it is not known, -2 if the machine has no such node."""
    return -1 if device.numa_node is None else numbers.get(device.numa_node, -2)


def _exclusions(inventory: Inventory, ids: Sequence[str]) -> list[tuple[list[int], int, int]]:
    """Return for each device the numbers of those that exclude it, how many do on the whole machine, and how much it
    hands over; nothing if no two devices of the machine exclude each other."""
    excluded = inventory.excluded_by
    if not excluded:
        return []
    number = {one: i for i, one in enumerate(ids)}
    return [
        (
            sorted(number[other] for other in excluded.get(one, ()) if other in number),
            len(excluded.get(one, ())),
            len(inventory.things_of[one]),
        )
        for one in ids
    ]


def machine_of(inventory: Inventory) -> MachineIndex:
    """Return the machine index of an inventory, cached on the inventory itself."""
    return kept_by(inventory, "_machine", lambda: MachineIndex(inventory))
