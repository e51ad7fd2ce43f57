"""Watches exclusive CPUs: intruders are reported, counted and logged, and interrupts are moved away if configured. Does
nothing while no CPU is exclusive.

A look costs about 50 microseconds per host thread. It runs in a worker thread, periodically and soon after the set of
exclusive CPUs changes. If that set changes constantly, looking takes at most a fiftieth of one CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.config.isolation import PinningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError
from nodeagent.host.irq.interrupts import InterruptMoves, Mover
from nodeagent.host.irq.intruders import Irq, Thread, irqs, sees_host, threads
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.manager import Manager
from nodeagent.telemetry import metrics

MOVED = "interrupts.json"
"""In the state folder: interrupts that were moved."""
SETTLE_S = 1.0
"""Delay of the look after the exclusive CPUs change: containers have their CPUs by then."""
REST = 50
"""Minimum pause before a look triggered by a change, as a multiple of the time the previous look took."""
SAY_S = 60.0
"""At most one log line is written in this time."""
UNSEEN = "threads of the host are not known: /proc shows the agent's own PID namespace only (hostPID: true is missing)"
MOST_SHOWN = 20
"""Maximum number of threads, names or warnings shown."""
log = structlog.get_logger()


class IntruderReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one look."""

    looked_at: float | None = None
    """Seconds since the epoch, or None if nothing is exclusive or no look has happened yet."""
    took_s: float = 0.0
    threads: tuple[Thread, ...] = ()
    """Threads bound to the fewest CPUs first, kernel threads last."""
    sees_host: bool = True
    """False if the threads of the host cannot be seen."""
    irqs: tuple[Irq, ...] = ()
    moving: bool = False
    """Whether interrupts were moved."""
    moves: InterruptMoves = msgspec.field(default_factory=InterruptMoves)
    warnings: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Irq, ...]:
        """Return the interrupts that are still delivered to exclusive CPUs."""
        return tuple(one for one in self.irqs if one.irq in self.moves.why or not self.moving)


