"""What the agent has changed of AMD's GPUs: a small file, written before the driver is told.

What an earlier boot recorded is gone with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent.core.partitions.amd import AmdRecord
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal


class _File(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    gpus: dict[str, AmdRecord] = {}


class AmdJournal(Journal[_File, str, AmdRecord]):
    """What was done since boot, by PCI address."""

    def __init__(self, path: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(path, _File),
            lambda file: file.gpus if file.boot_id == boot_id else {},
            lambda gpus: _File(boot_id=boot_id, gpus=dict(gpus)),
            unreadable="amd-partition-records-unreadable",
            left="partitions of GPUs stay",
        )
        self._boot_id = boot_id

    def is_outdated(self) -> bool:
        """Return whether the file is of an earlier boot."""
        found = self._found(certain=False)
        return found is not None and found.boot_id != self._boot_id

    def write(self, records: Mapping[str, AmdRecord | None]) -> None:
        """Record what is done to some GPUs, None for nothing. Durable on return. Raise HostError if it cannot be
        written."""
        self.change(lambda known: {gpu: one for gpu, one in {**known, **records}.items() if one is not None})
