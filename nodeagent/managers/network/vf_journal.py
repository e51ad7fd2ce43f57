"""Which virtual functions the agent made: a small file, written before they are made.

What an earlier boot recorded is gone with it, as the functions are.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal


class _File(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    made: dict[str, int] = {}


class VfJournal(Journal[_File, str, int]):
    """How many virtual functions were made since boot, by physical function."""

    def __init__(self, path: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(path, _File),
            lambda file: file.made if file.boot_id == boot_id else {},
            lambda made: _File(boot_id=boot_id, made=dict(made)),
            unreadable="virtual-functions-records-unreadable",
            left="virtual functions stay",
        )

    def write(self, pf: str, count: int) -> None:
        """Record that a physical function is about to have so many, 0 for none of the agent's. Durable on return. Raise
        HostError if it cannot be written."""
        if count:
            self.keep({pf: count})
        else:
            self.forget(pf)
