"""Moves interrupts off exclusive CPUs, and restores them when those CPUs are no longer exclusive.

The target of an interrupt follows from its previous affinity and the exclusive CPUs: what is left of that affinity or,
if nothing is left, the other CPUs. The previous affinity is written to disk before an interrupt is moved, so a
restarted agent can restore it. What another program has changed since is left alone; what the kernel refuses is retried
only when the exclusive CPUs change. /proc/irq/default_smp_affinity is left alone.
Source: Documentation/core-api/irq/irq-affinity.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError
from nodeagent.host.irq.intruders import Irq, interrupt_names, move_irq
from nodeagent.host.irq.journal import Moved, load, save
from nodeagent.host.sysfs.sysfs import SysFs

OFTEN = 2
"""From this many returns on, an interrupt is being moved back by another program."""
NOT_YET = "it is asked to go elsewhere, and goes there when it next occurs"
NOWHERE = "no CPUs are left for it"
_ONLINE = "sys/devices/system/cpu/online"


class InterruptMoves(msgspec.Struct, frozen=True, kw_only=True):
    """The state of interrupts after a round."""

    moved: tuple[Moved, ...] = ()
    """All interrupts that are currently moved away, by number."""
    fresh: int = 0
    """How many were moved away in this round."""
    why: Mapping[int, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why an interrupt is where it should not be, by number: includes all still delivered to exclusive CPUs."""
    notes: tuple[str, ...] = ()
    """Texts for the admin."""


class Mover:
    """Moves interrupts and records this in a file. Everything blocks; one round at a time."""

    def __init__(self, sysfs: SysFs, memory: Path) -> None:
        """memory: the file; it is read in the first round."""
        self._sysfs = sysfs
        self._memory = memory
        self._loaded = False
        self._unread = ""
        self._moved: dict[int, Moved] = {}
        self._exclusive = EMPTY
        self._refused: dict[int, str] = {}
        self._returns: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """Return whether no moved interrupt is left to restore."""
        return self._loaded and not self._moved

    def move(self, exclusive: CpuSet, others: CpuSet, found: Iterable[Irq]) -> InterruptMoves:
        """Move interrupts delivered to exclusive CPUs (`found`) away, and restore those that no longer need to be away.

        others: the target of an interrupt whose own CPUs are all exclusive. Raise HostError if the moves cannot be
        recorded; then nothing is moved.
        """
        self._begin(exclusive)
        hits = {one.irq: one for one in found}
        ours = dict(self._still_ours(hits))
        planned = self._planned(ours, others - exclusive, hits)
        due = [one for one in planned.values() if self._is_due(one, ours, hits)]
        self._remember(planned)
        moves = {one.irq: self._put(one, ours.get(one.irq)) for one in due}
        self._remember(self._moved)
        kept_away = {irq: why for irq, why in self._refused.items() if irq in self._moved}
        why = {irq: why for irq, one in hits.items() if (why := self._why(one, moves.get(irq)))}
        return InterruptMoves(
            moved=tuple(self._moved[irq] for irq in sorted(self._moved)),
            fresh=sum(irq in hits and irq in self._moved and irq not in self._refused for irq in moves),
            why=MappingProxyType({**kept_away, **why}),
            notes=tuple(self._notes()),
        )

    def _begin(self, exclusive: CpuSet) -> None:
        if not self._loaded:
            self._moved, self._unread = load(self._sysfs, self._memory)
            self._loaded = True
        if exclusive != self._exclusive:
            self._exclusive, self._refused = exclusive, {}
        if not exclusive:
            self._returns = {}

    def _remember(self, moved: Mapping[int, Moved]) -> None:
        save(self._sysfs, self._memory, moved.values())
        self._moved = dict(moved)

    # ---------------------------------------------------------------- what is to be done

    def _still_ours(self, hits: Mapping[int, Irq]) -> Iterator[tuple[int, Moved]]:
        """Yield the moved interrupts that no other program has changed since. Count those back on exclusive CPUs."""
        names = interrupt_names(self._sysfs) if self._moved else {}
        for irq, one in self._moved.items():
            asked = self._asked(irq) if names.get(irq, "") == one.name else None
            if asked is None:
                self._returns.pop(irq, None)
            elif asked in (one.wanted, one.seen):
                yield irq, one
            elif irq in hits:
                self._returns[irq] = self._returns.get(irq, 0) + 1

    def _planned(self, ours: Mapping[int, Moved], others: CpuSet, hits: Mapping[int, Irq]) -> dict[int, Moved]:
        """Return all interrupts that must be away or restored, with their targets."""
        online = self._sysfs.cpus(_ONLINE)

        def target(before: CpuSet) -> CpuSet:
            left = before - self._exclusive
            usable = left if online is None else left & online
            return left if usable or left == before else others

        planned = {irq: replace(one, wanted=target(one.before) or one.wanted) for irq, one in ours.items()}
        for irq in (one for one in hits.values() if one.irq not in ours and one.irq not in self._refused):
            wanted = target(irq.asked)
            if wanted and wanted != irq.asked:
                planned[irq.irq] = Moved(irq=irq.irq, name=irq.name, before=irq.asked, wanted=wanted, seen=wanted)
        return planned

    def _is_due(self, one: Moved, ours: Mapping[int, Moved], hits: Mapping[int, Irq]) -> bool:
        """Return whether an interrupt has to be written. If it is being restored, or its affinity still includes
        exclusive CPUs, the agent that planned the write did not complete it."""
        unfinished = one.wanted == one.before or (one.irq in hits and not hits[one.irq].asked <= one.wanted)
        return one.irq not in self._refused and (unfinished or ours.get(one.irq) != one)

    # ---------------------------------------------------------------- doing it

    def _put(self, one: Moved, older: Moved | None) -> CpuSet | None:
        """Move an interrupt and return where it is delivered then, or None, with the reason in
        `_refused`, if that failed."""
        del self._moved[one.irq]
        try:
            delivered = move_irq(self._sysfs, one.irq, one.wanted)
            asked = self._asked(one.irq)
        except HostError as error:
            self._refused[one.irq] = str(error)
            self._moved.update({} if older is None else {one.irq: older})
            return None
        if asked is not None and one.wanted != one.before:
            self._moved[one.irq] = replace(one, seen=asked)
        return delivered

    def _asked(self, irq: int) -> CpuSet | None:
        """Return the affinity set for an interrupt, or None if it is gone."""
        return self._sysfs.cpus(f"proc/irq/{irq}/smp_affinity_list")

    # ---------------------------------------------------------------- what is to be said

    def _why(self, one: Irq, delivered: CpuSet | None) -> str:
        """Return why an interrupt is still delivered to exclusive CPUs; empty if it is not."""
        if one.irq in self._refused:
            return self._refused[one.irq]
        if delivered is not None:
            return "" if delivered.isdisjoint(self._exclusive) else NOT_YET
        return NOT_YET if one.irq in self._moved or one.asked.isdisjoint(self._exclusive) else NOWHERE

    def _notes(self) -> Iterator[str]:
        if self._unread:
            yield self._unread
        often = [str(irq) for irq, times in sorted(self._returns.items()) if times >= OFTEN]
        if often:
            yield (
                f"interrupts {', '.join(often)} are moved back by another program: keep irqbalance off these CPUs "
                f"(IRQBALANCE_BANNED_CPULIST={self._exclusive})"
            )
