"""Progress of what takes longer than a second, on standard error and only on a terminal."""

from __future__ import annotations

import sys
import time

SHOW_AFTER_S, SHOW_EVERY_S = 1.0, 0.1


class Progress:
    """Shows on a terminal how far something has come that takes longer than a second."""

    def __init__(self, text: str) -> None:
        """text: what is shown, with {} for the number."""
        self._text = text
        self._began = time.monotonic()
        self._shown_at = 0.0

    def __call__(self, number: int) -> None:
        """Take in the number so far."""
        now = time.monotonic()
        if now - self._began > SHOW_AFTER_S and now - self._shown_at > SHOW_EVERY_S and sys.stderr.isatty():
            print(f"\r{self._text.format(number)} …", end="", file=sys.stderr, flush=True)
            self._shown_at = now

    def end(self) -> None:
        """Clear the line."""
        if self._shown_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
