"""Moves the tasks of a control group (cgroup) into a group of resctrl, and none else.

Tasks that begin meanwhile are in the group of their parent, or are found when the cgroup is read again. A task id may
be another task's by the time that it is written: so the cgroup is read again afterwards, and a task that is not in it
goes to the group of its parent.
Sources: Documentation/filesystems/resctrl.rst ("tasks"), proc(5), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from nodeagent.core.resctrl.model import ROOT
from nodeagent.errors import HostError
from nodeagent.host.resctrl.read import MOUNT, folder
from nodeagent.host.resctrl.write import add_task
from nodeagent.host.sysfs.sysfs import SysFs

ROUNDS = 16
"""How often a cgroup is read again while tasks begin in it."""
_PPID = 1
"""The field of /proc/PID/stat, after the name, that has its parent."""


class TaskMover:
    """Moves tasks. Everything blocks."""

    def __init__(self, sysfs: SysFs, cgroup_mount: str) -> None:
        """cgroup_mount: full path of the cgroup hierarchy."""
        self._sysfs = sysfs
        self._mount = cgroup_mount

    def members(self, group: str) -> frozenset[int]:
        """Return the ids of all tasks in a group. Raise HostError if there is no such group."""
        return frozenset(int(one) for one in self._sysfs.text(f"{folder(group)}/tasks").split())

    def threads(self, cgroup: str) -> frozenset[int]:
        """Return the ids of all tasks in a cgroup and below; none if it is gone. Raise HostError if they are not
        visible."""
        found = set[int]()
        for path, _, files in os.walk(f"{self._mount}/{cgroup}"):
            if "cgroup.threads" in files:
                found |= _ids(f"{path}/cgroup.threads")
        if 0 in found:
            raise HostError(
                f"cannot read {self._mount}/{cgroup}/cgroup.threads: its tasks are in a PID namespace that the agent "
                "cannot see (hostPID)"
            )
        return frozenset(found)

    def astray(self, group: str, cgroup: str) -> frozenset[int]:
        """Return the tasks of a cgroup that are not in the group. Raise HostError."""
        there = self.threads(cgroup)
        return there - self.members(group) if there else there

    def assign(self, group: str, cgroup: str) -> int:
        """Move all tasks of a cgroup into a group and read back. Return how many were moved. Raise HostError if some
        are not in it afterwards."""
        moved = 0
        for _ in range(ROUNDS):
            astray = self.astray(group, cgroup)
            if not astray:
                return moved
            added = {tid for tid in sorted(astray) if self._add(tid, group, cgroup)}
            there = self.threads(cgroup)
            if strangers := added - there:
                self._give_back(strangers & self.members(group))
            moved += len(added & there)
        raise HostError(f"cannot move the tasks of {cgroup} into {folder(group)}: they begin too fast")

    def _add(self, tid: int, group: str, cgroup: str) -> bool:
        """Add one task to a group. Return False if it has ended. Raise HostError if the kernel refuses."""
        try:
            add_task(self._sysfs.path(folder(group)), tid)
        except HostError:
            if tid in self.threads(cgroup):
                raise
            return False
        return True

    def _give_back(self, strangers: Iterable[int]) -> None:
        """Put tasks that have taken over the ids of ours where they would be: into the groups of their parents. If
        a parent is not visible, that is the default group."""
        for tid in strangers:
            fields = self._sysfs.text(f"proc/{tid}/stat", "").rpartition(")")[2].split()
            parent = int(fields[_PPID]) if len(fields) > _PPID else 0
            home = next((one for one in self._groups() if parent in self.members(one)), ROOT)
            with contextlib.suppress(HostError):  # it has ended meanwhile
                add_task(self._sysfs.path(folder(home)), tid)

    def _groups(self) -> Iterator[str]:
        for name in self._sysfs.names(MOUNT):
            if name != "info" and self._sysfs.exists(f"{folder(name)}/tasks"):
                yield name


def _ids(path: str) -> set[int]:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123 - a Path costs more than the read
            return {int(one) for one in file.read().split()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from None
