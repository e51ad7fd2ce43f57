"""MPS daemons and time slices follow the ledger: started, adopted, repaired and ended, whatever is killed and when.

The agent of these histories is a fork of this process that does one comparison and is killed at a random moment of it,
or not; the daemons are real processes (tests/doubles/nvidia.py), and so are their clients' connections.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent.aio.supervise import cancel_all
from nodeagent.core.events.happenings import unreported
from nodeagent.core.sharing.mps import MpsSet, mps_sets
from nodeagent.host import nvidia_smi
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.mps import control, processes
from nodeagent.host.mps.processes import is_of, pipes_below, process_id, processes_of
from nodeagent.host.nvidia_smi import INTERVALS, NvidiaSmi
from nodeagent.host.sysfs.atomic_file import entries
from nodeagent.managers.sharing import manager
from nodeagent.managers.sharing.journal import DaemonRecord, SharingJournal, Stage
from nodeagent.managers.sharing.manager import SharingManager
from nodeagent.managers.sharing.mps_daemons import Kept, MpsDaemons
from nodeagent.managers.sharing.time_slices import TimeSlices
from tests.doubles.nvidia import CONTROL, SMI, Client, Programs
from tests.support.claim_node import claim_room
from tests.support.dra_node import consumed
from tests.support.long_form import share_of
from tests.support.until import until

NAMES = ("000000000001", "000000000002", "000000000003")
STEPS, HISTORIES = 50, share_of(40, 0.025)
"""2,000 random steps in the long form."""
PATIENCE_S = 120.0


@dataclass
class SharingNode:
    """What an agent of a node has of GPUs that are shared."""

    folder: Path
    programs: Programs
    boot_id: str = "boot"
    daemons: MpsDaemons = field(init=False)
    slices: TimeSlices = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another agent on the same folders."""
        journal, smi = SharingJournal(self.folder / "state", self.boot_id), NvidiaSmi()
        self.daemons = MpsDaemons(journal, self.folder / "run", DriverSearch(), smi)
        self.slices = TimeSlices(journal, smi)
        self.journal = journal

    @property
    def root(self) -> Path:
        return self.folder / "run" / "mps"

    def pipe(self, name: str) -> Path:
        return self.root / name / "pipe"

    def keep(self, *sets: MpsSet, ended: bool = True) -> Kept:
        return self.daemons.keep({one.name: one for one in sets}, ended=ended)

    def kept(self, *sets: MpsSet) -> Kept:
        found = self.keep(*sets)
        assert not found.errors
        return found

    def record(self, name: str = NAMES[0]) -> DaemonRecord:
        return self.journal.daemons()[name]

    def left(self) -> list[str]:
        """Whatever there is of daemons: files, records and processes."""
        files = [str(one) for one in self.root.rglob("*")] if self.root.exists() else []
        return [*files, *self.journal.daemons(), *map(str, pipes_below(self.root))]


