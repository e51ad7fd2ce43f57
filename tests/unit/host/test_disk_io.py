"""Disks by their numbers, and lines of io files: written, read back, repaired, taken out, after kill -9 too."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeagent.core.blockio.limits import BFQ_WEIGHT, LATENCY, THROTTLE, WEIGHT, parse
from nodeagent.errors import HostError
from nodeagent.host.blockio.disks import check_queue, disk_at, disks_like, weight_file
from nodeagent.host.blockio.keeper import IoKeeper
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.line_keeper import KeptLines
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.cgroup_tree import CgroupTree
from tests.builders.io_files import IoDisks, add_disk

POD, MAIN = "kubepods/poda", "kubepods/poda/main"
SLOW = "rbps=1000 wbps=max riops=max wiops=max"
SLOWER = "rbps=500 wbps=max riops=max wiops=max"


class Machine:
    """Two disks, one of them with partitions, a volume without a queue, and a pod with a container."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **kernel: tuple[str, ...]) -> None:
        disks = IoDisks({"8:0": "iocost", "259:0": "bfq", "253:0": ""}, {"8:1"}, **kernel)
        self.tree = CgroupTree(root, cpus="0-7", mems="0", io=disks)
        monkeypatch.setattr(cgroupset, "put", self.tree.put)
        add_disk(root, "sda", "8:0", partitions=("sda1",))
        add_disk(root, "nvme0n1", "259:0")
        (root / "sys/class/block/nvme0n1/queue/scheduler").write_text("mq-deadline [bfq] none\n")
        add_disk(root, "dm-0", "253:0", queue=False)
        (root / "sys/fs/cgroup/io.cost.qos").write_text("8:0 enable=1 ctrl=auto rpct=95.00\n259:0 enable=0 ctrl=auto\n")
        self.tree.make(MAIN)
        self.sysfs, self.memory = SysFs(root), root / "state/io.json"
        self.begin()

    def begin(self) -> None:
        """Another agent on the same folders."""
        self.keeper = IoKeeper(self.sysfs, str(self.tree.mount), layouts(), self.memory)

    def keep(self, wanted: Mapping[str, Mapping[str, Mapping[str, str]]]) -> KeptLines:
        return self.keeper.keep(wanted)

    def lines(self, path: str, file: str) -> dict[str, str]:
        return parse(self.tree.text(path, file))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# ---------------------------------------------------------------- disks


def test_a_partition_stands_for_the_disk_that_it_is_on(machine: Machine) -> None:
    assert disk_at(machine.sysfs, "/dev/sda1") == disk_at(machine.sysfs, "/dev/sda")
    assert disk_at(machine.sysfs, "/dev/sda1").number == "8:0"


def test_a_link_stands_for_what_it_leads_to(machine: Machine) -> None:
    link = machine.tree.root / "dev/disk/by-id/wwn-1"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../nvme0n1")
    assert disk_at(machine.sysfs, "/dev/disk/by-id/wwn-1").name == "nvme0n1"


@pytest.mark.parametrize("path", ["/dev/sdz", "/dev/null", "/dev/bus/usb/001"])
def test_what_is_no_disk_is_refused_by_its_name(machine: Machine, path: str) -> None:
    with pytest.raises(HostError, match=f"cannot limit I/O on {path}: it is no disk of this machine"):
        disk_at(machine.sysfs, path)


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["*"], {"sda", "nvme0n1", "dm-0"}),
        (["sd*", "/dev/sda1"], {"sda"}),
        (["nvme*", "/dev/dm-0"], {"nvme0n1", "dm-0"}),
        (["vd*", "/dev/vda"], set()),
        ([], set()),
    ],
)
def test_a_class_means_whole_disks_that_there_are(machine: Machine, patterns: list[str], found: set[str]) -> None:
    names = [one.name for one in disks_like(machine.sysfs, patterns)]
    assert set(names) == found and len(names) == len(found)


def test_a_weight_goes_to_what_distributes_the_disks_time(machine: Machine) -> None:
    assert weight_file(machine.sysfs, disk_at(machine.sysfs, "/dev/sda")) == WEIGHT
    assert weight_file(machine.sysfs, disk_at(machine.sysfs, "/dev/nvme0n1")) == BFQ_WEIGHT
    (machine.tree.root / "sys/class/block/nvme0n1/queue/scheduler").write_text("[none] bfq\n")
    with pytest.raises(HostError, match=r"its scheduler is none, not bfq, and .*io.cost.qos does not enable iocost"):
        weight_file(machine.sysfs, disk_at(machine.sysfs, "/dev/nvme0n1"))


def test_a_volume_has_no_queue_of_its_own(machine: Machine) -> None:
    check_queue(machine.sysfs, disk_at(machine.sysfs, "/dev/sda"))
    with pytest.raises(HostError, match="dm-0, or keep to a latency: it has no queue of requests"):
        check_queue(machine.sysfs, disk_at(machine.sysfs, "/dev/dm-0"))


