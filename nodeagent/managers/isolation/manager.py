"""The daemon's watch over exclusive CPUs: who else runs there is shown, counted and said; interrupts are moved away
where that is configured. Nothing is looked at while no CPU is exclusive.

Looking costs about 50 microseconds a thread of the host. It is done in a thread, now and then, and soon after other
CPUs became exclusive; where that happens all the time, looking takes at most a fiftieth of one CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from nodeagent.config.schema import PinningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError
from nodeagent.host.irq.interrupts import InterruptMoves, Mover
from nodeagent.host.irq.intruders import Irq, Thread, irqs, threads
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.manager import Manager
from nodeagent.telemetry import metrics

SETTLE_S = 1.0
"""How long after other CPUs became exclusive one looks: containers have their CPUs by then."""
REST = 50
"""One look's time is followed by so many of its kind without any."""
SAY_S = 60.0
"""The log has at most one line in this time."""
MOST_SHOWN = 20
"""Threads, names and warnings that are shown."""
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class IntruderReport:
    """What one look found."""

    looked_at: float | None = None
    """Seconds since the epoch; None: nothing is exclusive, or nobody has looked yet."""
    took_s: float = 0.0
    threads: tuple[Thread, ...] = ()
    """Those that are bound to the fewest CPUs first, the kernel's last."""
    irqs: tuple[Irq, ...] = ()
    moving: bool = False
    """Whether interrupts were moved."""
    moves: InterruptMoves = field(default_factory=InterruptMoves)
    warnings: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Irq, ...]:
        """The interrupts that are still delivered to exclusive CPUs."""
        return tuple(one for one in self.irqs if one.irq in self.moves.why or not self.moving)


class IsolationManager(Manager):
    """Looks for intruders for as long as `lead` runs."""

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
        """exclusive: the CPUs that containers hold for themselves; others: where everything else may run. changed: a
        Revision's, of what the first three say. memory: a file that outlives the agent, for moved interrupts. clock: in
        seconds."""
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
        """Look indefinitely."""
        while True:
            asked = self._asked()
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().intruders_seconds):
                    await self._due(asked)

    async def look(self) -> None:
        """Look once, and move interrupts where that is configured."""
        exclusive, others, config = self._asked()
        if not exclusive and self._mover.idle:
            self._found = IntruderReport()
        else:
            self._found = await asyncio.to_thread(self._look, exclusive, others, config.move_interrupts)
        metrics.INTRUDERS.labels("thread").set(len(self._found.threads))
        metrics.INTRUDERS.labels("irq").set(len(self._found.left))
        metrics.INTERRUPTS_MOVED.inc(self._found.moves.fresh)
        self._say()

    def document(self) -> dict[str, Any]:
        """What the newest look found, in plain types."""
        found = self._found
        return {
            "looked_at": found.looked_at,
            "threads": [_thread(one) for one in found.threads[:MOST_SHOWN]],
            "threads_total": len(found.threads),
            "irqs": _irqs(found),
            "warnings": _first([*found.moves.notes, *found.warnings]),
        }

    # ---------------------------------------------------------------- when

    def _asked(self) -> tuple[CpuSet, CpuSet, PinningConfig]:
        return self._exclusive(), self._others(), self._config()

    async def _due(self, asked: tuple[object, ...]) -> None:
        """Return a moment after something else is asked for than was."""
        seen = await self._changed(0)
        while self._asked() == asked:
            seen = await self._changed(seen)
        await asyncio.sleep(max(self._settle_s, REST * self._found.took_s))

    # ---------------------------------------------------------------- looking, in a thread

    def _look(self, exclusive: CpuSet, others: CpuSet, move: bool) -> IntruderReport:
        began, warnings = time.thread_time(), list[str]()
        found = IntruderReport(looked_at=time.time() if exclusive else None)
        try:
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

    # ---------------------------------------------------------------- saying it

    def _say(self) -> None:
        """Say who is there when that changes: names, for threads and interrupts of one name come and go."""
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
    """Of a kernel's worker without its number and what it works at."""
    return re.split("[/:]", one.comm)[0] if one.kernel else one.comm


def _first(some: Iterable[str]) -> list[str]:
    """As many as are shown, and how many more there are."""
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
    """Those that are on exclusive CPUs, and those that were moved away from there, by number."""
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
