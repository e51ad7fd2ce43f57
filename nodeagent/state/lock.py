"""Locks between processes of one node: a file, held as long as its handle is open (flock(2)).

A lock is what lies at its path. Where somebody removed the file while it was held, the next taking makes it anew.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nodeagent.errors import StateError

LARGEST_CONTENT_BYTES = 4096
_CLOSED = -1


class FileLock:
    """One lock. Taking it twice is taking it once."""

    def __init__(self, path: Path) -> None:
        """StateError where the file cannot be made."""
        self.path = path
        self._handle = self._opened()
        self.held = False

    def try_take(self, *, make: bool = True) -> bool:
        """Take it if nobody else has it. Does not block. StateError where the file cannot be used.

        make: where somebody removed the file, make it anew. Whoever had it then cannot tell: it has to take it again.
        """
        while not (self.held and self.is_there()):
            if not self.is_there():
                if not make:
                    return False
                fresh = self._opened()
                self.close()
                self._handle = fresh
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                raise StateError(f"cannot lock {self.path}: {error.strerror}") from None
            self.held = True
        return True

    def content(self) -> bytes:
        """What the file holds, at most LARGEST_CONTENT_BYTES of it; nothing where it cannot be read."""
        try:
            return os.pread(self._handle, LARGEST_CONTENT_BYTES, 0)
        except OSError:
            return b""

    def put(self, content: bytes) -> None:
        """Replace what the file holds. Only while the lock is held. StateError where the disk refuses it.

        One write, so that kill -9 leaves the old content or the new; it is not synced: after a power cut it may be old.
        """
        try:
            os.pwrite(self._handle, content.ljust(len(self.content())), 0)
        except OSError as error:
            raise StateError(f"cannot write {self.path}: {error.strerror}") from None

    def release(self) -> None:
        """Let others have it."""
        if self.held:
            self.held = False
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release it and close the file. Once is enough: by the second time the number may be another file's."""
        self.held = False
        handle, self._handle = self._handle, _CLOSED
        if handle != _CLOSED:
            os.close(handle)

    def _opened(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"cannot use state folder {self.path.parent}: {error.strerror}") from None

    def is_there(self) -> bool:
        """Whether the open file is the one that others find."""
        try:
            found, mine = self.path.stat(), os.fstat(self._handle)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
