"""Looks at the devices through the kernel and their kinds, periodically and when the inventory changes, and reports
what it sees.

Everything is read in a thread of its own (aio/reads.py). A device that hangs is unknown and delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from nodeagent.aio.reads import DEADLINE_S, Reads
from nodeagent.config.schema import Config
from nodeagent.core.model.health import UNKNOWN, Evidence, Said
from nodeagent.host.health.kinds import OF_KINDS
from nodeagent.host.health.source import NO_READINGS, Readings, Sight, Silence, Source, looked
from nodeagent.host.health.sources import sources
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.state.agent import Agent

LONGEST_REST_S = 1.0
"""Longest pause after a look while the inventory keeps changing."""
Look = Callable[[], Sight | Silence]
log = structlog.get_logger()


class KernelHealth:
    """The sources that are read from the kernel. Building it starts nothing."""

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        config: Callable[[], Config],
        every: Sequence[Source] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """deadline_s: how long one look at one device may take."""
        self._agent = agent
        self._sysfs = sysfs
        self._config = config
        self._sources = tuple(every if every is not None else sources())
        self._reads: Reads[Said, Sight | Silence] = Reads(deadline_s)
        self._deadline_s = deadline_s
        self._looked_at: dict[Said, float] = {}
        """When a device was last looked at by a source that leaves time between two looks."""
        self._readings: dict[Said, Readings] = {}

    def readings(self) -> Mapping[Said, Readings]:
        """Return the numbers that were read of the devices, by device and source, as last seen."""
        there = self._agent.inventory.device_by_id
        return {said: readings for said, readings in self._readings.items() if said[0] in there}

    async def follow(self) -> None:
        """Look every health.pollSeconds, and at once when the inventory has changed, until cancelled."""
        while True:
            seen, began = self._agent.revisions.inventory.value, time.perf_counter()
            await self.look()
            await asyncio.sleep(min(LONGEST_REST_S, 10 * (time.perf_counter() - began)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().health.poll_seconds):
                    await self._agent.revisions.inventory.changed(seen)

    async def look(self) -> None:
        """Look at every device once and report what is seen."""
        every = self._looks()
        due = {said: look for said, look in every.items() if self._is_due(said)}
        found, hanging = await self._reads.run(due)
        before = {said: at for said, at in self._looked_at.items() if said in every}
        self._looked_at = before | dict.fromkeys(found, time.monotonic())
        self._readings = {said: self._readings_of(said, found) for said in every}
        self._agent.observe(self._evidence(found, hanging), self._unseen(every, found))

    def _looks(self) -> dict[Said, Look]:
        ignored = set(self._config().health.ignore)
        return {
            (device.id, source.name): functools.partial(looked, source, self._sysfs, device)
            for device in self._agent.inventory.devices
            for source in self._sources
            if source.name not in ignored and source.concerns(device)
        }

    def _is_due(self, said: Said) -> bool:
        period_s = next(source.period_s for source in self._sources if source.name == said[1])
        return said not in self._looked_at or time.monotonic() - self._looked_at[said] >= period_s

    def _readings_of(self, said: Said, found: Mapping[Said, Sight | Silence]) -> Readings:
        seen = found.get(said)
        if isinstance(seen, Sight):
            return seen.readings
        return NO_READINGS if seen is Silence.NOTHING_TO_SEE else self._readings.get(said, NO_READINGS)

    def _evidence(self, found: Mapping[Said, Sight | Silence], hanging: frozenset[Said]) -> list[Evidence]:
        seen = {**found, **{said: self._late(said) for said in hanging}}
        return [
            Evidence(device=device, source=source, state=one.state, reason=one.reason)
            for (device, source), one in seen.items()
            if isinstance(one, Sight)
        ]

    def _late(self, said: Said) -> Sight:
        who = "its kind" if said[1] == OF_KINDS else "the kernel"
        return Sight(UNKNOWN, f"{who} did not answer within {self._deadline_s:g} s")

    def _unseen(self, every: Mapping[Said, Look], found: Mapping[Said, Sight | Silence]) -> list[Said]:
        """Return what was said before about what there is nothing of any longer, also by a source that is ignored."""
        mine = {source.name for source in self._sources}
        before = [(device, source) for device, state in self._agent.health.items() for source in state.seen]
        return [
            said
            for said in before
            if said[1] in mine and (said not in every or found.get(said) is Silence.NOTHING_TO_SEE)
        ]
