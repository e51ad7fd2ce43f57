"""Kubernetes Events: takes what other parts of the agent report, and reports changes of the node's state."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.events.states import Node, PodOf, State, changes, states
from nodeagent.managers.events.recorder import EventRecorder
from nodeagent.managers.manager import Manager

LOOK_S, CALM_S = 15.0, 1.0
"""Longest time between two looks at the state, for what has no revision; shortest."""
START_S = 60.0
"""For how long after the agent began to lead a state counts as found: an earlier one may have reported it already."""


class EventsManager(Manager):
    """Reports happenings if there is an API server and the configuration does not forbid it."""

    name = "events"

    def __init__(
        self,
        recorder: EventRecorder,
        look: Callable[[], Node],
        pod_of: PodOf,
        news: Revision,
        *,
        configured: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """look: returns what is known of the node. news: rises with most of it. configured: whether there is an API
        server. clock: in seconds."""
        self._recorder = recorder
        self._look = look
        self._pod_of = pod_of
        self._news = news
        self._configured = configured
        self._clock = clock
        self._began_s = clock()
        self._states: Mapping[str, State] = {}

    async def apply(self, config: Config) -> None:
        """Switch Events on or off."""
        self._recorder.enable(self._configured and config.events.enabled)

    def notes(self) -> list[str]:
        """Return why Events are not written."""
        return self._recorder.notes()

    async def serve(self) -> None:
        """Write what is reported. Every agent on a node does: each refuses claims."""
        if self._configured:
            await self._recorder.run()

    async def lead(self) -> None:
        """Report changes of the state, until cancelled."""
        self._began_s = self._clock()
        while self._configured:
            seen = self._news.value
            self.look()
            await asyncio.sleep(CALM_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.changed(seen)

    def look(self) -> None:
        """Report what has changed since the last look."""
        if not self._recorder.enabled:
            self._states = {}
            return
        before, self._states = self._states, states(self._look(), self._pod_of)
        for one in changes(before, self._states, found=self._clock() - self._began_s < START_S):
            self._recorder.report(one)
