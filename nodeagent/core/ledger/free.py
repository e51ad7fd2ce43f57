"""What can still be granted of hugepages and memory on each NUMA node."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.model.request import Request
from nodeagent.core.model.topology import HugepagePool, NodeId, NumaNode

MEMORY = 0
"""The key of memory (in bytes) alongside the page sizes."""


class Stock(NamedTuple):
    """Hugepages and memory wanted by a request and available on each node."""

    order: tuple[NodeId, ...]
    """Inventory.node_order."""
    want: Mapping[int, int]
    """Number of pages by page_bytes, or bytes of memory under MEMORY; in order of size."""
    there: tuple[array[int], ...]
    """For each size of `want`, how much of it each node can give, in the order of the nodes."""

    @classmethod
    def of(cls, inventory: Inventory, ledger: Ledger, request: Request, *, empty: bool = False) -> Stock:
        """Return the stock for a request, on nodes with the kind of memory that it names; with `empty`, as if every
        page were free."""
        want = {MEMORY: request.memory_bytes} if request.memory_bytes else {}
        for size in sorted(request.hugepages):
            if request.hugepages[size]:
                want[size] = request.hugepages[size]
        if not want:
            return _NOTHING_WANTED
        rows = kept_by(inventory, "_amounts", lambda: _Amounts(inventory))
        kind = request.memory_kind
        there = [rows.total(kind, size) if empty else rows.free(ledger, kind, size) for size in want]
        return cls(inventory.node_order, want, tuple(there))

    @property
    def nodes(self) -> frozenset[NodeId]:
        """Return the nodes that have any of what is wanted."""
        return frozenset(node for row in self.there for node, amount in zip(self.order, row, strict=True) if amount)

    def sum(self, size: int) -> int:
        """Return how much of one size all nodes have together."""
        return next((sum(row) for one, row in zip(self.want, self.there, strict=True) if one == size), 0)


_NOTHING_WANTED = Stock((), MappingProxyType({}), ())


class _Amounts:
    """How much each node of an inventory has of each size and kind of memory, computed when it is first wanted."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._number = {node: i for i, node in enumerate(inventory.node_order)}
        self._totals: dict[tuple[str, int], array[int]] = {}
        self._unheld: dict[tuple[str, int], array[int]] = {}

    def total(self, kind: str, size: int) -> array[int]:
        """Return what each node could give if every page were free."""
        key = kind, size
        if key not in self._totals:
            self._totals[key] = self._row(lambda node: _total(node, size) if node.serves(kind) else 0)
        return self._totals[key]

    def free(self, ledger: Ledger, kind: str, size: int) -> array[int]:
        """Return what each node can still give."""
        unheld = self._unheld.get((kind, size))
        if unheld is None:
            unheld = self._row(lambda node: _left(node, size, _NOTHING_HELD) if node.serves(kind) else 0)
            self._unheld[kind, size] = unheld
        held = ledger.memory_held if size == MEMORY else ledger.pages_held
        return self._less(unheld, ledger, kind, size) if held else unheld

    def _less(self, unheld: array[int], ledger: Ledger, kind: str, size: int) -> array[int]:
        """Return what is left of a row on the nodes on which any of it is granted."""
        row = array("q", unheld)
        held = ledger.memory_held if size == MEMORY else [node for node, one in ledger.pages_held if one == size]
        for node in (self._inventory.node_by_id.get(one) for one in held):
            if node is not None and node.serves(kind):
                row[self._number[node.id]] = _left(node, size, ledger)
        return row

    def _row(self, amount: Callable[[NumaNode], int]) -> array[int]:
        row = array("q", bytes(8 * len(self._number)))
        for node in self._inventory.numa_nodes:
            row[self._number[node.id]] = amount(node)
        return row


_NOTHING_HELD = Ledger()


def _total(node: NumaNode, size: int) -> int:
    if size == MEMORY:
        return memory_left(node)
    return next((pool.total_pages for pool in node.hugepages if pool.page_bytes == size), 0)


def _left(node: NumaNode, size: int, ledger: Ledger) -> int:
    if size == MEMORY:
        return max(0, memory_left(node) - ledger.memory_held.get(node.id, 0))
    return next((grantable(pool, ledger) for pool in node.hugepages if pool.page_bytes == size), 0)


class PageLimit(msgspec.Struct, frozen=True, kw_only=True):
    """How far a hugepage pool may grow when a claim needs more pages."""

    node: NodeId
    page_bytes: int
    max_pages: int


def grantable(pool: HugepagePool, ledger: Ledger) -> int:
    """Return how many pages of a pool can still be granted.

    These are the free pages, less those reserved by other users' mappings and those granted but not yet faulted. If it
    is unknown whose pages are in use, as many granted pages count as mapped as there are pages in use or reserved:
    pages that the host itself uses alongside our holders are not promised twice.
    """
    granted = ledger.pages_held.get((pool.node, pool.page_bytes), 0)
    if pool.own_used_pages is not None:
        foreign_reserved = pool.reserved_pages - (pool.own_reserved_pages or 0)
        return max(0, pool.free_pages - foreign_reserved - max(0, granted - pool.own_used_pages))
    used = pool.total_pages - pool.free_pages + pool.reserved_pages
    return max(0, pool.free_pages - pool.reserved_pages - max(0, granted - used))


def memory_left(node: NumaNode) -> int:
    """Return the bytes of a node's memory that are not in hugepages."""
    return max(0, node.memory_bytes - sum(pool.page_bytes * pool.total_pages for pool in node.hugepages))


def room(node: NumaNode, pool: HugepagePool, limits: Iterable[PageLimit], held_bytes: int = 0) -> int:
    """Return by how many pages a pool can grow: up to its limit and the node's memory that is not in hugepages.

    held_bytes: memory of the node that is granted as memory.
    """
    key = pool.node, pool.page_bytes
    most = max((one.max_pages for one in limits if (one.node, one.page_bytes) == key), default=0)
    return max(0, min(most - pool.total_pages, (memory_left(node) - held_bytes) // pool.page_bytes))
