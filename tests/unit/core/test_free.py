"""What can still be granted of a pool of hugepages, whichever process has mapped or faulted how many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.ledger.free import grantable
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import HugepagePool

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


# ---------------------------------------------------------------- where it is known whose pages are in use


@given(st.integers(1, 50), st.data())
def test_foreign_pages_are_never_promised_and_all_others_are(total: int, data: st.DataObject) -> None:
    """Whatever holders and others have mapped and faulted: what is left is the pool less both."""
    granted = data.draw(st.integers(0, total))
    mine = data.draw(st.integers(0, granted))
    waiting = data.draw(st.integers(0, granted - mine))
    foreign = data.draw(st.integers(0, total - granted))
    promised = data.draw(st.integers(0, total - granted - foreign))
    found = HugepagePool(
        node=0,
        page_bytes=SIZE,
        total_pages=total,
        free_pages=total - mine - foreign,
        reserved_pages=waiting + promised,
        own_used_pages=mine,
        own_reserved_pages=waiting,
    )
    ledger = held(granted) if granted else Ledger()
    assert found.foreign_pages == foreign
    assert grantable(found, ledger) == total - granted - foreign - promised


def test_a_database_on_the_host_does_not_count_as_what_was_granted() -> None:
    """8 pages granted and none faulted, 6 in use by the host: by guess these are the holder's, in truth 2 are left."""
    guessed = pool(16, faulted=6)
    known = HugepagePool(node=0, page_bytes=SIZE, total_pages=16, free_pages=10, own_used_pages=0, own_reserved_pages=0)
    assert grantable(guessed, held(8)) == 8
    assert grantable(known, held(8)) == 2