class IsolationManager(Manager):
    """Looks for intruders while `lead` is running."""

    name = "intruders"

    def __init__(
        self,
        sysfs: SysFs,
        exclusive: Callable[[], CpuSet],
        others: Callable[[], CpuSet],
        config: Callable[[], PinningConfig],
        changed: Callable[[int], Awaitable[int]],
        memory: Path,
        *,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up without looking.

        `exclusive` returns the exclusive CPUs of containers; `others` where everything else may run. `changed` waits on
        a Revision that covers `exclusive`, `others` and `config`. `memory` is a file that outlives the agent and
        records moved interrupts. `clock` is in seconds.
        """
        self._sysfs = sysfs
        self._exclusive = exclusive
        self._others = others
        self._config = config
        self._changed = changed
        self._mover = Mover(sysfs, memory)
        self._settle_s = settle_s
        self._clock = clock
        self._found = IntruderReport()
        self._said: tuple[object, ...] = ((),) * 5
        self._said_at = float("-inf")

    async def lead(self) -> None:
        """Look repeatedly until cancelled."""
        while True:
            asked = self._asked()
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().intruders_seconds):
                    await self._due(asked)

    async def look(self) -> None:
        """Look once, and move interrupts if configured."""
        exclusive, others, config = self._asked()
        if not exclusive and self._mover.idle:
            self._found = IntruderReport()
        else:
            self._found = await asyncio.to_thread(self._look, exclusive, others, config.move_interrupts)
        metrics.INTRUDERS.labels("thread").set(len(self._found.threads) if self._found.sees_host else math.nan)
        metrics.INTRUDERS.labels("irq").set(len(self._found.left))
        metrics.INTERRUPTS_MOVED.inc(self._found.moves.fresh)
        self._say()

    def document(self) -> dict[str, Any]:
        """Return the latest findings in plain types."""
        found = self._found
        return {
            "looked_at": found.looked_at,
            "threads": [_thread(one) for one in found.threads[:MOST_SHOWN]],
            "threads_total": len(found.threads) if found.sees_host else None,
            "irqs": _irqs(found),
            "warnings": _first([*found.moves.notes, *found.warnings]),
        }

    # ---------------------------------------------------------------- when

    def _asked(self) -> tuple[CpuSet, CpuSet, PinningConfig]:
        return self._exclusive(), self._others(), self._config()

    async def _due(self, asked: tuple[object, ...]) -> None:
        """Return shortly after the inputs differ from `asked`."""
        seen = await self._changed(0)
        while self._asked() == asked:
            seen = await self._changed(seen)
        await asyncio.sleep(max(self._settle_s, REST * self._found.took_s))

    # ---------------------------------------------------------------- looking, in a worker thread

    def _look(self, exclusive: CpuSet, others: CpuSet, move: bool) -> IntruderReport:
        began, warnings = time.thread_time(), list[str]()
        found = IntruderReport(looked_at=time.time() if exclusive else None)
        try:
            if exclusive and not sees_host(self._sysfs):
                warnings.append(UNSEEN)
            found = replace(found, sees_host=UNSEEN not in warnings)
            found = replace(found, threads=_sorted(threads(self._sysfs, exclusive, warnings)))
            found = replace(found, irqs=irqs(self._sysfs, exclusive, warnings))
            if move:
                moves = self._mover.move(exclusive, others, found.irqs)
                found = replace(found, moving=True, moves=moves)
            elif not self._mover.idle:
                found = replace(found, moves=self._mover.move(EMPTY, others, ()))
        except HostError as error:
            warnings.append(str(error))
        return replace(found, took_s=time.thread_time() - began, warnings=tuple(warnings))

    # ---------------------------------------------------------------- logging

    def _say(self) -> None:
        """Log the intruders when they change. Names are compared, because threads and interrupts of the same name come
        and go."""
        found, now = self._found, self._clock()
        said = (
            tuple(sorted({_name(one) for one in found.threads})),
            tuple(f"{one.irq} {one.name}" for one in found.left),
            tuple(f"{one.irq} {one.name} to {one.wanted}" for one in found.moves.moved),
            tuple(sorted(set(found.moves.why.values()))),
            found.moves.notes,
        )
        if said == self._said or now - self._said_at < SAY_S:
            return
        self._said, self._said_at = said, now
        names = ("threads", "interrupts", "moved", "why", "notes")
        fields = {name: _first(some) for name, some in zip(names, said, strict=True) if some}
        tell = log.warning if {"why", "notes"} & fields.keys() else log.info
        tell("intruders", exclusive=str(self._exclusive()), **fields)


def _sorted(found: Iterable[Thread]) -> tuple[Thread, ...]:
    return tuple(sorted(found, key=lambda one: (one.kernel, len(one.cpus), one.pid, one.tid)))


def _name(one: Thread) -> str:
    """Return the thread's name; for a kernel worker without its number and current work item."""
    return re.split("[/:]", one.comm)[0] if one.kernel else one.comm


def _first(some: Iterable[str]) -> list[str]:
    """Return the first MOST_SHOWN items, and how many more there are."""
    every = list(some)
    more = [f"and {len(every) - MOST_SHOWN} more"] if len(every) > MOST_SHOWN else []
    return [*every[:MOST_SHOWN], *more]


def _thread(one: Thread) -> dict[str, Any]:
    return {
        "pid": one.pid,
        "tid": one.tid,
        "comm": one.comm,
        "cpus": str(one.cpus),
        "cgroup": one.cgroup,
        "kernel": one.kernel,
        "movable": one.movable,
    }


def _irqs(found: IntruderReport) -> list[dict[str, Any]]:
    """Return the interrupts on exclusive CPUs and those moved away from there, by number."""
    moved, left = {one.irq: one for one in found.moves.moved}, {one.irq: one for one in found.left}
    shown = []
    for irq in sorted(moved.keys() | left.keys()):
        away, here = moved.get(irq), left.get(irq)
        shown.append(
            {
                "irq": irq,
                "name": here.name if here else away.name if away else "",
                "cpus": str(here.cpus if here else away.wanted if away else ""),
                "hits": str(here.hits) if here else "",
                "moved": away is not None,
                "before": str(away.before) if away else "",
                "why": found.moves.why.get(irq, ""),
            }
        )
    return shown
