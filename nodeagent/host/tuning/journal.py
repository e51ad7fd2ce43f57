"""Which kernel files were set and what they had before, in a file that survives the agent but not the boot: after a
reboot the kernel has its own values again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from nodeagent.host.sysfs.record_file import INDENTED, RecordFile, since_boot
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs


class Tuned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that the agent has set, or was about to set."""

    path: str
    """Below the root, without a leading slash."""
    before: str
    wanted: str
    seen: str = ""
    """What the kernel made of it; empty until it was read back."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    boot_id: str = ""
    tuned: list[Tuned] = []


def load(sysfs: SysFs, path: Path) -> tuple[dict[str, Tuned], str]:
    """Return what was set since boot, by path, and why that is unknown; empty if it is known."""
    found, why = since_boot(_file(path), sysfs, "CPUs that were tuned before stay as they are")
    return {one.path: one for one in found.tuned} if found is not None else {}, why


def save(sysfs: SysFs, path: Path, tuned: Iterable[Tuned]) -> None:
    """Record exactly these; the file exists only if there are any. Raise HostError with the cause."""
    every = list(tuned)
    _file(path).save(_File(boot_id=sysfs.text(BOOT_ID, ""), tuned=every) if every else None)


def _file(path: Path) -> RecordFile[_File]:
    return RecordFile(path, _File, indent=INDENTED)
