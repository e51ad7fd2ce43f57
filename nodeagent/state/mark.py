"""What the ledger's lock file carries: how far the ledger has counted, and why it may lack decisions.

It lies next to the ledger, so it tells a ledger that was replaced by an older copy, or that lost its newest part, from
a whole one; and two agents of which only one notices such a thing both learn of it. It is written after each decision,
never before: it may lag behind the ledger, and a ledger that lags behind it has lost something.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nodeagent.state.lock import LARGEST_CONTENT_BYTES, FileLock

_LONGEST_REASON_BYTES = LARGEST_CONTENT_BYTES - 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One reading of it."""

    newest: int = 0
    """Number of the newest line of the audit."""
    loss: str = ""
    """Why the ledger may lack decisions; "": it is whole."""


class LedgerMark:
    """Reads and writes the mark of a lock file, in a turn of that lock."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def read(self) -> Mark | None:
        """What it says; None where no build that knows it has written it."""
        number, _, reason = self._lock.content().decode("utf-8", "replace").rstrip("\n ").partition("\n")
        if not (number.isascii() and number.isdigit()):
            return None
        return Mark(newest=int(number), loss=reason)

    def write(self, mark: Mark) -> None:
        """StateError where it cannot be written."""
        reason = " ".join(mark.loss.split()).encode()[:_LONGEST_REASON_BYTES].decode("utf-8", "ignore")
        self._lock.put(f"{mark.newest}\n{reason}\n".encode())

    def advance(self, newest: int) -> None:
        """Note that the ledger has counted on."""
        self.write(replace(self.read() or Mark(), newest=newest))
