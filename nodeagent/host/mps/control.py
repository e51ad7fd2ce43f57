"""MPS control daemons: starting one, asking it, and ending it (NVIDIA, Multi-Process Service: nvidia-cuda-mps-control).

The daemon runs in the foreground (`-f`) in a session of its own, so that it outlives the agent that started it. Its
folder has two: `pipe`, with the sockets that its clients need, and `log`. Containers have the pipe folder mounted: it
is emptied, never replaced: programs that they start later find a daemon that was started again.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.errors import HostError, cause_of
from nodeagent.host.driver_programs import DriverProgram, DriverSearch, run, shortened
from nodeagent.host.mps.processes import PIPE_VARIABLE, ProcessId, end, is_of, wait_gone
from nodeagent.host.sysfs import atomic_file as files

PROGRAM = "nvidia-cuda-mps-control"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
MULTI_USER = "-multiuser-server"
"""Clients of all users share one server. Without it one user's clients are served at a time (MPS, Architecture)."""
SOCKET = "control"
"""In the pipe folder."""
LONGEST_SOCKET_BYTES = 107
"""sockaddr_un.sun_path has 108 bytes, with the terminating zero (unix(7))."""
OUTPUT = "output.log"
ANSWER_S, START_S, POLL_S = 10.0, 15.0, 0.02
QUIT_S = 1
"""How long servers may take to end after `quit`, in seconds; then the daemon ends them (`quit -t`)."""
END_S = (2.0, 2.0)
"""How long processes may take to end after SIGTERM and after SIGKILL."""
ANYWHERE = DriverSearch()
_PERCENT = re.compile(r"\d{1,3}(\.\d+)?")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The upper bounds for each client of a daemon. A client's own environment can only lower them."""

    threads_percent: int = 100
    """Share of a GPU's threads that one client can use."""
    memory_mib: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Device memory that one client can allocate, in MiB, by the device's number among those of the daemon."""


