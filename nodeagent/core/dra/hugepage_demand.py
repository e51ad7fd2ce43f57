"""By how much hugepage pools must grow for the claims of one call, and when growth can be undone.

Pure. Growing itself needs a thread, and the kernel may give less; afterwards, grants are decided as usual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

import msgspec

from nodeagent.core.dra.memory_pools import SIZE
from nodeagent.core.dra.prepare import Catalog, grants_of, results_of
from nodeagent.core.ledger.free import PageLimit, grantable, memory_left, room
from nodeagent.core.ledger.ledger import Ledger, release
from nodeagent.core.model.claim import Claim, Result
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import HugepagePool, NodeId
from nodeagent.errors import InputError

Key = tuple[NodeId, int]
"""A pool: its node and page_bytes; with page_bytes 0 the node's memory, counted in bytes."""
Amounts = Mapping[Key, int]


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Hugepages that the claims of one call want and have not been granted yet, in pages."""

    wanted: Mapping[str, Amounts] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By claim UID, for the claims that can be granted once the pools have grown."""
    there: Amounts = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What the pools can give without growing."""

    @property
    def growth(self) -> Amounts:
        """Return the number of pages missing in each pool; only pools that lack any."""
        return self._missing(self.wanted)

    def unneeded(self, grown: Amounts, granted: Container[str]) -> Amounts:
        """Return how many of the pages that pools grew by are not needed by the granted claims.

        grown: pages by pool. granted: UIDs of the claims that were granted.
        """
        needed = self._missing([uid for uid in self.wanted if uid in granted])
        spare = {key: pages - needed.get(key, 0) for key, pages in grown.items()}
        return {key: pages for key, pages in spare.items() if pages > 0}

    def _missing(self, uids: Iterable[str]) -> Amounts:
        sums: Counter[Key] = Counter()
        for uid in uids:
            sums.update(self.wanted[uid])
        missing = {key: pages - self.there.get(key, 0) for key, pages in sums.items() if key[1]}
        return {key: pages for key, pages in sorted(missing.items()) if pages > 0}


def concerned(inventory: Inventory, catalog: Catalog, claims: Iterable[Claim], limits: Sequence[PageLimit]) -> bool:
    """Return whether any claim wants pages of a pool that may grow."""
    growable = {(one.node, one.page_bytes) for one in limits}
    return bool(growable) and any(not growable.isdisjoint(_wants(inventory, catalog, claim)) for claim in claims)


def demand(
    inventory: Inventory, ledger: Ledger, catalog: Catalog, claims: Iterable[Claim], limits: Sequence[PageLimit]
) -> Demand:
    """Return the demand, in the order in which claims are decided.

    A claim that cannot be granted however far pools grow causes no growth and leaves the pages to the next claim. What
    a claim was allocated before is released first.
    """
    new = {claim.ref.uid: claim for claim in claims if not is_granted(ledger, catalog, claim)}
    ledger = release(ledger, [one.id for uid in new for one in grants_of(ledger, uid)])
    left = supply = _Supply.of(inventory, ledger, limits)
    wanted: dict[str, Amounts] = {}
    for uid, claim in new.items():
        wants = _wants(inventory, catalog, claim)
        if wants and (after := left.without(wants)) is not None:
            wanted[uid], left = wants, after
    return Demand(wanted=MappingProxyType(wanted), there=supply.there)


def idle(pool: HugepagePool, ledger: Ledger, floor_pages: int) -> int:
    """Return how many pages above `floor_pages` can be returned: all of them, or none while any is granted or in
    use."""
    above = pool.persistent_pages - floor_pages
    return above if 0 < above <= grantable(pool, ledger) else 0


def is_granted(ledger: Ledger, catalog: Catalog, claim: Claim) -> bool:
    """Return whether a claim holds what is currently allocated to it."""
    try:
        return [grant.result for grant in grants_of(ledger, claim.ref.uid)] == results_of(catalog, claim)
    except InputError:
        return False  # it will be refused, and wants nothing


def _wants(inventory: Inventory, catalog: Catalog, claim: Claim) -> Amounts:
    """Return the pages and memory that a claim wants, or nothing if it is invalid; deciding on it reports that."""
    sums: Counter[Key] = Counter()
    try:
        for result in results_of(catalog, claim):
            sums.update(_wanted(inventory, catalog, result))
    except InputError:
        return {}
    return sums


def _wanted(inventory: Inventory, catalog: Catalog, result: Result) -> Amounts:
    _, part = catalog.find(inventory, result)
    if part.node is None or result.admin:
        return {}
    amount = result.consumed.get(SIZE, part.amount)
    return {(part.node, part.page_bytes): -(-amount // (part.page_bytes or 1))}


class _Supply(msgspec.Struct, frozen=True, kw_only=True):
    """What is available: free pages, growth in pages, and the memory in bytes that growth and memory grants use."""

    there: Amounts
    room: Amounts
    memory: Mapping[NodeId, int]

    @classmethod
    def of(cls, inventory: Inventory, ledger: Ledger, limits: Sequence[PageLimit]) -> _Supply:
        held = ledger.memory_held
        pools = [(node, pool) for node in inventory.numa_nodes for pool in node.hugepages]
        return cls(
            there={(pool.node, pool.page_bytes): grantable(pool, ledger) for _, pool in pools},
            room={(pool.node, pool.page_bytes): room(n, pool, limits, held.get(n.id, 0)) for n, pool in pools},
            memory={node.id: max(0, memory_left(node) - held.get(node.id, 0)) for node in inventory.numa_nodes},
        )

    def without(self, wants: Amounts) -> _Supply | None:
        """Return what is left after a claim has got what it wants, or None if it cannot."""
        there, rooms, memory = dict(self.there), dict(self.room), dict(self.memory)
        for (node, size), amount in wants.items():
            at_hand = min(amount, there.get((node, size), 0))
            if size:
                there[node, size] = there.get((node, size), 0) - at_hand
                rooms[node, size] = rooms.get((node, size), 0) - (amount - at_hand)
            memory[node] = memory.get(node, 0) - (amount - at_hand) * (size or 1)
        fits = all(one >= 0 for one in chain(rooms.values(), memory.values()))
        return _Supply(there=there, room=rooms, memory=memory) if fits else None
