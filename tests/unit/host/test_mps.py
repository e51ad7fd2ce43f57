"""MPS control daemons and nvidia-smi as real programs: found, started, asked, limited, ended, and what they refuse."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from nodeagent.host import driver_programs, nvidia_smi
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.mps import control, processes
from nodeagent.host.mps.control import Limits, MpsControl
from nodeagent.host.mps.processes import ProcessId, is_of, process_id, processes_of
from nodeagent.host.nvidia_smi import NvidiaSmi
from tests.doubles.nvidia import CONTROL, SMI, Client, Programs
from tests.support.until import until

UUIDS = ["GPU-0", "GPU-1"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / "bin")
    found.install(gpus={"GPU-0": {}, "GPU-1": {"mode": "Prohibited", "slice": 2}, "GPU-m": {"mig": True}})
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    for name in ("ANSWER_S", "START_S"):
        monkeypatch.setattr(control, name, 60.0)  # a busy machine is no failure
    monkeypatch.setattr(nvidia_smi, "DEADLINE_S", 60.0)
    return found


@pytest.fixture
def mps(folder: Path, programs: Programs) -> Iterator[MpsControl]:
    one = MpsControl(folder / "mps" / "one")
    yield one
    processes.end(one.pipe, (1.0, 5.0))


def start(mps: MpsControl, *, multi_user: bool = False) -> ProcessId:
    pid = mps.start(UUIDS, multi_user=multi_user)
    mps.wait_ready(pid)
    found = process_id(pid)
    assert found is not None
    return found


# A daemon's life


def test_a_daemon_serves_programs_and_nothing_is_left_of_it(mps: MpsControl) -> None:
    """It is a session of its own, not the agent's."""
    found = start(mps)
    assert mps.is_whole(found)
    assert os.getsid(found.pid) == found.pid
    client = Client(mps.pipe)
    assert mps.servers() == [client.server]
    assert [one.pid for one in processes_of(mps.pipe)] == sorted([found.pid, client.server])
    mps.stop(found)
    assert client.lost
    assert processes_of(mps.pipe) == []
    mps.remove()
    assert not mps.folder.exists()


def test_limits_are_those_of_later_servers_and_of_those_that_run(mps: MpsControl) -> None:
    start(mps)
    mps.limit(Limits(threads_percent=30, memory_mib={0: 2048, 1: 512}))
    first = Client(mps.pipe)
    assert (first.percent, first.limits) == (30.0, {"0": "2048M", "1": "512M"})
    mps.limit(Limits(threads_percent=60, memory_mib={0: 4096}))
    second = Client(mps.pipe)
    assert (second.server, second.percent, second.limits["0"]) == (first.server, 60.0, "4096M")


def test_users_share_a_server_only_if_that_is_asked_for(mps: MpsControl, folder: Path) -> None:
    start(mps)
    assert Client(mps.pipe, 1000).server != Client(mps.pipe, 1001).server
    other = MpsControl(folder / "mps" / "two")
    try:
        start(other, multi_user=True)
        assert Client(other.pipe, 1000).server == Client(other.pipe, 1001).server
    finally:
        processes.end(other.pipe, (1.0, 5.0))


