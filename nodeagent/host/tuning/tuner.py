"""Sets kernel files and gives them their old values back.

What a file had before is on disk before it is written, so that a restarted agent can give it back. A value that another
program has written meanwhile is replaced while ours is wanted, and stays afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.errors import HostError
from nodeagent.host.cgroup.write import put
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.tuning.journal import Tuned, load, save

OFTEN = 2
"""From this many repairs on, another program is setting a file."""
_ROUNDS = 2
"""Two files can depend on each other: the lower end of a range cannot be above the upper end."""


class TuningState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the files after a round."""

    set: tuple[str, ...] = ()
    """Paths that have what is wanted because of the agent."""
    repaired: int = 0
    """How many had been changed by another program and were set again in this round."""
    why: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a file has not what it should have, by path."""
    notes: tuple[str, ...] = ()
    """Texts for the admin."""


class Tuner:
    """Sets files and records this in a file of its own. Everything blocks; one round at a time."""

    def __init__(self, sysfs: SysFs, memory: Path) -> None:
        """memory: the record; it is read in the first round."""
        self._sysfs = sysfs
        self._memory = memory
        self._loaded = False
        self._unread = ""
        self._tuned: dict[str, Tuned] = {}
        self._repairs: dict[str, int] = {}

    @property
    def idle(self) -> bool:
        """Return whether no file is left whose old value has to be given back."""
        return self._loaded and not self._tuned

    def tune(self, wanted: Mapping[str, str], untouched: Collection[str] = ()) -> TuningState:
        """Give files their wanted value (by path), and all others that were set their old one, except those in folders
        that are left untouched.

        Raise HostError if what they had before cannot be recorded; then nothing is written.
        """
        if not self._loaded:
            self._tuned, self._unread = load(self._sysfs, self._memory)
            self._loaded = True
        why: dict[str, str] = {}
        done = {path: one for path, one in self._tuned.items() if path not in wanted}
        self._give_back({path: one for path, one in done.items() if path.rpartition("/")[0] not in untouched}, why)
        due, repaired = self._due(wanted, why)
        self._remember({**self._tuned, **due})
        self._set(due, why)
        self._remember(self._tuned)
        kept = tuple(path for path in wanted if path in self._tuned and path not in why)
        return TuningState(set=kept, repaired=repaired, why=MappingProxyType(why), notes=tuple(self._notes()))

    # ---------------------------------------------------------------- giving back

    def _give_back(self, some: Mapping[str, Tuned], why: dict[str, str]) -> None:
        """Write old values in the reverse order, twice where the first attempt fails."""
        left = dict(reversed(list(some.items())))
        for _ in range(_ROUNDS):
            for path, one in list(left.items()):
                error = self._restored(one)
                why[path] = error
                if not error:
                    del left[path], why[path], self._tuned[path]
                    self._repairs.pop(path, None)

    def _restored(self, one: Tuned) -> str:
        """Give a file its old value back, unless another program has changed it since. Return why it has it not, or
        "". The file of a CPU that is offline is given back when it returns."""
        try:
            now = self._sysfs.text(one.path, None)
            if now is None:
                return f"cannot write {self._sysfs.path(one.path)}: it is gone for now, value {one.before!r}"
            if now == one.before or (one.seen and now != one.seen):
                return ""
            put(self._sysfs.path(one.path), one.before)
        except HostError as error:
            return str(error)
        return ""

    # ---------------------------------------------------------------- setting

    def _due(self, wanted: Mapping[str, str], why: dict[str, str]) -> tuple[dict[str, Tuned], int]:
        """Return what has to be written, and how many of these another program has changed."""
        due: dict[str, Tuned] = {}
        repaired = 0
        for path, value in wanted.items():
            try:
                now, known = self._sysfs.text(path, None), self._tuned.get(path)
            except HostError as error:
                why[path] = str(error)
                continue
            if now is None:
                why[path] = f"cannot write {self._sysfs.path(path)}: it is gone for now, value {value!r}"
            elif known is None and now != value:
                due[path] = Tuned(path=path, before=now, wanted=value)
            elif known is not None and now != value:
                changed = known.wanted == value and known.seen not in ("", now)
                due[path] = msgspec.structs.replace(known, wanted=value, seen="")
                repaired += changed
                self._repairs[path] = self._repairs.get(path, 0) + changed
            elif known is not None:
                self._tuned[path] = msgspec.structs.replace(known, wanted=value, seen=now)
        return due, repaired

    def _set(self, due: Mapping[str, Tuned], why: dict[str, str]) -> None:
        for number in range(_ROUNDS):
            for path, one in due.items():
                if number and path not in why:
                    continue
                seen, error = self._written(one)
                self._tuned[path] = msgspec.structs.replace(one, seen=seen)
                why[path] = error
                if not error:
                    del why[path]

    def _written(self, one: Tuned) -> tuple[str, str]:
        """Write one file; return what it has then, or "" if that is not known, and why it is not what is wanted."""
        path = self._sysfs.path(one.path)
        try:
            put(path, one.wanted)
            seen = self._sysfs.text(one.path)
        except HostError as error:
            return "", str(error)
        return seen, "" if seen == one.wanted else f"cannot set {path} to {one.wanted!r}: it is {seen!r}"

    def _remember(self, tuned: Mapping[str, Tuned]) -> None:
        """Record before writing, and again what came of it. Nothing is written if nothing has changed."""
        save(self._sysfs, self._memory, tuned.values())
        self._tuned = dict(tuned)

    def _notes(self) -> Iterator[str]:
        if self._unread:
            yield self._unread
        often = [self._sysfs.path(path) for path, times in self._repairs.items() if times >= OFTEN]
        if often:
            some = f"{often[0]} and {len(often) - 1} more are" if len(often) > 1 else f"{often[0]} is"
            yield (
                f"{some} set by another program again and again: keep tuned, power-profiles-daemon or cpupower off "
                "exclusive CPUs"
            )
