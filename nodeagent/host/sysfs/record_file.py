"""Files that record what the agent changes, written before it acts, so that the next agent can undo it.

What happens to every such file:

- **kill -9 between two steps, or a power cut:** it has what was recorded before the step or after it, never a part. A
  caller records first and acts then, so a record says what may have been done, and the machine says what was.
- **A full disk, or a folder that cannot be written:** `save` raises HostError, and the caller does not act. The file
  keeps what it had, or has the new record if only the folder could not be synced.
- **Not readable for the moment (no descriptor is left, the disk reports an error):** `load` raises UnreadableError, and
  `save` HostError: what is recorded may be good.
- **Empty, truncated, damaged, or larger than LARGEST_BYTES:** `load` raises UnreadableError.
  Nothing of the file is used; the users report it, go on as if nothing were recorded, and what was changed stays as it
  is. When something is recorded next, `save` renames the file (`NAME.damaged-…`) and reports that; `set_aside` lists
  such files, which stay until an admin removes them. If it cannot be renamed, `save` raises HostError.
- **Two agents of the node, or two threads, at once:** a writer holds the lock of the folder from reading
  what is recorded to replacing it (`alone`), so nothing that was recorded is lost, and no good file is set aside that
  another one has just put in place of a damaged one. The locks of managers (`managers/turns.py`) are for what they do
  to the machine, and last longer: what changes a record alone needs none of them. If another holder keeps the lock of
  the folder for PATIENCE_S, `save` raises HostError.
- **Written by a newer build:** fields that this build does not know are ignored, and lost when something is recorded
  next. A type that forbids them or pins its version makes the file unreadable instead.
- **Written on an earlier boot:** it says nothing where the kernel has forgotten what was changed; types have a boot id
  for that.
- **Deleted, or never there:** nothing is recorded. A file of which nothing is left to undo is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import structlog

from nodeagent.errors import HostError, cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

LARGEST_BYTES = 16 << 20
PRIVATE = 0o600
COMPACT, INDENTED = -1, 1
PATIENCE_S, POLL_S = 5.0, 0.002
"""How long to wait for the lock of a folder, and how often to try: it is held as long as a disk takes for a file."""
log = structlog.get_logger()


class OfBoot(Protocol):
    """A type that says on which boot it was recorded."""

    @property
    def boot_id(self) -> str:
        """Return the id of that boot."""
        ...


Form = TypeVar("Form")
BootForm = TypeVar("BootForm", bound=OfBoot)


class UnreadableError(HostError):
    """A file is there, but what it records is not known. why: the cause alone. damaged: whether it was read and made no
    sense. passes: whether it may be good, and read another time."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.why = cause_of(error)
        self.damaged = not isinstance(error, OSError)
        self.passes = not self.damaged and not isinstance(error, IsADirectoryError | NotADirectoryError)
        super().__init__(f"cannot read {path}: {self.why}")


class RecordFile(Generic[Form]):
    """One file of a type that msgspec knows. Every call reads or replaces it, because another agent may do so too.
    Blocks."""

    def __init__(
        self, path: Path, form: type[Form], *, mode: int = PRIVATE, durable: bool = True, indent: int = COMPACT
    ) -> None:
        """durable: whether what is recorded has to survive a power cut, as it does a killed agent."""
        self.path = path
        self._form = form
        self._mode = mode
        self._durable = durable
        self._indent = indent

    def load(self) -> Form | None:
        """Return what is recorded, or None if there is no file. Raise UnreadableError."""
        try:
            with self.path.open("rb") as file:
                return msgspec.json.decode(file.read(LARGEST_BYTES), type=self._form)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise UnreadableError(self.path, error) from None

    def save(self, records: Form | None) -> None:
        """Record exactly this, or remove the file if there is nothing to record; set an unreadable file aside first.
        Raise HostError with the cause."""
        with self.alone() as save:
            save(records)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Callable[[Form | None], None]]:
        """Let no one else record anything in this folder meanwhile. Yield what records as `save` does, which cannot be
        called here. Raise HostError."""
        with _locked(self.path.parent):
            yield self._save

    def _save(self, records: Form | None) -> None:
        self._keep_unreadable()
        if records is None:
            files.remove(self.path, durable=self._durable)
            return
        content = msgspec.json.format(msgspec.json.encode(records, enc_hook=dict), indent=self._indent)
        files.replace(self.path, content + b"\n", mode=self._mode, durable=self._durable)

    def _keep_unreadable(self) -> None:
        try:
            self.load()
        except UnreadableError as error:
            if self.path.is_dir():
                return  # it can be neither replaced nor removed
            if error.passes:
                raise
            if (aside := files.set_aside(self.path, durable=self._durable)) is not None:
                log.error("record-set-aside", error=str(error), file=str(aside))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is on the folder itself. Without a folder there is nothing to lose, and a file
    system may have no such locks."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    except OSError as error:
        raise HostError(f"cannot lock {folder}: {cause_of(error)}") from None
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise HostError(f"cannot lock {folder}: another agent has it for more than {PATIENCE_S:g} s") from None
            time.sleep(POLL_S)
        except OSError:
            return None


def set_aside(folder: Path) -> list[str]:
    """Return the names of damaged records in a state folder, in order; empty if it cannot be listed. Blocks."""
    try:
        return sorted(one.name for one in folder.iterdir() if f".json{files.DAMAGED}" in one.name)
    except OSError:
        return []


def since_boot(file: RecordFile[BootForm], sysfs: SysFs, left: str) -> tuple[BootForm | None, str]:
    """Return what was recorded since boot, None for nothing, and why that is not known, or "". left: what is left as it
    is then."""
    try:
        found = file.load()
    except UnreadableError as error:
        return None, f"cannot load {file.path}: {error.why}; {left}"
    return found if found is not None and found.boot_id == sysfs.text(BOOT_ID, "") else None, ""
