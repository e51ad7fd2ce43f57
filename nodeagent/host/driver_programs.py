"""Programs of NVIDIA's driver: where they are found, and runs of them that cannot take longer than a deadline.

PATH comes first, unless the configuration names the driver's root. What is not there is searched below the roots under
which a container sees the driver (host/driver_root/roots.py); such a program needs the libraries of its own root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.errors import HostError, cause_of
from nodeagent.host.driver_root.roots import PROGRAM_FOLDERS, library_folders, roots

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_CAUSE = 300
"""Most characters of a program's output in an error."""
_LEFT_BEHIND: list[subprocess.Popen[bytes]] = []
"""Killed processes that have not ended: the kernel keeps what is left of them until it is asked."""


class DriverProgram(msgspec.Struct, frozen=True, kw_only=True):
    """A program that was found."""

    path: Path
    env: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Its environment: PATH with its own folder first, where it finds the programs that it starts, and LD_LIBRARY_PATH
    if its libraries are not where the loader looks."""


class DriverSearch(msgspec.Struct, frozen=True, kw_only=True):
    """Where the driver's programs are looked for."""

    top: str = "/"
    """What this process takes for /."""
    configured: str = ""
    """The driver's root as configured (nvidia.driverRoot), or "" to find it."""

    def find(self, name: str) -> DriverProgram | None:
        """Return a program of the driver, or None if neither PATH nor a driver's root has it."""
        path = os.environ.get("PATH", SYSTEM_PATH)
        by_path, below = _found(name, path, path, ()), self._below_roots(name, path)
        return below or by_path if self.configured else by_path or below

    def _below_roots(self, name: str, path: str) -> DriverProgram | None:
        for root in roots(self.top, self.configured, own=False):
            libraries = [root.at(one) for one in library_folders(root) if Path(root.at(one)).is_dir()]
            for folder in PROGRAM_FOLDERS:
                if found := _found(name, root.at(folder), path, libraries):
                    return found
        return None


def _found(name: str, where: str, path: str, libraries: Sequence[str]) -> DriverProgram | None:
    found = shutil.which(name, path=where)
    return DriverProgram(path=Path(found), env=_env(Path(found).parent, path, libraries)) if found else None


def _env(folder: Path, path: str, libraries: Sequence[str]) -> Mapping[str, str]:
    env = {"PATH": f"{folder}:{path}", "LANG": "C"}
    if libraries:
        env["LD_LIBRARY_PATH"] = ":".join(libraries)
    return MappingProxyType(env)


def run(
    program: DriverProgram,
    words: Sequence[str] = (),
    *,
    stdin: str = "",
    env: Mapping[str, str] = MappingProxyType({}),
    deadline_s: float,
) -> str:
    """Return what a program prints to its standard output. Blocks for `deadline_s` at most.

    Raise HostError if it cannot be started, ends with another status than 0, or has not ended in time. It is killed
    then, but not waited for: a process that the driver holds does not end.
    """
    name = program.path.name
    try:
        process = subprocess.Popen(
            [str(program.path), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**program.env, **env},
        )
    except OSError as error:
        raise HostError(f"cannot run {program.path}: {cause_of(error)}") from None
    try:
        output, _ = process.communicate(stdin.encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        _leave_behind(process)
        raise HostError(f"cannot run {name}: it has not answered within {deadline_s:g} s") from None
    text = output.decode(errors="backslashreplace").strip()
    if process.returncode:
        raise HostError(f"cannot run {name}: {shortened(text) or f'it ended with status {process.returncode}'}")
    return text


def _leave_behind(process: subprocess.Popen[bytes]) -> None:
    """Kill a process without waiting for it. Those left behind earlier that have ended meanwhile are forgotten."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    _LEFT_BEHIND[:] = [one for one in (*_LEFT_BEHIND, process) if one.poll() is None]


def shortened(text: str) -> str:
    """Return a program's output as one line that an error can carry."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= LONGEST_CAUSE else f"{line[:LONGEST_CAUSE]}…"
