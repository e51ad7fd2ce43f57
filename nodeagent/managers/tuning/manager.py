"""Keeps exclusive CPUs at the frequency and wake-up latency that `pinning.tuning` asks for, and gives them their own
values back when they are no longer exclusive. Does nothing where nothing is configured.

A round runs in a worker thread: soon after the exclusive CPUs or the configuration change, and every
`pinning.verifySeconds`. It is no part of starting a container: until it is done, a new holder's CPUs run as before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from nodeagent.aio.supervise import run_to_end
from nodeagent.config.isolation import PinningConfig, TuningConfig
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.tuning.plan import Tunables, Tuning, TuningPlan, plan
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.tuning import tunables
from nodeagent.host.tuning.tuner import Tuner, TuningState
from nodeagent.managers.manager import Manager
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

MOST_SAID = 3
"""Maximum number of files named in a note."""
_KHZ = 1000
log = structlog.get_logger()


class TuningReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one round."""

    plan: TuningPlan = msgspec.field(default_factory=TuningPlan)
    state: TuningState = msgspec.field(default_factory=TuningState)
    error: str = ""
    """Why the round was not completed."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is not as configured, one sentence each."""
        failed = list(dict.fromkeys(self.state.why.values()))
        more = [f"and {len(failed) - MOST_SAID} more files"] if len(failed) > MOST_SAID else []
        error = (self.error,) if self.error else ()
        return (*error, *self.plan.notes, *failed[:MOST_SAID], *more, *self.state.notes)


class TuningManager(Manager):
    """Tunes while `lead` is running."""

    name = "tuning"

    def __init__(
        self,
        sysfs: SysFs,
        exclusive: Callable[[], CpuSet],
        config: Callable[[], PinningConfig],
        changed: Callable[[int], Awaitable[int]],
        memory: Path,
    ) -> None:
        """Set up without reading anything.

        `exclusive` returns the CPUs that containers hold. `changed` waits on a Revision that covers `exclusive` and
        `config`. `memory` is a file that outlives the agent and records what was set.
        """
        self._sysfs = sysfs
        self._exclusive = exclusive
        self._config = config
        self._changed = changed
        self._tuner = Tuner(sysfs, memory)
        self._found = TuningReport()
        self._said = Once("cpus-not-tuned")

    async def lead(self) -> None:
        """Tune repeatedly until cancelled. What was set stays: the containers run on."""
        while True:
            asked = self._asked()
            await run_to_end(self.tune())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().verify_seconds):
                    await self._differs(asked)

    async def tune(self) -> None:
        """Do one round."""
        exclusive, tuning = self._asked()
        if tuning == Tuning() and self._tuner.idle:
            self._found = TuningReport()
        else:
            self._found = await asyncio.to_thread(self._tune, exclusive, tuning)
        metrics.CPU_SETTINGS.labels("set").set(len(self._found.state.set))
        metrics.CPU_SETTINGS.labels("refused").set(len(self._found.state.why))
        metrics.CPU_SETTINGS_REPAIRED.inc(self._found.state.repaired)
        self._said.report("; ".join(self._found.notes))

    def notes(self) -> list[str]:
        """Return what is not as configured, one sentence each."""
        return [f"pinning.tuning: {one}" for one in self._found.notes]

    def document(self) -> dict[str, Any]:
        """Return what was set, in plain types."""
        found = self._found
        return {
            "cpus": str(found.plan.cpus) if found.plan.wanted else "",
            "set": len(found.state.set),
            "refused": dict(found.state.why),
            "notes": list(found.notes),
        }

    def _asked(self) -> tuple[CpuSet, Tuning]:
        return self._exclusive(), tuning_of(self._config().tuning)

    async def _differs(self, asked: tuple[CpuSet, Tuning]) -> None:
        """Return when what is to be tuned differs from `asked`."""
        seen = await self._changed(0)
        while self._asked() == asked:
            seen = await self._changed(seen)

    def _tune(self, exclusive: CpuSet, tuning: Tuning) -> TuningReport:
        """In a worker thread."""
        planned, machine = TuningPlan(), Tunables()
        try:
            if exclusive and tuning != Tuning():
                machine = tunables.read(self._sysfs)
                planned = plan(machine, exclusive, tuning)
            return TuningReport(plan=planned, state=self._tuner.tune(planned.wanted, machine.unread.keys()))
        except HostError as error:
            return TuningReport(plan=planned, error=str(error))


def tuning_of(config: TuningConfig) -> Tuning:
    """Return a configuration as a core value."""
    return Tuning(
        governor=config.governor,
        preference=config.energy_performance_preference,
        min_khz=None if config.min_frequency_mhz is None else config.min_frequency_mhz * _KHZ,
        max_khz=None if config.max_frequency_mhz is None else config.max_frequency_mhz * _KHZ,
        wakeup_us=config.wakeup_latency_us,
    )
