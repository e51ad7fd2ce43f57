"""Which groups of resctrl are the agent's and what the default group gave up, in a file that survives the agent but not
the boot: after a reboot there are no groups, and the default one has everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from nodeagent.host.sysfs.record_file import INDENTED, RecordFile, since_boot
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

PlainSchemata = dict[str, dict[int, int]]


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group that the agent has made, or was about to make."""

    schemata: PlainSchemata
    """What it was to have."""
    exclusive: bool = False


class Journal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was done since boot."""

    version: Literal[1] = 1
    boot_id: str = ""
    groups: dict[str, GroupRecord] = {}
    aside: dict[int, int] = {}
    """Ways that were set aside, by L3 cache."""
    earlier: list[dict[int, int]] = []
    """What was set aside until then, until it is known that the default group has what it is to have."""
    before: PlainSchemata = {}
    """What the default group had before."""

    @property
    def empty(self) -> bool:
        """Return whether nothing has to be undone."""
        return not (self.groups or self.aside or self.before)


def load(sysfs: SysFs, path: Path) -> tuple[Journal, str]:
    """Return what was done since boot, and why that is unknown; empty if it is known."""
    found, why = since_boot(_file(path), sysfs, "groups of resctrl that were made before stay as they are")
    return found if found is not None else Journal(), why


def save(sysfs: SysFs, path: Path, journal: Journal) -> None:
    """Record exactly this; the file exists only if something has to be undone. Raise HostError with the cause."""
    _file(path).save(None if journal.empty else msgspec.structs.replace(journal, boot_id=sysfs.text(BOOT_ID, "")))


def _file(path: Path) -> RecordFile[Journal]:
    return RecordFile(path, Journal, indent=INDENTED)
