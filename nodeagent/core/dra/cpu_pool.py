"""What DRA publishes: one pool a kind, its devices in a fixed order. Here what all pools share, and the CPUs; pages and
memory are in pagepools.py, devices in devicepools.py.

Pure functions of (inventory, ledger, health) and of what the API server keeps. Nothing changes when claims come and go:
the scheduler itself counts what they consume. What was given away through the device plugin it cannot know: by that
much the capacity is smaller.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from nodeagent.core.dra.pool import HELD_TAINT, Capacity, DevicePart, Features, Pool, PoolDevice, Taint, Value
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.model.options import CORE_KINDS, FULL_PCPUS
from nodeagent.core.model.request import BEST_EFFORT
from nodeagent.core.model.topology import Cpu, NodeId
from nodeagent.core.placement.index import machine_of

NUMA_NODE, SOCKET, L3, INDIVIDUAL = "numa-node", "socket", "l3", "individual"
"""What one device of the CPU pool is."""
STANDARD_NUMA = "resource.kubernetes.io/numaNode"
OTHERS_NUMA = ("dra.cpu/numaNodeID", "dra.net/numaNode")
"""What other drivers call it: so that matchAttribute works between theirs and ours."""
CPUS = "cpus"
"""The capacity of a group: a number of CPUs."""
REQUIRE_ISOLATED = "require-isolated-cpus"
HELD = Taint(key=HELD_TAINT)
T = TypeVar("T")


class PoolKind(Protocol):
    """How one kind is published."""

    @property
    def kind(self) -> str:
        """Return the kind's name, as in the pool's."""

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        """The whole pool, in a form that the API server keeps."""
        ...

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        """What a device of this pool stands for, in whichever form it was published; None: there is none such."""
        ...


def claimed_names(ledger: Ledger) -> frozenset[str]:
    """Names of the devices that claims hold."""
    mine = (grant.result for grant in ledger.grants.values() if grant.holder.api == CLAIM)
    return frozenset(result.device for result in mine if result is not None and not result.admin)


# ---------------------------------------------------------------- CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPool:
    """CPUs by NUMA node, socket or L3 group with a capacity to consume, or one by one."""

    group: str = NUMA_NODE
    options: frozenset[str] = frozenset()
    """Placement options of claims that say nothing themselves."""
    numa: str = BEST_EFFORT
    kind: str = "cpu"

    @property
    def whole_cores(self) -> bool:
        """Cores are given whole: the step is the number of threads of a core."""
        return FULL_PCPUS in self.options

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        gone = ledger.reserved | union(g.cpus for g in ledger.grants.values() if g.holder.api != CLAIM)
        if self.group == INDIVIDUAL or not features.consumable:
            never = ledger.reserved | inventory.cpus_outside
            shown = _less_each(_individual(inventory), never, gone | never)
        else:
            shown = self._less(inventory, ledger.reserved, gone)
        return Pool(kind=self.kind, devices=tuple(one for one in shown if features.taints or not one.taints))

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return kept_by(inventory, "_cpu_parts", lambda: _cpu_parts(inventory)).get(name)

    def _less(self, inventory: Inventory, reserved: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
        """The groups without what is gone. One that nothing can ever be had of is left out."""
        every = kept_by(inventory, f"_cpu_{self.group}", lambda: self._all(inventory), self.options)
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
        """Every group with all that it has."""
        return tuple(self._whole(inventory, name, cpus) for name, cpus in _groups(inventory, self.group).items())

    def _whole(self, inventory: Inventory, name: str, members: list[Cpu]) -> PoolDevice:
        cpus = CpuSet(cpu.id for cpu in members)
        step = max(_core_sizes(inventory, cpus)) if self.whole_cores else 1
        return PoolDevice(
            name=name,
            part=DevicePart(cpus=cpus),
            attributes={"kind": self.kind, **_same(inventory, members)},
            capacity={CPUS: Capacity(value=self._count(inventory, cpus, step), least=step, step=step)},
            shared=True,
        )

    def _count(self, inventory: Inventory, free: CpuSet, step: int) -> int:
        """How many of these CPUs can be had. Of whole cores: whatever multiples of the step are taken, a multiple of
        the step that is left can be had too; so cores that do not add up to steps (of 3 threads beside 4) count not."""
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
        """A mask of the CPUs that the options leave."""
        machine = machine_of(inventory)
        kinds = [machine.of_kind(kind) for word, kind in CORE_KINDS.items() if f"require-{word}-cores" in self.options]
        isolated = machine.isolated if REQUIRE_ISOLATED in self.options else machine.usable
        return functools.reduce(operator.and_, kinds, isolated)


def _cpu_parts(inventory: Inventory) -> Mapping[str, DevicePart]:
    """What the devices of all forms stand for, by name."""
    groups = {name: cpus for group in _GROUP_NAME for name, cpus in _groups(inventory, group).items()}
    parts = {name: DevicePart(cpus=CpuSet(cpu.id for cpu in cpus)) for name, cpus in groups.items()}
    return {**parts, **{one.name: one.part for one in _individual(inventory)}}


def _individual(inventory: Inventory) -> tuple[PoolDevice, ...]:
    return kept_by(inventory, "_cpu_individual", lambda: tuple(_one(inventory, cpu) for cpu in inventory.cpus))


def _one(inventory: Inventory, cpu: Cpu) -> PoolDevice:
    attributes: dict[str, Value] = {"kind": "cpu", "core": cpu.core, **_same(inventory, [cpu])}
    return PoolDevice(name=f"cpu{cpu.id}", part=DevicePart(cpus=CpuSet([cpu.id])), attributes=attributes)


def _less_each(every: Iterable[PoolDevice], never: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
    """Single CPUs without those that are never given; `gone`: these and what was given elsewhere."""
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
    """Online CPUs by the name of their group, in order of their lowest number."""
    found: dict[str, list[Cpu]] = {}
    for cpu in inventory.cpus:
        found.setdefault(_GROUP_NAME[group](cpu), []).append(cpu)
    return found


def _same(inventory: Inventory, cpus: list[Cpu]) -> dict[str, Value]:
    """What all these CPUs have in common; what they have not, or what does not apply here, is left out."""
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


def _common(values: Iterable[T]) -> T | None:
    """The one value that all have; None: they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _core_sizes(inventory: Inventory, cpus: CpuSet) -> set[int]:
    """How many online threads the cores have that these CPUs are of."""
    cores = machine_of(inventory).cores
    return {cores[inventory.cpu_by_id[cpu].core].bit_count() for cpu in cpus}


def numa_attributes(node: NodeId) -> dict[str, Value]:
    """The NUMA node under every name that it is matched by; nothing where there is none."""
    return dict.fromkeys(("numaNode", STANDARD_NUMA, *OTHERS_NUMA), node) if node >= 0 else {}
