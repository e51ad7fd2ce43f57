"""Writes Events to the API server: at a limited pace, each at most once, equal ones as a series with their count.

Nothing waits for it. While the API server cannot be reached or does not allow Events, they wait, for an hour at most;
the notes of the status say so. Nothing is read: an Event that exists already is found by creating it again, since equal
Events have the same name, and the answer to an empty patch is the Event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nodeagent.core.events.happenings import Happening
from nodeagent.errors import PeerError
from nodeagent.kube.event import render, repeated, times
from nodeagent.managers.events.event_queue import EventQueue, Series
from nodeagent.managers.events.pace import Pace
from nodeagent.telemetry.once import Once

DEADLINE_S = 10.0
AGAIN_S, SLOWEST_S = 5.0, 300.0
"""How long nothing is written after a failure; doubled with each more."""
NOT_ALLOWED_S = 600.0
"""How long nothing is written in a namespace after the API server has forbidden it there."""
FORBIDDEN, GONE, EXISTS = 403, 404, 409


class EventApi(Protocol):
    """Writes Events of events.k8s.io/v1. Each call raises PeerError."""

    async def create_event(self, event: Mapping[str, Any]) -> None:
        """Create an Event; the error has status 409 if it exists."""
        ...

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> dict[str, Any] | None:
        """Change an Event and return it, or None if there is none."""
        ...


class EventRecorder:
    """Takes happenings from all parts of the agent. Building one starts nothing."""

    def __init__(
        self,
        api: EventApi,
        node: str,
        controller: str,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        """controller: the name under which Events are reported. clock: in seconds. unix: seconds since the epoch."""
        self.enabled = False
        """Whether happenings are taken; see enable()."""
        self._api = api
        self._clock = clock
        self._queue = EventQueue(node, controller, clock, unix)
        self._pace = pace or Pace(clock=clock)
        self._news = asyncio.Event()
        self._failing = Once("event-not-written")
        self._refused = Once("event-refused")
        self._failures = 0
        self._resume_s = 0.0
        self._silent: dict[tuple[str, bool], float] = {}
        """Until when Events of a namespace are not created (False) or changed (True)."""

    def enable(self, on: bool) -> None:
        """Set whether Events are written. What waits when they are switched off is forgotten."""
        self.enabled = on
        if not on:
            self._queue.clear()
            self._failing.clear()
            self._silent.clear()

    def report(self, happening: Happening) -> None:
        """Have a happening written, soon."""
        if self.enabled:
            self._queue.add(happening)
            self._news.set()

    def notes(self) -> list[str]:
        """Return why Events are not written, one sentence each."""
        found, waiting, dropped = [], len(self._queue), self._queue.dropped
        if waiting and (why := self._failing.last):
            found.append(f"Events cannot be written at present; waiting: {waiting}; cause: {why}")
        if dropped:
            last = f"; the last one refused: {self._refused.last}" if self._refused.last else ""
            found.append(f"Events never written since the agent started: {dropped}{last}")
        return found

    # ---------------------------------------------------------------- writing

    async def run(self) -> None:
        """Write what is reported, until cancelled."""
        while True:
            self._news.clear()
            one, due_s = self._queue.next(self._silent_s)
            wait_s = max(due_s, self._resume_s - self._clock(), self._pace.wait_s())
            if one is None:
                await self._news.wait()
            elif wait_s > 0:
                await self._news_within(wait_s)
            else:
                await self._write(one)

    async def _news_within(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            return

    def _silent_s(self, one: Series) -> float:
        return self._silent.get(_right(one), 0.0) - self._clock()

    async def _write(self, one: Series) -> None:
        """Write one Event as it is now; what fails for now waits."""
        self._pace.take()
        began_s = self._clock()
        try:
            async with asyncio.timeout(DEADLINE_S):
                count = await self._deliver(one)
        except TimeoutError:
            self._failed(one, PeerError(f"the API server did not answer within {DEADLINE_S:g} s"))
        except PeerError as error:
            self._failed(one, error)
        else:
            self._failures = 0
            self._silent.pop(_right(one), None)
            self._failing.clear()
            self._queue.wrote(one, count, began_s)

    async def _deliver(self, one: Series) -> int:
        """Create an Event, or count it if it exists. Return the count that is written now."""
        if one.exists and not one.counted:
            before = await self._patched(one, {})
            one.count += times(before) if before is not None else 0
            one.exists, one.counted = before is not None, True
        count = one.count
        if one.exists and await self._patched(one, repeated(count, one.last_at)) is not None:
            return count
        return await self._create(one)

    async def _create(self, one: Series) -> int:
        """Create an Event. One that was found at the start of the agent and exists was reported by an earlier agent; it
        is not counted again."""
        count, mine = one.count, one.unsure
        one.unsure = True  # until there is an answer
        try:
            await self._api.create_event(render(one.event, first_at=one.first_at, count=count, last_at=one.last_at))
        except PeerError as error:
            one.unsure = mine or not error.status
            one.exists, one.counted = error.status == EXISTS, mine
            if not one.exists:
                raise
            if mine and count == 1:
                return count
            if mine or not one.found:
                return await self._deliver(one)
            one.count -= count
            return 0
        one.exists = one.counted = True
        one.unsure = False
        return count

    async def _patched(self, one: Series, patch: Mapping[str, Any]) -> dict[str, Any] | None:
        return await self._api.patch_event(one.event.namespace, one.event.name, patch)

    def _failed(self, one: Series, error: PeerError) -> None:
        why = _without_name(str(error), one)
        if error.status == GONE or (error.lasting and error.status != FORBIDDEN):
            self._refused.report(why)  # the namespace is gone, or the Event breaks a rule
            self._queue.refuse(one)
            return
        self._failing.report(why)
        self._queue.defer(one)
        if error.status == FORBIDDEN:
            self._silent[_right(one)] = self._clock() + NOT_ALLOWED_S
            return
        self._failures += 1
        pause_s = min(AGAIN_S * 2 ** min(self._failures - 1, 10), SLOWEST_S)
        self._resume_s = self._clock() + max(pause_s, error.retry_after_s)


def _without_name(why: str, one: Series) -> str:
    """Return an error without the name of the Event, so that the same cause has the same words for all of them."""
    return why.replace(f"{one.event.namespace}/{one.event.name}", f"in {one.event.namespace}")


def _right(one: Series) -> tuple[str, bool]:
    """Return which permission writing an Event takes: the namespace, and whether it is changed instead of created."""
    return one.event.namespace, one.exists
