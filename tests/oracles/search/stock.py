"""Hugepages and memory of each node, as mappings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nodeagent.core.ledger.free import MEMORY, grantable, memory_left
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Request
from nodeagent.core.model.topology import NodeId


@dataclass(frozen=True, slots=True)
class Stock:
    """Hugepages and memory wanted by a request and available on each node.

    want: number of pages by page_bytes, or bytes of memory under MEMORY. there: how much of each a node can still give.
    """

    want: Mapping[int, int]
    there: Mapping[NodeId, Mapping[int, int]]

    @classmethod
    def of(cls, inventory: Inventory, ledger: Ledger, request: Request, *, empty: bool = False) -> Stock:
        """Return the stock for a request, on nodes with the kind of memory that it names; with `empty`, as if every
        page were free."""
        want = {page_bytes: count for page_bytes, count in request.hugepages.items() if count}
        if request.memory_bytes:
            want[MEMORY] = request.memory_bytes
        there = {}
        for node in (one for one in inventory.numa_nodes if want and one.serves(request.memory_kind)):
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
        """Return whether neither hugepages nor memory are requested."""
        return not self.want

    @property
    def nodes(self) -> frozenset[NodeId]:
        """Return the nodes that have any of what is wanted."""
        return frozenset(self.there)

    def within(self, nodes: frozenset[NodeId] | None) -> Stock:
        """Return the stock restricted to some nodes, or unchanged if `nodes` is None."""
        if nodes is None or not self.want:
            return self
        return replace(self, there={node: mine for node, mine in self.there.items() if node in nodes})

    def sum(self, size: int, nodes: Iterable[NodeId] | None = None) -> int:
        """Return how much of one size some nodes have together (None: all nodes)."""
        return sum(self.there[n].get(size, 0) for n in (self.there if nodes is None else nodes) if n in self.there)

    def enough(self, nodes: Iterable[NodeId] | None) -> bool:
        """Return whether some nodes (None: all nodes) have enough of everything."""
        some = None if nodes is None else list(nodes)
        return all(self.sum(size, some) >= count for size, count in self.want.items())

    def take(self, nodes: Sequence[NodeId]) -> tuple[tuple[Pages, ...], tuple[tuple[NodeId, int], ...]]:
        """Return (pages, memory), taking as much as possible from the first node, then from the next."""
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
