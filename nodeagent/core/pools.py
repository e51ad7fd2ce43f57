"""What DRA publishes of CPUs, hugepages and memory: one pool a kind, its devices in a fixed order.

Pure functions of (inventory, ledger, health) and of what the API server keeps. Nothing changes when claims come and go:
the scheduler itself counts what they consume. What was given away through the device plugin it cannot know: by that
much the capacity is smaller.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from nodeagent.core.cpuset import CpuSet, union
from nodeagent.core.health import Health
from nodeagent.core.ledger import Ledger
from nodeagent.core.machine import machine_of
from nodeagent.core.model import BEST_EFFORT, CLAIM, DEVICE_PLUGIN, Cpu, HugepagePool, Inventory, NodeId, NumaNode
from nodeagent.core.options import CORE_KINDS, FULL_PCPUS
from nodeagent.core.pool import HELD_TAINT, Capacity, Features, Part, Pool, PoolDevice, Taint, Value
from nodeagent.core.sizes import format_size
from nodeagent.core.stock import grantable, memory_left

NUMA_NODE, SOCKET, L3, INDIVIDUAL = "numa-node", "socket", "l3", "individual"
"""What one device of the CPU pool is."""
STANDARD_NUMA = "resource.kubernetes.io/numaNode"
OTHERS_NUMA = ("dra.cpu/numaNodeID", "dra.net/numaNode")
"""What other drivers call it: so that matchAttribute works between theirs and ours."""
CPUS, SIZE = "cpus", "size"
"""Capacities: a number of CPUs; bytes of pages or memory."""
BASE_PAGE_BYTES = 4096
"""Memory is given in steps of the smallest page that Linux has."""
BLOCKS = 16
"""Into how many devices the pages of one node are divided where the API server knows no consumable capacity."""
REQUIRE_ISOLATED = "require-isolated-cpus"
HELD = Taint(key=HELD_TAINT)
T = TypeVar("T")


class PoolKind(Protocol):
    """How one kind is published."""

    @property
    def kind(self) -> str: ...
    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        """The whole pool, in a form that the API server keeps."""
        ...

    def part(self, inventory: Inventory, name: str) -> Part | None:
        """What a device of this pool stands for, in whichever form it was published; None: there is none such."""
        ...


def kept_by(inventory: Inventory, name: str, of: object, make: Callable[[], T]) -> T:
    """What is worked out of an inventory and some settings alone, kept by the inventory itself. It is made once, and
    again where the settings are others."""
    kept: tuple[object, T] | None = inventory.__dict__.get(name)
    if kept is None or kept[0] != of:
        kept = inventory.__dict__[name] = (of, make())
    return kept[1]


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
        gone = ledger.reserved | union(g.cpus for g in ledger.grants.values() if g.holder.api == DEVICE_PLUGIN)
        if self.group == INDIVIDUAL or not features.consumable:
            shown = _less_each(_individual(inventory), ledger.reserved, gone)
        else:
            shown = self._less(inventory, ledger.reserved, gone)
        return Pool(kind=self.kind, devices=tuple(one for one in shown if features.taints or not one.taints))

    def part(self, inventory: Inventory, name: str) -> Part | None:
        return kept_by(inventory, "_cpu_parts", None, lambda: _cpu_parts(inventory)).get(name)

    def _less(self, inventory: Inventory, reserved: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
        """The groups without what is gone. One that nothing can ever be had of is left out."""
        every = kept_by(inventory, f"_cpu_{self.group}", self.options, lambda: self._all(inventory))
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
            part=Part(cpus=cpus),
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
        isolated = machine.isolated if REQUIRE_ISOLATED in self.options else machine.online
        return functools.reduce(operator.and_, kinds, isolated)


def _cpu_parts(inventory: Inventory) -> Mapping[str, Part]:
    """What the devices of all forms stand for, by name."""
    groups = {name: cpus for group in _GROUP_NAME for name, cpus in _groups(inventory, group).items()}
    parts = {name: Part(cpus=CpuSet(cpu.id for cpu in cpus)) for name, cpus in groups.items()}
    return {**parts, **{one.name: one.part for one in _individual(inventory)}}


def _individual(inventory: Inventory) -> tuple[PoolDevice, ...]:
    return kept_by(inventory, "_cpu_individual", None, lambda: tuple(_one(inventory, cpu) for cpu in inventory.cpus))


def _one(inventory: Inventory, cpu: Cpu) -> PoolDevice:
    attributes: dict[str, Value] = {"kind": "cpu", "core": cpu.core, **_same(inventory, [cpu])}
    return PoolDevice(name=f"cpu{cpu.id}", part=Part(cpus=CpuSet([cpu.id])), attributes=attributes)


def _less_each(every: Iterable[PoolDevice], reserved: CpuSet, gone: CpuSet) -> Iterator[PoolDevice]:
    for one in every:
        if one.part.cpus.isdisjoint(gone):
            yield one
        elif one.part.cpus.isdisjoint(reserved):
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


# ---------------------------------------------------------------- hugepages and memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePool:
    """Hugepages: one device a NUMA node and page size, consumed in whole pages."""

    sizes: tuple[int, ...]
    """Page sizes in bytes."""
    kind: str = "hugepages"

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        ours = _pages_of_claims(ledger)
        every = (_pages(pool, ledger, ours[pool.node, pool.page_bytes]) for pool in self._pools(inventory))
        return _pool_of(self.kind, every, self._totals(inventory), ledger, features)

    def part(self, inventory: Inventory, name: str) -> Part | None:
        return _part_of(self._totals(inventory), name)

    def _totals(self, inventory: Inventory) -> dict[str, tuple[Part, int]]:
        return {
            _page_name(pool): (Part(node=pool.node, page_bytes=pool.page_bytes), pool.total_pages * pool.page_bytes)
            for pool in self._pools(inventory)
        }

    def _pools(self, inventory: Inventory) -> Iterator[HugepagePool]:
        """Those that have any page."""
        every = (pool for node in inventory.numa_nodes for pool in node.hugepages)
        return (pool for pool in every if pool.page_bytes in self.sizes and pool.total_pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPool:
    """Memory that is not in hugepages: one device a NUMA node."""

    kind: str = "memory"

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        totals = self._totals(inventory)
        every = (_memory(node, totals[_memory_name(node)][1]) for node in self._nodes(inventory))
        return _pool_of(self.kind, every, totals, ledger, features)

    def part(self, inventory: Inventory, name: str) -> Part | None:
        return _part_of(self._totals(inventory), name)

    def _totals(self, inventory: Inventory) -> dict[str, tuple[Part, int]]:
        return {
            _memory_name(node): (Part(node=node.id), memory_left(node) // BASE_PAGE_BYTES * BASE_PAGE_BYTES)
            for node in self._nodes(inventory)
        }

    def _nodes(self, inventory: Inventory) -> Iterator[NumaNode]:
        return (node for node in inventory.numa_nodes if memory_left(node) >= BASE_PAGE_BYTES)


def _page_name(pool: HugepagePool) -> str:
    return f"{_numa_name(pool.node)}-{format_size(pool.page_bytes).lower()}"


def _memory_name(node: NumaNode) -> str:
    return _numa_name(node.id)


def _numa_name(node: NodeId) -> str:
    return f"numa{node}" if node >= 0 else "no-numa"


def _pages_of_claims(ledger: Ledger) -> Counter[tuple[NodeId, int]]:
    """Pages by (node, page_bytes)."""
    found: Counter[tuple[NodeId, int]] = Counter()
    for grant in ledger.grants.values():
        for pages in grant.hugepages if grant.holder.api == CLAIM else ():
            found[pages.node, pages.page_bytes] += pages.pages
    return found


def _pages(pool: HugepagePool, ledger: Ledger, ours: int) -> PoolDevice:
    """ours: pages that claims hold; they stay in the capacity."""
    size = min(pool.total_pages, grantable(pool, ledger) + ours) * pool.page_bytes
    attributes: dict[str, Value] = {"kind": "hugepages", "pageSize": format_size(pool.page_bytes)}
    part = Part(node=pool.node, page_bytes=pool.page_bytes)
    return _sized(_page_name(pool), part, {**attributes, **numa_attributes(pool.node)}, size, pool.page_bytes)


def _memory(node: NumaNode, size: int) -> PoolDevice:
    attributes: dict[str, Value] = {"kind": "memory", "memoryKind": node.kind, **numa_attributes(node.id)}
    return _sized(_memory_name(node), Part(node=node.id), attributes, size, BASE_PAGE_BYTES)


def _sized(name: str, part: Part, attributes: Mapping[str, Value], size: int, step: int) -> PoolDevice:
    return PoolDevice(
        name=name,
        part=part,
        attributes=attributes,
        capacity={SIZE: Capacity(value=size, binary=True, least=step, step=step)},
        shared=True,
        taints=() if size >= step else (HELD,),
    )


def _pool_of(
    kind: str, every: Iterable[PoolDevice], totals: Mapping[str, tuple[Part, int]], ledger: Ledger, features: Features
) -> Pool:
    """totals: what a device stands for and how many bytes it has, by its name."""
    if not features.consumable:
        claimed = claimed_names(ledger)
        every = (block for one in every for block in _as_blocks(one, totals[one.name][1], claimed))
    return Pool(kind=kind, devices=tuple(one for one in every if features.taints or not one.taints))


def _as_blocks(device: PoolDevice, total: int, claimed: frozenset[str]) -> Iterator[PoolDevice]:
    """A device as blocks that are had whole. Those are tainted that are more than the device's capacity; never one that
    a claim has."""
    amount = device.capacity[SIZE]
    names = {f"{device.name}-block{number}": size for number, size in enumerate(_blocks(total, amount.step))}
    spare = amount.value - sum(size for name, size in names.items() if name in claimed)
    for name, size in names.items():
        spare -= size if name not in claimed else 0
        yield PoolDevice(
            name=name,
            part=replace(device.part, amount=size),
            attributes=device.attributes,
            capacity={SIZE: Capacity(value=size, binary=True)},
            taints=() if name in claimed or spare >= 0 else (HELD,),
        )


def _blocks(size: int, step: int) -> list[int]:
    """Equal sizes in whole steps that a number of bytes is divided into; the last one has what is over."""
    count = min(BLOCKS, size // step)
    if not count:
        return []
    each = size // step // count * step
    return [*[each] * (count - 1), size // step * step - each * (count - 1)]


def _part_of(totals: Mapping[str, tuple[Part, int]], name: str) -> Part | None:
    """What `name` says: the whole of a device, or a block of it."""
    if name in totals:
        return totals[name][0]
    found = re.fullmatch(r"(.+)-block(0|[1-9][0-9]?)", name, re.ASCII)
    if found is None or found[1] not in totals:
        return None
    part, total = totals[found[1]]
    blocks, number = _blocks(total, part.page_bytes or BASE_PAGE_BYTES), int(found[2])
    return replace(part, amount=blocks[number]) if number < len(blocks) else None