class MpsControl:
    """The control daemon of one folder. Every call blocks, each at most for the time limits above."""

    def __init__(self, folder: Path, search: DriverSearch = ANYWHERE) -> None:
        """folder: made for the daemon. search: where its program is looked for."""
        self.folder = folder
        self.pipe = folder / "pipe"
        self._log = folder / "log"
        self._search = search

    # ---------------------------------------------------------------- starting

    def start(self, uuids: Sequence[str], *, multi_user: bool) -> int:
        """Start a daemon for some GPUs or a MIG instance, by UUID, and return its pid. It does not answer yet:
        `wait_ready`. The caller has to `reap` it once it has ended.

        Raise HostError if the program is missing, or if the folder cannot be used.
        """
        program = self._program()
        if (length := len(str(self.pipe / SOCKET).encode())) > LONGEST_SOCKET_BYTES:
            raise HostError(
                f"cannot start MPS in {self.pipe}: its socket would have a path of {length} bytes, "
                f"{LONGEST_SOCKET_BYTES} are possible (runtimeDir)"
            )
        self._make_folders()
        env = {
            **program.env,
            PIPE_VARIABLE: str(self.pipe),
            LOG_VARIABLE: str(self._log),
            "CUDA_VISIBLE_DEVICES": ",".join(uuids),
        }
        words = [str(program.path), "-f", *([MULTI_USER] if multi_user else [])]
        try:
            with (self._log / OUTPUT).open("wb") as output:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd="/",
                    umask=0o022,
                    start_new_session=True,
                )
        except OSError as error:
            raise HostError(f"cannot start {program.path}: {cause_of(error)}") from None
        process.returncode = 0  # it outlives this object, which must not wait for it
        return process.pid

    def wait_ready(self, pid: int) -> None:
        """Return once a daemon that was started answers. Raise HostError if it ends or takes longer than START_S."""
        until_s, why = time.monotonic() + START_S, "it made no socket"
        while time.monotonic() < until_s:
            if (status := reap(pid)) is not None:
                cause = self._last_words() or f"it ended with status {status}"
                raise HostError(f"cannot start {PROGRAM}: {cause}")
            if (self.pipe / SOCKET).exists():
                try:
                    self.threads_percent()
                except HostError as error:
                    why = str(error)
                else:
                    return
            time.sleep(POLL_S)
        raise HostError(f"cannot start {PROGRAM}: no answer within {START_S:g} s: {why}")

    def limit(self, limits: Limits) -> None:
        """Set the bounds of clients that come from now on, of servers that run and of later ones. Raise HostError if
        the daemon refuses."""
        percent, servers = limits.threads_percent, self.servers()
        self.ask(f"set_default_active_thread_percentage {percent}")
        for device, mib in sorted(limits.memory_mib.items()):
            self.ask(f"set_default_device_pinned_mem_limit {device} {mib}M")
        for pid in servers:
            self.ask(f"set_active_thread_percentage {pid} {percent}")
            for device, mib in sorted(limits.memory_mib.items()):
                self.ask(f"set_device_pinned_mem_limit {pid} {device} {mib}M")
        if (now := self.threads_percent()) != percent:
            raise HostError(f"cannot limit MPS in {self.folder}: its daemon has {now:g} % of threads, not {percent}")

    # ---------------------------------------------------------------- asking

    def threads_percent(self) -> float:
        """Return the default share of a GPU's threads, in percent. Raise HostError if the daemon does not answer."""
        answer = self.ask("get_default_active_thread_percentage")
        if not _PERCENT.fullmatch(answer):
            raise HostError(f"cannot read the answer of {PROGRAM} to get_default_active_thread_percentage: {answer!r}")
        return float(answer)

    def servers(self) -> list[int]:
        """Return the pids of the daemon's servers. Raise HostError if it does not answer."""
        words = self.ask("get_server_list").split()
        if bad := [one for one in words if not one.isascii() or not one.isdigit()]:
            raise HostError(f"cannot read the answer of {PROGRAM} to get_server_list: {bad[0]!r}")
        return [int(one) for one in words]

    def ask(self, command: str, more_s: float = 0.0) -> str:
        """Return the daemon's answer to one command; it may take `more_s` longer than others. Raise HostError."""
        try:
            return run(
                self._program(), stdin=f"{command}\n", env={PIPE_VARIABLE: str(self.pipe)}, deadline_s=ANSWER_S + more_s
            )
        except HostError as error:
            raise HostError(f"{error} ({command})") from None

    def is_whole(self, process: ProcessId) -> bool:
        """Return whether a process is the daemon of this folder and clients can still reach it."""
        return is_of(process, self.pipe) and (self.pipe / SOCKET).exists()

    # ---------------------------------------------------------------- ending

    def stop(self, process: ProcessId | None) -> None:
        """End the daemon and its servers, even if used; the folder stays. Raise HostError if one does not end."""
        if process is not None and self.is_whole(process) and self._quits():
            wait_gone(process, self.pipe, QUIT_S + END_S[0])
        end(self.pipe, END_S)

    def remove(self) -> None:
        """Remove the folder. Raise HostError if something is left."""
        for one in (self.pipe, self._log, self.folder):
            files.remove_folder(one)

    def _quits(self) -> bool:
        try:
            self.ask(f"quit -t {QUIT_S}", QUIT_S)
        except HostError:
            return False  # signals follow
        return True

    # ---------------------------------------------------------------- files

    def _make_folders(self) -> None:
        """Make the folders, readable by the users of containers whatever the umask, and empty them."""
        try:
            for one in (self.folder.parent, self.folder, self.pipe, self._log):
                if not one.is_dir():
                    one.mkdir(parents=True, exist_ok=True)
                    one.chmod(0o755)
        except OSError as error:
            raise HostError(f"cannot make {self.folder}: {cause_of(error)}") from None
        for one in files.entries(self.pipe):
            files.remove(one, durable=False)

    def _last_words(self) -> str:
        """Return what the daemon printed before it ended."""
        try:
            return shortened((self._log / OUTPUT).read_text(errors="backslashreplace"))
        except OSError:
            return ""

    def _program(self) -> DriverProgram:
        found = self._search.find(PROGRAM)
        if found is None:
            raise HostError(f"cannot find {PROGRAM}: neither PATH nor the driver's root (/run/nvidia/driver) has it")
        return found


def reap(pid: int) -> int | None:
    """Return the status with which a child has ended, or None if it still runs or is no child of this process. The
    kernel keeps what is left of a child until it is asked."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found else None