# ---------------------------------------------------------------- lines


def test_lines_are_set_the_controller_is_enabled_above_and_all_is_taken_out_again(machine: Machine) -> None:
    found = machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}, POD: {LATENCY: {"8:0": "target=75"}}})
    assert found.made == {MAIN, POD} and not found.errors and not found.drifts
    assert machine.lines(MAIN, THROTTLE) == {"8:0": SLOW} and machine.lines(POD, LATENCY) == {"8:0": "target=75"}
    assert "io" in machine.tree.text("kubepods", "cgroup.subtree_control").split()
    assert machine.memory.exists()
    assert machine.keep({}).errors == {}
    assert machine.lines(MAIN, THROTTLE) == machine.lines(POD, LATENCY) == {}
    assert not machine.memory.exists()


def test_what_is_as_wanted_is_not_written_and_the_record_neither(machine: Machine) -> None:
    wanted = {MAIN: {THROTTLE: {"8:0": SLOW}}}
    machine.keep(wanted)
    machine.tree.writes.clear()
    before = machine.memory.stat()
    assert machine.keep(wanted).made == {MAIN}
    assert machine.tree.writes == [] and machine.memory.stat().st_ino == before.st_ino


def test_what_another_process_changes_is_a_drift_and_is_repaired(machine: Machine) -> None:
    wanted = {MAIN: {THROTTLE: {"8:0": SLOW}}}
    machine.keep(wanted)
    machine.tree.set(MAIN, THROTTLE, "8:0 rbps=max")
    found = machine.keep(wanted)
    (drift,) = found.drifts[MAIN]
    assert (drift.file, drift.found, drift.wanted) == (THROTTLE, "8:0", f"8:0 {SLOW}")
    assert machine.lines(MAIN, THROTTLE) == {"8:0": SLOW} and MAIN in found.made
    assert machine.keep(wanted).drifts == {}


def test_a_controller_that_is_switched_off_is_switched_on_again(machine: Machine) -> None:
    wanted = {MAIN: {THROTTLE: {"8:0": SLOW}}}
    machine.keep(wanted)
    machine.tree.set(POD, "cgroup.subtree_control", "-io")
    found = machine.keep(wanted)
    assert [one.found for one in found.drifts[MAIN]] == ["8:0"] and machine.lines(MAIN, THROTTLE) == {"8:0": SLOW}


def test_a_change_of_what_is_wanted_is_no_drift(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert machine.keep({MAIN: {THROTTLE: {"8:0": SLOWER}}}).drifts == {}
    assert machine.lines(MAIN, THROTTLE) == {"8:0": SLOWER}


def test_lines_of_others_stay_and_what_was_there_comes_back(machine: Machine) -> None:
    machine.tree.set("kubepods", "cgroup.subtree_control", "+io")
    machine.tree.set(POD, "cgroup.subtree_control", "+io")
    machine.tree.set(MAIN, THROTTLE, "259:0 wiops=7")
    machine.tree.set(MAIN, THROTTLE, "8:0 wbps=9000")
    before = machine.lines(MAIN, THROTTLE)
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    machine.begin()
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOWER}}})
    assert machine.lines(MAIN, THROTTLE) == {**before, "8:0": SLOWER}
    machine.keep({})
    assert machine.lines(MAIN, THROTTLE) == before