@pytest.fixture
def node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharingNode]:
    programs = Programs(folder / "bin")
    programs.install(gpus={"GPU-0": {}, "GPU-1": {"slice": 1}, "GPU-p": {"mode": "Prohibited"}, "GPU-m": {"mig": True}})
    monkeypatch.setenv("PATH", f"{programs.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(control, "ANSWER_S", PATIENCE_S)  # a busy machine is no failure
    monkeypatch.setattr(control, "START_S", PATIENCE_S)
    monkeypatch.setattr(control, "END_S", (PATIENCE_S, PATIENCE_S))
    monkeypatch.setattr(nvidia_smi, "DEADLINE_S", PATIENCE_S)
    found = SharingNode(folder, programs)
    yield found
    for pipe in pipes_below(found.root):
        processes.end(pipe, (0.0, PATIENCE_S))


def mps_set(name: str = NAMES[0], uuid: str = "GPU-0", percent: int = 100, mib: int = 0, **more: object) -> MpsSet:
    facts = {"devices": (f"device-{name}",), "holders": ("claim ns/c",), "uuids": (uuid,), "parents": (uuid,), **more}
    memory = {0: mib} if mib else {}
    return MpsSet(name=name, threads_percent=percent, memory_mib=memory, **facts)  # type: ignore[arg-type]


def kill(pid: int) -> None:
    """End a process, and return once it has ended: a signal only asks for that."""
    victim = process_id(pid)
    os.kill(pid, signal.SIGKILL)
    while process_id(pid) == victim:
        time.sleep(0.001)


# Daemons


def test_what_is_wanted_runs_with_its_limits_and_what_is_not_leaves_nothing(node: SharingNode) -> None:
    node.kept(mps_set(percent=40, mib=1024), mps_set(NAMES[1], "GPU-1"))
    client = Client(node.pipe(NAMES[0]))
    assert (client.percent, client.limits) == (40.0, {"0": "1024M"})
    node.kept(mps_set(percent=70, mib=2048))
    later = Client(node.pipe(NAMES[0]))
    assert (later.server, later.percent, later.limits) == (client.server, 70.0, {"0": "2048M"})
    assert [one.name for one in node.root.iterdir()] == [NAMES[0]]
    assert not client.lost
    node.kept()
    assert client.lost
    assert node.left() == []
    assert not node.journal.path.exists()


def test_another_agent_adopts_a_daemon_and_its_clients_do_not_notice(node: SharingNode) -> None:
    node.kept(mps_set())
    client, before = Client(node.pipe(NAMES[0])), node.record()
    node.restart()
    assert node.kept(mps_set()).restarted == ()
    assert (node.record(), client.lost) == (before, False)


def test_a_daemon_that_ended_is_started_again_in_its_folder_and_that_is_told(node: SharingNode) -> None:
    """The folder is the one that containers have mounted."""
    node.kept(mps_set(mib=512))
    client, inode = Client(node.pipe(NAMES[0])), node.pipe(NAMES[0]).stat().st_ino
    kill(node.record().pid)
    assert node.kept(mps_set(mib=512)).restarted == (NAMES[0],)
    assert client.lost
    assert (node.record().restarts, node.pipe(NAMES[0]).stat().st_ino) == (1, inode)
    assert Client(node.pipe(NAMES[0])).limits == {"0": "512M"}


def test_a_daemon_whose_socket_is_gone_is_started_again(node: SharingNode) -> None:
    node.kept(mps_set())
    (node.pipe(NAMES[0]) / "control").unlink()
    assert node.kept(mps_set()).restarted == (NAMES[0],)
    assert Client(node.pipe(NAMES[0])).percent == 100.0


def test_another_device_needs_another_daemon(node: SharingNode) -> None:
    node.kept(mps_set())
    before = node.record()
    assert node.kept(mps_set(uuid="GPU-1")).restarted == ()
    assert (node.record().pid != before.pid, node.record().uuids) == (True, ("GPU-1",))


def test_a_process_that_has_the_recorded_pid_by_now_is_left_alone(node: SharingNode) -> None:
    """After a daemon has ended, any program may get its pid, even one of MPS in another folder."""
    node.kept(mps_set(NAMES[1]))
    other = node.record(NAMES[1])
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        found = process_id(stranger.pid)
        assert found is not None
        for pid, ticks in (found, (other.pid, other.start_ticks)):
            record = DaemonRecord(name=NAMES[0], stage=Stage.RUNNING, uuids=("GPU-0",), pid=pid, start_ticks=ticks)
            node.journal.keep({record.key: record})
            node.kept(mps_set(NAMES[1]))
            assert not (node.root / NAMES[0]).exists()
            node.journal.keep({record.key: record})
            node.kept(mps_set(), mps_set(NAMES[1]))
        assert stranger.poll() is None
        assert node.record(NAMES[1]) == other
        stranger.kill()


def test_nothing_is_stopped_while_the_ledger_may_lack_grants(node: SharingNode) -> None:
    node.kept(mps_set())
    before = node.record()
    node.keep(ended=False)
    assert (node.record(), is_of(processes.ProcessId(before.pid, before.start_ticks), node.pipe(NAMES[0]))) == (
        before,
        True,
    )


def test_records_of_an_earlier_boot_are_of_no_process(node: SharingNode) -> None:
    node.kept(mps_set())
    node.boot_id = "another"
    node.restart()
    assert node.journal.daemons() == {}
    node.kept()
    assert node.left() == []


def test_an_unreadable_record_loses_no_daemon_for_good(node: SharingNode) -> None:
    node.kept(mps_set())
    node.journal.path.write_text("{")
    node.restart()
    node.kept(mps_set())
    assert len(processes_of(node.pipe(NAMES[0]))) == 1
    node.kept()
    assert node.left() == []


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (lambda node: node.programs.remove(CONTROL), "cannot find nvidia-cuda-mps-control"),
        (
            lambda node: node.programs.plan(start="fail"),
            "cannot start nvidia-cuda-mps-control: CUDA driver: on purpose",
        ),
        (lambda node: node.programs.plan(refuse=["set_default_active_thread_percentage"]), "Failed: on purpose"),
    ],
    ids=["missing", "fails", "refuses"],
)
def test_a_daemon_that_cannot_run_is_an_error_of_its_own_and_of_no_other(
    node: SharingNode, break_it: object, cause: str
) -> None:
    node.kept(mps_set(NAMES[1], "GPU-1"))
    break_it(node)  # type: ignore[operator]
    errors = node.keep(mps_set(), mps_set(NAMES[1], "GPU-1")).errors
    assert [*errors] == [NAMES[0]]
    assert cause in errors[NAMES[0]]
    node.programs.install(CONTROL, gpus={"GPU-0": {}, "GPU-1": {}})
    node.programs.plan()
    assert node.kept(mps_set(), mps_set(NAMES[1], "GPU-1")).restarted == ()
    node.kept()
    assert node.left() == []


