"""What the agent has changed of AMD's GPUs: a small file, written before the driver is told.

What an earlier boot recorded is gone with it. An unreadable file counts as empty, and this is logged: partitions then
stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent.core.partitions.amd import AmdRecord
from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.telemetry.once import Once


class _File(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    gpus: dict[str, AmdRecord] = {}


class AmdJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        self._unreadable = Once("amd-partition-records-unreadable", level="error")

    def read(self) -> Mapping[str, AmdRecord]:
        """Return what was done since boot, by PCI address."""
        found = self._read()
        return found.gpus if found is not None and found.boot_id == self._boot_id else {}

    def is_outdated(self) -> bool:
        """Return whether the file is of an earlier boot."""
        found = self._read()
        return found is not None and found.boot_id != self._boot_id

    def _read(self) -> _File | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            self._unreadable.report(f"cannot read {self._path}: {cause_of(error)}", left="partitions of GPUs stay")
            return None

    def write(self, records: Mapping[str, AmdRecord | None]) -> None:
        """Record what is done to some GPUs, None for nothing. Durable on return. Raise HostError if it cannot be
        written."""
        before = self.read()
        after = {address: one for address, one in {**before, **records}.items() if one is not None}
        if not after:
            files.remove(self._path)
        elif after != before:
            file = _File(boot_id=self._boot_id, gpus=dict(sorted(after.items())))
            files.replace(self._path, msgspec.json.encode(file) + b"\n", mode=0o600)
