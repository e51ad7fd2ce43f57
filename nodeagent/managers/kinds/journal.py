"""Which devices kinds have prepared for claims, or begun to: a small file, written before a kind is called.

After kill -9 at any step it says what to undo. It outlives a reboot, since what a kind has done may outlive it too; but
what was prepared on an earlier boot has to be prepared again. An unreadable file counts as empty, and this is logged:
devices then stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
import structlog

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import KINDS
from nodeagent.telemetry.once import Once

_LARGEST_FILE_BYTES = 16 << 20
log = structlog.get_logger()


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


class KindsJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / KINDS
        self.boot_id = boot_id
        self._unreadable = Once("kinds-records-unreadable", level="error")

    def read(self) -> Mapping[str, Record]:
        """Return what is recorded, by device."""
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST_FILE_BYTES), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "devices stay as their kinds have prepared them"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {one.device: one for one in found.records}

    def put(self, record: Record) -> None:
        """Record a device, in place of what was recorded of it. Durable on return. Raise HostError if it cannot be
        written."""
        known = self.read()
        self._write({**known, record.device: record}, known)

    def forget(self, devices: Collection[str]) -> None:
        """Record that devices are as they were. Raise HostError if it cannot be written."""
        known = self.read()
        self._write({id: one for id, one in known.items() if id not in devices}, known)

    def _write(self, records: Mapping[str, Record], before: Mapping[str, Record]) -> None:
        if records == before:
            return
        if not records:
            files.remove(self.path)
            return
        whole = _File(records=[records[id] for id in sorted(records)])
        files.replace(self.path, msgspec.json.encode(whole, enc_hook=dict) + b"\n", mode=0o600)
