"""Moves interrupts off exclusive CPUs, or to those of the holder of their device, and restores them afterwards.

The target of an interrupt follows from its previous affinity and its rule: the CPUs to which it is confined, or what
is left of that affinity without those off which it is kept or, if nothing is left, the other CPUs. The previous
affinity is written to disk before an interrupt is moved, so a restarted agent can restore it. What another program has
changed since is left alone where the rule allows it, and is what is restored where it does not. What the kernel refuses
is retried only when the exclusive CPUs or the rules change. /proc/irq/default_smp_affinity is left alone.
Source: Documentation/core-api/irq/irq-affinity.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.errors import HostError
from nodeagent.host.irq.device_irqs import Rule, has_irq
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
        self._default = Rule()
        self._rules: Mapping[int, Rule] = {}
        self._refused: dict[int, str] = {}
        self._returns: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """Return whether no moved interrupt is left to restore."""
        return self._loaded and not self._moved

    def move(
        self, exclusive: CpuSet, others: CpuSet, found: Iterable[Irq], rules: Mapping[int, Rule] = MappingProxyType({})
    ) -> InterruptMoves:
        """Move interrupts that are, or may be, where they should not be (`found`), and restore those that no longer
        need to be moved.

        exclusive: CPUs off which interrupts without a rule are kept. others: the target of an interrupt that is kept
        off all of its own CPUs. rules: where the interrupts of some devices may be, by number. Raise HostError if the
        moves cannot be recorded; then nothing is moved.
        """
        self._begin(exclusive, rules)
        hits = {one.irq: one for one in found}
        ours = dict(self._still_ours(hits))
        planned = self._planned(ours, others, hits)
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

    def _begin(self, exclusive: CpuSet, rules: Mapping[int, Rule]) -> None:
        if not self._loaded:
            self._moved, self._unread = load(self._sysfs, self._memory)
            self._loaded = True
        if (exclusive, rules) != (self._default.keep_off, self._rules):
            self._default, self._rules, self._refused = Rule(keep_off=exclusive), dict(rules), {}
        if not exclusive and not rules:
            self._returns = {}

    def _remember(self, moved: Mapping[int, Moved]) -> None:
        save(self._sysfs, self._memory, moved.values())
        self._moved = dict(moved)

    def _rule(self, irq: int) -> Rule:
        return self._rules.get(irq, self._default)

    # ---------------------------------------------------------------- what is to be done

    def _still_ours(self, hits: Mapping[int, Irq]) -> Iterator[tuple[int, Moved]]:
        """Yield the moved interrupts that no other program has changed since. Count those that are moved back."""
        names = interrupt_names(self._sysfs) if self._moved else {}
        for irq, one in self._moved.items():
            same = has_irq(self._sysfs, one.device, irq) if one.device else names.get(irq, "") == one.name
            asked = self._asked(irq) if same else None
            if asked is None:
                self._returns.pop(irq, None)
            elif asked in (one.wanted, one.seen):
                yield irq, one
            elif irq in hits:
                self._returns[irq] = self._returns.get(irq, 0) + 1

    def _planned(self, ours: Mapping[int, Moved], others: CpuSet, hits: Mapping[int, Irq]) -> dict[int, Moved]:
        """Return all interrupts that must be away or restored, with their targets."""
        online = self._sysfs.cpus(_ONLINE)

        def target(irq: int, before: CpuSet) -> CpuSet:
            rule = self._rule(irq)
            if rule.confine_to:
                return rule.confine_to
            left = before - rule.keep_off
            usable = left if online is None else left & online
            return left if usable or left == before else others - rule.keep_off

        planned = {irq: replace(one, wanted=target(irq, one.before) or one.wanted) for irq, one in ours.items()}
        for one in (one for one in hits.values() if one.irq not in ours and one.irq not in self._refused):
            wanted, device = target(one.irq, one.asked), self._rule(one.irq).device
            if wanted and wanted != one.asked:
                planned[one.irq] = Moved(
                    irq=one.irq, name=one.name, device=device, before=one.asked, wanted=wanted, seen=wanted
                )
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
        """Return why an interrupt is where it should not be; empty if it is not."""
        if one.irq in self._refused:
            return self._refused[one.irq]
        rule = self._rule(one.irq)
        if rule.allows(one.cpus if delivered is None else delivered):
            return ""
        return NOT_YET if delivered is not None or one.irq in self._moved or rule.allows(one.asked) else NOWHERE

    def _notes(self) -> Iterator[str]:
        if self._unread:
            yield self._unread
        often = [irq for irq, times in sorted(self._returns.items()) if times >= OFTEN]
        if kept_off := [irq for irq in often if not self._rule(irq).confine_to]:
            cpus = union(self._rule(irq).keep_off for irq in kept_off)
            yield (
                f"interrupts {_listed(kept_off)} are moved back by another program: keep irqbalance off these CPUs "
                f"(IRQBALANCE_BANNED_CPULIST={cpus})"
            )
        if confined := [irq for irq in often if self._rule(irq).confine_to]:
            yield (
                f"interrupts {_listed(confined)} are moved away by another program: have irqbalance leave them alone "
                f"(irqbalance {' '.join(f'--banirq={irq}' for irq in confined)})"
            )


def _listed(irqs: Iterable[int]) -> str:
    return ", ".join(map(str, irqs))
