"""Who held what, and when: the periods that follow from the decisions on the ledger.

A decision says what a grant is from then on. What a grant was before its oldest decision that is still known follows
from the grant itself, which carries the time at which it was given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nodeagent.core.ledger.ledger import GRANTED, REDUCED, RELEASED, Action
from nodeagent.core.model.grant import Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One decision about one grant."""

    at: float
    """Seconds since the epoch."""
    action: Action
    grant: Grant
    """As the decision left it; if it was released, as it was."""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenure:
    """A period during which a holder held the same things. Times are in seconds since the epoch."""

    grant: Grant
    since: float
    until: float | None = None
    """None if it lasts."""
    ended_by: str = ""
    """The action that ended it, and why; "" if it lasts."""
    at_least: bool = False
    """Whether it may have held more: of its decisions the oldest that is known is that another grant took a part."""

    def covers(self, at: float) -> bool:
        """Return whether it was so at a moment. Where the clock was set back meanwhile, the moment may be that of
        either time."""
        if self.until is None:
            return at >= self.since
        return min(self.since, self.until) <= at < max(self.since, self.until)


def tenures(decisions: Iterable[Decided], held: Iterable[Grant]) -> list[Tenure]:
    """Return all periods, in the order in which they began.

    decisions: in the order in which they were made. held: what is held now, of which the decisions may be too old to be
    known.
    """
    done: list[Tenure] = []
    open_: dict[str, Tenure] = {}
    known = set()
    for one in decisions:
        known.add(one.grant.id)
        before = open_.pop(one.grant.id, None)
        done += _ended(before, one)
        if (after := _lasting(before, one)) is not None:
            open_[one.grant.id] = after
    older = (Tenure(grant=one, since=one.granted_at) for one in held if one.id not in known)
    return sorted((*done, *open_.values(), *older), key=lambda one: (one.since, one.grant.id))


def _ended(before: Tenure | None, one: Decided) -> list[Tenure]:
    """Return the period that a decision ends, if it ends one: also of a grant whose other decisions are not known."""
    if one.action == RELEASED:
        period = before or Tenure(grant=one.grant, since=min(one.grant.granted_at, one.at))
        return [replace(period, until=one.at, ended_by=_why(one))]
    if before is None and one.action == REDUCED:
        since = min(one.grant.granted_at, one.at)
        return [Tenure(grant=one.grant, since=since, until=one.at, ended_by=_why(one), at_least=True)]
    if before is None or _continues(before.grant, one.grant):
        return []
    return [replace(before, until=one.at, ended_by=_why(one))]


def _lasting(before: Tenure | None, one: Decided) -> Tenure | None:
    """Return the period that lasts after a decision."""
    if one.action == RELEASED:
        return None
    if before is not None and _continues(before.grant, one.grant):
        return replace(before, grant=one.grant)
    known_since = before is not None or one.action in (GRANTED, REDUCED)
    return Tenure(grant=one.grant, since=one.at if known_since else min(one.grant.granted_at or one.at, one.at))


def _continues(before: Grant, after: Grant) -> bool:
    """Return whether the same holder still holds the same. The name of a container becomes known later."""
    return _parts(before) == _parts(after) and (before.holder == after.holder or not _is_named(before))


def _parts(grant: Grant) -> tuple[object, ...]:
    return grant.ids, grant.cpus, grant.hugepages, grant.memory, grant.devices, grant.shares


def _is_named(grant: Grant) -> bool:
    holder = grant.holder
    return bool(holder.pod or holder.claim or holder.uid)


def _why(one: Decided) -> str:
    return f"{one.action}: {one.why}" if one.why else str(one.action)
