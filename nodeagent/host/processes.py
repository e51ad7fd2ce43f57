"""Programs that run on this machine, with their command lines (proc(5)).

Processes that end meanwhile, or whose name may not be read, are skipped. A command line is read only if the name
matches: the read can block on a stuck process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import msgspec

from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

INITIAL_NAMESPACE = "pid:[4026531836]"
"""/proc/self/ns/pid of the host (PROC_PID_INIT_INO of include/linux/proc_ns.h)."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A running program."""

    pid: int
    parent: int
    words: tuple[str, ...]
    """Its command line, argv[0] included; never empty."""
    folder: str = ""
    """Its working directory; empty if it may not be read."""


def running(sysfs: SysFs, like: Callable[[str], bool]) -> tuple[Process, ...]:
    """Return the processes whose name is `like`, in order of pid. The name is the kernel's
    (comm), at most 15 characters.

    Raise HostError if the command line of such a process cannot be read.
    """
    folders = (one for one in sysfs.numbered("proc", "") if like(_name(sysfs, one[1])))
    return tuple(found for pid, folder in folders if (found := _process(sysfs, pid, folder)) is not None)


def sees_all(sysfs: SysFs) -> bool:
    """Return whether no process of the host is hidden in another PID namespace. True for a captured tree, which is
    complete by definition."""
    return sysfs.link("proc/self/ns/pid") in (INITIAL_NAMESPACE, None)


def _name(sysfs: SysFs, folder: str) -> str:
    try:
        return sysfs.text(f"{folder}/comm", "")
    except HostError:
        return ""


def _process(sysfs: SysFs, pid: int, folder: str) -> Process | None:
    try:
        words = [os.fsdecode(one) for one in sysfs.content(f"{folder}/cmdline").split(b"\0")]
    except HostError as error:
        if isinstance(error.__context__, ProcessLookupError | FileNotFoundError):
            return None
        raise
    # Every word ends in NUL; a process that has ended has none.
    words = words[:-1] if words[-1] == "" else words
    return (
        Process(pid=pid, parent=_parent(sysfs, folder), words=(*words,), folder=_cwd(sysfs, folder)) if words else None
    )


def _parent(sysfs: SysFs, folder: str) -> int:
    """Return the parent's pid, or 0 if it is unknown."""
    return next((int(one) for one in _fields(sysfs, folder, "PPid:") if one.isdigit()), 0)


def _fields(sysfs: SysFs, folder: str, key: str) -> Iterator[str]:
    try:
        lines = sysfs.text(f"{folder}/status", "").splitlines()
    except HostError:
        return
    yield from (line.removeprefix(key).strip() for line in lines if line.startswith(key))


def _cwd(sysfs: SysFs, folder: str) -> str:
    """Return the working directory, or an empty string if unreadable: only a process with all of its
    capabilities may read it (ptrace(2))."""
    try:
        return sysfs.link(f"{folder}/cwd") or ""
    except HostError:
        return ""
