"""`nodeagent bench placement`: which CPUs it uses, that it leaves those of others alone, and what its figures mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli import main
from nodeagent.cli.node.bench._probe import Memory, wakeups_ns
from nodeagent.cli.node.bench.measure import Bench, Jitter, Measured, NodeMeasure, on_cpu
from nodeagent.cli.node.bench.plan import MIB, Plan, held_by_others, jittered, plan
from nodeagent.cli.node.bench.show import verdict
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import HostError, InputError, PeerError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.machines import machine

HERE = CpuSet(os.sched_getaffinity(0))


def grant(pod: str, cpus: str, *nodes: int) -> dict[str, Any]:
    pages = [{"size": "2Mi", "numa_node": node, "pages": 1} for node in nodes]
    return {"id": pod, "namespace": "a", "pod": pod, "cpus": cpus, "hugepages": pages, "memory": []}


@pytest.fixture
def two_nodes(tmp_path: Path) -> Inventory:
    return scan(SysFs(machine(tmp_path, "1s2n8c")), load_kinds())


# ---------------------------------------------------------------- the choice


def test_a_pod_is_measured_on_its_cpus_and_against_every_node(two_nodes: Inventory) -> None:
    grants = [grant("mine", "4-5"), grant("other", "6-7")]
    found = plan(two_nodes, grants, held_by_others(grants, EMPTY, "a/mine"), EMPTY, "a/mine")
    assert (str(found.cpus), str(found.local), found.nodes) == ("4-5", "1", (0, 1))


def test_the_memory_of_a_grant_is_where_its_pages_are(two_nodes: Inventory) -> None:
    grants = [grant("mine", "4-5", 0)]
    assert str(plan(two_nodes, grants, EMPTY, EMPTY, "a/mine").local) == "0"


def test_without_a_pod_it_takes_free_cpus_of_the_emptiest_node(two_nodes: Inventory) -> None:
    grants = [grant("other", "1-2,4")]
    found = plan(two_nodes, grants, held_by_others(grants, EMPTY, ""), CpuSet.parse("0"))
    assert (str(found.cpus), str(found.local)) == ("5-7", "1")


def test_a_pod_without_cpus_of_its_own_is_bad_input(two_nodes: Inventory) -> None:
    with pytest.raises(InputError, match="a/none holds no CPUs"):
        plan(two_nodes, [], EMPTY, EMPTY, "a/none")
    with pytest.raises(InputError, match="no CPU is free"):
        plan(two_nodes, [], CpuSet.parse("0-7"), EMPTY)


SETS = st.sets(st.integers(0, 7)).map(CpuSet)


@given(mine=SETS, others=SETS, kubelets=SETS, reserved=SETS, by_pod=st.booleans())
def test_cpus_of_others_are_never_chosen(
    mine: CpuSet, others: CpuSet, kubelets: CpuSet, reserved: CpuSet, by_pod: bool, tmp_path_factory: Any
) -> None:
    inventory = EIGHT or _eight(tmp_path_factory)
    grants = [grant("mine", str(mine)), grant("other", str(others))]
    pod = "a/mine" if by_pod else ""
    taken = held_by_others(grants, kubelets, pod)
    assert others <= taken and (by_pod or mine | kubelets <= taken)
    try:
        found = plan(inventory, grants, taken, reserved, pod)
    except InputError:
        return
    assert found.cpus and found.cpus.isdisjoint(others)
    assert found.cpus <= mine if by_pod else found.cpus.isdisjoint(mine | kubelets | reserved)


EIGHT: Inventory | None = None


def _eight(tmp_path_factory: Any) -> Inventory:
    global EIGHT  # noqa: PLW0603 - one machine for all examples
    EIGHT = scan(SysFs(machine(tmp_path_factory.mktemp("eight"), "1s2n8c")), load_kinds())
    return EIGHT


# ---------------------------------------------------------------- the measurement


def small(cpus: CpuSet) -> Plan:
    return Plan(whose="", cpus=cpus, local=CpuSet((0,)), nodes=(0,), skipped={7: "no memory"}, bytes_per_node=MIB)


def test_this_machine_is_measured_on_one_cpu_and_the_affinity_is_as_before() -> None:
    before, steps = os.sched_getaffinity(0), []
    found = Bench(small(CpuSet((min(HERE),))), SysFs("/"), lambda: EMPTY, steps.append).run(0.03)
    node, skipped = found.nodes
    assert not node.why_not and node.latency_ns and node.bytes_per_s, "with one node, no binding is needed"
    assert skipped == NodeMeasure(7, why_not="no memory")
    (jitter,) = found.jitter
    assert jitter.wakeups and jitter.median_ns <= jitter.p99_ns <= jitter.worst_ns
    assert os.sched_getaffinity(0) == before and steps


def test_a_node_that_the_machine_lacks_is_said_to_be_so() -> None:
    """Of several, each must be where it was bound to."""
    nodes = msgspec.structs.replace(small(CpuSet((min(HERE),))), nodes=(0, 1023))
    found = Bench(nodes, SysFs("/"), lambda: EMPTY, lambda _: None).run(0.03).nodes
    assert "no memory can be bound to it" in next(one for one in found if one.node == 1023).why_not


def test_cpus_that_are_granted_to_others_meanwhile_end_it() -> None:
    """Before the next step, not after the last."""
    answers = [EMPTY, CpuSet((min(HERE),))]
    bench = Bench(small(CpuSet((min(HERE),))), SysFs("/"), lambda: answers.pop(0), lambda _: None)
    with pytest.raises(PeerError, match="others have been granted"):
        bench.run(0.03)


def test_a_node_that_is_short_of_memory_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "sys/devices/system/node/node0"
    folder.mkdir(parents=True)
    (folder / "meminfo").write_text("Node 0 MemFree: 1024 kB\n")
    found = Bench(small(CpuSet((min(HERE),))), SysFs(tmp_path), lambda: EMPTY, lambda _: None).run(0.01)
    assert "only 1 MiB" in found.nodes[0].why_not


def test_a_cpu_that_this_process_may_not_use_is_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(HostError, match="cannot run on CPU 8190"), on_cpu(8190):
        pass
    assert os.sched_getaffinity(0) == before


def test_one_cpu_of_several_that_cannot_be_used_is_named() -> None:
    """And the threads of the others end."""
    bench = Bench(small(CpuSet((min(HERE), 8190))), SysFs("/"), lambda: EMPTY, lambda _: None)
    with pytest.raises(HostError, match="cannot run on CPU 8190"):
        bench.run(0.01)


def test_memory_lies_where_it_was_asked_for_or_nowhere() -> None:
    try:
        assert Memory(MIB, 0).nodes() == [0]
    except OSError:
        pass  # a kernel without NUMA, or one that forbids it
    with pytest.raises(OSError, match=r"."):
        Memory(MIB, 1023)
    for size, node in ((0, -1), (MIB + 1, -1), (MIB, -2), (MIB, 1024)):
        with pytest.raises(ValueError, match="cannot use"):
            Memory(size, node)


@pytest.mark.parametrize("mib", [1, 3, 64])
def test_a_walk_reads_all_of_the_memory(mib: int) -> None:
    """In one cycle: a shorter one would fit into a cache."""
    memory = Memory(mib * MIB, -1)
    assert memory.lines_walked() == mib * MIB // 64
    assert memory.latency_ns(0.001) > 0 and memory.bytes_per_s(0.001) > 0


def test_late_wakeups_are_counted_and_in_order() -> None:
    late = wakeups_ns(0.02, 1_000_000)
    assert late == sorted(late) and 1 <= len(late) <= 20 and late[0] >= 0
    for interval in (0, -1, 10**10):
        with pytest.raises(ValueError, match="cannot wake up"):
            wakeups_ns(0.01, interval)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_percentiles_are_in_order(late: list[int]) -> None:
    median, p99, worst = jittered(sorted(late))
    assert min(late) <= median <= p99 <= worst == max(late)


# ---------------------------------------------------------------- what it says


def measured(*nodes: NodeMeasure) -> Measured:
    jitter = (Jitter(4, 10, 1, 2, 3),)
    return Measured(plan=small(CpuSet((4,))), seconds=1.0, nodes=nodes, jitter=jitter)


def test_a_grant_is_compared_with_the_worst_node() -> None:
    latency, read = verdict(measured(NodeMeasure(0, 90.0, 20e9), NodeMeasure(1, 135.0, 10e9)))
    assert "90 ns" in latency and "node 1" in latency and "1.50 times" in latency
    assert "20.0 GB/s" in read and "0.50 times" in read


def test_one_node_has_nothing_to_be_compared_with() -> None:
    assert "One NUMA node" in next(verdict(measured(NodeMeasure(0, 90.0, 20e9))))
    assert "not measured" in next(verdict(measured(NodeMeasure(0, why_not="x"), NodeMeasure(1, 1.0, 1.0))))


def test_it_runs_on_this_machine_without_an_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--socket", str(tmp_path / "none"), "--state-dir", str(tmp_path), "--kubelet-dir", str(tmp_path)]
    assert main(["bench", "placement", *words, "--seconds", "0.5", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpus"] and found["limits"] and found["host_to_device"] is None
    assert len(found["wakeups"]) == len(CpuSet.parse(found["cpus"]))


@pytest.mark.parametrize(
    "words", [["--seconds", "0"], ["--seconds", "61"], ["--seconds", "nan"], ["--pod", "x"], ["--pod", "a/b/c"]]
)
def test_wrong_words_are_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "placement", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
