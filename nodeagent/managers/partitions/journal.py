"""Which MIG instances are the agent's own: a small file, written before the driver is asked to make one.

After kill -9 at any moment only this file distinguishes them from those of others. It need not survive a power cut, and
is not synced: no instance does. Where it is unreadable, instances are left as they are rather than taken from another
program.
"""

from __future__ import annotations

from pathlib import Path

from nodeagent.core.partitions.instances import Record
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import PARTITIONS


class PartitionJournal(Journal[list[Record], str, Record]):
    """What was made since boot, by partition."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / PARTITIONS, list[Record], durable=False),
            lambda file: {one.partition: one for one in file if one.boot_id == boot_id},
            lambda records: list(records.values()),
            unreadable="partition-records-unreadable",
            left="MIG instances that were made for claims stay as they are",
        )
        self.boot_id = boot_id
