"""Which MIG instances are the agent's own: a small file, written before the driver is asked to make one.

After kill -9 at any moment only this file distinguishes them from those of others. It need not survive a power cut, and
is not synced: no instance does. An unreadable file counts as empty, and this is logged: instances are then left as they
are rather than taken from another program.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import structlog

from nodeagent.core.partitions.instances import Record
from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import PARTITIONS
from nodeagent.telemetry.once import Once

_LARGEST_FILE_BYTES = 1 << 20
log = structlog.get_logger()


class PartitionJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / PARTITIONS
        self.boot_id = boot_id
        self._unreadable = Once("partition-records-unreadable", level="error")
        self._turn = threading.Lock()

    def read(self) -> Mapping[str, Record]:
        """Return what was made since boot, by partition."""
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST_FILE_BYTES), type=list[Record])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "MIG instances that were made for claims stay as they are"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {one.partition: one for one in found if one.boot_id == self.boot_id}

    def put(self, records: Iterable[Record]) -> None:
        """Record instances that are about to be made, or were made. Raise HostError if it cannot be written."""
        with self._turn:
            self._write({**self.read(), **{one.partition: one for one in records}}.values())

    def forget(self, partitions: Iterable[str]) -> None:
        """Record that instances are gone. Raise HostError if it cannot be written."""
        gone = frozenset(partitions)
        with self._turn:
            self._write(one for id, one in self.read().items() if id not in gone)

    def _write(self, records: Iterable[Record]) -> None:
        ours = [msgspec.structs.asdict(one) for one in sorted(records, key=lambda one: one.partition)]
        if ours:
            files.replace(self.path, msgspec.json.encode(ours) + b"\n", mode=0o600, durable=False)
        else:
            files.remove(self.path, durable=False)
