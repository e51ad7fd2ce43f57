"""Caches divided as claims and classes ask: made, repaired, given back, whenever the agent dies and whatever other
programs do. The kernel's side is a double (tests/doubles/resctrl.py); no hardware is behind it.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nodeagent.errors import HostError
from nodeagent.host.resctrl import tasks
from nodeagent.host.resctrl.tasks import TaskMover
from nodeagent.host.sysfs.sysfs import SysFs
from tests.doubles.cpufreq import Dead
from tests.doubles.resctrl import Ways
from tests.support.long_form import share_of
from tests.support.resctrl_node import ResctrlNode, grant

POD = "kubepods/podx/c1"
BATCH = {"name": "batch", "caches": {"L3": 2}, "memoryBandwidthPercent": 20}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResctrlNode:
    return ResctrlNode(tmp_path, monkeypatch)


def test_a_claim_has_ways_and_bandwidth_while_it_is_held(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2, memory_bandwidth_percent=45))
    report = node.round()
    assert report.notes == () and report.kept.made == {"nodeagent-a"}
    assert node.kernel.schemata("nodeagent-a") == {"L3": {0: 0x3, 1: 0xFF0}, "MB": {0: 50, 1: 100}}
    assert node.masks() == {0: 0xFF0, 1: 0xFF0}
    node.release("a")
    node.round()
    assert node.own() == set() and node.masks() == {0: 0xFF0, 1: 0xFF0}
    node.config = None
    node.round()
    assert node.kernel.state() == node.before and not node.memory.exists()


def test_nothing_is_read_or_written_where_nothing_is_configured(node: ResctrlNode) -> None:
    node.config = None
    node.kernel.mount.rename(node.root / "away")
    assert node.round().error == "" and not node.memory.exists() and not node.kernel.writes


def test_a_round_without_news_writes_nothing(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.writes.clear()
    record = node.memory.stat()
    assert node.round().kept.repaired == ()
    assert not node.kernel.writes and node.memory.stat().st_mtime_ns == record.st_mtime_ns


def test_a_claim_on_every_cache_is_exclusive_to_the_kernel_too(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-7", cache_ways=3))
    node.round()
    assert node.kernel.state()["nodeagent-a"][0] == "exclusive"
    node.round(exclusiveWays=4, classes=[BATCH])
    assert node.kernel.schemata("nodeagent-class-batch")["L3"] == {0: 0xC00, 1: 0xC00}


def test_a_class_is_made_changed_and_removed_with_the_configuration(node: ResctrlNode) -> None:
    node.round(classes=[BATCH])
    assert node.kernel.schemata("nodeagent-class-batch") == {"L3": {0: 0xC00, 1: 0xC00}, "MB": {0: 20, 1: 20}}
    node.round(classes=[{"name": "batch", "caches": {"L3": "0xf0"}}])
    assert node.kernel.schemata("nodeagent-class-batch") == {"L3": {0: 0xF0, 1: 0xF0}, "MB": {0: 100, 1: 100}}
    node.round(classes=[])
    assert node.kernel.state() == node.before


def test_a_class_of_a_cache_that_the_machine_lacks_is_said_and_harms_no_other(node: ResctrlNode) -> None:
    report = node.round(classes=[{"name": "tiny", "caches": {"L2": 1}}, BATCH])
    why = "cannot make class tiny: the machine has no L2 that can be divided, it has L3"
    assert report.notes == (why,) and report.why("nodeagent-class-tiny") == why
    assert node.own() == {"nodeagent-class-batch"}


def test_code_and_data_and_l2_are_divided_by_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = ResctrlNode(tmp_path, monkeypatch, cdp=True, caches={"L3": Ways(), "L2": Ways(full=0xFF)})
    node.hold(grant("a", "0-3", cache_ways=2))
    report = node.round(
        exclusiveWays=4, classes=[{"name": "k", "caches": {"L3CODE": "0xf0", "L3DATA": "0xff0", "L2": 2}}]
    )
    assert report.notes == ()
    code, data = ({0: one, 1: one} for one in (0xF0, 0xFF0))
    found = node.kernel.schemata("nodeagent-class-k")
    assert (found["L3CODE"], found["L3DATA"], found["L2"]) == (code, data, dict.fromkeys(range(4), 0xC0))
    mine = node.kernel.schemata("nodeagent-a")
    assert mine["L3CODE"] == mine["L3DATA"] == {0: 0x3, 1: 0xFF0}
    assert mine["L2"] == dict.fromkeys(range(4), 0xFF)


def test_amd_s_limits_are_in_mb_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = ResctrlNode(tmp_path, monkeypatch, bandwidth="amd", caches={"L3": Ways(full=0xFFFF, sparse=True)})
    node.hold(grant("a", "0-3", memory_bandwidth_mbps=2000), grant("b", "4-7", memory_bandwidth_percent=10))
    report = node.round()
    assert node.kernel.schemata("nodeagent-a")["MB"] == {0: 16, 1: 2048}
    assert report.why("nodeagent-b") == "memory bandwidth is limited in MB/s on this machine: give memoryBandwidthMBps"


def test_groups_that_the_hardware_does_not_have_are_refused_claim_by_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ResctrlNode(tmp_path, monkeypatch, closids=3)
    node.kernel.other("theirs")
    node.hold(grant("a", "0-3", memory_bandwidth_percent=50), grant("b", "4-7", memory_bandwidth_percent=50))
    report = node.round(exclusiveWays=0)
    assert report.why("nodeagent-a") == "" and report.why("nodeagent-b") == (
        "all 3 groups that the hardware has (CLOSIDs) are in use: the default one, 1 of the agent, 1 of other programs "
        "(theirs)"
    )
    node.release("a")
    assert node.round().why("nodeagent-b") == ""


def test_a_group_that_the_kernel_refuses_after_all_leaves_nothing(node: ResctrlNode) -> None:
    """Another program takes the last one between reading and making."""
    node.kernel.closids = 1
    node.hold(grant("a", "0-3", cache_ways=2))
    report = node.round()
    assert "No space left on device (Out of CLOSIDs)" in report.why("nodeagent-a")
    assert "nodeagent-a" not in node.memory.read_text() and node.own() == set()


def test_groups_of_others_are_left_alone_and_their_ways_not_given(node: ResctrlNode) -> None:
    node.round()
    node.kernel.other("theirs", L3={0: 0xFFC, 1: 0xFF0})
    before = node.kernel.schemata("theirs")
    node.hold(grant("a", "0-3", cache_ways=2), grant("b", "0-3", cache_ways=1))
    report = node.round()
    assert node.masks("nodeagent-a")[0] == 0x3
    assert report.why("nodeagent-b") == (
        "cannot give 1 ways of L3 0: of 4 that are set aside 0 are free, at most 0 consecutive ones, 2 are in groups "
        "of other programs (theirs)"
    )
    assert node.kernel.schemata("theirs") == before
    node.grants.clear()
    node.config = None
    node.round()
    assert set(node.kernel.groups) == {"", "theirs"} and node.kernel.schemata("theirs") == before


def test_a_group_of_another_program_that_takes_the_ways_meanwhile_refuses_the_claim(
    node: ResctrlNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives a new group every way that none has, and ways that are set aside are such."""
    make = node.kernel.mkdir

    def made_meanwhile(path: str) -> None:
        make(path)
        if path.endswith("nodeagent-a"):
            make(str(node.kernel.mount / "theirs"))

    node.round()
    monkeypatch.setattr("nodeagent.host.resctrl.write.mkdir", made_meanwhile)
    node.hold(grant("a", "0-3", cache_ways=2))
    report = node.round()
    assert report.why("nodeagent-a") == "its ways of L3 0 are also those of group theirs"
    assert node.own() == set() and set(node.kernel.groups) == {"", "theirs"}


