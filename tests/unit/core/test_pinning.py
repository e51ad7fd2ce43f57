"""What follows from the machine, the ledger and kubelet's records for every pod and container."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.container import RUNNING, STOPPED, Container, PageLimits, Resources
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.core.pinning.page_limits import allowed_to_pod
from nodeagent.core.pinning.plan import LOCAL, Rules, Situation, named_by, variable
from tests.unit.state.test_agent import machine

CPU = "nodeagent.dev/cpu"
MIB2, GIB = 2 << 20, 1 << 30
RESERVED = CpuSet([0])


def container(pod: str, name: str = "main", **more: Any) -> Container:
    more = {"state": RUNNING, "namespace": "ns", "pod_name": pod, **more}
    return Container(id=f"{pod}-{name}", pod_id=f"s-{pod}", pod_uid=f"uid-{pod}", name=name, **more)


def plugin_grant(id: str, cpus: str = "", **more: Any) -> Grant:
    own = CpuSet.parse(cpus)
    ids = more.pop("ids", None) or tuple(f"cpu{one}" for one in own)
    return Grant(id=id, holder=Holder(api=DEVICE_PLUGIN, resource=CPU), ids=ids, cpus=own, **more)


def listed(grant: Grant, pod: str, name: str = "main") -> Grant:
    from msgspec.structs import replace

    holder = replace(grant.holder, namespace="ns", pod=pod, container=name)
    return replace(grant, holder=holder, confirmed=True)


def claim_grant(uid: str, index: int, cpus: str = "", pods: Iterable[str] = (), **more: Any) -> Grant:
    holder = Holder(api=CLAIM, namespace="ns", claim=uid, uid=uid, resource="cpu.nodeagent.dev")
    return Grant(id=f"{uid}-{index}", holder=holder, ids=(), cpus=CpuSet.parse(cpus), pods=tuple(pods), **more)


def situation(
    *grants: Grant,
    given_to: Mapping[tuple[str, str], Iterable[str]] | None = None,
    allowed: Mapping[str, Mapping[int, int]] | None = None,
    **rules: Any,
) -> Situation:
    ids = {
        (f"uid-{pod}", name): frozenset((CPU, one) for one in some) for (pod, name), some in (given_to or {}).items()
    }
    ledger = Ledger(grants=MappingProxyType({one.id: one for one in grants}), reserved=RESERVED)
    return Situation(inventory=machine(), ledger=ledger, given=ids, rules=Rules(**rules), allowed=allowed or {})


def using(*grants: Grant) -> dict[str, str]:
    return {variable(one.id): one.id for one in grants}


# Whose a grant is


def test_kubelet_s_checkpoint_says_whose_a_grant_is_before_its_list_does() -> None:
    found = situation(plugin_grant("g", "4-5"), given_to={("db", "main"): ["cpu4", "cpu5"]})
    assert found.pin(container("db")).cpus == CpuSet.parse("4-5")
    assert found.pin(container("db", "other")).cpus is None
    assert found.pin(container("web")).grants == ()


def test_a_grant_that_kubelet_has_listed_is_that_container_s() -> None:
    found = situation(listed(plugin_grant("g", "4-5"), "db"))
    assert found.pin(container("db")).grants == ("g",)
    assert found.pin(container("db", "other")).grants == found.pin(container("web")).grants == ()


def test_an_old_record_counts_no_more_than_the_list() -> None:
    """Another pod has the ids by now."""
    found = situation(listed(plugin_grant("g", "4-5"), "new"), given_to={("old", "main"): ["cpu4", "cpu5"]})
    assert found.pin(container("old")).grants == ()
    assert found.pin(container("new")).grants == ("g",)


def test_a_claim_is_of_the_pods_that_it_is_reserved_for_and_of_their_containers_that_use_it() -> None:
    grant = claim_grant("c", 0, "4-5", ["uid-a", "uid-b"])
    found = situation(grant)
    for pod in ("a", "b"):
        assert found.pin(container(pod, env=using(grant))).cpus == CpuSet.parse("4-5")
        assert found.pin(container(pod)).grants == ()
    thief = found.pin(container("thief", env=using(grant)))
    assert thief.grants == () and thief.unproven == ("c-0",)


def test_a_container_with_several_claims_has_all_of_them() -> None:
    first, second = claim_grant("c", 0, "4-5", ["uid-a"]), claim_grant("d", 1, "8", ["uid-a"])
    pin = situation(first, second).pin(container("a", env=using(first, second)))
    assert (pin.grants, pin.cpus) == (("c-0", "d-1"), CpuSet.parse("4-5,8"))


def test_a_variable_under_another_name_names_nothing() -> None:
    env = {"NODEAGENT_CPU_GRANT": "g", "NODEAGENT_GRANT_X": "c-0", variable("c-0"): "c-1"}
    assert named_by(container("a", env=env)) == ()


def test_what_was_taken_over_from_kubelet_is_the_container_s_or_the_rest_of_the_pod_s() -> None:
    both = Grant(id="k-1", holder=Holder(api=KUBELET, uid="uid-a", container="one,two"), cpus=CpuSet.parse("4"))
    rest = Grant(id="k-2", holder=Holder(api=KUBELET, uid="uid-a", container=""), cpus=CpuSet.parse("5"))
    found = situation(both, rest)
    cpus = {name: found.pin(container("a", name)).cpus for name in ("one", "two", "three")}
    assert cpus == {"one": CpuSet([4]), "two": CpuSet([4]), "three": CpuSet([5])}


# What it is confined to


def test_memory_is_bound_to_the_nodes_of_pages_before_those_of_cpus() -> None:
    pages = (Pages(node=1, page_bytes=MIB2, pages=8),)
    found = situation(
        claim_grant("c", 0, "4-5", ["uid-a"]), claim_grant("c", 1, pods=["uid-a"], hugepages=pages), memory=LOCAL
    )
    both = container("a", env={variable(one): one for one in ("c-0", "c-1")})
    assert (found.pin(both).cpus, found.pin(both).mems) == (CpuSet.parse("4-5"), CpuSet([1]))
    alone = container("a", env={variable("c-0"): "c-0"})
    assert found.pin(alone).mems == CpuSet([0])
    assert situation(claim_grant("c", 0, "4-5", ["uid-a"])).pin(alone).mems is None


def test_pages_of_one_size_add_up_over_grants_and_a_neighbour_gets_none() -> None:
    some = [Pages(node=0, page_bytes=MIB2, pages=8), Pages(node=1, page_bytes=MIB2, pages=4)]
    grants = [claim_grant("c", number, pods=["uid-a"], hugepages=(one,)) for number, one in enumerate(some)]
    holder = container("a", env=using(*grants))
    plan = situation(*grants, allowed={"uid-a": {}}).plan([holder, container("a", "sidecar")])
    assert plan.containers[holder.id].hugepage_limits == {MIB2: 12 * MIB2}
    assert plan.containers["a-sidecar"].hugepage_limits == {MIB2: 0}
    assert plan.pods["uid-a"].hugepages_at_least == {MIB2: 12 * MIB2}


def limited(pages: int, limits: PageLimits, name: str = "main", **more: Any) -> Container:
    """A container of pod a with kubelet's limit of so many pages of 2 MiB."""
    return container("a", name, resources=Resources(hugepage_limits={MIB2: pages * MIB2}), page_limits=limits, **more)


