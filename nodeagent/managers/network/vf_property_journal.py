"""Which virtual functions were set to what claims want, and what they had before: a small file, written before anything
is set.

After kill -9 at any step it says what to set back. What an earlier boot recorded is gone with it, as the functions are.
An unreadable file counts as empty, and this is logged: functions then stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent.core.network.vf_checks import VfPlace
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import VF_PROPERTIES
from nodeagent.telemetry.once import Once


class VfSet(msgspec.Struct, frozen=True, kw_only=True):
    """One virtual function that is, or is about to be, set to what a claim wants."""

    vf: str
    """Id of the device."""
    claim: str
    """UID."""
    place: VfPlace
    wanted: VfProperties
    before: VfProperties
    """What it had."""


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    set: list[VfSet] = []


class VfPropertyJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / VF_PROPERTIES
        self._boot_id = boot_id
        self._unreadable = Once("vf-properties-records-unreadable", level="error")

    def read(self) -> Mapping[str, VfSet]:
        """Return what was recorded since boot, by virtual function."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "virtual functions keep the properties that they have"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {one.vf: one for one in found.set} if found.boot_id == self._boot_id else {}

    def add(self, record: VfSet) -> None:
        """Record a function that is about to be set. Durable on return. Raise HostError if it cannot be written."""
        self._write({**self.read(), record.vf: record})

    def forget(self, vf: str) -> None:
        """Record that a function has what it had before. Raise HostError if it cannot be written."""
        known = self.read()
        if vf in known:
            self._write({id: one for id, one in known.items() if id != vf})

    def _write(self, records: Mapping[str, VfSet]) -> None:
        if not records:
            files.remove(self.path)
            return
        ordered = [records[vf] for vf in sorted(records)]
        files.replace(self.path, msgspec.json.encode(_File(boot_id=self._boot_id, set=ordered)) + b"\n", mode=0o600)
