"""Who gets which ways: no way is given twice, nothing of others is touched, what was given stays."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.resctrl.bandwidth import limit
from nodeagent.core.resctrl.masks import fault
from nodeagent.core.resctrl.model import (
    Bandwidth,
    Cache,
    Group,
    Mode,
    Partition,
    SharedClass,
    Tree,
    Unit,
)
from nodeagent.core.resctrl.plan import Held, ResctrlPlan, plan
from nodeagent.errors import InputError

FULL = 0xFFF


def tree(
    groups: Mapping[str, Mapping[int, int]] | None = None,
    *,
    root: int = FULL,
    closids: int = 16,
    unit: Unit | None = Unit.PERCENT,
    names: tuple[str, ...] = ("L3",),
    mode: Mode = Mode.SHAREABLE,
    hardware: int = 0,
    domains: tuple[int, ...] = (0, 1),
) -> Tree:
    """Two L3 caches of twelve ways, and groups of other programs with these masks."""
    every = {one: Cache(name=one, full=FULL, hardware=hardware, closids=closids, domains=domains) for one in names}
    most = {Unit.PERCENT: 100, Unit.EIGHTHS: 2048, Unit.MIBPS: 0xFFFFFFFF}
    limits = {"MB": dict.fromkeys(domains, most[unit])} if unit is not None else {}
    bandwidth = (
        Bandwidth(unit=unit, least=10 if unit == Unit.PERCENT else 1, step=10, closids=closids, domains=domains)
        if unit is not None
        else None
    )
    own = Group(name="", mode=Mode.SHAREABLE, schemata={name: dict.fromkeys(domains, root) for name in names} | limits)
    masks = {name: dict.fromkeys(names, some) for name, some in (groups or {}).items()}
    others = {name: Group(name=name, mode=mode, schemata=some) for name, some in masks.items()}
    return Tree(caches=every, bandwidth=bandwidth, groups={"": own, **others}, rmids=8)


def claim(name: str, ways: int = 0, *domains: int, percent: int | None = None, mbps: int | None = None) -> Partition:
    some = domains or (0,)
    given_ways = dict.fromkeys(some, ways) if ways else {}
    return Partition(
        group=name, holder=f"claim {name}", ways=given_ways, domains=frozenset(some), percent=percent, mbps=mbps
    )


def held_after(found: ResctrlPlan) -> Held:
    """What is recorded once a plan was carried out."""
    return Held(groups={name: one.schemata for name, one in found.groups.items()}, aside=found.aside, root=found.before)


def test_nothing_is_touched_where_nothing_is_configured() -> None:
    assert plan(tree({"theirs": {0: 1, 1: 1}}), Held(), 0, [], []) == ResctrlPlan()


def test_a_claim_has_ways_of_the_caches_of_its_cpus_and_shares_the_others() -> None:
    found = plan(tree(), Held(), 4, [], [claim("a", 2, 0)])
    assert found.root == {"L3": {0: 0xFF0, 1: 0xFF0}}
    one = found.groups["a"]
    assert one.schemata == {"L3": {0: 0x3, 1: 0xFF0}, "MB": {0: 100, 1: 100}}
    assert one.own == {0: 0x3} and not one.exclusive


def test_a_claim_on_all_caches_can_be_exclusive_to_the_kernel_too() -> None:
    assert plan(tree(), Held(), 4, [], [claim("a", 2, 0, 1)]).groups["a"].exclusive
    assert not plan(tree(names=("L3", "L2")), Held(), 4, [], [claim("a", 2, 0, 1)]).groups["a"].exclusive


def test_code_and_data_get_the_same_ways() -> None:
    found = plan(tree(names=("L3CODE", "L3DATA")), Held(), 4, [], [claim("a", 2, 0)])
    assert found.groups["a"].schemata["L3CODE"] == found.groups["a"].schemata["L3DATA"] == {0: 0x3, 1: 0xFF0}
    assert found.root == {"L3CODE": {0: 0xFF0, 1: 0xFF0}, "L3DATA": {0: 0xFF0, 1: 0xFF0}}


def test_ways_that_groups_of_others_have_are_not_given() -> None:
    found = plan(tree({"theirs": {0: 0xFFC, 1: 0}}), Held(), 4, [], [claim("a", 2, 0), claim("b", 3, 0)])
    assert found.groups["a"].own == {0: 0x3}
    assert found.errors["b"] == (
        "cannot give 3 ways of L3 0: of 4 that are set aside 0 are free, at most 0 consecutive ones, 2 are in groups "
        "of other programs (theirs)"
    )
    assert "theirs" not in found.groups


def test_gaps_are_named_where_ways_are_free_but_not_consecutive() -> None:
    first = plan(tree(), Held(), 4, [], [claim("a", 1), claim("b", 2), claim("c", 1)])
    second = plan(tree(root=0xFF0), held_after(first), 4, [], [claim("b", 2), claim("d", 2)])
    assert second.errors["d"] == (
        "cannot give 2 ways of L3 0: of 4 that are set aside 2 are free, at most 1 consecutive ones"
    )


def test_what_is_not_set_aside_cannot_be_had() -> None:
    assert plan(tree(), Held(), 0, [], [claim("a", 2)]).errors["a"] == (
        "cannot give 2 ways of L3 0: none are set aside for claims (exclusiveWays)"
    )
    assert plan(tree(names=()), Held(), 0, [], [claim("a", 2)]).errors["a"] == (
        "the L3 caches of this machine cannot be divided"
    )
    assert plan(tree(names=()), Held(), 4, [], []).notes == (
        "cannot set ways aside: the L3 caches of this machine cannot be divided",
    )


def test_where_devices_use_too_many_ways_none_are_set_aside_and_a_note_says_so() -> None:
    found = plan(tree(hardware=0x0F0), Held(), 5, [], [])
    assert found.aside == {} and found.root == {}
    assert found.notes[0] == (
        "cannot set 5 ways of L3 0 aside: it has 12, and devices use 0xf0 of them; the default group needs at least 1 "
        "consecutive ones"
    )


def test_the_groups_of_the_hardware_are_counted_and_their_users_named() -> None:
    machine = tree({"theirs": {0: FULL, 1: FULL}}, closids=4, root=0xFF0)
    found = plan(machine, Held(), 4, [], [claim("a", percent=50), claim("b", percent=50), claim("c", percent=50)])
    assert set(found.groups) == {"a", "b"}
    assert found.errors["c"] == (
        "all 4 groups that the hardware has (CLOSIDs) are in use: the default one, 2 of the agent, 1 of other programs "
        "(theirs)"
    )


def test_a_new_class_takes_no_group_of_a_claim() -> None:
    first = plan(tree(closids=2), Held(), 0, [], [claim("a", percent=50)])
    found = plan(tree(closids=2), held_after(first), 0, [SharedClass(group="k", name="k")], [claim("a", percent=50)])
    assert set(found.groups) == {"a"} and "CLOSIDs" in found.errors["k"]


def test_ways_stay_set_aside_while_claims_have_some() -> None:
    first = plan(tree(), Held(), 4, [], [claim("a", 2)])
    second = plan(tree(root=0xFF0), held_after(first), 0, [], [claim("a", 2)])
    assert second.aside == first.aside and second.groups == first.groups and second.root == first.root
    (note,) = second.notes
    assert note == "the ways that were set aside stay so while claims have some: exclusiveWays 0 applies later"
    third = plan(tree(root=0xFF0), held_after(second), 0, [], [])
    assert third.root == {"L3": {0: FULL, 1: FULL}} and not third.before and not third.aside


def test_what_another_program_has_made_of_the_default_group_is_not_given_back() -> None:
    first = plan(tree(), Held(), 4, [], [])
    assert plan(tree(root=0xF00), held_after(first), 0, [], []).root == {}


def test_a_class_shares_the_highest_ways_of_the_default_group() -> None:
    one = SharedClass(group="k", name="batch", ways={"L3": 2}, percent=15)
    assert plan(tree(), Held(), 4, [one], []).groups["k"].schemata == {
        "L3": {0: 0xC00, 1: 0xC00},
        "MB": {0: 20, 1: 20},
    }


@pytest.mark.parametrize(
    ("masks", "ways", "why"),
    [
        ({"L2": 0x3}, {}, "the machine has no L2 that can be divided, it has L3"),
        (
            {"L3CODE": 0x3},
            {},
            "the machine has no L3CODE that can be divided, it has L3: code and data are apart only if resctrl is "
            "mounted with cdp or cdpl2",
        ),
        ({"L3": 0x50}, {}, "L3 0 does not take it: 0x50 has gaps"),
        ({"L3": 0x1000}, {}, "L3 0 does not take it: 0x1000 has ways beyond 0xfff"),
        ({"L3": 0x18}, {}, "0x18 overlaps the ways 0xf of L3 0, set aside for claims"),
        ({}, {"L3": 9}, "9 ways of L3 0, of which the default group has 0xff0"),
    ],
)
def test_a_class_that_the_machine_cannot_have_is_refused_alone(
    masks: Mapping[str, int], ways: Mapping[str, int], why: str
) -> None:
    bad = SharedClass(group="bad", name="bad", masks=masks, ways=ways)
    good = SharedClass(group="good", name="good", ways={"L3": 2})
    found = plan(tree(), Held(), 4, [bad, good], [claim("a", 2)])
    assert found.errors == {"bad": f"cannot make class bad: {why}"}
    assert set(found.groups) == {"good", "a"}


def test_a_limit_of_bandwidth_holds_where_the_claims_cpus_are() -> None:
    found = plan(tree(), Held(), 0, [], [claim("a", 0, 1, percent=41)])
    assert found.groups["a"].schemata == {"L3": {0: FULL, 1: FULL}, "MB": {0: 100, 1: 50}}


@pytest.mark.parametrize(
    ("unit", "percent", "mbps", "expected"),
    [
        (Unit.PERCENT, 10, None, 10),
        (Unit.PERCENT, 11, 5000, 20),
        (Unit.PERCENT, 100, None, 100),
        (Unit.EIGHTHS, None, 2000, 16),
        (Unit.EIGHTHS, 50, 60, 1),
        (Unit.MIBPS, None, 1049, 1000),
        (Unit.PERCENT, None, None, None),
    ],
)
def test_bandwidth_is_what_the_hardware_counts(
    unit: Unit, percent: int | None, mbps: int | None, expected: int | None
) -> None:
    assert limit(tree(unit=unit), percent, mbps) == expected


@pytest.mark.parametrize(
    ("unit", "percent", "mbps", "why"),
    [
        (Unit.PERCENT, None, 500, "in percent on this machine: give memoryBandwidthPercent, or mount resctrl with mba"),
        (Unit.PERCENT, 5, None, "cannot limit memory bandwidth to 5 %: the least is 10 %"),
        (Unit.EIGHTHS, 50, None, "in MB/s on this machine: give memoryBandwidthMBps"),
        (None, 50, None, "cannot be limited on this machine: resctrl has no MB"),
    ],
)
def test_a_limit_that_the_machine_does_not_know_is_refused(
    unit: Unit | None, percent: int | None, mbps: int | None, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        limit(tree(unit=unit), percent, mbps)


STEPS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5), st.sampled_from([(0,), (1,), (0, 1)])), max_size=12)


@given(
    steps=STEPS,
    aside=st.integers(1, 8),
    theirs=st.lists(st.tuples(st.integers(0, FULL), st.integers(0, FULL)), max_size=2),
    hardware=st.sampled_from([0, 0xC00, 0x3]),
)
def test_no_way_has_two_holders_in_any_history(
    steps: list[tuple[int, int, tuple[int, ...]]], aside: int, theirs: list[tuple[int, int]], hardware: int
) -> None:
    """Claims come and go (a second time with the same name is the end of the first)."""
    foreign = {f"theirs{i}": {0: one, 1: two} for i, (one, two) in enumerate(theirs)}
    held, live = Held(), dict[str, Partition]()
    machine = tree(foreign, hardware=hardware)
    for number, ways, domains in steps:
        name = f"c{number}"
        if name in live:
            del live[name]
        else:
            live[name] = claim(name, ways, *domains)
        before = held
        found = plan(machine, held, aside, [], list(live.values()))
        held = held_after(found)
        cache = machine.caches["L3"]
        for domain in (0, 1):
            used = 0
            for one in found.groups.values():
                mask = one.own.get(domain, 0)
                assert not mask & used and not mask & ~found.aside.get(domain, 0)
                assert not mask or not fault(cache, mask)
                used |= mask
                root = found.root.get("L3", {}).get(domain, FULL)
                assert not mask & root and not fault(cache, root)
        for name, one in found.groups.items():
            assert all(one.own[domain].bit_count() == ways for domain, ways in live[name].ways.items())
            if name in before.groups:
                assert one.schemata == before.groups[name]
            else:
                assert not any(one.own.get(d, 0) & masks[d] for masks in foreign.values() for d in (0, 1))
        assert set(found.groups) | set(found.errors) == set(live)
        live = {name: one for name, one in live.items() if name not in found.errors}
