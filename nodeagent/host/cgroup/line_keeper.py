"""Makes lines of cgroups' files what they should be, reads them back, and takes them out again.

What is about to be written is on disk before the kernel is asked, so that a restarted agent can undo it. Lines that are
not recorded are never touched. Everything blocks; one call at a time. What the files of one controller look like is
known to a subclass: limits of disk I/O in `host/blockio/keeper.py`, utilization clamps in `host/uclamp/keeper.py`.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.errors import HostError, cause_of
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import CgroupLayout
from nodeagent.host.cgroup.line_journal import CgroupLine, Key, load, save
from nodeagent.host.cgroup.read import CgroupReader
from nodeagent.host.cgroup.write import Drift, Writer
from nodeagent.host.sysfs.sysfs import SysFs

_GONE = (errno.ENOENT, errno.ENODEV, errno.ENOTDIR)
"""Errors of a read that mean that the cgroup, or its file, is gone."""
Files = Mapping[str, Mapping[str, str]]
"""Lines by file, and by what of the file."""
Targets = Mapping[str, Files]
"""The same by the path of a cgroup."""


class KeptLines(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the lines after a round."""

    made: frozenset[str] = frozenset()
    """Paths of cgroups that are as wanted."""
    drifts: Mapping[str, tuple[Drift, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What another process had changed, by path; where there is no error it is as wanted again."""
    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a cgroup is not as wanted, by path."""
    notes: tuple[str, ...] = ()


class LineKeeper(ABC):
    """Keeps lines, with a record in a file of its own."""

    controller: str
    act: str
    """What is done, as errors have it, such as "limit I/O"."""
    left: str
    """What is left as it is if the record cannot be read."""

    def __init__(self, sysfs: SysFs, mount: str, layouts: Sequence[CgroupLayout], memory: Path) -> None:
        """mount: of the cgroup hierarchy. memory: the record. Another agent may change it between two calls."""
        self._sysfs = sysfs
        self._mount = mount
        self._layouts = tuple(layouts)
        self._writer = Writer(CgroupReader(mount, ()))
        self._memory = memory
        self._confirmed: dict[Key, str] = {}
        """Lines that were as wanted when they were last read: what differs then was changed by another process, unless
        another agent has recorded since that it wants something else."""

    # ---------------------------------------------------------------- what the files look like

    @abstractmethod
    def parsed(self, text: str) -> Mapping[str, str]:
        """Return the lines of a file, by what of the file."""

    @abstractmethod
    def alike(self, one: str, other: str) -> bool:
        """Return whether two lines say the same."""

    @abstractmethod
    def removed(self, file: str) -> str:
        """Return the line that a file takes in order to be as in a new cgroup."""

    def written(self, number: str, line: str) -> str:
        """Return what is written for a line."""
        return f"{number} {line}".strip()

    def is_there(self, number: str) -> bool:
        """Return whether there is still what a line is about."""
        return True

    def missing(self, file: str) -> str:
        """Return why a file is missing although the controller is on."""
        return f"this kernel has no {file}"

    # ---------------------------------------------------------------- one round

    def keep(self, wanted: Targets, leave: Callable[[str], bool] = lambda path: False) -> KeptLines:
        """Make lines what is wanted, and take out all others that are recorded, but not where `leave` returns True.
        Raise HostError if something cannot be recorded; it is not done then. Cgroups that are gone are no error."""
        held, unread = self.held()
        known = {one.key: one for one in held if self.exists(one.path)}
        self._confirmed = {
            key: line for key, line in self._confirmed.items() if key in known and known[key].wanted == line
        }
        errors: dict[str, str] = {}
        drifts: dict[str, tuple[Drift, ...]] = {}
        fresh, now = self._read_all({path: some for path, some in wanted.items() if self.exists(path)}, errors)
        due = {one.key: self._recorded(one, known, now) for one in fresh}
        left = {key: one for key, one in known.items() if key not in due}
        self._record(held, [*left.values(), *due.values()])
        kept = [one for one in left.values() if leave(one.path) or not self._taken_out(one, errors)]
        for path in now:
            mine = [one for one in due.values() if one.path == path]
            if found := self._set(path, mine, now[path], errors):
                drifts[path] = found
        done = [replace(one, earlier=()) if self._confirmed.get(one.key) == one.wanted else one for one in due.values()]
        self._record([*left.values(), *due.values()], [*kept, *done])
        return KeptLines(
            made=frozenset(now.keys() - errors.keys()),
            drifts=MappingProxyType(drifts),
            errors=MappingProxyType(errors),
            notes=(unread,) if unread else (),
        )

    def held(self) -> tuple[Sequence[CgroupLine], str]:
        """Return what is recorded, and why that is unknown."""
        return load(self._sysfs, self._memory, self.left)

    def exists(self, path: str) -> bool:
        """Return whether there is a cgroup."""
        return self._sysfs.exists(f"{self._mount}/{path}".removeprefix(self._sysfs.root))

    def text(self, path: str, file: str) -> str | None:
        """Return what a file of a cgroup says, or None if it is not there. Raise HostError if it cannot be read."""
        full = f"{self._mount}/{path}/{file}"
        try:
            return Path(full).read_text(encoding="ascii")
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise HostError(f"cannot read {full}: {cause_of(error)}") from None

    def _record(self, before: Sequence[CgroupLine], after: Sequence[CgroupLine]) -> None:
        if set(before) != set(after):
            save(self._sysfs, self._memory, sorted(after, key=lambda one: one.key))

    # ---------------------------------------------------------------- what is there

    def _read_all(self, wanted: Targets, errors: dict[str, str]) -> tuple[list[CgroupLine], dict[str, dict[str, str]]]:
        """Return the lines that are wanted, and by path and file what there is; the controller is enabled where it is
        not. Cgroups that cannot be read are left out, with an error."""
        lines: list[CgroupLine] = []
        now: dict[str, dict[str, str]] = {}
        for path, some in wanted.items():
            try:
                texts = {file: self.text(path, file) for file in some}
                if None in texts.values():
                    self._enable(path)
                    texts = {file: self.text(path, file) for file in some}
                if missing := [file for file, text in texts.items() if text is None]:
                    if not self.exists(path):
                        continue
                    raise HostError(f"cannot {self.act} in {self._mount}/{path}: {self.missing(missing[0])}")
            except HostError as error:
                errors[path] = str(error)
                continue
            now[path] = {file: text or "" for file, text in texts.items()}
            lines += [
                CgroupLine(path=path, file=file, number=number, wanted=line)
                for file, by_number in some.items()
                for number, line in by_number.items()
            ]
        return lines, now

    def _enable(self, path: str) -> None:
        layout = next((one for one in self._layouts if path.startswith(f"{one.top}/")), None)
        if layout is None:
            raise HostError(f"cannot {self.act} in {self._mount}/{path}: it is not below kubepods")
        self._writer.enable(layout, path, (self.controller,))

    def _recorded(
        self, one: CgroupLine, known: Mapping[Key, CgroupLine], now: Mapping[str, Mapping[str, str]]
    ) -> CgroupLine:
        """Return a line with what was there before the agent came, and what of the agent's may be there now."""
        if (held := known.get(one.key)) is not None:
            own = dict.fromkeys((*held.earlier, held.wanted))
            return replace(one, before=held.before, earlier=tuple(line for line in own if line != one.wanted))
        before = self.parsed(now[one.path][one.file]).get(one.number, "")
        # What is as wanted already is most likely the agent's, from before its record was lost.
        return replace(one, before="" if self.alike(before, one.wanted) else before)

    # ---------------------------------------------------------------- writing

    def _set(
        self, path: str, lines: Sequence[CgroupLine], now: Mapping[str, str], errors: dict[str, str]
    ) -> tuple[Drift, ...]:
        """Write what differs in a cgroup and read it back. Return what another process had changed."""
        found = {one: self.parsed(now[one.file]).get(one.number, "") for one in lines}
        due = [one for one in lines if not self.alike(found[one], one.wanted)]
        changed = tuple(self._drift(one, found[one]) for one in due if self._confirmed.get(one.key) == one.wanted)
        self._confirmed = {key: line for key, line in self._confirmed.items() if key[0] != path}
        try:
            for one in due:
                cgroupset.put(f"{self._mount}/{path}/{one.file}", self.written(one.number, one.wanted))
            for one in due:
                text = self.parsed(self.text(path, one.file) or "").get(one.number, "")
                if not self.alike(text, one.wanted):
                    what = f" for disk {one.number}" if one.number else ""
                    raise HostError(
                        f"cannot {self.act} in {self._mount}/{path}: {one.file} has {text!r}{what}, not {one.wanted!r}"
                    )
        except HostError as error:
            if self.exists(path):
                errors[path] = str(error)
            return changed
        self._confirmed |= {one.key: one.wanted for one in lines}
        return changed

    def _taken_out(self, one: CgroupLine, errors: dict[str, str]) -> bool:
        """Give a line back what was there before, unless another process has changed it since; return whether nothing
        of the agent is left."""
        self._confirmed.pop(one.key, None)
        try:
            now = self.parsed(self.text(one.path, one.file) or "").get(one.number, "")
            if any(self.alike(now, own) for own in (one.wanted, *one.earlier)) and self.is_there(one.number):
                value = self.written(one.number, one.before or self.removed(one.file))
                cgroupset.put(f"{self._mount}/{one.path}/{one.file}", value)
        except HostError as error:
            if not self.exists(one.path):
                return True
            errors[one.path] = str(error)
            return False
        return True

    def _drift(self, one: CgroupLine, found: str) -> Drift:
        return Drift(file=one.file, found=self.written(one.number, found), wanted=self.written(one.number, one.wanted))
