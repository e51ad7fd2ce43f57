"""Watches exclusive CPUs: intruders are reported, counted and logged, interrupts are moved away if configured, and
those of held devices go where their claims or the configuration want them. Does nothing while no CPU is exclusive.

A look costs about 50 microseconds per host thread. It runs in a worker thread, periodically and soon after the set of
exclusive CPUs changes. If that set changes constantly, looking takes at most a fiftieth of one CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from msgspec.structs import replace

from nodeagent.config.isolation import PinningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.pinning.device_interrupts import DeviceInterrupts
from nodeagent.errors import HostError
from nodeagent.host.irq.device_irqs import Rule, rules
from nodeagent.host.irq.interrupts import Mover
from nodeagent.host.irq.intruders import Irq, Thread, irqs, sees_host, threads
from nodeagent.host.irq.irqbalance import bans
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.isolation.report import IntruderReport, IrqbalanceState, device_states, document, first
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
log = structlog.get_logger()


class _Asked(NamedTuple):
    """The input of one look."""

    exclusive: CpuSet
    others: CpuSet
    devices: tuple[DeviceInterrupts, ...]
    config: PinningConfig


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
        devices: Callable[[], tuple[DeviceInterrupts, ...]] = tuple,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up without looking.

        `exclusive` returns the exclusive CPUs of containers; `others` where everything else may run; `devices` where
        the interrupts of held devices belong. `changed` waits on a Revision that covers these and `config`. `memory` is
        a file that outlives the agent and records moved interrupts. `clock` is in seconds.
        """
        self._sysfs = sysfs
        self._exclusive = exclusive
        self._others = others
        self._config = config
        self._devices = devices
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
        asked = self._asked()
        if not asked.exclusive and self._mover.idle:
            self._found = IntruderReport()
        else:
            self._found = await asyncio.to_thread(self._look, asked)
        metrics.INTRUDERS.labels("thread").set(len(self._found.threads) if self._found.sees_host else math.nan)
        metrics.INTRUDERS.labels("irq").set(len(self._found.left))
        metrics.INTERRUPTS_MOVED.inc(self._found.moves.fresh)
        self._say()

    def document(self) -> dict[str, Any]:
        """Return the latest findings in plain types."""
        return document(self._found)

    # ---------------------------------------------------------------- when

    def _asked(self) -> _Asked:
        return _Asked(self._exclusive(), self._others(), self._devices(), self._config())

    async def _due(self, asked: _Asked) -> None:
        """Return shortly after the inputs differ from `asked`."""
        seen = await self._changed(0)
        while self._asked() == asked:
            seen = await self._changed(seen)
        await asyncio.sleep(max(self._settle_s, REST * self._found.took_s))

    # ---------------------------------------------------------------- looking, in a worker thread

    def _look(self, asked: _Asked) -> IntruderReport:
        began, warnings = time.thread_time(), list[str]()
        exclusive = asked.exclusive
        found = IntruderReport(looked_at=time.time() if exclusive else None)
        try:
            if exclusive and not sees_host(self._sysfs):
                warnings.append(UNSEEN)
            found = replace(found, sees_host=UNSEEN not in warnings)
            found = replace(found, threads=_sorted(threads(self._sysfs, exclusive, warnings)))
            found = self._interrupts(found, asked, warnings)
        except HostError as error:
            warnings.append(str(error))
        return replace(found, took_s=time.thread_time() - began, warnings=tuple(warnings))

    def _interrupts(self, found: IntruderReport, asked: _Asked, warnings: list[str]) -> IntruderReport:
        """Find interrupts and move them."""
        moving = asked.config.move_interrupts
        by_irq = rules(self._sysfs, asked.devices, asked.exclusive, moving=moving)
        default = Rule(keep_off=asked.exclusive if moving else EMPTY)
        seen = irqs(self._sysfs, asked.exclusive, warnings, by_irq)
        due = {one.irq: one for one in seen if _is_concerned(one, by_irq.get(one.irq, default))}
        intruding = (_intruding(one, by_irq.get(one.irq, default)) for one in seen)
        found = replace(found, left=tuple(one for one in intruding if one.hits))
        if not (moving or asked.devices) and self._mover.idle:
            return found
        try:
            moves = self._mover.move(default.keep_off, asked.others, due.values(), by_irq)
        except HostError as error:
            warnings.append(str(error))
            return replace(found, devices=device_states(asked.devices, by_irq, dict.fromkeys(due, str(error))))
        return replace(
            found,
            left=tuple(one for one in found.left if one.irq in moves.why or one.irq not in due),
            moves=moves,
            devices=device_states(asked.devices, by_irq, moves.why),
            irqbalance=self._irqbalance(default.keep_off, by_irq, sees_host=found.sees_host),
        )

    def _irqbalance(self, kept_off: CpuSet, by_irq: Mapping[int, Rule], *, sees_host: bool) -> IrqbalanceState:
        """Return whether irqbalance leaves alone what was moved."""
        cpus = kept_off | union(one.keep_off for one in by_irq.values())
        confined = frozenset(irq for irq, one in by_irq.items() if one.confine_to)
        if not cpus and not confined:
            return IrqbalanceState()
        try:
            found = bans(self._sysfs)
        except HostError as error:
            return IrqbalanceState(running=True, error=str(error), cpus=cpus, irqs=confined)
        why = "" if found is not None or sees_host else "the processes of the host are not seen"
        return IrqbalanceState(running=found is not None, bans=found, error=why, cpus=cpus, irqs=confined)

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
            found.notes,
        )
        if said == self._said or now - self._said_at < SAY_S:
            return
        self._said, self._said_at = said, now
        names = ("threads", "interrupts", "moved", "why", "notes")
        fields = {name: first(some) for name, some in zip(names, said, strict=True) if some}
        tell = log.warning if {"why", "notes"} & fields.keys() else log.info
        tell("intruders", exclusive=str(self._exclusive()), **fields)


def _sorted(found: Iterable[Thread]) -> tuple[Thread, ...]:
    return tuple(sorted(found, key=lambda one: (one.kernel, len(one.cpus), one.pid, one.tid)))


def _name(one: Thread) -> str:
    """Return the thread's name; for a kernel worker without its number and current work item."""
    return re.split("[/:]", one.comm)[0] if one.kernel else one.comm


def _intruding(one: Irq, rule: Rule) -> Irq:
    """Return an interrupt with the CPUs on which it disturbs others than the holder of its device."""
    return replace(one, hits=one.hits - rule.tolerated)


def _is_concerned(one: Irq, rule: Rule) -> bool:
    """Return whether an interrupt is where it should not be, or has to be looked at because it is confined."""
    return bool(rule.confine_to) or not rule.allows(one.cpus)
