"""Which targets are, or are about to be, connected for claims: a small file, written before the kernel is asked.

After kill -9 at any step it says what to disconnect. What an earlier boot recorded is gone with it: a connection ends
with its kernel.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.core.fabrics.target import Port
from nodeagent.core.model.device import ContainerEdits
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import FABRICS


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """One target that is, or is about to be, connected."""

    device: str
    """Device.id."""
    claim: str
    """UID."""
    grant: str
    """Grant.id."""
    port: Port
    hostnqn: str = ""
    """As whom it is connected; "": as the kernel calls itself."""
    controller: str = ""
    """Its name; "" as long as the kernel has not said it."""
    edits: ContainerEdits | None = None
    """What the claim's container gets; None until its disks are there."""


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    connected: list[Connected] = []


class FabricsJournal(Journal[_File, str, Connected]):
    """The records of this boot, by device."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / FABRICS, _File),
            lambda file: {one.device: one for one in file.connected} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, connected=list(records.values())),
            unreadable="fabrics-records-unreadable",
            left="targets stay connected",
        )