def test_a_container_may_use_what_kubelet_allows_it_and_what_it_holds() -> None:
    """Its neighbours may use what kubelet allows them, and the pod all of that."""
    mine = claim_grant("c", 0, pods=["uid-a"], hugepages=(Pages(node=0, page_bytes=MIB2, pages=8),))
    holder = limited(3, PageLimits.ASKED, env=using(mine))
    others = [limited(5, PageLimits.ASKED, "sidecar"), limited(0, PageLimits.ASKED, "plain")]
    plan = situation(mine, allowed={"uid-a": {MIB2: 8 * MIB2}}).plan([holder, *others])
    assert plan.containers[holder.id].hugepage_limits == {MIB2: 11 * MIB2}
    assert plan.containers["a-sidecar"].hugepage_limits == {MIB2: 5 * MIB2}
    assert plan.containers["a-plain"].hugepage_limits == {MIB2: 0}
    assert plan.pods["uid-a"].hugepages_at_least == {MIB2: 16 * MIB2}


@pytest.mark.parametrize(
    ("limits", "kubelets", "whole"),
    [
        (PageLimits.ASKED, 0, 8),
        (PageLimits.ASKED, 9, 17),
        (PageLimits.COUNTED, 8, 8),  # the claim alone
        (PageLimits.COUNTED, 11, 11),  # the claim and 3 of the container's own
        (PageLimits.COUNTED, 3, 11),  # the claim was allocated before it was counted
        (PageLimits.FOUND, 8, 8),  # as the agent has set it
        (PageLimits.FOUND, 3, 11),  # as kubelet has, while the agent was away
        (PageLimits.FOUND, 11, None),  # of either: it stays
    ],
)
def test_no_page_of_a_claim_is_allowed_twice(limits: PageLimits, kubelets: int, whole: int | None) -> None:
    """Kubelet that counts claims has added them already; a limit that was found may be the agent's own."""
    mine = claim_grant("c", 0, pods=["uid-a"], hugepages=(Pages(node=0, page_bytes=MIB2, pages=8),))
    found = situation(mine).pin(limited(kubelets, limits, env=using(mine)))
    assert found.hugepage_limits == ({} if whole is None else {MIB2: whole * MIB2})


