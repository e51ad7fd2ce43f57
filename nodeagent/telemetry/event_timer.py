"""How long an event of the kernel takes until those who are to know have a list that shows what it changed."""

from __future__ import annotations

import time
from collections.abc import Callable

from nodeagent.telemetry import metrics


class EventTimer:
    """Times the lists of one API, each by its key. A list is looked at, sent if it differs, and then in force."""

    def __init__(self, api: str, clock: Callable[[], float] = time.monotonic) -> None:
        """api: value of the metric's label. clock: in seconds, the one by which events are timed."""
        self._api = api
        self._clock = clock
        self._looked: tuple[int, float | None] = 0, None
        self._in_force: dict[str, int] = {}
        self._sent: set[str] = set()

    def looked(self, generation: int, event_s: float | None) -> None:
        """Record which inventory the lists are made of now, and when the event came that led to it (None: none did)."""
        self._looked = generation, event_s

    def sent(self, key: str) -> None:
        """Record that a list was sent."""
        self._sent.add(key)

    def in_force(self, key: str) -> None:
        """Record that a list is known as it was last looked at. If it had to be sent for a new inventory, that was
        timed; the first list of a key shows no event."""
        generation, event_s = self._looked
        before = self._in_force.get(key, generation)
        if key in self._sent and generation != before and event_s is not None:
            metrics.EVENT_TO_LIST_SECONDS.labels(self._api).observe(self._clock() - event_s)
        self._in_force[key] = generation
        self._sent.discard(key)
