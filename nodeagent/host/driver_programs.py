"""Programs of NVIDIA's driver: where they are found, and runs of them that cannot take longer than a deadline.

PATH comes first. What is not there is searched below the roots under which a container sees the driver
(host/nvml/library.py); such a program needs the libraries of its own root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from nodeagent.errors import HostError, cause_of
from nodeagent.host.nvml.library import FOLDERS as LIBRARY_FOLDERS
from nodeagent.host.nvml.library import ROOTS

PROGRAM_FOLDERS = ("usr/bin", "bin", "usr/local/bin")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_CAUSE = 300
"""Most characters of a program's output in an error."""
_LEFT_BEHIND: list[subprocess.Popen[bytes]] = []
"""Killed processes that have not ended: the kernel keeps what is left of them until it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverProgram:
    """A program that was found."""

    path: Path
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Its environment: PATH with its own folder first, where it finds the programs that it starts, and LD_LIBRARY_PATH
    if its libraries are not where the loader looks."""


def find_program(name: str, root: Path = Path("/")) -> DriverProgram | None:
    """Return a program of the driver, or None if neither PATH nor a driver's root has it."""
    path = os.environ.get("PATH", SYSTEM_PATH)
    if found := shutil.which(name, path=path):
        return DriverProgram(path=Path(found), env=_env(Path(found).parent, path, ()))
    for top in ROOTS:
        for folder in PROGRAM_FOLDERS:
            below = root / top
            if found := shutil.which(name, path=str(below / folder)):
                libraries = [below / one for one in LIBRARY_FOLDERS if (below / one).is_dir()]
                return DriverProgram(path=Path(found), env=_env(Path(found).parent, path, libraries))
    return None


def _env(folder: Path, path: str, libraries: Sequence[Path]) -> Mapping[str, str]:
    env = {"PATH": f"{folder}:{path}", "LANG": "C"}
    if libraries:
        env["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
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
