"""Which MPS daemons were started and which time slices were changed: a small file, written before either.

After kill -9 at any step it says what may run and what a GPU had before. What an earlier boot recorded is gone with it:
no process outlives it, and the driver starts with its default time slice.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec

from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import SHARING

DAEMON, SLICE = "daemon", "slice"


class Stage(StrEnum):
    """How far a daemon is."""

    STARTING = "starting"
    """It may run or not; no claim was prepared with it since."""
    RUNNING = "running"
    STOPPING = "stopping"


class DaemonRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One MPS daemon."""

    name: str
    stage: Stage
    uuids: tuple[str, ...]
    shared: bool = False
    pid: int = 0
    start_ticks: int = 0
    threads_percent: int = 0
    """The limits that it was last given; 0: none yet."""
    memory_mib: dict[int, int] = {}
    restarts: int = 0
    """How often it had ended by itself and was started again."""

    @property
    def key(self) -> tuple[str, str]:
        """Return what it is recorded by."""
        return DAEMON, self.name


class SliceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The time slice of one GPU that was changed."""

    device: str
    """Device.id."""
    uuid: str
    before: str
    """What to restore."""
    interval: str
    """What it was changed to, or is about to be."""

    @property
    def key(self) -> tuple[str, str]:
        """Return what it is recorded by."""
        return SLICE, self.device


class _File(msgspec.Struct, kw_only=True, omit_defaults=True):
    boot_id: str
    daemons: list[DaemonRecord] = []
    slices: list[SliceRecord] = []

    def every(self) -> list[DaemonRecord | SliceRecord]:
        """Return all records."""
        return [*self.daemons, *self.slices]


class SharingJournal(Journal[_File, tuple[str, str], DaemonRecord | SliceRecord]):
    """The records of this boot, by `key`."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / SHARING, _File),
            lambda file: {one.key: one for one in file.every()} if file.boot_id == boot_id else {},
            lambda records: _File(
                boot_id=boot_id,
                daemons=[one for one in records.values() if isinstance(one, DaemonRecord)],
                slices=[one for one in records.values() if isinstance(one, SliceRecord)],
            ),
            unreadable="sharing-records-unreadable",
            left="time slices that were changed stay as they are",
        )

    def daemons(self) -> dict[str, DaemonRecord]:
        """Return the recorded daemons, by name."""
        return {one.name: one for one in self.read().values() if isinstance(one, DaemonRecord)}

    def slices(self) -> dict[str, SliceRecord]:
        """Return the recorded time slices, by device."""
        return {one.device: one for one in self.read().values() if isinstance(one, SliceRecord)}
