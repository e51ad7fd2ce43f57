"""What can still be granted of hugepages and memory, per NUMA node, and taking it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Request
from nodeagent.core.model.topology import HugepagePool, NodeId, NumaNode

MEMORY = 0
"""The key of memory (in bytes) beside page sizes."""


@dataclass(frozen=True, slots=True)
class Stock:
    """want: amount by page_bytes, or bytes of memory by MEMORY. there: what each node can still give of it."""

    want: Mapping[int, int]
    there: Mapping[NodeId, Mapping[int, int]]

    @classmethod
    def of(cls, inventory: Inventory, ledger: Ledger, request: Request, *, empty: bool = False) -> Stock:
        """What is there for a request; `empty`: were every page free."""
        want = {page_bytes: count for page_bytes, count in request.hugepages.items() if count}
        if request.memory_bytes:
            want[MEMORY] = request.memory_bytes
        there = {}
        for node in inventory.numa_nodes if want else ():
            pools = {pool.page_bytes: pool for pool in node.hugepages}
            mine = {
                size: pools[size].total_pages if empty else grantable(pools[size], ledger)
                for size in want
                if size in pools
            }
            if MEMORY in want:
                mine[MEMORY] = max(0, memory_left(node) - ledger.memory_held.get(node.id, 0))
            if any(mine.values()):
                there[node.id] = mine
        return cls(want, there)

    @property
    def nothing_wanted(self) -> bool:
        """Return whether no hugepages and no memory are asked for."""
        return not self.want

    @property
    def nodes(self) -> frozenset[NodeId]:
        """Nodes that have any of what is wanted."""
        return frozenset(self.there)

    def within(self, nodes: frozenset[NodeId] | None) -> Stock:
        """The same on some nodes only; None: on all."""
        if nodes is None or not self.want:
            return self
        return replace(self, there={node: mine for node, mine in self.there.items() if node in nodes})

    def sum(self, size: int, nodes: Iterable[NodeId] | None = None) -> int:
        """What some nodes (None: all) have of one size."""
        return sum(self.there[n].get(size, 0) for n in (self.there if nodes is None else nodes) if n in self.there)

    def enough(self, nodes: Iterable[NodeId] | None) -> bool:
        """Whether some nodes (None: all) have enough of everything."""
        some = None if nodes is None else list(nodes)
        return all(self.sum(size, some) >= count for size, count in self.want.items())

    def take(self, nodes: Sequence[NodeId]) -> tuple[tuple[Pages, ...], tuple[tuple[NodeId, int], ...]]:
        """(pages, memory), as much as can be from the first node, then from the next."""
        pages, memory = [], []
        for size, count in sorted(self.want.items()):
            for node in nodes:
                part = min(count, self.there.get(node, {}).get(size, 0))
                count -= part
                if part and size == MEMORY:
                    memory.append((node, part))
                elif part:
                    pages.append(Pages(node=node, page_bytes=size, pages=part))
        return tuple(pages), tuple(memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLimit:
    """How far a pool of hugepages may grow when a claim needs more."""

    node: NodeId
    page_bytes: int
    max_pages: int


def grantable(pool: HugepagePool, ledger: Ledger) -> int:
    """Pages of a pool that can still be granted: free, not reserved by a mapping of others, not granted and not yet
    faulted.

    Where nobody can say whose pages are in use, as many granted ones are taken to be mapped as are in use or reserved:
    what the host itself uses beside our holders is not promised twice.
    """
    granted = ledger.pages_held.get((pool.node, pool.page_bytes), 0)
    if pool.own_used_pages is not None:
        foreign_reserved = pool.reserved_pages - (pool.own_reserved_pages or 0)
        return max(0, pool.free_pages - foreign_reserved - max(0, granted - pool.own_used_pages))
    used = pool.total_pages - pool.free_pages + pool.reserved_pages
    return max(0, pool.free_pages - pool.reserved_pages - max(0, granted - used))


def memory_left(node: NumaNode) -> int:
    """Bytes of a node that are not in hugepages."""
    return max(0, node.memory_bytes - sum(pool.page_bytes * pool.total_pages for pool in node.hugepages))


def room(node: NumaNode, pool: HugepagePool, limits: Iterable[PageLimit], held_bytes: int = 0) -> int:
    """By how many pages a pool may grow: to its limit, as far as the node has memory that is not in pages.

    held_bytes: memory of the node that is granted as such.
    """
    key = pool.node, pool.page_bytes
    most = max((one.max_pages for one in limits if (one.node, one.page_bytes) == key), default=0)
    return max(0, min(most - pool.total_pages, (memory_left(node) - held_bytes) // pool.page_bytes))
