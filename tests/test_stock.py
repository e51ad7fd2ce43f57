"""What can still be granted of a pool of hugepages, whoever has mapped or faulted how many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.ledger import Ledger, grant
from nodeagent.core.model import CLAIM, Grant, Holder, HugepagePool, Pages
from nodeagent.core.stock import grantable

SIZE = 2 << 20


def held(pages: int) -> Ledger:
    holder = Holder(api=CLAIM, namespace="ns", claim="c")
    return grant(Ledger(), Grant(id="g", holder=holder, hugepages=(Pages(node=0, page_bytes=SIZE, pages=pages),)))


def pool(total: int, *, faulted: int = 0, reserved: int = 0) -> HugepagePool:
    free = total - faulted
    return HugepagePool(node=0, page_bytes=SIZE, total_pages=total, free_pages=free, reserved_pages=reserved)


@given(st.integers(1, 50), st.data())
def test_what_holders_do_with_their_pages_changes_nothing_for_others(total: int, data: st.DataObject) -> None:
    """Mapped, faulted, given back to the pool: the others can have what was not granted."""
    granted = data.draw(st.integers(1, total))
    faulted = data.draw(st.integers(0, granted))
    reserved = data.draw(st.integers(0, granted - faulted))
    assert grantable(pool(total, faulted=faulted, reserved=reserved), held(granted)) == total - granted


@given(st.integers(1, 50), st.data())
def test_no_page_is_promised_that_is_in_use_or_reserved(total: int, data: st.DataObject) -> None:
    granted = data.draw(st.integers(1, total))
    faulted = data.draw(st.integers(0, total))
    reserved = data.draw(st.integers(0, total - faulted))
    free = grantable(pool(total, faulted=faulted, reserved=reserved), held(granted))
    assert 0 <= free <= min(total - granted, total - faulted - reserved)
