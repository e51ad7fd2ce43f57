"""Clamps of containers and of the cgroups above them: written, read back, repaired, given back, after kill -9 too."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeagent.core.uclamp.clamps import MAX, MIN, Clamp, text_of
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.cgroup_limits import Asking, LimitsReport, Wanted
from nodeagent.managers.uclamp.rounds import UclampRounds
from tests.builders.cgroup_tree import CgroupTree

TOP, QOS = "kubepods", "kubepods/burstable"
POD, MAIN, SIDE = f"{QOS}/poda", f"{QOS}/poda/main", f"{QOS}/poda/side"
OTHER = "kubepods/podb/main"
CONTAINERS = (MAIN, SIDE, OTHER)
CGROUPS = (TOP, QOS, POD, "kubepods/podb", *CONTAINERS)
HALF = 512


class Machine:
    """Two pods of different QoS classes, with three containers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, uclamp: bool = True) -> None:
        self.tree = CgroupTree(root, cpus="0-7", mems="0", uclamp=uclamp)
        monkeypatch.setattr(cgroupset, "put", self.tree.put)
        for path in CONTAINERS:
            self.tree.make(path)
        self.sysfs, self.memory = SysFs(root), root / "state/uclamp.json"
        self.begin()

    def begin(self) -> None:
        """Another agent on the same folders."""
        self.rounds = UclampRounds(self.sysfs, layouts(), self.memory)

    def keep(self, wanted: Mapping[str, Clamp], *, unknown: str = "", started: bool = False) -> LimitsReport:
        """One round in which it is known what all but one container ask for. started: it is one before a start."""
        asking = [Asking(whose=path, path=path, pod_path="", asks=(clamp,)) for path, clamp in wanted.items()]
        known = frozenset(one for one in CONTAINERS if one != unknown)
        asked = Wanted(asking=tuple(asking), known=known)
        return self.rounds.keep(asked, lambda path: started or path not in known)

    def values(self) -> dict[str, tuple[str, str]]:
        """Minimum and maximum of each cgroup."""
        there = [path for path in CGROUPS if (self.tree.mount / path).exists()]
        return {path: (self.tree.text(path, MIN), self.tree.text(path, MAX)) for path in there}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def low(percent: int) -> Clamp:
    return Clamp(min_hundredths=percent * 100)


def high(percent: int) -> Clamp:
    return Clamp(max_hundredths=percent * 100)


# ---------------------------------------------------------------- what is written


def test_a_minimum_is_in_effect_because_all_above_are_raised_and_others_stay_at_none(machine: Machine) -> None:
    found = machine.keep({MAIN: low(50)})
    assert machine.tree.clamped(MAIN) == (HALF, 1024) and not found.errors and MAIN in found.kept.made
    assert machine.tree.clamped(SIDE) == machine.tree.clamped(OTHER) == (0, 1024)
    raised = {path for path, (least, _) in machine.values().items() if least == "50.00"}
    assert raised == {TOP, QOS, POD, MAIN}


def test_a_maximum_is_the_containers_alone(machine: Machine) -> None:
    machine.keep({MAIN: high(50)})
    assert machine.tree.clamped(MAIN) == (0, HALF)
    assert [path for path, value in machine.values().items() if value != ("0.00", "max")] == [MAIN]


def test_a_cgroup_has_the_highest_minimum_that_is_needed_below_it(machine: Machine) -> None:
    machine.keep({MAIN: low(20), SIDE: low(40), OTHER: low(30)})
    least = {path: value[0] for path, value in machine.values().items()}
    assert (least[TOP], least[QOS], least[POD], least["kubepods/podb"]) == ("40.00", "40.00", "40.00", "30.00")
    machine.tree.remove(SIDE)
    machine.keep({MAIN: low(20), OTHER: low(30)})
    least = {path: value[0] for path, value in machine.values().items()}
    assert (least[TOP], least[QOS], least[POD]) == ("30.00", "20.00", "20.00")


def test_all_is_as_before_when_nobody_needs_it_any_longer(machine: Machine) -> None:
    before = machine.values()
    machine.keep({MAIN: Clamp(min_hundredths=1250, max_hundredths=5000), OTHER: low(100)})
    assert machine.values()[MAIN] == ("12.50", "50.00") and machine.values()[TOP] == ("max", "max")
    assert machine.memory.exists()
    machine.begin()
    assert machine.keep({}).errors == {}
    assert machine.values() == before and not machine.memory.exists()


def test_an_admins_minimum_above_is_not_lowered_and_comes_back(machine: Machine) -> None:
    machine.tree.set(TOP, MIN, "60")
    machine.tree.set(QOS, MIN, "10")
    machine.keep({MAIN: low(50)})
    assert machine.values()[TOP][0] == "60.00" and machine.values()[QOS][0] == "50.00"
    machine.keep({})
    assert machine.values()[TOP][0] == "60.00" and machine.values()[QOS][0] == "10.00"


