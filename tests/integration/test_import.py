"""Taking over what kubelet's own managers gave away: what becomes of it, that it lasts, and that it is given back."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.dra.cpu_pool import CPUS, CpuPool
from nodeagent.core.dra.memory_pools import SIZE, MemoryPool
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.core.kubelet import imports
from nodeagent.core.kubelet.assigned import Assigned, MemoryBlock, Said, assigned
from nodeagent.core.kubelet.imports import ImportPlan, ended
from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.ledger.ledger import ADOPTED, RELEASED, Change, Ledger
from nodeagent.core.ledger.release import Patience
from nodeagent.core.model.container import Container
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.pinning.plan import Situation
from nodeagent.state.agent import Agent
from nodeagent.state.store import FILE, Store
from nodeagent.state.values import AgentSettings
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.kubelet_process import kubelet, put
from tests.support.running import CPU, Running, running

MIB, GIB = 1 << 20, 1 << 30
A, B, C = "0aa0", "0bb0", "0cc0"
"""Pod UIDs."""


def cpus(text: str) -> CpuSet:
    return CpuSet.parse(text)


def node() -> Inventory:
    """CPUs 0-7 on NUMA node 0, 8-15 on node 1; 16 GiB and 64 pages of 2 MiB on each."""
    return inventory_of(even_rows(2, 1, 1, 8, 1), pages={(0, 2 * MIB): 64, (1, 2 * MIB): 64})


def of_cpus(**pods: Mapping[str, str]) -> tuple[Assigned, ...]:
    """Pods by UID: CPUs by container."""
    every = {(uid[1:], name): cpus(text) for uid, some in pods.items() for name, text in some.items()}
    return assigned(every, {}, {}, {})


def pages(nodes: tuple[int, ...], count: int) -> MemoryBlock:
    return MemoryBlock(nodes=nodes, page_bytes=2 * MIB, size_bytes=count * 2 * MIB)


def memory(nodes: tuple[int, ...], size: int) -> MemoryBlock:
    return MemoryBlock(nodes=nodes, page_bytes=MEMORY, size_bytes=size)


def ledger_of(*grants: Grant, reserved: CpuSet = EMPTY) -> Ledger:
    return Ledger(grants=MappingProxyType({one.id: one for one in grants}), reserved=reserved)


def planned(
    every: Iterable[Assigned],
    ledger: Ledger | None = None,
    *,
    there: Iterable[str] = (A, B, C),
    at: float = 7.0,
    on: tuple[bool, bool] = (True, True),
) -> ImportPlan:
    """on: whether the CPU manager and the memory manager are."""
    said = Said(assigned=tuple(every), cpus=on[0], memory=on[1])
    return imports.plan(node(), ledger or Ledger(), said, frozenset(there), at=at, boot_id="boot")


def shown(grants: Iterable[Grant]) -> dict[str, str]:
    return {one.id: str(one.cpus) for one in grants}


def whys(plan: ImportPlan) -> dict[str, str]:
    return {one.id: why for one, why in plan.refused}


# ---------------------------------------------------------------- who has what


def test_containers_of_different_pods_and_with_different_cpus_are_held_one_by_one() -> None:
    found = of_cpus(x0aa0={"b": "3", "a": "1-2"}, x0bb0={"a": "4"})
    assert [(one.id, str(one.cpus)) for one in found] == [("k-0aa0-a", "1-2"), ("k-0aa0-b", "3"), ("k-0bb0-a", "4")]


def test_what_an_init_container_leaves_to_others_is_held_once_by_all_of_them() -> None:
    """Kubelet gives its CPUs on to those after it and keeps its entry; who has nothing to do with it is apart."""
    found = of_cpus(x0aa0={"init": "1-2", "app": "1-4", "side": "5-6", "last": "6"})
    assert [(one.container, str(one.cpus)) for one in found] == [
        ("app", "3-4"),
        ("app,init", "1-2"),
        ("last,side", "6"),
        ("side", "5"),
    ]


def test_containers_that_share_an_init_containers_cpus_do_not_share_each_others() -> None:
    """Each has what kubelet gave it, and nothing is held twice; the init container has what both have while it runs."""
    found = of_cpus(x0aa0={"init": "1-4", "a": "1-2", "b": "3-4"})
    assert [(one.containers, str(one.cpus)) for one in found] == [(("a", "init"), "1-2"), (("b", "init"), "3-4")]
    taken = planned(found).taken
    containers = [Container(id=name, name=name, pod_uid=A, pod_id="s") for name in ("a", "b")]
    plan = Situation(inventory=node(), ledger=ledger_of(*taken)).plan(containers)
    assert {id: str(pin.cpus) for id, pin in plan.containers.items()} == {"a": "1-2", "b": "3-4"}


def test_a_pods_own_cpus_that_no_container_has_are_the_pods() -> None:
    """Its containers that share a pool of the pod hold that together."""
    mine = {(A, "own"): cpus("1"), (A, "x"): cpus("2-3"), (A, "y"): cpus("2-3")}
    found = assigned(mine, {A: cpus("1-5"), B: cpus("6")}, {}, {})
    assert [(one.id, str(one.cpus)) for one in found] == [
        ("k-0aa0", "4-5"),
        ("k-0aa0-own", "1"),
        ("k-0aa0-x,y", "2-3"),
        ("k-0bb0", "6"),
    ]


def test_cpus_and_memory_of_a_container_are_one() -> None:
    found = assigned({(A, "a"): cpus("1")}, {}, {(A, "a"): (memory((0,), GIB),), (B, "b"): (pages((1,), 3),)}, {})
    assert found == (
        Assigned(uid=A, containers=("a",), cpus=cpus("1"), blocks=(memory((0,), GIB),)),
        Assigned(uid=B, containers=("b",), blocks=(pages((1,), 3),)),
    )


def test_memory_of_a_whole_pod_counts_once() -> None:
    """What its containers have is part of it."""
    found = assigned(
        {}, {}, {(A, "a"): (memory((0,), GIB),), (A, "b"): (memory((0,), GIB),)}, {A: (memory((0,), GIB),)}
    )
    assert found == (Assigned(uid=A, containers=("a", "b"), blocks=(memory((0,), GIB),)),)


def test_who_has_nothing_is_not_there() -> None:
    """Kubelet writes containers without exclusive CPUs only in pods that have some."""
    assert assigned({(A, "a"): EMPTY}, {A: EMPTY}, {(A, "b"): ()}, {B: ()}) == ()


@given(
    st.dictionaries(
        st.tuples(st.sampled_from([A, B]), st.sampled_from("abcd")), st.sets(st.integers(0, 12), max_size=4), max_size=8
    ),
    st.dictionaries(st.sampled_from([A, B]), st.sets(st.integers(0, 12)), max_size=2),
)
def test_nothing_is_lost_and_nothing_of_one_pod_is_there_twice(
    mine: dict[tuple[str, str], set[int]], whole: dict[str, set[int]]
) -> None:
    """Every CPU of a pod is in exactly one of its sets, and each container is named by the sets of its own CPUs."""
    found = assigned(
        {key: CpuSet(some) for key, some in mine.items()}, {uid: CpuSet(some) for uid, some in whole.items()}, {}, {}
    )
    for uid in (A, B):
        of_pod = [one for one in found if one.uid == uid]
        every = sorted(cpu for one in of_pod for cpu in one.cpus)
        assert every == sorted(
            {*whole.get(uid, ()), *(cpu for (pod, _), some in mine.items() if pod == uid for cpu in some)}
        )
        for (pod, name), some in mine.items():
            if pod == uid:
                assert {cpu for one in of_pod if name in one.containers for cpu in one.cpus} == some


# ---------------------------------------------------------------- taking over


def test_what_runs_is_taken_over_as_the_pods_containers() -> None:
    found = [Assigned(uid=A, containers=("app",), cpus=cpus("1-2"), blocks=(memory((1,), GIB), pages((0,), 5)))]
    plan = planned(found)
    (grant,) = plan.taken
    assert grant == Grant(
        id="k-0aa0-app",
        holder=Holder(api=KUBELET, uid=A, container="app"),
        cpus=cpus("1-2"),
        hugepages=(Pages(node=0, page_bytes=2 * MIB, pages=5),),
        memory=((1, GIB),),
        granted_at=7.0,
        confirmed=True,
        boot_id="boot",
    )
    assert str(grant.holder) == "kubelet's pod 0aa0/app"
    assert [(one.action, one.grant.id) for one in plan.changes] == [(ADOPTED, "k-0aa0-app")]
    assert dict(plan.ledger.grants) == {grant.id: grant}


def test_taking_over_again_changes_nothing() -> None:
    found = [*of_cpus(x0aa0={"a": "1-2"}), Assigned(uid=B, containers=("b",), blocks=(memory((0, 1), 20 * GIB),))]
    first = planned(found)
    again = planned(found, first.ledger, at=99.0)
    assert (again.changes, again.refused, again.known) == ((), (), first.taken)


def test_what_kubelet_has_otherwise_now_follows_it() -> None:
    """Another set of CPUs; a container that has none any longer; a pod that ended: its CPUs are another one's."""
    before = planned(of_cpus(x0aa0={"a": "1-2", "b": "3"}, x0bb0={"a": "5"})).ledger
    plan = planned(of_cpus(x0aa0={"a": "1,4"}, x0cc0={"a": "5"}), before, there=(A, C))
    assert shown(plan.taken) == {"k-0aa0-a": "1,4", "k-0cc0-a": "5"}
    assert shown(plan.released) == {"k-0aa0-b": "3", "k-0bb0-a": "5"}
    assert [one.action for one in plan.changes] == [RELEASED, RELEASED, ADOPTED, ADOPTED]
    assert shown(plan.ledger.grants.values()) == {"k-0aa0-a": "1,4", "k-0cc0-a": "5"}


