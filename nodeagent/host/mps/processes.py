"""Which processes belong to an MPS daemon, and ending them.

A process is named by its pid and the time at which it started: a pid alone may belong to another process by now. A
control daemon and the servers that it starts have its pipe folder in their environment (CUDA_MPS_PIPE_DIRECTORY), by
which they are found even if the agent was killed before it could record them. Programs of containers have the path that
the folder has in the container.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nodeagent.errors import HostError

PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
COMM = b"nvidia-cuda-mps"
"""How the names of MPS's processes start; the kernel keeps 15 characters of a name (TASK_COMM_LEN, proc(5))."""
PROC = Path("/proc")


class ProcessId(NamedTuple):
    """A process that is named for good."""

    pid: int
    start_ticks: int
    """When it started, in clock ticks since boot (field 22 of /proc/PID/stat, proc(5))."""


def process_id(pid: int) -> ProcessId | None:
    """Return the name of the process that has a pid now, or None if none has or it has ended (a zombie)."""
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The second field is the process's name in parentheses and may contain anything.
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]))


def is_of(process: ProcessId, pipe: Path) -> bool:
    """Return whether a process still runs and belongs to the MPS daemon of a pipe folder."""
    return process_id(process.pid) == process and _pipe_of(process.pid) == str(pipe)


def processes_of(pipe: Path) -> list[ProcessId]:
    """Return the running processes of the MPS daemon of a pipe folder, in order of pid."""
    found = (process_id(pid) for pid in _mps_pids() if _pipe_of(pid) == str(pipe))
    return sorted(one for one in found if one is not None)


def pipes_below(folder: Path) -> set[Path]:
    """Return the pipe folders below a folder to which running processes of MPS belong."""
    every = {Path(pipe) for pid in _mps_pids() if (pipe := _pipe_of(pid)) and process_id(pid) is not None}
    return {one for one in every if one.is_relative_to(folder)}


def end(pipe: Path, patience_s: Sequence[float]) -> None:
    """End all processes of a pipe folder: SIGTERM, then SIGKILL, each followed by a wait of so many seconds. Raise
    HostError if one does not end. Blocks."""
    for number, wait_s in zip((signal.SIGTERM, signal.SIGKILL), patience_s, strict=True):
        until_s = time.monotonic() + wait_s
        # A control daemon that is about to end may still start a server.
        while left := processes_of(pipe):
            for one in left:
                _signal_and_wait(one, pipe, number, until_s)
            if time.monotonic() >= until_s:
                break
        else:
            return
    pids = ", ".join(str(one.pid) for one in processes_of(pipe))
    if pids:
        raise HostError(f"cannot end process {pids} of {pipe}: it does not react to SIGKILL")


def wait_gone(process: ProcessId, pipe: Path, wait_s: float) -> bool:
    """Return whether a process ends within so many seconds. Blocks."""
    return _signal_and_wait(process, pipe, None, time.monotonic() + wait_s)


def _signal_and_wait(process: ProcessId, pipe: Path, number: signal.Signals | None, until_s: float) -> bool:
    """Send a signal to a process, if it still is the one meant, and wait until it has ended. Return whether it has."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return True
    try:
        if not is_of(process, pipe):  # the handle is of another process that has the pid by now
            return True
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(max(0, int(1000 * (until_s - time.monotonic())))))
    finally:
        os.close(handle)


def _mps_pids() -> Iterator[int]:
    for name in os.listdir(PROC):  # noqa: PTH208 - thousands of names
        if name.isdigit():
            with contextlib.suppress(OSError):
                if (PROC / name / "comm").read_bytes().startswith(COMM):
                    yield int(name)


def _pipe_of(pid: int) -> str:
    """Return the pipe folder in a process's environment, or "" if it has none or may not be read."""
    try:
        environ = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    prefix = f"{PIPE_VARIABLE}=".encode()
    return next((os.fsdecode(one[len(prefix) :]) for one in environ.split(b"\0") if one.startswith(prefix)), "")