def test_a_compute_mode_that_allows_no_program_is_an_error_before_anything_starts(node: SharingNode) -> None:
    """Without nvidia-smi it is not known, and the daemon is started."""
    errors = node.keep(mps_set(uuid="GPU-p")).errors
    assert errors[NAMES[0]] == (
        f"cannot start MPS for device-{NAMES[0]}: the compute mode of GPU-p is Prohibited, which allows no CUDA "
        "program (nvidia-smi -i GPU-p -c DEFAULT changes it)"
    )
    assert node.left() == []
    node.programs.remove(SMI)
    node.kept(mps_set(uuid="GPU-p"))


def test_a_daemon_of_a_device_that_cannot_be_named_goes_on_if_it_runs(node: SharingNode) -> None:
    gone = mps_set(uuids=(), fault="g is not there at this moment")
    assert node.keep(gone).errors == {
        NAMES[0]: f"cannot start MPS for device-{NAMES[0]}: g is not there at this moment"
    }
    node.kept(mps_set())
    before = node.record()
    assert node.kept(gone).restarted == ()
    assert node.record() == before


# Time slices


def test_a_time_slice_is_set_and_what_was_before_is_restored(node: SharingNode) -> None:
    uuids = {"a": "GPU-0", "b": "GPU-1"}
    assert node.slices.keep({"a": "Long", "b": "Long"}, uuids, ended=True) == {}
    assert [node.programs.gpu(one)["slice"] for one in uuids.values()] == [3, 3]
    assert node.slices.keep({"a": "Short", "b": "Long"}, uuids, ended=True) == {}
    node.restart()
    assert node.slices.keep({"a": "Short"}, uuids, ended=False) == {}
    assert [node.programs.gpu(one)["slice"] for one in uuids.values()] == [1, 3]
    assert node.slices.keep({"a": "Short"}, uuids, ended=True) == {}
    assert [node.programs.gpu(one)["slice"] for one in uuids.values()] == [1, 1]
    assert node.slices.keep({}, uuids, ended=True) == {}
    assert [node.programs.gpu(one)["slice"] for one in uuids.values()] == [0, 1]
    assert not node.journal.path.exists()


def test_a_time_slice_that_cannot_be_set_is_an_error_of_its_gpu(node: SharingNode) -> None:
    errors = node.slices.keep({"m": "Long", "x": "Long", "a": "Long"}, {"m": "GPU-m", "a": "GPU-0"}, ended=True)
    assert [*errors] == ["m", "x"]
    assert "cannot set the time slice of GPU-m to Long: cannot run nvidia-smi: Unable to set timeslice" in errors["m"]
    assert errors["x"] == "cannot set the time slice of x to Long: its UUID is not known"
    assert node.programs.gpu("GPU-0")["slice"] == 3
    node.programs.remove(SMI)
    assert node.slices.keep({"a": "Short"}, {"a": "GPU-0"}, ended=True)["a"].startswith("cannot find nvidia-smi")


# The manager


