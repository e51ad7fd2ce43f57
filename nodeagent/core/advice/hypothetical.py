"""States that do not exist: the same machine without some grants, or with nothing held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.ledger.free import grantable, memory_left
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import HugepagePool, NodeId, NumaNode

_OTHERS = Holder(api="")


def untouched(inventory: Inventory, ledger: Ledger) -> Inventory:
    """Return the machine as if no holder had touched its hugepages yet.

    As much can be granted as before. But pages that holders have faulted are in use until their processes end: only on
    this machine does a ledger without some grants show what can be granted once their pods have ended, and one with
    more grants what is left once theirs have begun.
    """
    nodes = tuple(_untouched_node(node, ledger) for node in inventory.numa_nodes)
    same = all(a is b for a, b in zip(nodes, inventory.numa_nodes, strict=True))
    return inventory if same else replace(inventory, numa_nodes=nodes)


def _untouched_node(node: NumaNode, ledger: Ledger) -> NumaNode:
    pools = tuple(_untouched_pool(pool, ledger) for pool in node.hugepages)
    same = all(a is b for a, b in zip(pools, node.hugepages, strict=True))
    return node if same else replace(node, hugepages=pools)


def _untouched_pool(pool: HugepagePool, ledger: Ledger) -> HugepagePool:
    granted = ledger.pages_held.get((pool.node, pool.page_bytes), 0)
    known = pool.own_used_pages is not None
    used = pool.own_used_pages or 0 if known else pool.total_pages - pool.free_pages + pool.reserved_pages
    faulted = min(granted, used)
    if not used:
        return pool
    # What holders have reserved and not faulted is of what was granted to them as well.
    own_reserved = (pool.own_reserved_pages or 0) if known else min(pool.reserved_pages, faulted)
    back = faulted if known else faulted - own_reserved
    return replace(
        pool,
        free_pages=min(pool.total_pages, pool.free_pages + back),
        own_used_pages=0,
        own_reserved_pages=own_reserved,
    )


def without(ledger: Ledger, gone: Iterable[Grant]) -> Ledger:
    """Return the ledger without some grants, also of other device plugins."""
    ids = {one.id for one in gone}
    return replace(
        ledger,
        grants=MappingProxyType({id: one for id, one in ledger.grants.items() if id not in ids}),
        foreign=MappingProxyType({id: one for id, one in ledger.foreign.items() if id not in ids}),
    )


def empty(ledger: Ledger) -> Ledger:
    """Return a ledger with nothing but the reserved CPUs."""
    return Ledger(reserved=ledger.reserved)


def leaving_only(
    inventory: Inventory, ledger: Ledger, pages: Iterable[Pages], memory: Iterable[tuple[NodeId, int]]
) -> Ledger:
    """Return the ledger with so much held that exactly these pages and this memory can be granted of their sizes."""
    left = {(one.node, one.page_bytes): one.pages for one in pages}
    sizes, of_memory = {size for _, size in left}, dict(memory)
    held = tuple(
        Pages(node=pool.node, page_bytes=pool.page_bytes, pages=more)
        for node in inventory.numa_nodes
        for pool in node.hugepages
        if pool.page_bytes in sizes
        and (more := grantable(pool, ledger) - left.get((pool.node, pool.page_bytes), 0)) > 0
    )
    rest = _rest_of_memory(inventory, ledger, of_memory) if of_memory else ()
    if not held and not rest:
        return ledger
    others = Grant(id="\0others", holder=_OTHERS, cpus=EMPTY, hugepages=held, memory=rest)
    return replace(ledger, grants=MappingProxyType({**ledger.grants, others.id: others}))


def _rest_of_memory(inventory: Inventory, ledger: Ledger, left: Mapping[NodeId, int]) -> tuple[tuple[NodeId, int], ...]:
    free = ((node.id, memory_left(node) - ledger.memory_held.get(node.id, 0)) for node in inventory.numa_nodes)
    return tuple((node, more) for node, size in free if (more := size - left.get(node, 0)) > 0)
