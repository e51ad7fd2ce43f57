"""The ledger: what may be held alongside what, and that an old ledger stays as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger, amend, grant, release, with_reserved
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.errors import Refused

NOBODY = Ledger()
KEPT = ("cpus_held", "pages_held", "memory_held", "devices_held", "devices_whole", "by_id")


def one(name: str, *ids: str, resource: str = "r", api: str = DEVICE_PLUGIN, **parts: object) -> Grant:
    holder = Holder(api=api, resource=resource, namespace="ns", pod=name, claim=name)
    return Grant(id=name, holder=holder, ids=ids, **parts)  # type: ignore[arg-type]


def pages(count: int) -> Pages:
    return Pages(node=0, page_bytes=1, pages=count)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (one("a", cpus=CpuSet([1, 2])), one("b", cpus=CpuSet([2, 3])), "cannot grant CPUs 2-3: 2 held by ns/a"),
        (one("a", cpus=CpuSet([1])), one("b", api=CLAIM, cpus=CpuSet([1])), "cannot grant CPUs 1: 1 held by ns/a"),
        (one("a", devices=("x", "y")), one("b", resource="s", devices=("y",)), "cannot grant y: held by ns/a"),
        (one("a", devices=("x",)), one("b", shares=("x",)), "cannot grant x: held by ns/a"),
        (one("a", shares=("x",)), one("b", devices=("x", "z")), "cannot grant x: held by ns/a"),
        (one("a", "id1", "id2"), one("b", "id2"), "cannot grant id2: held by ns/a"),
    ],
    ids=["cpus", "both-apis", "two-resources", "share-of-whole", "whole-of-share", "ids"],
)
def test_what_overlaps_is_refused_by_the_name_of_its_holder(first: Grant, second: Grant, why: str) -> None:
    """Whichever comes first."""
    with pytest.raises(Refused) as refusal:
        grant(grant(NOBODY, first), second)
    assert str(refusal.value) == why
    assert refusal.value.want == refusal.value.free + 1
    with pytest.raises(Refused, match=r"held by (claim )?ns/b"):
        grant(grant(NOBODY, second), first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (one("a", "id1", shares=("x",)), one("b", "id2", shares=("x",))),
        (one("a", "id1", resource="r"), one("b", "id1", resource="s")),
        (one("a", hugepages=(pages(2),)), one("b", hugepages=(pages(3),))),
        (one("a"), one("b")),
    ],
    ids=["shares", "ids-of-two-resources", "pages", "nothing"],
)
def test_what_does_not_overlap_is_held_side_by_side(first: Grant, second: Grant) -> None:
    """Pages are counted, not named."""
    ledger = grant(grant(NOBODY, first), second)
    assert set(ledger.grants) == {"a", "b"}
    assert ledger.pages_held.get((0, 1), 0) in (0, 5)


def test_reserved_cpus_are_granted_to_nobody() -> None:
    """Those reserved later stay with their holder."""
    ledger = grant(NOBODY, one("a", cpus=CpuSet([0])))
    reserved = with_reserved(ledger, CpuSet([0, 1]))
    assert reserved.grants == ledger.grants
    assert grant(reserved, ledger.grants["a"]) is reserved
    with pytest.raises(Refused, match="cannot grant CPUs 1: they are reserved"):
        grant(reserved, one("b", cpus=CpuSet([1, 2])))
    assert with_reserved(reserved, CpuSet([0, 1])) is reserved


def test_an_old_ledger_stays_as_it_was() -> None:
    """grant and release return new ones; what changes nothing returns the same."""
    before = grant(NOBODY, one("a", "id", cpus=CpuSet([1])))
    after = grant(release(before, ["a"]), one("b", "id", cpus=CpuSet([1])))
    assert (list(before.grants), list(after.grants), list(NOBODY.grants)) == (["a"], ["b"], [])
    assert before.by_id["r", "id"].id == "a"
    assert grant(before, before.grants["a"]) is before
    assert release(before, ["nobody"]) is before


def test_a_grant_of_the_same_id_replaces_the_old_one() -> None:
    """What it held before is free."""
    ledger = grant(NOBODY, one("a", "id1", "id2", cpus=CpuSet([1, 2]), devices=("x",)))
    ledger = grant(ledger, one("a", "id2", cpus=CpuSet([2, 3])))
    assert (ledger.cpus_held, ledger.devices_held, set(ledger.by_id)) == (CpuSet([2, 3]), set(), {("r", "id2")})


def test_amending_changes_what_is_known_of_the_holder_and_nothing_that_is_held() -> None:
    """Even where it is told otherwise."""
    ledger = grant(NOBODY, one("a", "id", cpus=CpuSet([1])))
    named = replace(one("x", "other", cpus=CpuSet([9])), id="a", confirmed=True)
    held = amend(ledger, [named]).grants["a"]
    assert (held.holder, held.confirmed, held.cpus, held.ids) == (named.holder, True, CpuSet([1]), ("id",))


GRANTS = st.builds(
    lambda number, ids, cpus, devices, shares, resource: one(
        f"g{number}",
        *(f"id{x}" for x in ids),
        resource=resource,
        cpus=CpuSet(cpus),
        devices=tuple(f"d{x}" for x in devices),
        shares=tuple(f"d{x}" for x in shares),
    ),
    st.integers(0, 5),
    st.sets(st.integers(0, 5), max_size=2),
    st.sets(st.integers(0, 9), max_size=2),
    st.sets(st.integers(0, 4), max_size=1),
    st.sets(st.integers(0, 4), max_size=1),
    st.sampled_from(["r", "s"]),
)


def overlap(a: Grant, b: Grant) -> bool:
    """The rule in its plainest words."""
    whole = set(a.devices) & {*b.devices, *b.shares} or set(a.shares) & set(b.devices)
    same = a.holder.resource == b.holder.resource and set(a.ids) & set(b.ids)
    return bool(set(a.cpus) & set(b.cpus) or whole or same)


@given(st.lists(st.one_of(GRANTS, st.integers(0, 5)), max_size=30))
def test_whatever_is_granted_and_released_nothing_overlaps_and_every_sum_is_right(steps: list[Grant | int]) -> None:
    """A refusal where, and only where, the plain rule says so; what is carried over equals what is worked out."""
    ledger = NOBODY
    for step in steps:
        if isinstance(step, int):
            ledger = release(ledger, [f"g{step}"])
        else:
            others = [held for held in ledger.grants.values() if held.id != step.id]
            try:
                ledger = grant(ledger, step)
                assert not any(overlap(held, step) for held in others)
            except Refused:
                assert any(overlap(held, step) for held in others)
        fresh = Ledger(grants=ledger.grants)
        for name in KEPT:
            assert getattr(ledger, name) == getattr(fresh, name), name