def test_a_manager_that_is_off_takes_nothing_back_by_its_silence() -> None:
    """Pods run on with what they have when kubelet has been reconfigured, one manager after the other."""
    both = [Assigned(uid=A, containers=("a",), cpus=cpus("1-2"), blocks=(memory((0,), GIB),))]
    before = planned(both).ledger
    assert planned([], before, on=(False, False)).changes == ()
    only_memory = [Assigned(uid=A, containers=("a",), blocks=(memory((0,), GIB),))]
    assert planned(only_memory, before, on=(False, True)).changes == ()
    less = [Assigned(uid=A, containers=("a",), blocks=(memory((0,), GIB // 2),))]
    (grant,) = planned(less, before, on=(False, True)).taken
    assert (str(grant.cpus), grant.memory) == ("1-2", ((0, GIB // 2),))
    only_cpus = [Assigned(uid=A, containers=("a",), cpus=cpus("3"))]
    (grant,) = planned(only_cpus, before, on=(True, False)).taken
    assert (str(grant.cpus), grant.memory) == ("3", ((0, GIB),))
    assert planned([], before, on=(True, True)).released == (before.grants["k-0aa0-a"],)


def test_a_pod_that_is_gone_is_left_alone() -> None:
    """Kubelet's state outlives its pods."""
    plan = planned(of_cpus(x0aa0={"a": "1"}, x0bb0={"a": "2"}), there=[B])
    assert shown(plan.taken) == {"k-0bb0-a": "2"}
    assert [one.id for one in plan.ended] == ["k-0aa0-a"]
    assert plan.refused == ()


def test_what_was_taken_over_of_a_pod_that_ended_is_left_to_the_agent() -> None:
    """It looks twice. Neither a state that is late nor a manager that is off gives it back here."""
    before = planned(of_cpus(x0aa0={"a": "1"})).ledger
    late = planned(of_cpus(x0aa0={"a": "1"}), before, there=[])
    assert ([one.id for one in late.ended], late.changes) == (["k-0aa0-a"], ())
    assert planned([], before, there=[], on=(False, False)).changes == ()


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (Assigned(uid=A, containers=("a",), cpus=cpus("0-1")), "CPUs 0: they are reserved"),
        (Assigned(uid=A, containers=("a",), cpus=cpus("2-3")), "3 held by shop/till/main"),
        (Assigned(uid=A, containers=("a",), cpus=cpus("15-17")), "CPUs 16-17 are not online"),
        (
            Assigned(uid=A, containers=("a",), blocks=(memory((7,), 1),)),
            "1 bytes of memory on NUMA node 7, where 0 are",
        ),
        (
            Assigned(uid=A, containers=("a",), blocks=(pages((1,), 50), pages((1,), 14), pages((1,), 1))),
            "2097152 bytes of 2Mi pages on NUMA node 1, where 0 are not granted",
        ),
        (
            Assigned(uid=A, containers=("a",), blocks=(pages((0, 1), 125),)),
            f"{250 * MIB} bytes of 2Mi pages on NUMA node 0,1, where {2 * MIB * 124} are not granted",
        ),
        (
            Assigned(uid=A, containers=("a",), blocks=(MemoryBlock(nodes=(0,), page_bytes=2 * MIB, size_bytes=MIB),)),
            f"{MIB} bytes of 2Mi pages on NUMA node 0, which is no whole number",
        ),
        (
            Assigned(uid=A, containers=("a",), blocks=(memory((1,), 15 * GIB),)),
            f"{15 * GIB} bytes of memory on NUMA node 1, where {14 * GIB} are not granted",
        ),
        (
            Assigned(uid=A, containers=("a",), blocks=(MemoryBlock(nodes=(0,), page_bytes=GIB, size_bytes=GIB),)),
            "1Gi pages on NUMA node 0, where 0 are not granted",
        ),
    ],
)
def test_what_cannot_be_taken_over_says_why(one: Assigned, why: str) -> None:
    """With the value; what else there is goes into the plan."""
    holder = Holder(api=DEVICE_PLUGIN, resource=CPU, namespace="shop", pod="till", container="main")
    taken = {"hugepages": (Pages(node=0, page_bytes=2 * MIB, pages=4),), "memory": ((1, 2 * GIB),)}
    held = Grant(id="g", holder=holder, cpus=cpus("3"), **taken)  # type: ignore[arg-type]
    plan = planned([one, *of_cpus(x0bb0={"b": "8"})], ledger_of(held, reserved=cpus("0")))
    assert why in whys(plan)["k-0aa0-a"]
    assert shown(plan.taken) == {"k-0bb0-b": "8"}


def test_memory_on_several_nodes_is_taken_from_one_after_the_other() -> None:
    """Kubelet does not say how much is on each; it fills them in that order."""
    found = [
        Assigned(uid=A, containers=("a",), blocks=(pages((0, 1), 70), memory((0, 1), 20 * GIB))),
        Assigned(uid=B, containers=("b",), blocks=(pages((0, 1), 50),)),
    ]
    first, second = planned(found).taken
    assert [(one.node, one.pages) for one in first.hugepages] == [(0, 64), (1, 6)]
    assert first.memory == ((0, 16 * GIB), (1, 4 * GIB))
    assert [(one.node, one.pages) for one in second.hugepages] == [(1, 50)]


def test_containers_without_a_pod_are_refused() -> None:
    said = Said(unnamed=(Assigned(uid="", containers=("4a1f",), cpus=cpus("1")),), cpus=True)
    plan = imports.plan(node(), Ledger(), said, frozenset(), at=1.0)
    assert [(one.container, why) for one, why in plan.refused] == [("4a1f", imports.OLD_FORM)]
    assert plan.changes == ()


def test_claims_are_offered_no_cpus_and_no_memory_that_were_taken_over() -> None:
    """The scheduler counts what claims hold; what no claim holds has to go from the capacity."""
    inventory, found = node(), [Assigned(uid=A, containers=("a",), cpus=cpus("1-3"), blocks=(memory((0,), GIB + 1),))]
    ledger = planned(found).ledger
    first = CpuPool().pool(inventory, ledger, {}, ALL_FEATURES).devices[0]
    assert first.capacity[CPUS].value == 5
    whole, left = (MemoryPool().pool(inventory, one, {}, ALL_FEATURES).devices[0] for one in (Ledger(), ledger))
    assert whole.capacity[SIZE].value - left.capacity[SIZE].value == GIB + 4096
    every = planned([Assigned(uid=A, containers=("a",), blocks=(memory((0,), 16 * GIB),))]).ledger
    assert MemoryPool().pool(inventory, every, {}, ALL_FEATURES).devices[0].taints


# ---------------------------------------------------------------- giving back


def test_a_pod_is_gone_when_two_looks_did_not_find_it() -> None:
    """And enough time lies between them; one that comes back in between has not been gone."""
    ledger = planned(of_cpus(x0aa0={"a": "1"}, x0bb0={"b": "2"})).ledger
    first = ended(ledger, {B}, {}, 10.0, 5.0)
    assert (dict(first.missing), first.released) == ({"k-0aa0-a": 10.0}, ())
    early = ended(ledger, {B}, first.missing, 14.9, 5.0)
    assert (dict(early.missing), early.released) == ({"k-0aa0-a": 10.0}, ())
    assert dict(ended(ledger, {A, B}, early.missing, 15.0, 5.0).missing) == {}
    last = ended(ledger, {B}, early.missing, 15.0, 5.0)
    assert (dict(last.missing), shown(last.released)) == ({}, {"k-0aa0-a": "1"})


def test_one_look_is_never_enough() -> None:
    """However little patience there is."""
    ledger = planned(of_cpus(x0aa0={"a": "1"})).ledger
    assert ended(ledger, (), {}, 10.0, 0.0).released == ()


def test_what_came_through_an_api_is_not_given_back_for_want_of_a_folder() -> None:
    held = Grant(id="g", holder=Holder(api=DEVICE_PLUGIN, resource=CPU, uid=A), cpus=cpus("1"))
    assert ended(ledger_of(held), (), {"g": 1.0}, 99.0, 5.0).released == ()


async def test_the_agent_gives_back_what_was_taken_over_when_the_pod_has_ended(folder: Path) -> None:
    """Durably, and not before; kubelet's own lists and silences have no say in it."""
    now_s = [100.0]
    store = Store(folder)
    taken = planned(of_cpus(x0aa0={"a": "1"}, x0bb0={"b": "2"})).taken
    store.save([Change(action=ADOPTED, grant=one) for one in taken], op="o", at=1.0)
    settings = AgentSettings(patience=Patience(unconfirmed_s=0.2, confirmed_s=5.0))
    agent = Agent(store, node(), settings, listing=_nobody, clock=lambda: now_s[0])
    try:
        assert await agent.release_ended({B}, "op") == ()
        assert agent.look_again_s == 0.0
        now_s[0] += 1000.0
        await agent.reconcile([], [], "op")
        assert shown(agent.ledger.grants.values()) == {"k-0aa0-a": "1", "k-0bb0-b": "2"}
        assert shown(await agent.release_ended({B}, "op")) == {"k-0aa0-a": "1"}
        assert agent.look_again_s is None
        assert shown(await agent.release(["k-0bb0-b"], "op")) == {"k-0bb0-b": "2"}
    finally:
        await agent.close()
    again = Store(folder)
    assert again.load() == ()
    again.close()


async def _nobody() -> tuple[()]:
    return ()


# ---------------------------------------------------------------- the command


STATIC = {
    "policyName": "static",
    "defaultCpuSet": "0,4-7",
    "entries": {A: {"app": "1-2"}, B: {"db": "3"}},
    "checksum": 3141592653,
}
STATIC_MEMORY = {
    "policyName": "Static",
    "machineState": {},
    "entries": {A: {"app": [{"numaAffinity": [0], "type": "hugepages-2Mi", "size": 8 * MIB}]}},
    "checksum": 1,
}
QUICK = {
    "resyncSeconds": 0.1,
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
}


class Node:
    """A machine of 8 CPUs on 2 NUMA nodes, kubelet's folder with two pods, and the ledger's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubelet = folder / "kubelet"
        self.state = folder / "state"
        self.root = machine(folder / "root", "1s2n4c-smt", hugepages={(0, 2 * MIB): (16, 16, 0)})
        for uid in (A, B):
            (self.kubelet / "pods" / uid).mkdir(parents=True)
        self.kubelet_says(STATIC)

    def kubelet_says(self, cpus: object = None, memory: object = None) -> None:
        for name, one in (("cpu_manager_state", cpus), ("memory_manager_state", memory)):
            if one is not None:
                (self.kubelet / name).write_text(json.dumps(one))

    def ends(self, uid: str) -> None:
        (self.kubelet / "pods" / uid).rmdir()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        places = ("--kubelet-dir", str(self.kubelet), "--state-dir", str(self.state), "--root", str(self.root))
        command = [sys.executable, "-m", "nodeagent", "import", "kubelet-state", *places, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)

    def report(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = self.run("-o", "json", *words)
        assert (done.returncode, done.stderr) == (code, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def grants(self) -> dict[str, Grant]:
        store = Store(self.state)
        try:
            return {one.id: one for one in store.load()}
        finally:
            store.close()


@pytest.fixture
def the_node(folder: Path) -> Node:
    return Node(folder)


def states(report: Mapping[str, Any]) -> dict[str, str]:
    return {f"{one['pod_uid']}/{one['container']}": one["state"] for one in report["entries"]}


def test_without_apply_nothing_is_written(the_node: Node) -> None:
    """Not even a ledger is made."""
    report = the_node.report()
    assert states(report) == {f"{A}/app": "new", f"{B}/db": "new"}
    assert (report["applied"], report["next"]) == (False, ["run it again with --apply"])
    assert not the_node.state.exists()


def test_applied_it_is_in_the_ledger_with_its_audit_and_a_second_run_changes_nothing(the_node: Node) -> None:
    the_node.kubelet_says(memory=STATIC_MEMORY)
    assert states(the_node.report("--apply")) == {f"{A}/app": "taken", f"{B}/db": "taken"}
    grants = the_node.grants()
    assert shown(grants.values()) == {f"k-{A}-app": "1-2", f"k-{B}-db": "3"}
    assert grants[f"k-{A}-app"].hugepages == (Pages(node=0, page_bytes=2 * MIB, pages=4),)
    assert grants[f"k-{A}-app"].holder == Holder(api=KUBELET, uid=A, container="app")
    again = the_node.report("--apply")
    assert states(again) == {f"{A}/app": "held", f"{B}/db": "held"}
    assert the_node.grants() == grants
    assert audit(the_node.state) == [("adopted", f"kubelet's pod {A}/app"), ("adopted", f"kubelet's pod {B}/db")]


def audit(state: Path) -> list[tuple[str, str]]:
    db = sqlite3.connect(state / FILE)
    try:
        return list(db.execute("SELECT action, holder FROM audit ORDER BY seq"))
    finally:
        db.close()


def test_it_says_how_to_go_on(the_node: Node) -> None:
    """The settings and files of those managers that are on; nothing more when they are off."""
    the_node.kubelet_says(memory=STATIC_MEMORY)
    steps = the_node.report("--apply")["next"]
    assert steps[0] == "stop kubelet"
    assert steps[1] == "set cpuManagerPolicy: none wherever it is set, memoryManagerPolicy: None wherever it is set"
    assert all(str(the_node.kubelet / f"{name}_manager_state") in steps[2] for name in ("cpu", "memory"))
    the_node.kubelet_says({"policyName": "none", "defaultCpuSet": "", "checksum": 1})
    the_node.kubelet_says(memory={"policyName": "None", "machineState": {}, "checksum": 1})
    after = the_node.report("--apply")
    assert (after["entries"], after["next"]) == ([], [])
    assert len(the_node.grants()) == 2


def test_it_says_where_a_policy_is_set(the_node: Node) -> None:
    """The file, the drop-in or the flag."""
    the_node.kubelet_says(memory=STATIC_MEMORY)
    file = put(the_node.root / "etc/k.yaml", "cpuManagerPolicy: static\n")
    kubelet(the_node.root, the_node.kubelet, "--config=/etc/k.yaml", "--memory-manager-policy=Static")
    assert the_node.report("--apply")["next"][1] == (
        f"set cpuManagerPolicy: none in {file}, "
        "memoryManagerPolicy: None in --memory-manager-policy of kubelet (process 812)"
    )
    kubelet(the_node.root, the_node.kubelet)
    assert the_node.report()["next"][1].count("wherever it is set") == 2


def test_one_that_cannot_be_taken_over_keeps_all_others_out(the_node: Node) -> None:
    """Exit code 3, the reason, and an untouched ledger."""
    (the_node.folder / "c.yaml").write_text("reservedCpus: '0,3'\n")
    words = ("--config", str(the_node.folder / "c.yaml"))
    for more in ((), ("--apply",)):
        report = the_node.report(*words, *more, code=3)
        assert states(report) == {f"{A}/app": "new", f"{B}/db": "refused"}
        assert (report["applied"], len(report["next"])) == (False, 1)
        assert [one["why"] for one in report["entries"] if one["why"]] == ["cannot grant CPUs 3: they are reserved"]
    assert the_node.grants() == {}


def test_the_table_says_the_same(the_node: Node) -> None:
    the_node.kubelet_says(memory=STATIC_MEMORY)
    the_node.ends(B)
    lines = the_node.run().stdout.splitlines()
    assert lines[0].split() == ["STATE", "POD", "UID", "CONTAINER", "CPUS", "HUGEPAGES", "MEMORY", "WHY"]
    assert lines[1].split() == ["new", A, "app", "1-2", "4x2Mi@node0", "-", "-"]
    assert lines[2].split()[:4] == ["ended", B, "db", "3"]
    assert "no longer has a folder" in lines[2]
    assert lines[3:] == ["next: run it again with --apply"]


def test_a_drained_node_has_nothing_to_take_over(the_node: Node) -> None:
    the_node.kubelet_says({"policyName": "static", "defaultCpuSet": "0-7", "checksum": 1})
    report = the_node.report("--apply")
    assert report["entries"] == []
    assert report["next"][0] == "stop kubelet"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"cpu_manager_state": "{"}, "cannot read {}/cpu_manager_state: Input data was truncated"),
        ({"memory_manager_state": "[]"}, "cannot read {}/memory_manager_state: Expected `object`, got `array`"),
        (
            {"cpu_manager_state": '{"policyName":"static","containerEntries":{}}'},
            "cannot import {}/cpu_manager_state: it has no defaultCpuSet",
        ),
    ],
)
def test_a_state_that_is_not_understood_is_one_line_and_exit_code_2(
    files: Mapping[str, str], message: str, the_node: Node
) -> None:
    """Nothing of it is taken over."""
    for name, text in files.items():
        (the_node.kubelet / name).write_text(text)
    done = the_node.run("--apply")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message.format(the_node.kubelet) in done.stderr
    assert not the_node.state.exists()


def test_a_folder_that_is_not_kubelets_is_exit_code_2(the_node: Node) -> None:
    done = the_node.run("--kubelet-dir", str(the_node.root))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"cannot read {the_node.root}/pods: No such file" in done.stderr


def test_a_ledger_that_cannot_be_written_is_exit_code_1(the_node: Node) -> None:
    the_node.state.write_text("in the way")
    done = the_node.run("--apply")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(the_node.state) in done.stderr


def test_a_damaged_ledger_is_not_taken_for_an_empty_one(the_node: Node) -> None:
    the_node.state.mkdir()
    (the_node.state / FILE).write_text("not a database, and longer than its header would be" * 9)
    done = the_node.run("--apply")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"cannot use {the_node.state / FILE}" in done.stderr
    assert the_node.grants() == {}


async def test_two_at_the_same_time_take_it_over_once(the_node: Node) -> None:
    """The second one finds what the first one did."""
    both = await asyncio.gather(*(asyncio.to_thread(the_node.report, "--apply") for _ in range(2)))
    assert sorted(next(iter(states(one).values())) for one in both) == ["held", "taken"]
    assert len(audit(the_node.state)) == 2


# ---------------------------------------------------------------- alongside a running agent


def alongside(the_node: Node, **config: Any) -> Any:
    resources = [{"name": "cpu", "kind": "cpu"}]
    return running(the_node.folder, root=the_node.root, **{"resources": resources, **QUICK, **config})


async def import_beside(the_node: Node, agent: Running) -> dict[str, Any]:
    words = ("--config", str(agent.config_file), "--apply")
    return await asyncio.to_thread(the_node.report, *words)


async def test_a_running_agent_hears_of_it_at_once(the_node: Node) -> None:
    """It waits for nothing else: it asks kubelet, and looks at the machine, once an hour."""
    slow = {"resyncSeconds": 3600, "release": {"pollSeconds": 3600}}
    async with FakeKubelet(the_node.kubelet), alongside(the_node, **slow) as agent:
        await agent.until("/v1/status", lambda status: status["refused"] and status["listed_at"])
        await import_beside(the_node, agent)
        await agent.until("/v1/grants", lambda grants: len(grants) == 2)


async def test_what_was_taken_over_is_nobody_elses_until_its_pod_has_ended(the_node: Node) -> None:
    """Also when kubelet's own manager is off by then."""
    async with FakeKubelet(the_node.kubelet) as kubelet, alongside(the_node) as agent:
        await agent.until("/v1/status", lambda status: status["refused"])
        await import_beside(the_node, agent)
        grants = await agent.until("/v1/grants", lambda grants: len(grants) == 2)
        assert {(one["api"], one["uid"], one["container"], one["cpus"]) for one in grants} == {
            (KUBELET, A, "app", "1-2"),
            (KUBELET, B, "db", "3"),
        }
        # Kubelet is told to manage none, as the command says.
        the_node.kubelet_says({"policyName": "none", "defaultCpuSet": "", "checksum": 1})
        await kubelet.restart()
        await kubelet.wait_allocatable(CPU, 5)
        held = {one["id"] for one in (await agent.ask("/v1/devices"))[1] if one["holder"].startswith("kubelet's pod")}
        assert held == {"cpu1", "cpu2", "cpu3"}
        the_node.ends(B)
        gone = await agent.said("released", grant=f"k-{B}-db")
        assert gone["holder"] == f"kubelet's pod {B}/db"
        await kubelet.wait_allocatable(CPU, 6)
        assert [one["id"] for one in (await agent.ask("/v1/grants"))[1]] == [f"k-{A}-app"]
        _, metrics = await agent.ask("/metrics")
        assert f'container="app",namespace="",pod="{A}",resource=""' in metrics


async def test_what_a_pod_holds_through_the_agent_is_not_taken_over_as_anothers(the_node: Node) -> None:
    """Each decides in its turn on what the other has done."""
    the_node.kubelet_says({"policyName": "none", "defaultCpuSet": "", "checksum": 1})
    async with FakeKubelet(the_node.kubelet) as kubelet, alongside(the_node) as agent:
        await kubelet.wait_allocatable(CPU, 8)
        await kubelet.admit_pod("shop", "till", {"main": {CPU: 8}})
        the_node.kubelet_says(STATIC)
        words = ("--config", str(agent.config_file), "--apply")
        report = await asyncio.to_thread(the_node.report, *words, code=3)
        assert states(report) == {f"{A}/app": "refused", f"{B}/db": "refused"}
        (grant,) = (await agent.ask("/v1/grants"))[1]
        assert grant["api"] == DEVICE_PLUGIN


async def test_what_was_taken_over_stays_while_nobody_can_see_the_pods(the_node: Node) -> None:
    """A folder of pods that cannot be read is not an empty one: it is said."""
    pods, aside = the_node.kubelet / "pods", the_node.kubelet / "aside"
    async with FakeKubelet(the_node.kubelet), alongside(the_node) as agent:
        await agent.until("/v1/status", lambda status: status["refused"])
        await import_beside(the_node, agent)
        await agent.until("/v1/grants", lambda grants: len(grants) == 2)
        pods.rename(aside)
        assert str(pods) in (await agent.said("ended-pods-unknown"))["error"]
        assert len((await agent.ask("/v1/grants"))[1]) == 2
        (aside / A).rmdir()
        aside.rename(pods)
        await agent.said("released", grant=f"k-{A}-app")
        assert [one["id"] for one in (await agent.ask("/v1/grants"))[1]] == [f"k-{B}-db"]


async def test_it_outlives_kill_9_of_the_agent(the_node: Node) -> None:
    async with FakeKubelet(the_node.kubelet), alongside(the_node) as agent:
        await agent.until("/v1/status", lambda status: status["refused"])
        await import_beside(the_node, agent)
        agent.signal(9)
        await agent.end()
        the_node.ends(A)
        await agent.start()
        await agent.said("released", grant=f"k-{A}-app")
        grants = await agent.until("/v1/grants", lambda grants: len(grants) == 1)
        assert [(one["id"], one["cpus"]) for one in grants] == [(f"k-{B}-db", "3")]


# ---------------------------------------------------------------- alongside kubelet's memory manager


async def test_pages_and_memory_are_refused_beside_the_static_memory_manager(the_node: Node) -> None:
    """In both APIs, with the way there; other kinds are served, and these too once it is off."""
    pages = {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 4, "serve": "both"}
    resources = [{"name": "cpu", "kind": "cpu"}, pages, {"name": "memory", "kind": "memory", "serve": "dra"}]
    the_node.kubelet_says({"policyName": "none", "defaultCpuSet": "", "checksum": 1}, STATIC_MEMORY)
    async with FakeKubelet(the_node.kubelet) as kubelet, alongside(the_node, resources=resources) as agent:
        await kubelet.wait_allocatable(CPU, 8)
        status = await agent.until("/v1/status", lambda status: len(status["refused"]) == 3)
        assert set(status["refused"]) == {"nodeagent.dev/pages", "pages through DRA", "memory through DRA"}
        for why in status["refused"].values():
            assert str(the_node.kubelet / "memory_manager_state") in why and "memoryManagerPolicy: None" in why
        assert "nodeagent.dev/pages" not in kubelet.registrations
        the_node.kubelet_says(memory={"policyName": "None", "machineState": {}, "checksum": 1})
        await kubelet.restart()
        await kubelet.wait_allocatable("nodeagent.dev/pages", 4)
        await agent.until("/v1/status", lambda status: status["refused"] == {})


async def test_a_memory_state_that_cannot_be_read_is_a_reason_too(the_node: Node) -> None:
    pages = {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 4}
    (the_node.kubelet / "memory_manager_state").write_text("{")
    the_node.kubelet_says({"policyName": "none", "defaultCpuSet": "", "checksum": 1})
    async with FakeKubelet(the_node.kubelet), alongside(the_node, resources=[pages]) as agent:
        status = await agent.until("/v1/status", lambda status: status["refused"])
        assert "cannot determine whether kubelet manages memory itself" in status["refused"]["nodeagent.dev/pages"]
