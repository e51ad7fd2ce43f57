"""What was found on exclusive CPUs, what was done about it, and how both are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.pinning.device_interrupts import FOLLOW, DeviceInterrupts
from nodeagent.host.irq.device_irqs import Rule
from nodeagent.host.irq.interrupts import NOT_YET, InterruptMoves
from nodeagent.host.irq.intruders import Irq, Thread
from nodeagent.host.irq.irqbalance import Bans

MOST_SHOWN = 20
"""Maximum number of threads, names or warnings shown."""
NO_CPUS = "its holder has no exclusive CPUs"
NO_IRQS = "it has no message-signalled interrupts"


class IrqbalanceState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether irqbalance leaves alone what it should not touch."""

    running: bool = False
    bans: Bans | None = None
    """None if they are not known."""
    error: str = ""
    """Why they are not known."""
    cpus: CpuSet = CpuSet()
    """CPUs off which interrupts are kept."""
    irqs: frozenset[int] = frozenset()
    """Interrupts that are confined."""

    @property
    def missing_cpus(self) -> CpuSet:
        """Return the CPUs that it has to ban and does not, as far as that is known."""
        return self.cpus - self.bans.cpus if self.bans is not None else CpuSet()

    @property
    def missing_irqs(self) -> list[int]:
        """Return the interrupts that it has to ban and does not, as far as that is known."""
        return sorted(self.irqs - self.bans.irqs) if self.bans is not None else []

    def notes(self) -> list[str]:
        """Return what an admin has to do, one sentence each."""
        found = [f"whether irqbalance undoes it is not known: {self.error}"] if self.running and self.error else []
        if self.missing_cpus:
            found.append(
                f"irqbalance runs and may send interrupts to CPUs {self.missing_cpus}: ban them "
                f"(IRQBALANCE_BANNED_CPULIST={self.missing_cpus})"
            )
        if missing := self.missing_irqs:
            bans = " ".join(f"--banirq={irq}" for irq in missing)
            found.append(f"irqbalance runs and may move interrupts {_listed(missing)} away: ban them ({bans})")
        return found


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the interrupts of one device are."""

    wanted: DeviceInterrupts
    irqs: tuple[int, ...]
    misplaced: Mapping[int, str]
    """Why interrupts are where they should not be."""

    @property
    def why(self) -> str:
        """Return why not all of them are where they belong, or ""; what is refused first, before what is only due."""
        if self.wanted.wanted == FOLLOW and not self.wanted.cpus:
            return NO_CPUS
        return NO_IRQS if not self.irqs else min(self.misplaced.values(), key=NOT_YET.__eq__, default="")


class IntruderReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one look."""

    looked_at: float | None = None
    """Seconds since the epoch, or None if nothing is exclusive or no look has happened yet."""
    took_s: float = 0.0
    threads: tuple[Thread, ...] = ()
    """Threads bound to the fewest CPUs first, kernel threads last."""
    sees_host: bool = True
    """False if the threads of the host cannot be seen."""
    left: tuple[Irq, ...] = ()
    """Interrupts that are delivered to exclusive CPUs of others than the holder of their device."""
    moves: InterruptMoves = msgspec.field(default_factory=InterruptMoves)
    devices: tuple[DeviceState, ...] = ()
    """Devices whose interrupts belong somewhere."""
    irqbalance: IrqbalanceState = msgspec.field(default_factory=IrqbalanceState)
    warnings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what an admin should know of interrupts, one sentence each."""
        return (*self.moves.notes, *self.irqbalance.notes())


def device_states(
    wanted: Iterable[DeviceInterrupts], rules: Mapping[int, Rule], why: Mapping[int, str]
) -> tuple[DeviceState, ...]:
    """Return where the interrupts of devices are. why: why an interrupt is where it should not be."""
    by_function: dict[str, list[int]] = {}
    for irq, rule in sorted(rules.items()):
        by_function.setdefault(rule.device, []).append(irq)
    found = []
    for one in wanted:
        irqs = tuple(irq for address in one.addresses for irq in by_function.get(address, ()))
        misplaced = MappingProxyType({irq: why[irq] for irq in irqs if irq in why})
        found.append(DeviceState(wanted=one, irqs=irqs, misplaced=misplaced))
    return tuple(found)


def document(found: IntruderReport) -> dict[str, Any]:
    """Return the findings in plain types."""
    return {
        "looked_at": found.looked_at,
        "threads": [_thread(one) for one in found.threads[:MOST_SHOWN]],
        "threads_total": len(found.threads) if found.sees_host else None,
        "irqs": _irqs(found),
        "devices": [_device(one) for one in found.devices],
        "irqbalance": _irqbalance(found.irqbalance),
        "warnings": first([*found.notes, *found.warnings]),
    }


def first(some: Iterable[str]) -> list[str]:
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
    """Return the interrupts on exclusive CPUs and those that were moved, by number."""
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


def _device(one: DeviceState) -> dict[str, Any]:
    return {
        "device": one.wanted.device,
        "holder": one.wanted.holder,
        "interrupts": one.wanted.wanted,
        "cpus": str(one.wanted.cpus),
        "irqs": list(one.irqs),
        "misplaced": sorted(one.misplaced),
        "why": one.why,
    }


def _irqbalance(one: IrqbalanceState) -> dict[str, Any]:
    return {
        "running": one.running,
        "banned_cpus": str(one.bans.cpus) if one.bans is not None else None,
        "banned_irqs": sorted(one.bans.irqs) if one.bans is not None else None,
        "missing_cpus": str(one.missing_cpus),
        "missing_irqs": one.missing_irqs,
        "error": one.error,
    }


def _listed(irqs: Iterable[int]) -> str:
    return ", ".join(map(str, irqs))
