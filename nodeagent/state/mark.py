"""The mark in the ledger's lock file: how far the ledger has counted, and why it may lack decisions.

Being next to the ledger, it reveals a ledger that was replaced by an older copy or lost its newest part. If only one of
two agents notices this, the other learns of it from the mark. The mark is written after each decision, never before: it
may lag behind the ledger, and a ledger that lags behind the mark has lost something.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from nodeagent.state.lock import LARGEST_CONTENT_BYTES, FileLock

_LONGEST_REASON_BYTES = LARGEST_CONTENT_BYTES - 64


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the mark."""

    newest: int = 0
    """Number of the newest audit entry."""
    loss: str = ""
    """Why the ledger may lack decisions; "" if it is whole."""


class LedgerMark:
    """Reads and writes the mark of a lock file while that lock is held."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def read(self) -> Mark | None:
        """Return the mark, or None if no build that supports it has written it."""
        number, _, reason = self._lock.content().decode("utf-8", "replace").rstrip("\n ").partition("\n")
        if not (number.isascii() and number.isdigit()):
            return None
        return Mark(newest=int(number), loss=reason)

    def write(self, mark: Mark) -> None:
        """Write the mark. Raise StateError if that fails."""
        reason = " ".join(mark.loss.split()).encode()[:_LONGEST_REASON_BYTES].decode("utf-8", "ignore")
        self._lock.put(f"{mark.newest}\n{reason}\n".encode())

    def advance(self, newest: int) -> None:
        """Record the number of the ledger's newest audit entry. Raise StateError if that fails."""
        self.write(replace(self.read() or Mark(), newest=newest))
