"""The pace at which Events are written, so that a node on which much goes wrong burdens the API server no more."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST, PACE_S = 10, 30.0
"""How many Events may be written at once, and how long it takes until one more may be."""


class Pace:
    """Allows BURST turns at once and one more every PACE_S."""

    def __init__(self, burst: int = BURST, pace_s: float = PACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._pace_s, self._clock = burst, pace_s, clock
        self._full_at = clock()
        """When the burst will be complete again."""

    def wait_s(self) -> float:
        """Return how long to wait for the next turn; 0 if it may be taken now."""
        behind = self._full_at - self._clock() - (self._burst - 1) * self._pace_s
        return max(0.0, behind)

    def take(self) -> None:
        """Take a turn."""
        self._full_at = max(self._full_at, self._clock()) + self._pace_s