def test_what_another_program_changes_is_repaired_and_counted(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.put(str(node.kernel.mount / "nodeagent-a/schemata"), "L3:0=1")
    node.kernel.put(str(node.kernel.mount / "schemata"), "L3:1=fff")
    assert node.round().kept.repaired == ("", "nodeagent-a")
    assert node.masks("nodeagent-a")[0] == 0x3 and node.masks()[1] == 0xFF0
    node.kernel.rmdir(str(node.kernel.mount / "nodeagent-a"))
    assert node.round().kept.repaired == ("nodeagent-a",)
    assert node.masks("nodeagent-a")[0] == 0x3


def test_ways_that_another_program_took_from_the_default_group_stay_taken_afterwards(node: ResctrlNode) -> None:
    node.round()
    node.kernel.put(str(node.kernel.mount / "schemata"), "L3:1=f00")
    node.config = None
    node.round()
    assert node.masks() == {0: 0xFFF, 1: 0xF00} and not node.memory.exists()


def test_ways_set_aside_move_only_while_no_claim_has_some(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    report = node.round(exclusiveWays=6)
    assert node.masks() == {0: 0xFF0, 1: 0xFF0} and "exclusiveWays 6 applies later" in report.notes[0]
    node.release("a")
    node.round()
    assert node.masks() == {0: 0xFC0, 1: 0xFC0}


def test_while_the_ledger_may_lack_grants_nothing_is_removed(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.grants.clear()
    node.ended = False
    node.round()
    assert node.own() == {"nodeagent-a"} and node.masks("nodeagent-a")[0] == 0x3
    node.ended = True
    node.round()
    assert node.own() == set()


def test_after_a_reboot_groups_are_made_again_and_nothing_old_is_given_back(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.reboot("boot-2")
    node.begin()
    assert node.round().why("nodeagent-a") == "" and node.masks("nodeagent-a")[0] == 0x3
    node.kernel.reboot("boot-3")
    node.kernel.put(str(node.kernel.mount / "schemata"), "L3:0=ff0;1=ff0")
    node.config = None
    node.begin()
    node.round()
    assert node.masks() == {0: 0xFF0, 1: 0xFF0} and not node.own()


def test_a_damaged_record_is_said_and_what_is_held_stays_as_it_is(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    before = node.kernel.state()
    node.memory.write_bytes(b"{")
    node.begin()
    report = node.round()
    assert "groups of resctrl that were made before stay as they are" in report.notes[-1]
    assert set(node.kernel.state()) == set(before)


def test_nothing_is_made_where_it_cannot_be_recorded(node: ResctrlNode) -> None:
    node.memory.mkdir(parents=True)
    (node.memory / "full").write_text("")
    node.hold(grant("a", "0-3", cache_ways=2))
    report = node.round()
    assert not node.kernel.writes and f"cannot remove {node.memory}" in report.why("nodeagent-a")


def test_where_resctrl_is_not_mounted_every_claim_says_so(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.kernel.mount.rename(node.root / "away")
    node.kernel.mount.mkdir()
    why = "cannot divide caches: it is not mounted: mount -t resctrl resctrl /sys/fs/resctrl"
    report = node.round()
    assert report.why("nodeagent-a") == why and report.notes == (why,)


def test_what_was_done_before_resctrl_was_unmounted_is_forgotten(node: ResctrlNode) -> None:
    """The kernel removes all groups then, and gives everything back to the default one."""
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.mount.rename(node.root / "away")
    node.kernel.mount.mkdir()
    node.config = None
    assert node.round().notes == () and not node.memory.exists()


def test_a_claim_whose_caches_are_not_known_is_refused(node: ResctrlNode) -> None:
    node.hold(grant("a", "12-13", cache_ways=2))
    assert node.round().why("nodeagent-a") == "the L3 caches of its CPUs are not known (cache/index3/id)"


def test_several_devices_of_a_claim_share_one_group(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-1", cache_ways=1), grant("a", "2-3", 1, cache_ways=3), grant("a", "4-5", 2, cache_ways=2))
    node.round()
    assert node.masks("nodeagent-a") == {0: 0x7, 1: 0x3}


def test_what_the_hardware_counts_is_read_where_it_can(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.count("nodeagent-a", "llc_occupancy", 0, "123456")
    node.kernel.count("nodeagent-a", "mbm_total_bytes", 0, "Unavailable")
    node.kernel.count("nodeagent-a", "mbm_local_bytes", 1, "Unassigned")
    found = node.round().counted["nodeagent-a"]
    assert found[("llc_occupancy", 0)] == 123456
    assert ("mbm_total_bytes", 0) not in found and ("mbm_local_bytes", 1) not in found


# ---------------------------------------------------------------- tasks


def mover(node: ResctrlNode) -> TaskMover:
    return TaskMover(SysFs(node.root), str(node.root / "sys/fs/cgroup"))


def test_tasks_of_a_container_are_moved_and_no_others(node: ResctrlNode) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.kernel.spawn(10, POD)
    node.kernel.spawn(11, f"{POD}/nested")
    node.kernel.spawn(20, "kubepods/podx/c2")
    node.containers = {POD: "nodeagent-a"}
    assert node.round().moved == 2
    assert node.kernel.tasks == {10: "nodeagent-a", 11: "nodeagent-a", 20: ""}
    node.kernel.spawn(12, POD, parent=10)
    assert node.round().moved == 0
    node.kernel.put(str(node.kernel.mount / "tasks"), "10")
    assert node.round().moved == 1 and node.kernel.tasks[10] == "nodeagent-a"


def test_tasks_that_begin_meanwhile_are_moved_too(node: ResctrlNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that has not been moved yet starts another one."""
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.spawn(10, POD)
    put, born = node.kernel.put, iter(range(11, 15))

    def busy(path: str, value: str) -> None:
        if path.endswith("tasks") and (tid := next(born, None)):
            node.kernel.spawn(tid, POD)
        put(path, value)

    monkeypatch.setattr("nodeagent.host.resctrl.write.put", busy)
    assert mover(node).assign("nodeagent-a", POD) == 5
    assert set(node.kernel.tasks.values()) == {"nodeagent-a"}


def test_a_task_that_ends_meanwhile_is_no_fault(node: ResctrlNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.spawn(10, POD)
    put = node.kernel.put

    def late(path: str, value: str) -> None:
        node.kernel.end(10, POD)
        put(path, value)

    monkeypatch.setattr("nodeagent.host.resctrl.write.put", late)
    assert mover(node).assign("nodeagent-a", POD) == 0


@pytest.mark.parametrize("parent", [None, 30])
def test_a_stranger_that_has_taken_over_an_id_goes_where_its_parent_is(
    node: ResctrlNode, monkeypatch: pytest.MonkeyPatch, parent: int | None
) -> None:
    """The task ended and its id was given to a process of another container just before it was written."""
    node.hold(grant("a", "0-3", cache_ways=2), grant("b", "4-7", cache_ways=2))
    node.kernel.spawn(30, "kubepods/pody/c3")
    node.containers = {"kubepods/pody/c3": "nodeagent-b"}
    node.round()
    node.kernel.spawn(10, POD)
    put = node.kernel.put

    def reused(path: str, value: str) -> None:
        monkeypatch.setattr("nodeagent.host.resctrl.write.put", put)
        node.kernel.end(10, POD)
        node.kernel.spawn(10, "kubepods/pody/c3", parent=parent, start=99)
        put(path, value)

    monkeypatch.setattr("nodeagent.host.resctrl.write.put", reused)
    assert mover(node).assign("nodeagent-a", POD) == 0
    assert node.kernel.tasks[10] == ("nodeagent-b" if parent else "")


def test_tasks_that_never_stop_beginning_are_an_error(node: ResctrlNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.round()
    node.kernel.spawn(10, POD)
    put = node.kernel.put

    def endless(path: str, value: str) -> None:
        node.kernel.spawn(max(node.kernel.tasks) + 1, POD)
        put(path, value)

    monkeypatch.setattr("nodeagent.host.resctrl.write.put", endless)
    with pytest.raises(HostError, match="they begin too fast"):
        mover(node).assign("nodeagent-a", POD)


def test_tasks_that_the_agent_cannot_see_are_an_error(node: ResctrlNode) -> None:
    node.kernel.spawn(10, POD)
    (node.root / "sys/fs/cgroup" / POD / "cgroup.threads").write_text("0\n")
    with pytest.raises(HostError, match="a PID namespace that the agent cannot see"):
        mover(node).threads(POD)


def test_a_task_that_the_kernel_refuses_to_move_is_an_error(node: ResctrlNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.hold(grant("a", "0-3", cache_ways=2))
    node.kernel.spawn(10, POD)
    node.containers = {POD: "nodeagent-a"}

    def refuse(path: str, tid: int) -> None:
        raise HostError(f"cannot write {path}/tasks: {os.strerror(errno.EPERM)}, value '{tid}'")

    monkeypatch.setattr(tasks, "add_task", refuse)
    report = node.round()
    assert "Operation not permitted" in report.astray[POD] and report.astray[POD] in report.notes


# ---------------------------------------------------------------- killed at any step


def test_killed_at_any_step_of_any_history_it_ends_as_the_ledger_says(node: ResctrlNode) -> None:
    """2,000 steps, a tenth of them in every run: claims held and released, configurations, other programs' groups, and
    kill -9 between any two calls to the kernel. At the end nothing of it is left."""
    chance = random.Random(7)
    configs: list[dict[str, Any]] = [
        {"exclusiveWays": 4},
        {"exclusiveWays": 6, "classes": [BATCH]},
        {"exclusiveWays": 0, "classes": [{"name": "other", "caches": {"L3": "0xf00"}}, BATCH]},
    ]
    for number in range(share_of(2000, 0.1)):
        uid = f"c{chance.randrange(8)}"
        if any(one.holder.uid == uid for one in node.grants.values()):
            node.release(uid)
        else:
            cpus = chance.choice(["0-3", "4-7", "0-7", "2-5"])
            node.hold(grant(uid, cpus, cache_ways=chance.randrange(1, 4), memory_bandwidth_percent=30))
        if chance.random() < 0.1:
            toggle(node, chance)
        if chance.random() < 0.5:
            node.kernel.dies_after = chance.randrange(8)
        config = chance.choice(configs) if chance.random() < 0.2 else {}
        try:
            node.round(**config)
        except Dead:
            node.begin()
        node.kernel.dies_after = None
        if number % 5 == 0:
            report = node.round()
            settled(node, report)
    if "theirs" in node.kernel.groups:
        node.kernel.rmdir(str(node.kernel.mount / "theirs"))
    node.grants.clear()
    node.config = None
    node.round()
    assert node.kernel.state() == node.before and not node.memory.exists()


def toggle(node: ResctrlNode, chance: random.Random) -> None:
    """Another program makes a group of some ways, or removes it."""
    if "theirs" in node.kernel.groups:
        node.kernel.rmdir(str(node.kernel.mount / "theirs"))
        return
    try:
        node.kernel.other("theirs", L3={0: 0xC00, 1: 0xC00 if chance.random() < 0.5 else 0xC})
    except (HostError, OSError):
        if "theirs" in node.kernel.groups:
            node.kernel.rmdir(str(node.kernel.mount / "theirs"))


def settled(node: ResctrlNode, report: Any) -> None:
    """The kernel has what the ledger and the configuration say, and no way has two owners."""
    assert node.config is not None
    classes = {f"nodeagent-class-{one.name}" for one in node.config.classes}
    claims = {f"nodeagent-{one.holder.uid}" for one in node.grants.values()}
    assert node.own() <= classes | claims
    assert report.kept.made <= node.own()
    for name, one in report.plan.groups.items():
        if name in report.kept.made:
            assert node.kernel.schemata(name) == {key: dict(values) for key, values in one.schemata.items()}
            others = [node.masks(other) for other in node.kernel.groups if other not in (name, "theirs")]
            assert not [domain for domain, mask in one.own.items() for them in others if them[domain] & mask]
