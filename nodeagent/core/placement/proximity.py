"""How near devices are to each other and CPUs to devices. Facts of one inventory, computed once.

A link weight expresses how near two devices are (core.model.device.LINK_WEIGHTS): an explicit Link if there is one,
else the relation in the PCIe tree. A CPU's distance to a device is 0 if the CPU is on its NUMA node and among its
PCIe-local CPUs, and 1 if only one of the two is true. Otherwise it is twice the SLIT distance, plus one if the CPU is
on another socket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nodeagent.core.model.device import LINK_WEIGHTS, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import NodeId

REMOTE, LOCAL = 20, 10
"""SLIT distances assumed if the kernel reports none (ACPI 6.5, 5.2.17: 10 is the distance of a node to itself)."""
MOST_REMEMBERED = 4096
"""Highest number of distance sums cached, each keyed by the places it refers to."""
Place = tuple[int, NodeId | None]
"""A mask of PCIe-local CPUs and the NUMA node: all that matters to a CPU about a device's location."""
_Piece = tuple[int, NodeId, int, int]
"""Package, NUMA node, mask of CPUs, distance so far."""


class Proximity:
    """Distances within one inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._explicit: dict[tuple[str, str], int] = {}
        for link in inventory.links:
            for pair in ((link.a, link.b), (link.b, link.a)):
                self._explicit[pair] = max(link.weight, self._explicit.get(pair, 0))
        self._linked = {one for one, _ in self._explicit}
        self._package = {cpu.numa_node: cpu.package for cpu in sorted(inventory.cpus, key=lambda c: -c.id)}
        cells: dict[tuple[int, NodeId], int] = {}
        for cpu in inventory.cpus:
            cells[cpu.package, cpu.numa_node] = cells.get((cpu.package, cpu.numa_node), 0) | 1 << cpu.id
        self._weights: dict[frozenset[tuple[Place, int]], list[tuple[int, int]]] = {}
        self._cells = tuple((package, node, mask) for (package, node), mask in cells.items())

    def node_distance(self, a: NodeId, b: NodeId) -> int:
        """Return the SLIT distance from node a to node b."""
        node = self._inventory.node_by_id.get(a)
        return (node.distances.get(b) if node else None) or (LOCAL if a == b else REMOTE)

    def weight(self, a: Device, b: Device) -> int:
        """Return the link weight of two devices; larger means nearer."""
        return self._explicit.get((a.id, b.id)) or self.place_weight(a, b)

    def place_weight(self, a: Device, b: Device) -> int:
        """Return the link weight of two devices by PCIe tree and NUMA node, ignoring explicit links."""
        if a.pcie_root is not None and a.pcie_root == b.pcie_root:
            shared = a.bridges[:1] and a.bridges[:1] == b.bridges[:1]
            return LINK_WEIGHTS["pcie-switch" if shared else "pcie-root"]
        if a.numa_node is None or b.numa_node is None:
            return LINK_WEIGHTS["system"]
        if a.numa_node == b.numa_node:
            return LINK_WEIGHTS["numa"]
        package = self._package.get(a.numa_node)
        same = package is not None and package == self._package.get(b.numa_node)
        return LINK_WEIGHTS["socket" if same else "system"]

    def classes(self, devices: Sequence[Device]) -> list[list[Device]]:
        """Group interchangeable devices into classes, ordered by their first device."""
        found: dict[object, list[Device]] = {}
        for device in devices:
            found.setdefault(self._class_key(device), []).append(device)
        return list(found.values())

    def _class_key(self, device: Device) -> object:
        where = (device.kind, device.pcie_root, device.bridges, device.numa_node, device.local_cpus.mask)
        return (where, device.id if device.id in self._linked else "")

    @staticmethod
    def place(device: Device) -> Place:
        """Return where a device is, as seen from CPUs."""
        return device.local_cpus.mask, device.numa_node

    def cpu_weights(self, places: Iterable[Place]) -> list[tuple[int, int]]:
        """Return (mask of CPUs, summed distance to all places) for the CPUs whose sum is not 0."""
        counts: dict[Place, int] = {}
        for place in places:
            counts[place] = counts.get(place, 0) + 1
        key = frozenset(counts.items())
        if key not in self._weights:
            if len(self._weights) >= MOST_REMEMBERED:
                self._weights.clear()
            self._weights[key] = self._work_out(counts)
        return self._weights[key]

    def _work_out(self, counts: Mapping[Place, int]) -> list[tuple[int, int]]:
        pieces = [(package, node, mask, 0) for package, node, mask in self._cells]
        for place, count in counts.items():
            if place != (0, None):
                pieces = [piece for old in pieces for piece in self._farther(old, place, count)]
        return [(mask, weight) for _, _, mask, weight in pieces if weight]

    def _farther(self, piece: _Piece, place: Place, count: int) -> list[_Piece]:
        """Split a piece of a cell by a place's local CPUs and add the distance to the place."""
        package, node, mask, weight = piece
        local = mask & place[0]
        return [
            (package, node, part, weight + count * self._cpu_distance(package, node, place, is_local))
            for part, is_local in ((local, True), (mask & ~local, False))
            if part
        ]

    def _cpu_distance(self, package: int, node: NodeId, place: Place, local: bool) -> int:
        if place[1] is None:
            return 0 if local else 2 * REMOTE
        if node == place[1]:
            return 0 if local or place[0] == 0 else 1
        if local:
            return 1
        return 2 * self.node_distance(node, place[1]) + (package != self._package.get(place[1]))

    def node_weights(self, places: Sequence[Place]) -> list[int]:
        """Return the node weight of each node, in the order of `Inventory.node_order`."""
        return [self.node_weight(node, places) for node in self._inventory.node_order]

    def node_weight(self, node: NodeId, places: Iterable[Place]) -> int:
        """Return the summed SLIT distance of a node, beyond the local distance, to all places whose node is known."""
        return sum(self.node_distance(node, at) - LOCAL for _, at in places if at is not None)
