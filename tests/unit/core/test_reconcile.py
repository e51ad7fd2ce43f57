"""Kubelet's list against the ledger: who is named, who is missing, what is adopted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.ledger.reconcile import Findings, compare
from nodeagent.core.ledger.release import Memory, Patience
from nodeagent.core.ledger.witness import Witnesses
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder, Holding
from nodeagent.errors import InputError

PATIENCE = Patience(unconfirmed_s=60, confirmed_s=5)


def held(name: str, *ids: str, confirmed: bool = False, resource: str = "r", api: str = DEVICE_PLUGIN) -> Grant:
    return Grant(id=name, holder=Holder(api=api, resource=resource), ids=ids, confirmed=confirmed)


def ledger_of(*grants: Grant) -> Ledger:
    ledger = Ledger()
    for one in grants:
        ledger = grant(ledger, one)
    return ledger


def listed(pod: str, *ids: str, resource: str = "r") -> Holding:
    return Holding(namespace="ns", pod=pod, container="c", resource=resource, ids=ids)


def adopt(holding: Holding) -> Grant:
    if any(one.startswith("odd") for one in holding.ids):
        raise InputError(f"cannot allocate {', '.join(holding.ids)}: unknown")
    return held(f"new-{holding.pod}", *holding.ids, resource=holding.resource, confirmed=True)


def found(
    ledger: Ledger,
    *holdings: Holding,
    missing: Mapping[str, float] | None = None,
    now: float = 100.0,
    resources: Iterable[str] = ("r",),
    young: Iterable[str] = (),
) -> Findings:
    """missing: since when grants have been missing from the lists of a kubelet that listed all of them before."""
    memory = Memory(missing=missing or {}, listed=frozenset(ledger.grants))
    witnesses = Witnesses(given={})
    return compare(ledger, holdings, memory, now, PATIENCE, set(resources), adopt, set(young), witnesses)


def names(findings: Findings) -> dict[str, str]:
    return {one.id: one.holder.pod for one in findings.confirmed}


def test_a_listed_grant_gets_the_name_of_its_holder_once() -> None:
    """The second list has no news."""
    first = found(ledger_of(held("g", "1", "2")), listed("a", "1", "2"))
    assert names(first) == {"g": "a"}
    assert found(ledger_of(*first.confirmed), listed("a", "1", "2")).confirmed == ()


def test_the_audit_tells_a_pod_of_the_checkpoint_from_a_holder_that_kubelet_names() -> None:
    """A container that runs before the others is never listed."""
    before, named = held("a", "x"), held("b", "y")
    witnesses = Witnesses(given={("uid", "setup"): frozenset({("r", "x")})})
    ledger, none = ledger_of(before, named), frozenset[str]()
    done = compare(ledger, [listed("p", "y")], Memory(), 100.0, PATIENCE, {"r"}, adopt, none, witnesses)
    why = {one.grant.id: one.why for one in done.changes}
    assert why == {"a": "kubelet's checkpoint names its pod", "b": "kubelet names its holder"}


def test_a_grant_whose_ids_another_pod_has_now_gets_the_other_name() -> None:
    """The first pod ended between two lists."""
    first = found(ledger_of(held("g", "1")), listed("a", "1"))
    assert names(found(ledger_of(*first.confirmed), listed("b", "1"))) == {"g": "b"}


def test_an_init_container_is_not_taken_for_the_one_that_has_its_ids_now() -> None:
    """Kubelet lists both; the grant is named for the one that has the same ids."""
    ledger = ledger_of(held("init", "2", "3"), held("main", "1"))
    lists = [listed("a-main", "1"), listed("z-init", "1", "2", "3")]
    assert (
        names(found(ledger, *lists)) == names(found(ledger, *reversed(lists))) == {"init": "z-init", "main": "a-main"}
    )


def test_a_list_with_the_grant_ends_its_absence() -> None:
    """It starts again with the next list without."""
    ledger = ledger_of(held("g", "1"))
    assert found(ledger, listed("a", "1"), missing={"g": 1}).absences.memory.missing == {}


def test_part_of_a_grant_listed_keeps_the_whole() -> None:
    """Nothing that may be in use is released."""
    findings = found(ledger_of(held("g", "1", "2")), listed("a", "2"), missing={"g": 0}, now=999)
    assert (findings.released, names(findings)) == ((), {"g": "a"})


def test_what_the_list_is_too_old_to_know_is_left_alone() -> None:
    """Neither named for whom it lists nor missing."""
    ledger = ledger_of(held("g", "1"), held("h", "2"))
    findings = found(ledger, listed("a", "1"), missing={"h": 0}, now=999, young=["g", "h"])
    assert (findings.confirmed, findings.absences.memory.missing, findings.released) == ((), {}, ())


def test_a_claims_grant_is_never_missing() -> None:
    """Kubelet lists what its device manager gave."""
    findings = found(ledger_of(held("c", api=CLAIM)), missing={"c": 0}, now=9999)
    assert (findings.absences.memory.missing, findings.released) == ({}, ())


def test_ids_that_nobody_recorded_are_adopted_apart_from_those_that_are() -> None:
    """Also where one container has both; what is not served is not ours."""
    ledger = ledger_of(held("g", "1"))
    findings = found(ledger, listed("a", "1", "2"), listed("b", "3"), listed("x", "9", resource="other"))
    assert [(one.id, one.ids) for one in findings.adopted] == [("new-a", ("2",)), ("new-b", ("3",))]


def test_what_cannot_be_adopted_is_said_and_the_rest_goes_on() -> None:
    """One bad id of one pod is that pod's trouble."""
    findings = found(ledger_of(), listed("a", "odd"), listed("b", "1"))
    assert [(holding.pod, why) for holding, why in findings.unknown] == [("a", "cannot allocate odd: unknown")]
    assert [one.id for one in findings.adopted] == ["new-b"]


