"""Which PCI functions were bound to a VFIO driver for a claim, and what they had before: a small file, written before
anything is bound.

After kill -9 at any step it says what to give back. What an earlier boot recorded is gone with it: the kernel binds
every function again. An unreadable file counts as empty, and this is logged: functions then stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec
import structlog

from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import PASSTHROUGH
from nodeagent.telemetry.once import Once

_LARGEST_FILE_BYTES = 4 << 20
log = structlog.get_logger()


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


class PassthroughJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / PASSTHROUGH
        self._boot_id = boot_id
        self._unreadable = Once("passthrough-records-unreadable", level="error")

    def read(self) -> Mapping[str, Bound]:
        """Return what was recorded since boot, by address."""
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST_FILE_BYTES), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "functions stay bound to the drivers that they have"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {one.address: one for one in found.bound} if found.boot_id == self._boot_id else {}

    def add(self, records: Iterable[Bound]) -> None:
        """Record functions that are about to be bound; those that are recorded stay as they are. Durable on return.
        Raise HostError if it cannot be written."""
        known = self.read()
        self._write({**{one.address: one for one in records}, **known}, known)

    def forget(self, addresses: Collection[str]) -> None:
        """Record that functions have their own driver again. Raise HostError if it cannot be written."""
        known = self.read()
        self._write({address: one for address, one in known.items() if address not in addresses}, known)

    def _write(self, records: Mapping[str, Bound], before: Mapping[str, Bound]) -> None:
        if records == before:
            return
        if not records:
            files.remove(self.path)
            return
        ordered = [records[address] for address in sorted(records)]
        files.replace(self.path, msgspec.json.encode(_File(boot_id=self._boot_id, bound=ordered)) + b"\n", mode=0o600)
