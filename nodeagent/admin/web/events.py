"""Server-sent events (WHATWG HTML, "Server-sent events") that report that the agent's state has changed, not how."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from nodeagent.admin.http import HttpAnswer, problem
from nodeagent.admin.web.headers import STRICT
from nodeagent.aio.revision import Revision
from nodeagent.state.agent import Agent

MOST_LISTENERS = 16
"""So many clients may listen at a time: a quarter of the connections of the status socket."""
BEAT_S = 15.0
"""How often a listener is sent something although nothing changes."""
RETRY_MS = 2000
"""After how long a browser connects again."""


class Events:
    """The clients that listen. Building it starts nothing."""

    def __init__(self, agent: Agent, beat_s: float = BEAT_S) -> None:
        self.agent = agent
        self.beat_s = beat_s
        self.listeners: set[Listener] = set()

    def answer(self) -> HttpAnswer:
        """Return an answer that lasts until its client leaves, or 503 if too many listen."""
        if len(self.listeners) >= MOST_LISTENERS:
            why = f"cannot send events: {MOST_LISTENERS} clients listen already"
            return problem(503, why, *STRICT, ("retry-after", "5"))
        start = f"retry: {RETRY_MS}\n\n".encode()
        return HttpAnswer(200, start, "text/event-stream", STRICT, Listener(self))


class Listener:
    """One client that listens: an event now and after each change; what changes meanwhile is one event."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._news = Revision(*events.agent.revisions)
        self._seen = 0
        events.listeners.add(self)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(self._events.beat_s):
                self._seen = await self._news.changed(self._seen)
        except TimeoutError:
            return b"event: beat\ndata: {}\n\n"
        return self._changed()

    async def aclose(self) -> None:
        """Make room for another."""
        self._events.listeners.discard(self)

    def _changed(self) -> bytes:
        numbers = {name: one.value for name, one in self._events.agent.revisions._asdict().items()}
        return f"event: changed\ndata: {json.dumps(numbers)}\n\n".encode()