def test_a_minimum_that_an_admin_raises_meanwhile_stays(machine: Machine) -> None:
    machine.keep({MAIN: low(50)})
    machine.tree.set(TOP, MIN, "90")
    assert machine.keep({MAIN: low(50)}).kept.drifts == {}
    machine.keep({})
    assert machine.values()[TOP][0] == "90.00" and not machine.memory.exists()


# ---------------------------------------------------------------- what others change


@pytest.mark.parametrize("path", [TOP, QOS, POD, MAIN])
def test_what_another_process_lowers_is_a_drift_and_is_repaired(machine: Machine, path: str) -> None:
    machine.keep({MAIN: low(50)})
    machine.tree.set(path, MIN, "0")
    found = machine.keep({MAIN: low(50)})
    (drift,) = found.kept.drifts[path]
    assert (drift.file, drift.found, drift.wanted) == (MIN, "0.00", "50.00")
    assert machine.tree.clamped(MAIN) == (HALF, 1024)
    assert machine.keep({MAIN: low(50)}).kept.drifts == {}


@given(said=st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([20, 50, 80]), st.booleans()), max_size=8))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_agents_that_take_turns_with_other_classes_count_no_drifts_of_each_other(
    said: list[tuple[int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Only what neither of them has written was changed by another process."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(tmp_path_factory.mktemp("any"), patch)
        before = machine.values()
        agents = machine.rounds, UclampRounds(machine.sysfs, layouts(), machine.memory)
        own, newest = {0: 0, 1: 0}, 0
        for agent, percent, is_changed in said:
            if is_changed:
                machine.tree.set(MAIN, MIN, "7")
            machine.rounds = agents[agent]
            found = machine.keep({MAIN: low(percent)})
            assert {*found.kept.drifts} == ({MAIN} if is_changed and own[agent] == newest == percent else set())
            assert machine.tree.clamped(MAIN)[0] == round(percent * 10.24) and not found.errors
            own[agent] = newest = percent
        machine.keep({})
        assert is_as(machine, before, changed=bool(said) and said[0][2])


def is_as(machine: Machine, before: Mapping[str, tuple[str, str]], *, changed: bool) -> bool:
    """Whether all is as before. changed: the container had another minimum by then."""
    return machine.values() == {**before, **({MAIN: ("7.00", "max")} if changed else {})}


def test_a_controller_that_is_switched_off_and_on_has_lost_nothing(machine: Machine) -> None:
    machine.keep({MAIN: low(50)})
    machine.tree.set(QOS, "cgroup.subtree_control", "-cpu")
    machine.tree.set(QOS, "cgroup.subtree_control", "+cpu")
    assert machine.values()[POD][0] == "0.00"
    machine.keep({MAIN: low(50)})
    assert machine.tree.clamped(MAIN) == (HALF, 1024)
    machine.keep({})
    assert machine.values()[POD][0] == "0.00"


def test_what_is_as_wanted_is_written_once(machine: Machine) -> None:
    machine.keep({MAIN: low(50)})
    machine.tree.writes.clear()
    before = machine.memory.stat().st_ino
    machine.keep({MAIN: low(50)})
    assert machine.tree.writes == [] and machine.memory.stat().st_ino == before


# ---------------------------------------------------------------- what is not known


@pytest.mark.parametrize("seen", [True, False])
def test_a_container_of_which_it_is_not_known_what_it_asks_for_keeps_its_minimum(machine: Machine, seen: bool) -> None:
    """It asks for the default class as far as is known, or for nothing."""
    machine.keep({MAIN: low(50), OTHER: low(10)})
    machine.tree.set(MAIN, MIN, "0")
    machine.begin()
    machine.keep({OTHER: low(10), **({MAIN: low(20)} if seen else {})}, unknown=MAIN)
    assert machine.tree.clamped(MAIN) == (HALF, 1024)
    machine.keep({OTHER: low(10)})
    assert machine.tree.clamped(MAIN) == (0, 1024) and machine.values()[TOP][0] == "10.00"


def test_a_container_that_is_gone_needs_nothing_although_nothing_is_known_of_it(machine: Machine) -> None:
    machine.keep({MAIN: low(50)})
    machine.tree.remove(MAIN)
    machine.keep({}, unknown=MAIN)
    assert machine.values()[TOP][0] == "0.00" and not machine.memory.exists()


def test_a_round_before_a_start_takes_nothing_from_others(machine: Machine) -> None:
    machine.keep({MAIN: low(50)})
    machine.keep({OTHER: low(10)}, started=True)
    assert machine.tree.clamped(MAIN) == (HALF, 1024)
    assert machine.tree.clamped(OTHER)[0] == 102


# ---------------------------------------------------------------- what cannot be


def test_a_refusal_above_is_the_error_of_the_containers_below(machine: Machine) -> None:
    machine.tree.refuses[f"{POD}/{MIN}"] = errno.EACCES
    found = machine.keep({MAIN: low(50), OTHER: low(10)})
    assert found.errors.keys() == {MAIN} and "Permission denied, value '50.00'" in found.errors[MAIN]
    assert machine.tree.clamped(OTHER)[0] == 102
    machine.tree.refuses.clear()
    assert machine.keep({MAIN: low(50), OTHER: low(10)}).errors == {}
    assert machine.tree.clamped(MAIN) == (HALF, 1024)


def test_a_kernel_without_the_files_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, uclamp=False)
    assert machine.rounds.unavailable() == "this kernel has no cpu.uclamp.min (CONFIG_UCLAMP_TASK_GROUP)"
    (tmp_path / "sys/fs/cgroup/kubepods/cgroup.controllers").write_text("cpuset hugetlb\n")
    assert "kubepods has no cpu, only 'cpuset hugetlb'" in machine.rounds.unavailable()


def test_a_machine_with_the_first_version_of_control_groups_is_named(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    rounds = UclampRounds(SysFs(tmp_path), layouts(), tmp_path / "uclamp.json")
    assert "is cgroup v1" in rounds.unavailable()
    assert "is cgroup v1" in rounds.keep(Wanted(), lambda path: False).error


def test_what_caps_a_minimum_is_a_note(machine: Machine) -> None:
    machine.tree.set(QOS, MAX, "20")
    limit = machine.tree.root / "proc/sys/kernel/sched_util_clamp_min"
    limit.parent.mkdir(parents=True)
    limit.write_text("256\n")
    found = machine.keep({MAIN: low(50), OTHER: low(25)})
    assert found.notes == (
        f"{MAIN}: kernel.sched_util_clamp_min is 256 of 1024, which caps its minimum",
        f"{MAIN}: {MAX} of {QOS} is 20.00, which caps its minimum",
    )
    limit.write_text("1024\n")
    machine.tree.set(QOS, MAX, "max")
    assert machine.keep({MAIN: low(50), OTHER: low(25)}).notes == ()


def test_what_cannot_be_recorded_is_not_done(machine: Machine) -> None:
    machine.memory.parent.write_text("no folder")
    assert "cannot write" in machine.keep({MAIN: low(50)}).error
    assert machine.tree.writes == []


# ---------------------------------------------------------------- kill -9


class Killed(BaseException):
    """kill -9."""


clamps = st.builds(
    Clamp,
    min_hundredths=st.none() | st.integers(0, 10_000),
    max_hundredths=st.none() | st.sampled_from([0, 2500, 9996, 10_000]),
)
asks = st.dictionaries(st.sampled_from(CONTAINERS), clamps)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(asks, st.integers(0, 8), st.sampled_from(["", *CONTAINERS])), max_size=4),
    asks,
    st.sampled_from(["0.00", "30.00", "max"]),
)
def test_after_kill_9_at_any_write_the_next_agent_ends_at_what_is_wanted_and_can_undo_it(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[tuple[dict[str, Clamp], int, str]],
    last: dict[str, Clamp],
    admins: str,
) -> None:
    """Each agent of the history dies before its Nth write of any file, and one of the containers may be unknown to it.
    An admin's minimum is above some of the containers."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(tmp_path_factory.mktemp("m"), patch)
        machine.tree.set(QOS, MIN, admins)
        before = machine.values()
        for wanted, writes, unknown in history:
            left = [writes]

            def put(path: str, value: str, left: list[int] = left) -> None:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                machine.tree.put(path, value)

            patch.setattr(cgroupset, "put", put)
            machine.begin()
            try:
                machine.keep(wanted, unknown=unknown)
            except Killed:
                pass
        patch.setattr(cgroupset, "put", machine.tree.put)
        machine.begin()
        assert not machine.keep(last).errors
        values = machine.values()
        for path, clamp in last.items():
            asked = (clamp.min_hundredths or 0, 10_000 if clamp.max_hundredths is None else clamp.max_hundredths)
            assert values[path] == tuple(map(text_of, asked))
            low_now, high_now = machine.tree.clamped(path)
            assert (low_now, high_now) == (min(_share(asked[0]), _share(asked[1])), _share(asked[1]))
        machine.begin()
        assert not machine.keep({}).errors
        assert machine.values() == before and not machine.memory.exists()


def _share(hundredths: int) -> int:
    return (hundredths * 1024 + 5000) // 10_000
