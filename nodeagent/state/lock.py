"""Locks between processes of one node: a file, locked for as long as its handle is open (flock(2)).

The lock is the file currently at the path. If the file was removed while held, the next attempt to take it creates it
again.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nodeagent.errors import StateError

LARGEST_CONTENT_BYTES = 4096
_CLOSED = -1


class FileLock:
    """One lock. Taking it again while it is held has no effect."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raise StateError if it cannot be created."""
        self.path = path
        self._handle = self._opened()
        self.held = False

    def try_take(self, *, make: bool = True) -> bool:
        """Take the lock unless another process holds it, without blocking. Return whether it is held.

        make: create the file again if it was removed. The previous holder is not notified: it has to take the lock
        again. Raise StateError if the file cannot be used.
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
        """Return the first LARGEST_CONTENT_BYTES of the file, or nothing if it cannot be read."""
        try:
            return os.pread(self._handle, LARGEST_CONTENT_BYTES, 0)
        except OSError:
            return b""

    def put(self, content: bytes) -> None:
        """Replace the content of the file; only while the lock is held. Raise StateError if the disk refuses.

        It is a single write, so that kill -9 leaves the old content or the new. It is not synced: after a power cut the
        content may be old.
        """
        try:
            os.pwrite(self._handle, content.ljust(len(self.content())), 0)
        except OSError as error:
            raise StateError(f"cannot write {self.path}: {error.strerror}") from None

    def release(self) -> None:
        """Release the lock."""
        if self.held:
            self.held = False
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release the lock and close the file.

        Closing again has no effect, as the handle's number may belong to another file by then.
        """
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
        """Return whether the open file is still the one at the path."""
        try:
            found, mine = self.path.stat(), os.fstat(self._handle)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