def test_a_busy_daemon_is_ended_all_the_same(
    mps: MpsControl, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer, and servers that ignore SIGTERM."""
    programs.plan(stubborn=True, hang=["quit"])
    found, client = start(mps), Client(mps.pipe)
    monkeypatch.setattr(control, "ANSWER_S", 0.2)
    monkeypatch.setattr(control, "QUIT_S", 0)
    monkeypatch.setattr(control, "END_S", (0.3, 60.0))
    mps.stop(found)
    assert client.lost
    assert processes_of(mps.pipe) == []


def test_a_process_that_has_the_pid_by_now_is_not_the_daemon(mps: MpsControl) -> None:
    """Neither by its start time nor by its folder."""
    found = start(mps)
    assert not is_of(ProcessId(found.pid, found.start_ticks + 1), mps.pipe)
    assert not is_of(found, mps.pipe.parent)
    mine = process_id(os.getpid())
    assert mine is not None
    assert not is_of(mine, mps.pipe)
    mps.stop(mine)
    assert processes_of(mps.pipe) == []


def test_only_a_daemon_that_programs_can_reach_is_whole(mps: MpsControl) -> None:
    found = start(mps)
    (mps.pipe / "control").unlink()
    assert not mps.is_whole(found)


# What goes wrong


def test_a_second_daemon_in_one_folder_is_refused(mps: MpsControl, programs: Programs) -> None:
    start(mps)
    env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(mps.pipe)}
    done = subprocess.run([programs.folder / CONTROL, "-f"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "An instance of this daemon is already running")


def test_a_daemon_that_does_not_start_says_why(
    mps: MpsControl, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.plan(start="fail")
    with pytest.raises(HostError, match=r"^cannot start nvidia-cuda-mps-control: CUDA driver: on purpose$"):
        start(mps)
    programs.plan(start="silent")
    monkeypatch.setattr(control, "START_S", 0.3)
    with pytest.raises(HostError, match=r"^cannot start nvidia-cuda-mps-control: no answer within 0\.3 s: it made no"):
        start(mps)


def test_limits_that_the_daemon_refuses_are_errors(mps: MpsControl, programs: Programs) -> None:
    start(mps)
    for limits, cause in (
        (Limits(threads_percent=101), "Invalid percentage 101"),
        (Limits(memory_mib={2: 1024}), "Invalid device 2"),
        (Limits(memory_mib={0: 0}), "Invalid limit 0M"),
    ):
        with pytest.raises(HostError, match=cause):
            mps.limit(limits)
    with pytest.raises(HostError, match=r"Unrecognized command \(sing\)$"):
        mps.ask("sing")


def test_a_missing_program_is_named(mps: MpsControl, programs: Programs) -> None:
    programs.remove(CONTROL)
    with pytest.raises(HostError, match=r"^cannot find nvidia-cuda-mps-control: neither PATH nor the driver's root"):
        mps.start(UUIDS, multi_user=False)


def test_a_folder_whose_socket_would_have_too_long_a_path_is_refused(folder: Path, programs: Programs) -> None:
    long = MpsControl(folder / ("x" * 90))
    with pytest.raises(HostError, match="107 are possible"):
        long.start(UUIDS, multi_user=False)


def test_a_program_that_hangs_is_left_behind(programs: Programs) -> None:
    programs.smi(hang=True)
    found = DriverSearch().find(SMI)
    assert found is not None
    with pytest.raises(HostError, match=r"^cannot run nvidia-smi: it has not answered within 0\.2 s$"):
        driver_programs.run(found, ["-i", "GPU-0"], deadline_s=0.2)


def test_the_drivers_root_is_searched_after_path(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own libraries, which the loader does not find by itself."""
    search = DriverSearch(top=str(tmp_path))
    first = search.find(CONTROL)
    assert first is not None
    assert (first.path, "LD_LIBRARY_PATH" in first.env) == (programs.folder / CONTROL, False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert search.find(CONTROL) is None
    below = tmp_path / "run/nvidia/driver"
    Programs(below / "usr/bin").install()
    (below / "usr/lib64").mkdir()
    second = search.find(CONTROL)
    assert second is not None
    assert second.path == below / "usr/bin" / CONTROL
    assert second.env["PATH"].split(":")[0] == str(below / "usr/bin")
    assert second.env["LD_LIBRARY_PATH"] == str(below / "usr/lib64")


def test_a_configured_root_of_the_driver_comes_before_path(tmp_path: Path, programs: Programs) -> None:
    """And PATH after it, for what it does not have."""
    Programs(tmp_path / "opt/driver/usr/bin").install(CONTROL)
    search = DriverSearch(top=str(tmp_path), configured="/opt/driver")
    assert [found.path if (found := search.find(name)) else None for name in (CONTROL, SMI)] == [
        tmp_path / "opt/driver/usr/bin" / CONTROL,
        programs.folder / SMI,
    ]


# nvidia-smi


def test_the_time_slice_and_the_compute_mode_are_read_and_set(programs: Programs) -> None:
    smi = NvidiaSmi()
    assert smi.is_there()
    assert (smi.compute_mode("GPU-0"), smi.compute_mode("GPU-1")) == ("Default", "Prohibited")
    assert (smi.time_slice("GPU-0"), smi.time_slice("GPU-1")) == ("Default", "Medium")
    for interval in ("Long", "Short", "Medium", "Default"):
        smi.set_time_slice("GPU-0", interval)
        assert smi.time_slice("GPU-0") == interval


def test_what_nvidia_smi_refuses_is_an_error(programs: Programs) -> None:
    smi = NvidiaSmi()
    with pytest.raises(HostError, match=r"^cannot run nvidia-smi: No devices were found$"):
        smi.time_slice("GPU-9")
    with pytest.raises(HostError, match=r"cannot set the time slice of GPU-m to Long: .*Not Supported"):
        smi.set_time_slice("GPU-m", "Long")
    programs.smi(unprivileged=True)
    with pytest.raises(HostError, match="Insufficient Permissions"):
        smi.set_time_slice("GPU-0", "Long")
    programs.remove(SMI)
    assert not smi.is_there()
    with pytest.raises(HostError, match=r"^cannot find nvidia-smi"):
        smi.time_slice("GPU-0")


async def test_a_daemon_that_was_killed_leaves_servers_that_are_found(mps: MpsControl) -> None:
    """By their environment, not by their parent; the kernel shows none of a process that is just being started."""
    found = start(mps)
    client = Client(mps.pipe)
    os.kill(found.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, found.pid, 0)
    await until(lambda: [one.pid for one in processes_of(mps.pipe)] == [client.server])
    mps.stop(found)
    assert processes_of(mps.pipe) == []
