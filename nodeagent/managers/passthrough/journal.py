"""Which PCI functions were bound to a VFIO driver for a claim, and what they had before: a small file, written before
anything is bound.

After kill -9 at any step it says what to give back. What an earlier boot recorded is gone with it: the kernel binds
every function again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import PASSTHROUGH


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """One function that is, or is about to be, bound to a VFIO driver."""

    address: str
    claim: str
    """UID."""
    driver: str
    before: str
    """The driver that it had; "" for none."""
    override: str
    """What it was reserved for; "" for nothing."""


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    bound: list[Bound] = []


class PassthroughJournal(Journal[_File, str, Bound]):
    """The records of this boot, by address."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / PASSTHROUGH, _File),
            lambda file: {one.address: one for one in file.bound} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, bound=list(records.values())),
            unreadable="passthrough-records-unreadable",
            left="functions stay bound to the drivers that they have",
        )

    def add(self, records: Iterable[Bound]) -> None:
        """Record functions that are about to be bound; those that are recorded stay as they are. Durable on return.
        Raise HostError if it cannot be written."""
        new = {one.address: one for one in records}
        self.change(lambda known: {**new, **known})
