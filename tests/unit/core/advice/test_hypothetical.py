"""Machines that do not exist: what can be granted of pages once pods have ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.advice.hypothetical import leaving_only, untouched, without
from nodeagent.core.ledger.free import grantable
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import HugepagePool, NumaNode

SIZE = 2 << 20


@st.composite
def pools(draw: st.DrawFn) -> HugepagePool:
    total = draw(st.integers(0, 20))
    free = draw(st.integers(0, total))
    reserved = draw(st.integers(0, free))
    own = draw(st.none() | st.integers(0, total - free))
    return HugepagePool(
        node=0,
        page_bytes=SIZE,
        total_pages=total,
        free_pages=free,
        reserved_pages=reserved,
        own_used_pages=own,
        own_reserved_pages=None if own is None else draw(st.integers(0, reserved)),
    )


def holding(**pages: int) -> Ledger:
    grants = [
        Grant(id=id, holder=Holder(api=CLAIM, uid=id), hugepages=(Pages(node=0, page_bytes=SIZE, pages=count),))
        for id, count in pages.items()
    ]
    return Ledger(grants={one.id: one for one in grants})


def left(inventory: Inventory, ledger: Ledger) -> int:
    (pool,) = inventory.numa_nodes[0].hugepages
    return grantable(pool, ledger)


@given(pool=pools(), a=st.integers(0, 10), b=st.integers(0, 10))
def test_pages_come_back_in_full_when_their_pod_ends(pool: HugepagePool, a: int, b: int) -> None:
    """As many can be granted as before; without a grant as many more as it had, whichever process has faulted them."""
    inventory, ledger = Inventory(numa_nodes=(NumaNode(id=0, hugepages=(pool,)),)), holding(a=a, b=b)
    after = untouched(inventory, ledger)
    assert left(after, ledger) == left(inventory, ledger)
    if left(inventory, ledger) > 0:
        assert left(after, without(ledger, [ledger.grants["a"]])) == left(inventory, ledger) + a


@given(pool=pools(), count=st.integers(0, 20))
def test_a_placement_can_be_forced_onto_the_pages_that_are_held(pool: HugepagePool, count: int) -> None:
    """Of the sizes that are held, nothing else is left to choose."""
    inventory = untouched(Inventory(numa_nodes=(NumaNode(id=0, hugepages=(pool,)),)), Ledger())
    pages = [Pages(node=0, page_bytes=SIZE, pages=count)]
    assert left(inventory, leaving_only(inventory, Ledger(), pages, ())) == min(count, left(inventory, Ledger()))
