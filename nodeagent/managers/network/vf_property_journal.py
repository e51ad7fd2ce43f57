"""Which virtual functions were set to what claims want, and what they had before: a small file, written before anything
is set.

After kill -9 at any step it says what to set back. What an earlier boot recorded is gone with it, as the functions are.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.core.network.vf_checks import VfPlace
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import VF_PROPERTIES


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


class VfPropertyJournal(Journal[_File, str, VfSet]):
    """The records of this boot, by virtual function."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / VF_PROPERTIES, _File),
            lambda file: {one.vf: one for one in file.set} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, set=list(records.values())),
            unreadable="vf-properties-records-unreadable",
            left="virtual functions keep the properties that they have",
        )

    def add(self, record: VfSet) -> None:
        """Record a function that is about to be set. Durable on return. Raise HostError if it cannot be written."""
        self.keep({record.vf: record})
