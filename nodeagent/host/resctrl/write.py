"""Writes resctrl: groups, their masks and limits, their mode. What is written is read back.

An error has what the kernel says of it in info/last_cmd_status, which every write and every new folder set again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from nodeagent.core.resctrl.model import BANDWIDTH, Group, Mode, Schemata, Tree, Values
from nodeagent.errors import HostError
from nodeagent.host.cgroup.write import put
from nodeagent.host.resctrl.read import STATUS, folder, group
from nodeagent.host.sysfs.sysfs import SysFs

mkdir = os.mkdir
rmdir = os.rmdir


class GroupWriter:
    """Writes groups. Everything blocks."""

    def __init__(self, sysfs: SysFs) -> None:
        self._sysfs = sysfs

    def make(self, name: str, tree: Tree) -> None:
        """Make a control group, unless there is one. Raise HostError with the cause; where none are left, with how many
        there can be and whose they are. tree: as it was just read."""
        path = self._sysfs.path(folder(name))
        try:
            with self._explained():
                _make(path)
        except HostError as error:
            used = sorted(one for one in tree.groups if one)
            if len(used) + 1 < tree.closids:
                raise
            every = f"all {tree.closids} groups that the hardware has are in use: the default one"
            raise HostError(f"{error}: {', '.join([every, *used])}") from None

    def remove(self, name: str) -> None:
        """Remove a group, if it is there; its tasks and CPUs are the default group's then. Raise HostError."""
        path = self._sysfs.path(folder(name))
        with self._explained():
            _remove(path)

    def write(self, name: str, wanted: Schemata, tree: Tree) -> Group:
        """Give a group masks and limits; those of its resources that `wanted` leaves out stay. Return it as it is then.

        Raise HostError if the kernel refuses, which changes nothing, or made something else of it: bandwidth may be
        rounded by one step."""
        path = self._sysfs.path(f"{folder(name)}/schemata")
        with self._explained():
            put(path, "\n".join(line(resource, values) for resource, values in wanted.items()))
        found = self._read(name)
        for resource, values in wanted.items():
            seen = found.schemata.get(resource, {})
            for domain, value in values.items():
                if not alike(tree, resource, seen.get(domain), value):
                    now = line(resource, {domain: seen[domain]}) if domain in seen else "not there"
                    raise HostError(f"cannot write {path}: it is {now}, value {line(resource, {domain: value})!r}")
        return found

    def set_mode(self, name: str, mode: Mode) -> Group:
        """Change how a group shares its ways. Return it as it is then. Raise HostError if the kernel refuses."""
        path = self._sysfs.path(f"{folder(name)}/mode")
        with self._explained():
            put(path, mode.value)
        found = self._read(name)
        if found.mode != mode:
            raise HostError(f"cannot write {path}: it is {found.mode.value!r}, value {mode.value!r}")
        return found

    def _read(self, name: str) -> Group:
        found = group(self._sysfs, name)
        if found is None:
            raise HostError(f"cannot read {self._sysfs.path(folder(name))}: the group is gone")
        return found

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Append what the kernel says to a HostError raised inside."""
        try:
            yield
        except HostError as error:
            said = self._said()
            raise HostError(f"{error} ({said})" if said else str(error)) from None

    def _said(self) -> str:
        with contextlib.suppress(HostError):
            said = "; ".join(self._sysfs.text(STATUS, "").splitlines())
            return "" if said == "ok" else said
        return ""


def add_task(path: str, tid: int) -> None:
    """Add a task to the group at a full path. Raise HostError if the kernel refuses, as it does if there is none."""
    put(f"{path}/tasks", str(tid))


def line(resource: str, values: Values) -> str:
    """Return a line of a schemata file, such as "L3:0=f;1=ff"."""
    form = "d" if resource == BANDWIDTH else "x"
    return f"{resource}:" + ";".join(f"{domain}={value:{form}}" for domain, value in sorted(values.items()))


def alike(tree: Tree, resource: str, found: int | None, wanted: int) -> bool:
    """Return whether a value is what is wanted, as far as the hardware can be set."""
    if found is None or tree.bandwidth is None or resource != BANDWIDTH:
        return found == wanted
    return abs(found - wanted) < max(2, tree.bandwidth.step)


def _make(path: str) -> None:
    try:
        mkdir(path)
    except FileExistsError:
        return
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}") from None


def _remove(path: str) -> None:
    try:
        rmdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}") from None
