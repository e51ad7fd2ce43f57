"""Which lines of cgroups' files are the agent's, in a file that survives the agent but not the boot: after a reboot
these cgroups are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from nodeagent.host.sysfs.record_file import INDENTED, RecordFile, since_boot
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

Key = tuple[str, str, str]
"""Cgroup, file, and what of the file."""


class CgroupLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line that the agent has set, or was about to set."""

    path: str
    """Of the cgroup, below the mount."""
    file: str
    number: str
    """MAJOR:MINOR of the disk that it is about; "" if the file has one value."""
    wanted: str
    before: str = ""
    """What was there; "" if there was no line, or the value of a new cgroup."""
    earlier: tuple[str, ...] = ()
    """What was wanted until then, until it is known that the line is as wanted."""

    @property
    def key(self) -> Key:
        """Return what distinguishes it."""
        return self.path, self.file, self.number


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    boot_id: str = ""
    lines: list[CgroupLine] = []


def load(sysfs: SysFs, path: Path, left: str) -> tuple[list[CgroupLine], str]:
    """Return what was set since boot, and why that is unknown; empty if it is known. left: what is left as it is
    then."""
    found, why = since_boot(_file(path), sysfs, left)
    return found.lines if found is not None else [], why


def save(sysfs: SysFs, path: Path, lines: Iterable[CgroupLine]) -> None:
    """Record exactly these; the file exists only if there are any. Raise HostError with the cause."""
    every = list(lines)
    _file(path).save(_File(boot_id=sysfs.text(BOOT_ID, ""), lines=every) if every else None)


def _file(path: Path) -> RecordFile[_File]:
    return RecordFile(path, _File, indent=INDENTED)
