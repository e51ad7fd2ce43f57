"""By how much hugepage pools grow for claims: by what is missing, never beyond a limit, only for what can be had."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.dra.hugepage_demand import Demand, concerned, demand, idle, is_granted
from nodeagent.core.dra.memory_pools import SIZE, MemoryPool, PagePool
from nodeagent.core.dra.prepare import Catalog, prepare, unprepare
from nodeagent.core.ledger.free import PageLimit, grantable, room
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import HugepagePool
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import DRIVER, FORMS, NOBODY, NODE, amounts, claim, pool_of, result, shown, stamp, wrong_with

MIB = 1 << 20
PAGE = 2 * MIB
LIMIT = PageLimit(node=0, page_bytes=PAGE, max_pages=20)


def machine(pages: int = 4, memory_bytes: int = GIB) -> Inventory:
    """Two nodes with as many pages each, all free."""
    return inventory_of(
        even_rows(1, 2, 1, 2, 1),
        pages={(node, PAGE): pages for node in (0, 1)},
        memory=dict.fromkeys((0, 1), memory_bytes),
    )


def catalog(*limits: PageLimit) -> Catalog:
    kinds = {"hugepages": PagePool(sizes=(PAGE,), limits=limits), "memory": MemoryPool(limits=limits)}
    return Catalog(driver=DRIVER, node_name=NODE, kinds=kinds)


def wants(name: str, *pages: tuple[int, int], memory: int = 0) -> Claim:
    """(node, pages) each, and bytes of memory of node 0."""
    parts = [
        result("hugepages", f"numa{node}-2mi", f"p{n}", share=f"{name}-{n}", size=count * PAGE)
        for n, (node, count) in enumerate(pages)
    ]
    if memory:
        parts.append(result("memory", "numa0", "m", share=f"{name}-m", size=memory))
    return claim(name, *parts)


def lacking(*claims: Claim, pages: int = 4, ledger: Ledger = NOBODY, memory_bytes: int = GIB) -> Demand:
    return demand(machine(pages, memory_bytes), ledger, catalog(LIMIT), claims, [LIMIT])


def granted(*claims: Claim, pages: int = 40) -> Ledger:
    batch = prepare(machine(pages), NOBODY, catalog(), claims, stamp())
    assert not batch.errors
    return batch.ledger


# ---------------------------------------------------------------- what is missing


def test_a_pool_grows_by_what_is_missing() -> None:
    assert lacking(wants("a", (0, 10))).growth == {(0, PAGE): 6}


def test_what_fits_makes_nothing_grow() -> None:
    assert lacking(wants("a", (0, 4))).growth == {}


def test_two_requests_of_one_size_add_up() -> None:
    assert lacking(wants("a", (0, 3), (0, 3))).growth == {(0, PAGE): 2}


def test_claims_of_one_call_add_up() -> None:
    assert lacking(wants("a", (0, 3)), wants("b", (0, 3))).growth == {(0, PAGE): 2}


def test_a_pool_grows_to_its_limit_and_not_beyond() -> None:
    assert lacking(wants("a", (0, 20))).growth == {(0, PAGE): 16}
    assert lacking(wants("a", (0, 21))).growth == {}


def test_a_claim_that_cannot_be_granted_leaves_growing_to_the_next_one() -> None:
    found = lacking(wants("a", (0, 21)), wants("b", (0, 6)))
    assert (found.growth, list(found.wanted)) == ({(0, PAGE): 2}, ["uid-b"])


def test_a_claim_that_lacks_pages_of_a_pool_without_a_limit_makes_no_other_grow() -> None:
    assert lacking(wants("a", (0, 10), (1, 5))).growth == {}


def test_a_claim_that_is_granted_already_makes_nothing_grow() -> None:
    held = wants("a", (0, 10))
    assert lacking(held, pages=4, ledger=granted(held)).growth == {}


def test_what_a_claim_was_allocated_before_is_given_back_first() -> None:
    """Same UID, another allocation."""
    ledger = granted(wants("a", (0, 4)))
    assert lacking(wants("a", (0, 6)), ledger=ledger).growth == {(0, PAGE): 2}


def test_memory_that_is_granted_does_not_become_pages() -> None:
    """32 MiB alongside 4 pages: room for 16 more, less what a claim holds."""
    held = prepare(machine(), NOBODY, catalog(), [wants("m", memory=24 * MIB)], stamp()).ledger
    assert lacking(wants("a", (0, 8)), ledger=held, memory_bytes=32 * MIB).growth == {(0, PAGE): 4}
    assert lacking(wants("a", (0, 9)), ledger=held, memory_bytes=32 * MIB).growth == {}


def test_pages_and_memory_of_one_node_are_not_promised_twice_in_one_call() -> None:
    found = lacking(wants("a", (0, 5), memory=30 * MIB), wants("b", (0, 5), memory=30 * MIB), memory_bytes=34 * MIB)
    assert (found.growth, list(found.wanted)) == ({(0, PAGE): 1}, ["uid-a"])


@pytest.mark.parametrize(
    "bad",
    [
        claim("x"),
        claim("x", result("hugepages", "numa7-2mi", "p", share="s", size=PAGE)),
        claim("x", result("nothing", "numa0-2mi", "p", share="s", size=PAGE)),
        replace(wants("x", (0, 9)), allocated=False),
    ],
)
def test_a_claim_that_cannot_be_understood_makes_nothing_grow(bad: Claim) -> None:
    assert lacking(bad, wants("a", (0, 5))).growth == {(0, PAGE): 1}


def test_only_claims_for_a_pool_that_may_grow_are_of_concern() -> None:
    machine_, shelf = machine(), catalog(LIMIT)
    assert concerned(machine_, shelf, [wants("a", (1, 1)), wants("b", (0, 1))], [LIMIT])
    assert not concerned(machine_, shelf, [wants("a", (1, 1))], [LIMIT])
    assert not concerned(machine_, shelf, [wants("a", (0, 1))], [])


# ---------------------------------------------------------------- what goes back


def test_what_a_refused_claim_made_grow_is_not_needed() -> None:
    found = lacking(wants("a", (0, 6)), wants("b", (0, 6)))
    assert found.growth == {(0, PAGE): 8}
    assert found.unneeded({(0, PAGE): 8}, {"uid-a", "uid-b"}) == {}
    assert found.unneeded({(0, PAGE): 8}, {"uid-a"}) == {(0, PAGE): 6}
    assert found.unneeded({(0, PAGE): 8}, set()) == {(0, PAGE): 8}


def test_of_a_pool_that_grew_less_than_asked_only_what_it_grew_goes_back() -> None:
    found = lacking(wants("a", (0, 6)), wants("b", (0, 6)))
    assert found.unneeded({(0, PAGE): 3}, {"uid-a"}) == {(0, PAGE): 1}


def test_a_pool_is_idle_when_all_that_is_above_its_floor_is_free() -> None:
    pool = HugepagePool(node=0, page_bytes=PAGE, total_pages=10, free_pages=6)
    assert [idle(pool, NOBODY, floor) for floor in (3, 4, 9, 10, 12)] == [0, 6, 1, 0, 0]


def test_a_claim_holds_what_is_allocated_to_it_or_something_else() -> None:
    ledger = granted(wants("a", (0, 4)))
    assert is_granted(ledger, catalog(), wants("a", (0, 4)))
    assert not is_granted(ledger, catalog(), wants("a", (0, 5)))
    assert not is_granted(ledger, catalog(), wants("b", (0, 4)))
    assert not is_granted(ledger, catalog(), claim("a"))


sizes = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12)), min_size=1, max_size=3)


@given(st.lists(sizes, max_size=4), st.integers(0, 8), st.integers(0, 24), st.integers(0, 3))
def test_what_is_foreseen_is_granted_once_pools_have_grown(
    claims: list[list[tuple[int, int]]], pages: int, most: int, held: int
) -> None:
    """And giving back what is not needed leaves every grant its pages."""
    limit = PageLimit(node=0, page_bytes=PAGE, max_pages=most)
    every = [wants(f"c{n}", *parts) for n, parts in enumerate(claims)]
    before = granted(*([wants("old", (0, min(held, pages)))] if min(held, pages) else []), pages=pages)
    found = demand(machine(pages), before, catalog(limit), every, [limit])
    assert all(key == (0, PAGE) for key in found.growth)
    more = found.growth.get((0, PAGE), 0)
    assert pages + more <= max(most, pages)
    grown = with_more(machine(pages), more)
    batch = prepare(grown, before, catalog(limit), every, stamp())
    assert {*found.wanted} <= {*batch.grants}
    spare = found.unneeded(found.growth, batch.grants).get((0, PAGE), 0)
    (pool,) = grown.numa_nodes[0].hugepages
    assert spare <= grantable(pool, batch.ledger)
    everything_back = unprepare(batch.ledger, [one.ref.uid for one in every], "done").ledger
    assert idle(pool, everything_back, pages) == more


def with_more(inventory: Inventory, pages: int) -> Inventory:
    """Node 0 with more pages."""
    first, *rest = inventory.numa_nodes
    (pool,) = first.hugepages
    pool = replace(pool, total_pages=pool.total_pages + pages, free_pages=pool.free_pages + pages)
    return replace(inventory, numa_nodes=(replace(first, hugepages=(pool,)), *rest))


# ---------------------------------------------------------------- what is published


def test_a_pool_that_may_grow_is_shown_as_large_as_it_may_become() -> None:
    assert amounts(pool_of(PagePool(sizes=(PAGE,), limits=(LIMIT,)), machine()), SIZE) == {
        "numa0-2mi": 20 * PAGE,
        "numa1-2mi": 4 * PAGE,
    }


def test_an_empty_pool_that_may_grow_is_shown() -> None:
    found = shown(pool_of(PagePool(sizes=(PAGE,), limits=(LIMIT,)), with_pool_of_none()))
    assert [(name, one.capacity[SIZE].value, one.taints) for name, one in found.items()] == [
        ("numa0-2mi", 20 * PAGE, ())
    ]


def with_pool_of_none() -> Inventory:
    """As on every machine whose kernel knows the size: pools without pages."""
    inventory = machine(0)
    nodes = (
        replace(node, hugepages=(HugepagePool(node=node.id, page_bytes=PAGE, total_pages=0, free_pages=0),))
        for node in inventory.numa_nodes
    )
    return replace(inventory, numa_nodes=tuple(nodes))


def test_growing_changes_nothing_of_what_is_shown() -> None:
    """The slices stay as they are while pools breathe."""
    for kind in (PagePool(sizes=(PAGE,), limits=(LIMIT,)), MemoryPool(limits=(LIMIT,))):
        for features in FORMS:
            before = pool_of(kind, machine(), features=features)
            assert before == pool_of(kind, with_more(machine(), 7), features=features)


def test_memory_that_pages_may_grow_by_is_shown_once() -> None:
    found = amounts(pool_of(MemoryPool(limits=(LIMIT,)), machine()), SIZE)
    assert found == {"numa0": GIB - 16 * PAGE, "numa1": GIB}


def test_pages_that_the_node_has_no_memory_for_are_not_shown() -> None:
    found = amounts(pool_of(PagePool(sizes=(PAGE,), limits=(LIMIT,)), machine(memory_bytes=6 * PAGE)), SIZE)
    assert found["numa0-2mi"] == 10 * PAGE


def test_a_pool_that_is_larger_than_its_limit_is_shown_as_it_is() -> None:
    assert amounts(pool_of(PagePool(sizes=(PAGE,), limits=(LIMIT,)), machine(30)), SIZE)["numa0-2mi"] == 30 * PAGE
    assert room(machine(30).numa_nodes[0], machine(30).numa_nodes[0].hugepages[0], [LIMIT]) == 0


def test_no_pool_that_may_grow_breaks_a_rule_in_any_form() -> None:
    for kind in (PagePool(sizes=(PAGE,), limits=(LIMIT,)), MemoryPool(limits=(LIMIT,))):
        for inventory in (machine(), with_pool_of_none(), machine(30)):
            assert wrong_with(kind, inventory, granted(wants("a", (0, 3)))) == []