@given(st.sampled_from(PageLimits), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_a_limit_is_the_same_after_a_restart_and_never_more_than_kubelets_and_the_claims(
    limits: PageLimits, own: int, claimed: int, counted: bool
) -> None:
    """own: pages of the container's own limits. counted: whether kubelet has added what the claim holds."""
    mine = claim_grant("c", 0, pods=["uid-a"], hugepages=(Pages(node=0, page_bytes=MIB2, pages=claimed + 1),))
    kubelets = own + (claimed + 1 if counted and limits == PageLimits.COUNTED else 0)
    asked = limited(kubelets, limits, env=using(mine))
    first = situation(mine).pin(asked).hugepage_limits.get(MIB2, kubelets * MIB2)
    assert claimed + 1 <= first // MIB2 <= own + claimed + 1
    for described in (first // MIB2, kubelets):  # some runtimes tell the agent's limits later, others kubelet's
        again = limited(described, PageLimits.FOUND, env=using(mine))
        assert situation(mine).pin(again).hugepage_limits.get(MIB2, first) in (first, (claimed + 1) * MIB2)


@pytest.mark.parametrize("limits", PageLimits)
def test_where_the_runtime_passes_no_limits_on_containers_may_use_what_kubelet_allows_their_pod(
    limits: PageLimits,
) -> None:
    """containerd by default. A claim that two of them share counts once for the pod."""
    mine = claim_grant("c", 0, pods=["uid-a"], hugepages=(Pages(node=0, page_bytes=MIB2, pages=8),))
    holders = [container("a", name, env=using(mine), page_limits=limits) for name in ("one", "two")]
    found = situation(mine, allowed={"uid-a": {MIB2: 3 * MIB2, GIB: GIB}})
    plan = found.plan([*holders, container("a", "plain", page_limits=limits), container("b")])
    assert [plan.containers[one.id].hugepage_limits for one in holders] == [{MIB2: 11 * MIB2}] * 2
    assert plan.containers["a-plain"].hugepage_limits == {MIB2: 3 * MIB2}
    assert plan.pods["uid-a"].hugepages_at_least == {MIB2: 11 * MIB2}
    assert plan.containers["b-main"].hugepage_limits == plan.pods["uid-b"].hugepages_at_least == {}


def test_the_limits_of_a_pod_are_not_raised_before_what_kubelet_allows_it_is_known() -> None:
    mine = claim_grant("c", 0, pods=["uid-a"], hugepages=(Pages(node=0, page_bytes=MIB2, pages=8),))
    plan = situation(mine).plan([container("a", env=using(mine))])
    assert plan.pods["uid-a"].hugepages_at_least == {}
    assert plan.containers["a-main"].hugepage_limits == {MIB2: 8 * MIB2}


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_what_kubelet_allows_a_pod_is_found_again_and_never_more_than_it_did(
    own: int, claimed: int, plain: int, counted: bool
) -> None:
    """own: pages of kubelet's. claimed, plain: what the pod holds through claims and the device plugin. A limit that
    was raised gives the same again."""
    pages = [(Pages(node=0, page_bytes=MIB2, pages=one),) for one in (claimed, plain)]
    grants = claim_grant("c", 0, hugepages=pages[0]), plugin_grant("g", hugepages=pages[1])
    limit = {MIB2: (own + (claimed if counted else 0)) * MIB2}
    allowed = allowed_to_pod(limit, grants, ran=False, counted=counted)
    assert allowed == {MIB2: own * MIB2}
    raised = {MIB2: allowed[MIB2] + (claimed + plain) * MIB2}
    assert allowed_to_pod(raised, grants, ran=True, counted=counted) == allowed
    # Claims that were prepared before kubelet counted any.
    late = allowed_to_pod({MIB2: own * MIB2}, grants, ran=False, counted=True)[MIB2]
    assert late == (own - claimed if own >= claimed else own) * MIB2


def test_the_reserved_cpus_are_shared_where_nothing_else_is_left_or_where_it_is_said() -> None:
    assert situation().shared == CpuSet.parse("1-15")
    assert situation(strict_reservation=False).shared == CpuSet.parse("0-15")
    assert situation(plugin_grant("g", "1-15")).shared == RESERVED


def test_a_container_that_stopped_holds_its_pod_back_no_more() -> None:
    found = situation(plugin_grant("g", "4-5"), given_to={("db", "main"): ["cpu4", "cpu5"]})
    plan = found.plan([container("db", state=STOPPED), container("db", "side")])
    assert plan.pods["uid-db"].cpus == found.shared and plan.containers["db-side"].cpus is None


def test_nobody_else_is_confined_where_kubelet_does_it() -> None:
    found = situation(plugin_grant("g", "4-5"), given_to={("db", "main"): ["cpu4"]}, confine_others=False)
    plan = found.plan([container("db"), container("db", "side"), container("web")])
    assert plan.containers["db-main"].cpus == CpuSet.parse("4-5")
    assert [plan.containers[one].cpus for one in ("db-side", "web-main")] == [None, None]
    assert {pin.cpus for pin in plan.pods.values()} == {None} and plan.pod("uid-new").cpus is None


# Who has no name yet


def unnamed(pod: str, name: str = "main") -> Container:
    """What the watch of control groups knows of a container."""
    return Container(id=f"{pod}-{name}", pod_id="", pod_uid=f"uid-{pod}", name="")


def test_a_pod_keeps_what_it_was_given_while_a_container_there_has_no_name() -> None:
    """By each of those who say what pods were given."""
    imported = Grant(id="k", holder=Holder(api=KUBELET, uid="uid-old", container="one"), cpus=CpuSet.parse("8-9"))
    found = situation(
        plugin_grant("g", "4-5"), claim_grant("c", 0, "6", ["uid-claim"]), imported, given_to={("db", "main"): ["cpu4"]}
    )
    some = [unnamed(pod) for pod in ("db", "claim", "old", "web")]
    plan = found.plan(some, unnamed={one.id for one in some})
    held = {pod: plan.pod(f"uid-{pod}").cpus - plan.shared for pod in ("db", "claim", "old", "web")}  # type: ignore[operator]
    assert {pod: str(cpus) for pod, cpus in held.items()} == {"db": "4-5", "claim": "6", "old": "8-9", "web": ""}
    assert plan.open == {"uid-db", "uid-claim", "uid-old"}
    assert all(plan.containers[one.id].cpus is None for one in some)


def test_what_the_named_containers_hold_leaves_nothing_for_the_unnamed() -> None:
    """Those are sandboxes then, and are kept off it; also where an init container had it and has ended."""
    grants = plugin_grant("g", "4-5"), plugin_grant("h", "6")
    found = situation(*grants, given_to={("db", "main"): ["cpu4", "cpu5"], ("db", "init"): ["cpu6"]})
    sandbox, ended = unnamed("db", "sandbox"), container("db", "init", state=STOPPED)
    plan = found.plan([container("db"), ended, sandbox], unnamed={sandbox.id})
    assert (plan.open, plan.containers[sandbox.id].cpus) == (frozenset(), found.shared)
    plan = found.plan([container("db"), sandbox], unnamed={sandbox.id})
    assert (plan.open, plan.containers[sandbox.id].cpus) == ({"uid-db"}, None)
    assert plan.pods["uid-db"].cpus == found.shared | CpuSet.parse("4-6")


def test_ids_that_kubelet_s_record_has_for_two_pods_are_let_through_to_neither_by_guess() -> None:
    found = situation(plugin_grant("g", "4"), given_to={("old", "main"): ["cpu4"], ("new", "main"): ["cpu4"]})
    some = [unnamed("old"), unnamed("new")]
    plan = found.plan(some, unnamed={one.id for one in some})
    assert plan.open == frozenset() and plan.pod("uid-old").cpus == found.shared


@given(st.lists(st.lists(st.tuples(st.sampled_from("es"), st.booleans()), max_size=3), max_size=6))
def test_no_silence_takes_cpus_from_who_holds_them_or_lets_others_near(pods: list[list[tuple[str, bool]]]) -> None:
    """Every pod's containers, "e" with two CPUs of its own, and whether each of them was named."""
    grants, given_to, containers, held = [], {}, [], {}
    for number, some in enumerate(pods):
        for place, (kind, named) in enumerate(some):
            one = (container if named else unnamed)(f"p{number}", f"c{place}")
            containers.append((one, named))
            low = 1 + 2 * len(grants)
            if kind == "e" and low < 15:
                grants.append(plugin_grant(f"g{low}", f"{low}-{low + 1}"))
                given_to[f"p{number}", f"c{place}"] = [f"cpu{low}", f"cpu{low + 1}"]
                held[one.id] = CpuSet.parse(f"{low}-{low + 1}")
    found = situation(*grants, given_to=given_to)
    plan = found.plan([one for one, _ in containers], unnamed={one.id for one, named in containers if not named})

    def effective(one: Container, written: CpuSet) -> CpuSet:
        """written: what its own file says already."""
        above, own = plan.pod(one.pod_uid).cpus or EMPTY, plan.containers[one.id].cpus or written
        return (own & above) or above

    for one, named in containers:
        mine = held.get(one.id, EMPTY)
        of_others = union(cpus for id, cpus in held.items() if id != one.id)
        of_other_pods = union(cpus for id, cpus in held.items() if id.split("-")[0] != one.id.split("-")[0])
        assert not mine or effective(one, mine) == mine
        assert effective(one, mine).isdisjoint(of_others if named else of_other_pods)


@given(st.lists(st.sampled_from(["", "e", "s", "es", "ee"]), max_size=7), st.booleans())
def test_no_two_containers_ever_meet_on_exclusive_cpus(pods: list[str], strict: bool) -> None:
    """Every pod's containers, "e" with two CPUs of its own, "s" with none."""
    grants, given_to, containers = [], {}, []
    for number, kinds in enumerate(pods):
        for place, kind in enumerate(kinds):
            containers.append(container(f"p{number}", f"c{place}"))
            low = 1 + 2 * len(grants)
            if kind == "e" and low < 15:
                grants.append(plugin_grant(f"g{low}", f"{low}-{low + 1}"))
                given_to[f"p{number}", f"c{place}"] = [f"cpu{low}", f"cpu{low + 1}"]
    found = situation(*grants, given_to=given_to, strict_reservation=strict)
    plan = found.plan(containers, [f"uid-p{number}" for number in range(len(pods))])

    def effective(one: Container) -> CpuSet:
        above = plan.pod(one.pod_uid).cpus or EMPTY
        return ((plan.containers[one.id].cpus or above) & above) or above

    for one in containers:
        pin = plan.containers[one.id]
        assert not pin.exclusive or effective(one) == pin.held
        others = union(plan.containers[other.id].held for other in containers if other is not one)
        assert effective(one) and effective(one).isdisjoint(others)
