"""Which groups of resctrl are the agent's and what the default group gave up, in a file that survives the agent but not
the boot: after a reboot there are no groups, and the default one has everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

_MODE = 0o600
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
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Journal)
    except FileNotFoundError:
        return Journal(), ""
    except OSError as error:
        cause = error.strerror or str(error)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        cause = str(error)
    else:
        return found if found.boot_id == sysfs.text(BOOT_ID, "") else Journal(), ""
    return Journal(), f"cannot load {path}: {cause}; groups of resctrl that were made before stay as they are"


def save(sysfs: SysFs, path: Path, journal: Journal) -> None:
    """Record exactly this; the file exists only if something has to be undone. Raise HostError with the cause."""
    if journal.empty:
        files.remove(path)
        return
    content = msgspec.json.encode(msgspec.structs.replace(journal, boot_id=sysfs.text(BOOT_ID, "")))
    files.replace(path, msgspec.json.format(content, indent=1) + b"\n", mode=_MODE)
