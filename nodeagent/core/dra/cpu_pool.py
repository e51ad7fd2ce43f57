"""The CPU pool, and what all DRA pools share. Hugepages and memory are in memory_pools.py, devices in device_pool.py.

DRA publishes one pool per kind, with its devices in a fixed order. Pools are pure functions of (inventory, ledger,
health) and of the features that the API server keeps. Nothing changes when claims come and go: the scheduler itself
counts what they consume. It cannot know what was granted through the device plugin, so the capacity is reduced by that
amount.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from nodeagent.core.dra.pool import (
    HELD_TAINT,
    Capacity,
    DevicePart,
    Features,
    NodeCost,
    Pool,
    PoolDevice,
    Taint,
    Value,
)
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.model.options import FULL_PCPUS
from nodeagent.core.model.request import BEST_EFFORT, Request
from nodeagent.core.model.topology import NO_NODE, Cpu, NodeId
from nodeagent.core.placement.cpu_choice import allowed
from nodeagent.core.placement.index import machine_of

NUMA_NODE, SOCKET, L3, INDIVIDUAL = "numa-node", "socket", "l3", "individual"
"""Values of CpuPool.group: what one device of the CPU pool stands for."""
STANDARD_NUMA, STANDARD_ROOT = "resource.kubernetes.io/numaNode", "resource.kubernetes.io/pcieRoot"
OTHERS_NUMA = ("dra.cpu/numaNodeID", "dra.net/numaNode")
"""Names that other drivers use for the same attribute, so that matchAttribute works across their devices and ours."""
CPUS = "cpus"
"""The capacity of a group: a number of CPUs."""
NODE_CPU = "cpu"
"""What the Node object calls CPUs."""
_COST_OF_GROUP, _COST_OF_CPU = {NODE_CPU: NodeCost(capacity=CPUS)}, {NODE_CPU: NodeCost(amount=1)}
HELD = Taint(key=HELD_TAINT)
MOST_ROOTS = 16
"""How many PCIe roots a group names at most: a device may have 48 values in all its attributes."""
_PCIE_ROOT = re.compile(r"pci[0-9a-f]{4}:[0-9a-f]{2}")
_UNKNOWN = 1 << 16
"""Farther than any distance that the kernel reports."""
T = TypeVar("T")


class PoolKind(Protocol):
    """Publishes one kind as a pool."""

    @property
    def kind(self) -> str:
        """Return the name of the kind, as used in the pool's name."""

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        """Return the whole pool, limited to the features that the API server keeps."""
        ...

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        """Return what a device of this pool stands for, in any form it may be published in, or None if it does not
        exist."""
        ...


def claimed_names(ledger: Ledger) -> frozenset[str]:
    """Return the names of the devices that claims hold."""
    mine = (grant.result for grant in ledger.grants.values() if grant.holder.api == CLAIM)
    return frozenset(result.device for result in mine if result is not None and not result.admin)


# ---------------------------------------------------------------- CPUs


