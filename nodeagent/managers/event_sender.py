"""Sends Kubernetes Events at a limited pace. An Event is optional: it is not retried, and delays nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nodeagent.errors import PeerError
from nodeagent.telemetry.once import Once

BURST, PACE_S = 10, 30.0
"""How many Events may be sent at once, and how long it takes until one more may be."""
DEADLINE_S = 10.0
NOT_ALLOWED_S = 600.0
"""How long nothing is sent after the API server has forbidden it."""
Send = Callable[[Mapping[str, Any]], Awaitable[object]]
"""Create an Event. Raises PeerError."""


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


class EventSender:
    """Sends one Event at a time."""

    def __init__(self, send: Send, pace: Pace | None = None) -> None:
        self._send = send
        self._pace = pace or Pace()
        self._not_before_s = 0.0
        self._failing = Once("event-not-sent")

    async def ready(self) -> None:
        """Return when the next one may be sent."""
        await asyncio.sleep(self._pace.wait_s())

    async def send(self, event: Mapping[str, Any]) -> None:
        """Send an Event now, unless Events were forbidden a while ago; a failure is logged once."""
        if time.monotonic() < self._not_before_s:
            return
        self._pace.take()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._send(event)
            self._failing.clear()
        except (PeerError, TimeoutError) as error:
            self._failing.report(str(error) or f"the API server did not answer within {DEADLINE_S:g} s")
            if isinstance(error, PeerError) and error.status == 403:
                self._not_before_s = time.monotonic() + NOT_ALLOWED_S
