"""Which accelerators are, or are about to be, divided into work queues, and which queues are made for claims: a small
file, written before anything is changed.

After kill -9 at any step it says what to take down. What an earlier boot recorded is gone with it: the kernel starts
with accelerators that are not configured.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.core.dsa.division import Division
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import DSA_QUEUES


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    divided: list[Division] = []


class DsaJournal(Journal[_File, str, Division]):
    """The records of this boot, by PCI address."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / DSA_QUEUES, _File),
            lambda file: {one.address: one for one in file.divided} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, divided=list(records.values())),
            unreadable="dsa-queues-records-unreadable",
            left="accelerators stay divided as they are",
        )
        self._boot_id = boot_id

    def is_of_earlier_boot(self) -> bool:
        """Return whether there is a file, and an earlier boot recorded it. Raise HostError if it cannot be read for the
        moment."""
        found = self._found(certain=True)
        return found is not None and found.boot_id != self._boot_id