class CpuPool(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs by NUMA node, socket or L3 group with a consumable capacity, or as individual devices."""

    group: str = NUMA_NODE
    options: frozenset[str] = frozenset()
    """Placement options of claims that do not specify any."""
    numa: str = BEST_EFFORT
    kind: str = "cpu"
    lists: bool = False
    """Whether groups name all NUMA nodes and PCIe roots near them, if the API server keeps lists."""

    @property
    def whole_cores(self) -> bool:
        """Return whether only whole cores are granted; the step is then the number of threads per core."""
        return FULL_PCPUS in self.options

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        gone = ledger.reserved | union(g.cpus for g in ledger.grants.values() if g.holder.api != CLAIM)
        if self.group == INDIVIDUAL or not features.consumable:
            never = ledger.reserved | inventory.cpus_outside
            shown = _less_each(_individual(inventory), never, gone | never)
        else:
            shown = replace(self, lists=self.lists and features.lists)._less(inventory, ledger.reserved, gone)
        return Pool(kind=self.kind, devices=tuple(one for one in shown if features.taints or not one.taints))

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return kept_by(inventory, "_cpu_parts", lambda: _cpu_parts(inventory)).get(name)

    def _less(self, inventory: Inventory, reserved: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
        """Yield the groups without the CPUs that are gone; a group that can never give any is left out."""
        every = kept_by(
            inventory, f"_cpu_{self.group}", lambda: self._all(inventory), (self.options, self.numa, self.lists)
        )
        for one in every:
            amount = one.capacity[CPUS]
            if self._count(inventory, one.part.cpus - reserved, amount.step) < amount.step:
                continue
            left = self._count(inventory, one.part.cpus - gone, amount.step)
            taints = () if left >= amount.step else (HELD,)
            yield (
                one
                if left == amount.value
                else replace(one, capacity={CPUS: replace(amount, value=left)}, taints=taints)
            )

    def _all(self, inventory: Inventory) -> tuple[PoolDevice, ...]:
        """Return every group with its full capacity."""
        return tuple(self._whole(inventory, name, cpus) for name, cpus in _groups(inventory, self.group).items())

    def _whole(self, inventory: Inventory, name: str, members: list[Cpu]) -> PoolDevice:
        cpus = CpuSet(cpu.id for cpu in members)
        step = max(_core_sizes(inventory, cpus)) if self.whole_cores else 1
        return PoolDevice(
            name=name,
            part=DevicePart(cpus=cpus),
            attributes={
                "kind": self.kind,
                **_same(inventory, members),
                **(_near(inventory, members) if self.lists else {}),
            },
            capacity={CPUS: Capacity(value=self._count(inventory, cpus, step), least=step, step=step)},
            shared=True,
            costs=_COST_OF_GROUP,
        )

    def _count(self, inventory: Inventory, free: CpuSet, step: int) -> int:
        """Return how many of these CPUs can be granted.

        With whole cores, the count is such that whichever multiples of the step are taken, every remaining multiple can
        be taken too. Cores that do not add up to steps (cores of 3 threads among cores of 4) are therefore not counted.
        """
        some = free.mask & self._allowed(inventory)
        if not self.whole_cores:
            return some.bit_count()
        whole = Counter(core.bit_count() for core in machine_of(inventory).cores.values() if core & ~some == 0)
        count, unit = 0, step
        for size in sorted(whole, reverse=True):
            if unit % size == 0:
                count, unit = count + size * whole[size], size
        return count

    def _allowed(self, inventory: Inventory) -> int:
        """Return a mask of the CPUs that the options and the NUMA policy permit."""
        return allowed(machine_of(inventory), Request(options=self.options, numa=self.numa))


def group_around(inventory: Inventory, name: str) -> CpuSet:
    """Return the online CPUs of the group that a device stands for, or those of its NUMA node if it is a single CPU.
    Return none if there is no such device at this moment."""
    return kept_by(inventory, "_cpu_groups", lambda: _groups_around(inventory)).get(name, EMPTY)


def _groups_around(inventory: Inventory) -> Mapping[str, CpuSet]:
    groups = {name: cpus for group in _GROUP_NAME for name, cpus in _groups(inventory, group).items()}
    found = {name: CpuSet(cpu.id for cpu in cpus) for name, cpus in groups.items()}
    nodes = _groups(inventory, NUMA_NODE)
    return {**{f"cpu{cpu.id}": found[name] for name, cpus in nodes.items() for cpu in cpus}, **found}


def _cpu_parts(inventory: Inventory) -> Mapping[str, DevicePart]:
    """Return what the devices of all forms stand for, by name."""
    groups = {name: cpus for group in _GROUP_NAME for name, cpus in _groups(inventory, group).items()}
    parts = {name: DevicePart(cpus=CpuSet(cpu.id for cpu in cpus)) for name, cpus in groups.items()}
    return {**parts, **{one.name: one.part for one in _individual(inventory)}}


def _individual(inventory: Inventory) -> tuple[PoolDevice, ...]:
    return kept_by(inventory, "_cpu_individual", lambda: tuple(_one(inventory, cpu) for cpu in inventory.cpus))


def _one(inventory: Inventory, cpu: Cpu) -> PoolDevice:
    attributes: dict[str, Value] = {"kind": "cpu", "core": cpu.core, **_same(inventory, [cpu])}
    part = DevicePart(cpus=CpuSet([cpu.id]))
    return PoolDevice(name=f"cpu{cpu.id}", part=part, attributes=attributes, costs=_COST_OF_CPU)


def _less_each(every: Iterable[PoolDevice], never: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
    """Yield single CPUs, without those that are never granted.

    gone: those never granted and those granted elsewhere; the latter are tainted.
    """
    for one in every:
        if one.part.cpus.isdisjoint(gone):
            yield one
        elif one.part.cpus.isdisjoint(never):
            yield replace(one, taints=(HELD,))


_GROUP_NAME: Mapping[str, Callable[[Cpu], str]] = {
    NUMA_NODE: lambda cpu: f"numa{cpu.numa_node}" if cpu.numa_node >= 0 else "no-numa",
    SOCKET: lambda cpu: f"socket{cpu.package}",
    L3: lambda cpu: f"l3-{cpu.l3}" if cpu.l3 is not None else "no-l3",
}


def _groups(inventory: Inventory, group: str) -> Mapping[str, list[Cpu]]:
    """Return the online CPUs by name of their group, groups in order of their lowest CPU."""
    found: dict[str, list[Cpu]] = {}
    for cpu in inventory.cpus:
        found.setdefault(_GROUP_NAME[group](cpu), []).append(cpu)
    return found


def _same(inventory: Inventory, cpus: list[Cpu]) -> dict[str, Value]:
    """Return the attributes that all these CPUs have in common; others, and those that do not apply, are left out."""
    node = _common(cpu.numa_node for cpu in cpus)
    found: dict[str, Value | None] = {
        **(numa_attributes(node) if node is not None else {}),
        "socket": _common(cpu.package for cpu in cpus),
        "l3": _common(cpu.l3 for cpu in cpus),
        "coreType": _common(cpu.kind for cpu in cpus) or None,
        "threadsPerCore": _common(_core_sizes(inventory, CpuSet(cpu.id for cpu in cpus))),
        "isolated": _common(cpu.isolated for cpu in cpus),
    }
    return {name: value for name, value in found.items() if value is not None}


def _near(inventory: Inventory, cpus: list[Cpu]) -> dict[str, Value]:
    """Return the standard attributes that name everything near a group of CPUs: its NUMA nodes and then those of the
    same socket at the least distance, and the PCIe roots of its nodes."""
    own = sorted({cpu.numa_node for cpu in cpus} - {NO_NODE})
    roots = sorted({root for one in inventory.devices if one.numa_node in own and (root := standard_root(one))})
    found: dict[str, Value] = {STANDARD_NUMA: (*own, *_next_to(inventory, cpus, own))} if own else {}
    return {**found, STANDARD_ROOT: tuple(roots)} if 0 < len(roots) <= MOST_ROOTS else found


def _next_to(inventory: Inventory, cpus: list[Cpu], own: list[NodeId]) -> list[NodeId]:
    """Return the other nodes of the sockets of some CPUs that are nearest to their nodes; none if the kernel reports no
    distances."""
    sockets = {cpu.package for cpu in cpus}
    others = {cpu.numa_node for cpu in inventory.cpus if cpu.package in sockets} - {*own, NO_NODE}
    far = {
        other: min(inventory.node_by_id[one].distances.get(other, _UNKNOWN) for one in own) for other in sorted(others)
    }
    least = min(far.values(), default=_UNKNOWN)
    return [other for other, distance in far.items() if distance == least < _UNKNOWN]


def _common(values: Iterable[T]) -> T | None:
    """Return the value that all have, or None if they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _core_sizes(inventory: Inventory, cpus: CpuSet) -> set[int]:
    """Return the numbers of online threads of the cores that these CPUs belong to."""
    cores = machine_of(inventory).cores
    return {cores[inventory.cpu_by_id[cpu].core].bit_count() for cpu in cpus}


def standard_root(device: Device) -> str | None:
    """Return the PCIe root of a device, or None if it has none in the standard format."""
    root = device.pcie_root or ""
    return root if _PCIE_ROOT.fullmatch(root) else None


def numa_attributes(node: NodeId) -> dict[str, Value]:
    """Return the NUMA node under every attribute name used for matching, or nothing if there is no node."""
    return dict.fromkeys(("numaNode", STANDARD_NUMA, *OTHERS_NUMA), node) if node >= 0 else {}
