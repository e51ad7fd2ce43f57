"""Which MPS daemons were started and which time slices were changed: a small file, written before either.

After kill -9 at any step it says what may run and what a GPU had before. What an earlier boot recorded is gone with it:
no process outlives it, and the driver starts with its default time slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog

from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import SHARING
from nodeagent.telemetry.once import Once

_LARGEST_FILE_BYTES = 4 << 20
log = structlog.get_logger()


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


class SliceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The time slice of one GPU that was changed."""

    device: str
    """Device.id."""
    uuid: str
    before: str
    """What to restore."""
    interval: str
    """What it was changed to, or is about to be."""


class _File(msgspec.Struct, kw_only=True, omit_defaults=True):
    boot_id: str
    daemons: list[DaemonRecord] = []
    slices: list[SliceRecord] = []


class SharingJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / SHARING
        self._boot_id = boot_id
        self._unreadable = Once("sharing-records-unreadable", level="error")

    def daemons(self) -> dict[str, DaemonRecord]:
        """Return the recorded daemons of this boot, by name."""
        return {one.name: one for one in self._read().daemons}

    def slices(self) -> dict[str, SliceRecord]:
        """Return the recorded time slices of this boot, by device."""
        return {one.device: one for one in self._read().slices}

    def put(self, record: DaemonRecord | SliceRecord) -> None:
        """Record a daemon or a time slice; durable on return. Raise HostError if it cannot be written."""
        if isinstance(record, DaemonRecord):
            self._write({**self.daemons(), record.name: record}, self.slices())
        else:
            self._write(self.daemons(), {**self.slices(), record.device: record})

    def forget_daemon(self, name: str) -> None:
        """Record that nothing of a daemon is left. Raise HostError if it cannot be written."""
        self._write({key: one for key, one in self.daemons().items() if key != name}, self.slices())

    def forget_slice(self, device: str) -> None:
        """Record that a GPU has its own time slice again. Raise HostError if it cannot be written."""
        self._write(self.daemons(), {key: one for key, one in self.slices().items() if key != device})

    def _read(self) -> _File:
        nothing = _File(boot_id=self._boot_id)
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST_FILE_BYTES), type=_File)
        except FileNotFoundError:
            return nothing
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "time slices that were changed stay as they are"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return nothing
        return found if found.boot_id == self._boot_id else nothing

    def _write(self, daemons: Mapping[str, DaemonRecord], slices: Mapping[str, SliceRecord]) -> None:
        if not daemons and not slices:
            files.remove(self.path)
            return
        found = _File(
            boot_id=self._boot_id,
            daemons=[daemons[name] for name in sorted(daemons)],
            slices=[slices[device] for device in sorted(slices)],
        )
        files.replace(self.path, msgspec.json.encode(found) + b"\n", mode=0o600)
