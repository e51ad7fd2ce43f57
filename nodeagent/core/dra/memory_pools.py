"""The hugepage and memory pools: one device per NUMA node (and page size), with its bytes as consumable capacity.

Pure functions of (inventory, ledger). What claims hold stays in the capacity: the scheduler counts it. A pool that may
grow advertises its size after growth, and the memory for that is advertised only once, as pages.

A node that ordinary requests must not use (memory of a GPU, HBM, CXL, persistent memory) is published under a separate
kind, "special-memory" or "special-hugepages": a class that selects "memory" never finds it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from nodeagent.core.dra.cpu_pool import HELD, claimed_names, numa_attributes
from nodeagent.core.dra.pool import Capacity, DevicePart, Features, NodeCost, Pool, PoolDevice, Value
from nodeagent.core.ledger.free import PageLimit, grantable, memory_left, room
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import SPECIAL, HugepagePool, NodeId, NumaNode

SIZE = "size"
"""The capacity: a number of bytes."""
BASE_PAGE_BYTES = 4096
"""Memory is granted in multiples of the smallest page size of Linux."""
BLOCKS = 16
"""Number of devices into which the bytes of a node are divided if the API server has no consumable capacity."""


class PagePool(msgspec.Struct, frozen=True, kw_only=True):
    """Hugepages: one device per NUMA node and page size, consumed in whole pages."""

    sizes: tuple[int, ...]
    """Page sizes in bytes."""
    limits: tuple[PageLimit, ...] = ()
    """Pools that may grow."""
    kind: str = "hugepages"

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        ours = _pages_of_claims(ledger)
        every = (
            _pages(node, pool, ledger, ours[pool.node, pool.page_bytes], self._room(node, pool, ledger))
            for node, pool in self._pools(inventory)
        )
        return _pool_of(self.kind, every, self._totals(inventory), ledger, features)

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return _part_of(self._totals(inventory), name)

    def _totals(self, inventory: Inventory) -> dict[str, tuple[DevicePart, int]]:
        totals = {}
        for node, pool in self._pools(inventory):
            most = pool.total_pages + room(node, pool, self.limits)
            totals[_page_name(pool)] = (DevicePart(node=pool.node, page_bytes=pool.page_bytes), most * pool.page_bytes)
        return totals

    def _room(self, node: NumaNode, pool: HugepagePool, ledger: Ledger) -> int:
        return room(node, pool, self.limits, ledger.memory_held.get(node.id, 0))

    def _pools(self, inventory: Inventory) -> Iterator[tuple[NumaNode, HugepagePool]]:
        """Return the pools that have pages or may get some."""
        every = ((node, pool) for node in inventory.numa_nodes for pool in node.hugepages)
        mine = ((node, pool) for node, pool in every if pool.page_bytes in self.sizes)
        return ((node, pool) for node, pool in mine if pool.total_pages or room(node, pool, self.limits))


class MemoryPool(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that is not in hugepages and into which no hugepage pool may grow: one device per NUMA node."""

    limits: tuple[PageLimit, ...] = ()
    """Hugepage pools that may grow."""
    kind: str = "memory"

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        totals = self._totals(inventory)
        left = ((node, totals[_memory_name(node)][1] - _elsewhere(ledger, node)) for node in self._nodes(inventory))
        every = (_memory(node, max(0, size)) for node, size in left)
        return _pool_of(self.kind, every, totals, ledger, features)

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return _part_of(self._totals(inventory), name)

    def _totals(self, inventory: Inventory) -> dict[str, tuple[DevicePart, int]]:
        return {
            _memory_name(node): (DevicePart(node=node.id), self._left(node) // BASE_PAGE_BYTES * BASE_PAGE_BYTES)
            for node in self._nodes(inventory)
        }

    def _nodes(self, inventory: Inventory) -> Iterator[NumaNode]:
        return (node for node in inventory.numa_nodes if self._left(node) >= BASE_PAGE_BYTES)

    def _left(self, node: NumaNode) -> int:
        """Return a number of bytes."""
        pages = sum(room(node, pool, self.limits) * pool.page_bytes for pool in node.hugepages)
        return memory_left(node) - pages


def _elsewhere(ledger: Ledger, node: NumaNode) -> int:
    """Return the bytes of a node that are granted to holders other than claims, rounded up to whole pages."""
    others = [grant for grant in ledger.grants.values() if grant.holder.api != CLAIM]
    held = sum(size for grant in others for id, size in grant.memory if id == node.id)
    return -(-held // BASE_PAGE_BYTES) * BASE_PAGE_BYTES


def _page_name(pool: HugepagePool) -> str:
    return f"{_numa_name(pool.node)}-{format_size(pool.page_bytes).lower()}"


def _memory_name(node: NumaNode) -> str:
    return _numa_name(node.id)


def _numa_name(node: NodeId) -> str:
    return f"numa{node}" if node >= 0 else "no-numa"


def _pages_of_claims(ledger: Ledger) -> Counter[tuple[NodeId, int]]:
    """Return the pages held by claims, by (node, page_bytes)."""
    found: Counter[tuple[NodeId, int]] = Counter()
    for grant in ledger.grants.values():
        for pages in grant.hugepages if grant.holder.api == CLAIM else ():
            found[pages.node, pages.page_bytes] += pages.pages
    return found


def _pages(node: NumaNode, pool: HugepagePool, ledger: Ledger, ours: int, more: int) -> PoolDevice:
    """Return the device of a hugepage pool.

    ours: pages that claims hold; they stay in the capacity. more: pages by which the pool may grow.
    """
    size = (min(pool.total_pages, grantable(pool, ledger) + ours) + more) * pool.page_bytes
    attributes: dict[str, Value] = {**_attributes("hugepages", node), "pageSize": format_size(pool.page_bytes)}
    part = DevicePart(node=pool.node, page_bytes=pool.page_bytes)
    return _sized(_page_name(pool), part, attributes, size, pool.page_bytes)


def _memory(node: NumaNode, size: int) -> PoolDevice:
    return _sized(_memory_name(node), DevicePart(node=node.id), _attributes("memory", node), size, BASE_PAGE_BYTES)


def _attributes(kind: str, node: NumaNode) -> dict[str, Value]:
    """Return the attributes that pages and memory have in common."""
    own = kind if node.serves() else f"{SPECIAL}-{kind}"
    return {"kind": own, "memoryKind": node.kind, **numa_attributes(node.id)}


def _sized(name: str, part: DevicePart, attributes: Mapping[str, Value], size: int, step: int) -> PoolDevice:
    return PoolDevice(
        name=name,
        part=part,
        attributes=attributes,
        capacity={SIZE: Capacity(value=size, binary=True, least=step, step=step)},
        shared=True,
        taints=() if size >= step else (HELD,),
    )


def node_resource(page_bytes: int) -> str:
    """Return what the Node object calls pages of a size, or memory for size 0."""
    return f"hugepages-{format_size(page_bytes)}" if page_bytes else "memory"


def _pool_of(
    kind: str,
    every: Iterable[PoolDevice],
    totals: Mapping[str, tuple[DevicePart, int]],
    ledger: Ledger,
    features: Features,
) -> Pool:
    """Return a pool of these devices, in the form that the API server supports.

    totals: what each device stands for and its total bytes, by device name.
    """
    if features.consumable:
        every = (replace(one, costs=_costs(one.part, totals[one.name][1], capacity=SIZE)) for one in every)
    else:
        claimed = claimed_names(ledger)
        every = (block for one in every for block in _as_blocks(one, totals[one.name][1], claimed))
    return Pool(kind=kind, devices=tuple(one for one in every if features.taints or not one.taints))


def _as_blocks(device: PoolDevice, total: int, claimed: frozenset[str]) -> Iterator[PoolDevice]:
    """Yield a device as blocks that are allocated whole.

    Blocks in excess of the device's capacity are tainted, but never one that a claim holds.
    """
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
            costs=_costs(device.part, size, amount=size),
        )


def _costs(part: DevicePart, largest: int, **mapping: Any) -> Mapping[str, NodeCost]:
    """Return what an allocation takes of the Node's memory or pages. largest: bytes that the device can ever give."""
    return {node_resource(part.page_bytes): NodeCost(largest=largest, **mapping)}


def _blocks(size: int, step: int) -> list[int]:
    """Divide a number of bytes into equal blocks of whole steps; the last block takes the remainder."""
    count = min(BLOCKS, size // step)
    if not count:
        return []
    each = size // step // count * step
    return [*[each] * (count - 1), size // step * step - each * (count - 1)]


def _part_of(totals: Mapping[str, tuple[DevicePart, int]], name: str) -> DevicePart | None:
    """Return what `name` stands for: a whole device or one of its blocks."""
    if name in totals:
        return totals[name][0]
    found = re.fullmatch(r"(.+)-block(0|[1-9][0-9]?)", name, re.ASCII)
    if found is None or found[1] not in totals:
        return None
    part, total = totals[found[1]]
    blocks, number = _blocks(total, part.page_bytes or BASE_PAGE_BYTES), int(found[2])
    return replace(part, amount=blocks[number]) if number < len(blocks) else None
