"""Which devices kinds have prepared for claims, or begun to: a small file, written before a kind is called.

After kill -9 at any step it says what to undo. It outlives a reboot, since what a kind has done may outlive it too; but
what was prepared on an earlier boot has to be prepared again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import KINDS


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A device that its kind prepares for a grant."""

    device: str
    kind: str
    claim: str
    """UID."""
    grant: str
    """Grant.id."""
    settings: str = ""
    """Grant.settings."""
    boot_id: str
    edits: ContainerEdits | None = None
    """What the kind said; None: it has not said anything yet."""
    pci_address: str | None = None
    paths: tuple[str, ...] = ()
    parent: str | None = None
    attributes: Mapping[str, str | int | bool] = msgspec.field(default_factory=lambda: MappingProxyType({}))

    def as_found(self) -> Device:
        """Return the device as it was when it was prepared, for a kind that no longer finds it."""
        return Device(
            kind=self.kind,
            id=self.device,
            pci_address=self.pci_address,
            paths=self.paths,
            parent=self.parent,
            attributes=MappingProxyType(dict(self.attributes)),
        )


class _File(msgspec.Struct, kw_only=True):
    records: list[Record] = []


class KindsJournal(Journal[_File, str, Record]):
    """The records, by device."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / KINDS, _File),
            lambda file: {one.device: one for one in file.records},
            lambda records: _File(records=list(records.values())),
            unreadable="kinds-records-unreadable",
            left="devices stay as their kinds have prepared them",
        )
        self.boot_id = boot_id