def test_what_is_not_served_any_more_is_held_while_it_is_listed() -> None:
    """And released when it is not."""
    ledger = ledger_of(held("g", "1", confirmed=True))
    assert found(ledger, listed("a", "1"), missing={"g": 0}, now=99, resources=()).released == ()
    assert len(found(ledger, missing={"g": 0}, now=999, resources=()).released) == 1


IDS = st.sets(st.sampled_from(["1", "2", "3", "4", "5", "odd"]), min_size=1, max_size=3)


@given(
    st.lists(st.tuples(IDS, st.booleans()), max_size=4),
    st.lists(IDS, max_size=4),
    st.floats(0, 1200),
    st.sets(st.integers(0, 3)),
)
def test_nothing_listed_is_ever_released_and_everything_listed_is_accounted_for(
    grants: list[tuple[set[str], bool]], lists: list[set[str]], now: float, young: set[int]
) -> None:
    """Whatever overlaps whatever."""
    taken: set[str] = set()
    ledger = Ledger()
    for number, (ids, confirmed) in enumerate(grants):
        ledger = grant(ledger, held(f"g{number}", *sorted(ids - taken), confirmed=confirmed))
        taken |= ids
    holdings = [listed(f"p{number}", *sorted(ids)) for number, ids in enumerate(lists)]
    before = {f"g{number}": 0.0 for number in range(len(grants))}
    findings = found(ledger, *holdings, missing=before, now=now, young={f"g{number}" for number in young})
    shown = {one for ids in lists for one in ids}
    for one in findings.released:
        assert not shown & set(one.ids)
        assert one.id in findings.absences.memory.missing
        assert now >= PATIENCE.unobserved_s
    adopted = {one for grant in findings.adopted for one in grant.ids}
    unknown = {one for holding, _ in findings.unknown for one in holding.ids}
    assert shown <= {one for _, one in ledger.by_id} | adopted | unknown
    assert all(ledger.grants[one.id].ids == one.ids for one in findings.confirmed)