async def test_a_node_that_shares_nothing_is_not_searched_at_every_decision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, at the start, for what an earlier agent may have left."""
    compared: list[set[str]] = []
    looks: list[object] = []

    def keep(self: MpsDaemons, wanted: Mapping[str, MpsSet], *, ended: bool) -> Kept:
        compared.append({*wanted})
        return Kept()

    def look(*args: Any) -> dict[str, MpsSet]:
        looks.append(args)
        return mps_sets(*args)

    monkeypatch.setattr(MpsDaemons, "keep", keep)
    monkeypatch.setattr(manager, "mps_sets", look)
    monkeypatch.setattr(manager, "POLL_S", 0.01)
    async with claim_room(folder) as room:
        search, state, run = DriverSearch(top=str(folder)), folder / "state", folder / "run"
        one = SharingManager(room.agent, search, state, run, unreported, lambda uid: None)
        leading = asyncio.create_task(one.lead())
        await until(lambda: compared)
        for number in range(3):
            await room.prepare(room.claim(f"c{number}", consumed("cpu", "numa0", cpus="1")))
            before = len(looks)
            await until(lambda: len(looks) > before + 2)  # noqa: B023 - it is waited for
        assert compared == [set()]
        await cancel_all([leading])
        await one.close()


# Killed at any moment


def killed(work: object, delay_s: float) -> bool:
    """Do work in a fork of this process and kill it after a delay. Return whether it ended before."""
    pid = os.fork()
    if not pid:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


@dataclass
class History:
    """Random grants and ends of grants, with kills of the agent and of daemons in between."""

    node: SharingNode
    random: random.Random
    wanted: dict[str, MpsSet] = field(default_factory=dict)
    intervals: dict[str, str] = field(default_factory=dict)
    clients: list[tuple[str, Client]] = field(default_factory=list)
    longest_s: float = 0.5
    kills: int = 0

    uuids: Mapping[str, str] = field(default_factory=lambda: {"a": "GPU-0", "b": "GPU-1"})

    def step(self) -> None:
        drawn = self.random.random()
        if drawn < 0.55:
            self.change()
        elif drawn < 0.75:
            self.kill_a_process()
        elif drawn < 0.85:
            self.connect()
        self.compare()

    def change(self) -> None:
        """A grant comes, ends, or another share changes the limits."""
        name = self.random.choice(NAMES)
        if name in self.wanted and self.random.random() < 0.5:
            del self.wanted[name]
        else:
            percent, mib = self.random.randint(1, 100), self.random.choice((0, 512, 1024))
            self.wanted[name] = mps_set(name, f"GPU-{NAMES.index(name) % 2}", percent, mib, shared=name != NAMES[0])
        device = self.random.choice(("a", "b"))
        self.intervals.pop(device, None)
        if self.random.random() < 0.5:
            self.intervals[device] = self.random.choice(INTERVALS)

    def kill_a_process(self) -> None:
        every = [one for name in NAMES for one in processes_of(self.node.pipe(name))]
        if every:
            victim = self.random.choice(every)
            kill(victim.pid)
            self.kills += 1

    def connect(self) -> None:
        """A container starts a program."""
        for name in self.wanted:
            try:
                self.clients.append((name, Client(self.node.pipe(name))))
            except (OSError, ValueError):
                continue  # its daemon was killed

    def compare(self) -> None:
        """What an agent does after a change; two times of three it is killed while it does."""

        def work() -> None:
            self.node.restart()
            self.node.keep(*self.wanted.values())
            self.node.slices.keep(self.intervals, self.uuids, ended=True)

        if self.random.random() < 0.66:
            self.kills += not killed(work, self.random.uniform(0, self.longest_s))
        else:
            before = {one.pid: name for name, one in self.node.journal.daemons().items() if self.is_unharmed(name, one)}
            began = time.monotonic()
            work()
            self.longest_s = time.monotonic() - began
            self.check()
            now = {one.pid for one in self.node.journal.daemons().values()}
            assert {pid for pid, name in before.items() if name in self.wanted} <= now, (
                "an unharmed daemon was replaced"
            )

    def is_unharmed(self, name: str, one: DaemonRecord) -> bool:
        wanted = self.wanted.get(name)
        process = processes.ProcessId(one.pid, one.start_ticks)
        runs = one.stage is Stage.RUNNING and control.MpsControl(self.node.root / name).is_whole(process)
        return runs and wanted is not None and (wanted.uuids, wanted.shared) == (one.uuids, one.shared)

    def check(self) -> None:
        """Exactly the daemons of the ledger, with its limits, and the time slices."""
        node = self.node
        assert {one.name for one in entries(node.root)} == self.wanted.keys() == node.journal.daemons().keys()
        assert {one.parent.name for one in pipes_below(node.root)} == self.wanted.keys()
        for name, one in self.wanted.items():
            record = node.journal.daemons()[name]
            assert (record.stage, record.uuids) == (Stage.RUNNING, one.uuids)
            assert is_of(processes.ProcessId(record.pid, record.start_ticks), node.pipe(name))
            client = Client(node.pipe(name))
            limits = {str(device): f"{mib}M" for device, mib in one.memory_mib.items()}
            assert client.percent == one.threads_percent
            assert limits.items() <= client.limits.items()
        for device, uuid in self.uuids.items():
            own = INTERVALS[{"GPU-0": 0, "GPU-1": 1}[uuid]]
            assert INTERVALS[node.programs.gpu(uuid).get("slice", 0)] == self.intervals.get(device, own)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_whenever_agent_or_daemon_is_killed_exactly_the_daemons_of_the_ledger_run(node: SharingNode, seed: int) -> None:
    history = History(node, random.Random(f"sharing {seed}"))
    for _ in range(STEPS):
        history.step()
    history.node.restart()
    node.kept(*history.wanted.values())
    assert node.slices.keep(history.intervals, history.uuids, ended=True) == {}
    history.check()
    node.kept()
    assert node.slices.keep({}, history.uuids, ended=True) == {}
    assert node.left() == []
    assert not node.journal.path.exists()
    assert (node.programs.gpu("GPU-0").get("slice", 0), node.programs.gpu("GPU-1")["slice"]) == (0, 1)
    assert history.kills > STEPS / 10