def test_what_another_process_has_changed_since_is_not_taken_out(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    machine.tree.set(MAIN, THROTTLE, "8:0 rbps=77")
    machine.keep({})
    assert machine.lines(MAIN, THROTTLE) == {"8:0": "rbps=77 wbps=max riops=max wiops=max"}
    assert not machine.memory.exists()


def test_nothing_is_taken_out_where_it_is_not_known_what_is_wanted(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    machine.begin()
    machine.keeper.keep({}, lambda path: path == MAIN)
    assert machine.lines(MAIN, THROTTLE) == {"8:0": SLOW} and machine.memory.exists()
    machine.keep({})
    assert machine.lines(MAIN, THROTTLE) == {}


def test_a_cgroup_that_is_gone_is_forgotten(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    machine.tree.remove(MAIN)
    found = machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert found == KeptLines() and not machine.memory.exists()


def test_a_disk_that_is_gone_took_its_lines_along(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    (machine.tree.root / "sys/dev/block/8:0").unlink()
    assert machine.tree.io is not None
    del machine.tree.io.disks["8:0"]
    assert machine.keep({}).errors == {} and not machine.memory.exists()


@pytest.mark.parametrize(
    ("number", "line", "cause"),
    [("8:1", SLOW, "No such device"), ("7:7", SLOW, "No such device"), ("8:0", "rbps=0", "Numerical result out")],
)
def test_a_refusal_of_the_kernel_is_the_cgroups_error_alone(
    machine: Machine, number: str, line: str, cause: str
) -> None:
    found = machine.keep({MAIN: {THROTTLE: {number: line}}, POD: {THROTTLE: {"8:0": SLOW}}})
    assert found.errors.keys() == {MAIN} and cause in found.errors[MAIN] and number in found.errors[MAIN]
    assert found.made == {POD}
    assert machine.keep({}).errors == {}


def test_a_kernel_without_the_controller_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    (machine.tree.mount / "kubepods/cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    found = machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert "cannot enable io in" in found.errors[MAIN] and "cpuset cpu hugetlb" in found.errors[MAIN]


def test_a_kernel_without_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, files=(THROTTLE,))
    found = machine.keep({POD: {LATENCY: {"8:0": "target=5"}}, MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert found.errors == {POD: f"cannot limit I/O in {machine.tree.mount}/{POD}: this kernel has no io.latency"}
    assert found.made == {MAIN}


def test_a_value_that_the_kernel_takes_and_does_not_show_is_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.tree.io is not None
    monkeypatch.setattr(machine.tree.io, "write", lambda file, text, value: text)
    found = machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert f"io.max has '' for disk 8:0, not '{SLOW}'" in found.errors[MAIN] and not found.made


def test_what_cannot_be_recorded_is_not_done(machine: Machine) -> None:
    machine.memory.parent.write_text("no folder")
    with pytest.raises(HostError):
        machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    assert not [one for one in machine.tree.writes if "io." in one[0]]


def test_an_unreadable_record_is_noted(machine: Machine) -> None:
    machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}})
    machine.memory.write_text("{")
    (note,) = machine.keep({MAIN: {THROTTLE: {"8:0": SLOW}}}).notes
    assert "limits of I/O that were set before stay as they are" in note


class Killed(BaseException):
    """kill -9."""


wanted_lines = st.dictionaries(
    st.sampled_from([POD, MAIN]),
    st.dictionaries(
        st.just(THROTTLE),
        st.dictionaries(st.sampled_from(["8:0", "259:0"]), st.sampled_from([SLOW, SLOWER]), min_size=1),
        min_size=1,
    ),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(wanted_lines, st.integers(0, 5)), max_size=4), wanted_lines)
def test_after_kill_9_at_any_write_the_next_agent_ends_at_what_is_wanted_and_can_undo_it(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[tuple[dict[str, dict[str, dict[str, str]]], int]],
    last: object,
) -> None:
    """Each agent of the history dies before its Nth write of any file."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(tmp_path_factory.mktemp("m"), patch)
        machine.keep({POD: {THROTTLE: {"8:0": SLOW}}, MAIN: {THROTTLE: {"8:0": SLOW}}})
        machine.keep({})
        machine.tree.set(MAIN, THROTTLE, "259:0 wiops=7")
        before = {path: machine.lines(path, THROTTLE) for path in (POD, MAIN)}
        for wanted, writes in history:
            left = [writes]

            def put(path: str, value: str, left: list[int] = left) -> None:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                machine.tree.put(path, value)

            patch.setattr(cgroupset, "put", put)
            machine.begin()
            try:
                machine.keep(wanted)
            except Killed:
                pass
        patch.setattr(cgroupset, "put", machine.tree.put)
        machine.begin()
        assert isinstance(last, dict)
        assert not machine.keep(last).errors
        for path, some in last.items():
            for file, lines in some.items():
                assert lines.items() <= machine.lines(path, file).items()
        machine.begin()
        assert not machine.keep({}).errors
        assert {path: machine.lines(path, THROTTLE) for path in (POD, MAIN)} == before
        assert not machine.memory.exists()


def test_the_double_refuses_as_the_kernel_does() -> None:
    kernel = IoDisks({"8:0": "iocost", "9:0": ""}, {"8:1"})
    refused = [
        (THROTTLE, "8:0 rbps=1", errno.EINVAL),
        (THROTTLE, "8:0 rbps=0", errno.ERANGE),
        (THROTTLE, "8:0 speed=5", errno.EINVAL),
        (THROTTLE, "8:0 rbps", errno.EINVAL),
        (THROTTLE, "rbps=5", errno.EINVAL),
        (THROTTLE, "8:1 rbps=5", errno.ENODEV),
        (THROTTLE, "8:9 rbps=5", errno.ENODEV),
        (LATENCY, "8:0 target=x", errno.EINVAL),
        (LATENCY, "8:0", errno.EINVAL),
        (WEIGHT, "8:0 0", errno.EINVAL),
        (WEIGHT, "9:0 50", errno.EOPNOTSUPP),
        (WEIGHT, "default 0", errno.EINVAL),
        (BFQ_WEIGHT, "8:0 50", errno.EOPNOTSUPP),
    ]
    for file, value, code in refused:
        with pytest.raises(OSError) as raised:
            kernel.write(file, "", value)
        assert raised.value.errno == code, value
