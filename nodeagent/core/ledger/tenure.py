"""Who held what, and when: the periods that follow from the decisions on the ledger.

A decision says what a grant is from then on. What a grant was before its oldest decision that is still known follows
from the grant itself, which carries the time at which it was given.

The order of the decisions is certain, their times are those of the node's clock. A time that is later than that of a
later decision, or than the present, shows that the clock was ahead when it was taken, or behind afterwards: then the
period may have begun earlier than its time says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import GRANTED, REDUCED, RELEASED, Action
from nodeagent.core.model.grant import Grant


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """One decision about one grant."""

    at: float
    """Seconds since the epoch."""
    action: Action
    grant: Grant
    """As the decision left it; if it was released, as it was."""
    why: str = ""


class Tenure(msgspec.Struct, frozen=True, kw_only=True):
    """A period during which a holder held the same things. Times are in seconds since the epoch."""

    grant: Grant
    since: float
    until: float | None = None
    """None if it lasts."""
    ended_by: str = ""
    """The action that ended it, and why; "" if it lasts."""
    at_least: bool = False
    """Whether it may have held more: of its decisions the oldest that is known is that another grant took a part."""
    doubted: tuple[float, float] | None = None
    """From when on and up to when it may have held the same, by the order of the decisions, outside of its times; None
    if its times and that order agree."""
    lasts_at: float = math.inf
    """A moment at which a period without an end is known to last, whatever the clock said at its beginning."""

    def covers(self, at: float) -> bool:
        """Return whether it was so at a moment. Where the clock was set back meanwhile, the moment may be that of
        either time."""
        if self.until is None:
            return at >= min(self.since, self.lasts_at)
        return min(self.since, self.until) <= at < max(self.since, self.until)

    def may_cover(self, at: float) -> bool:
        """Return whether it may have been so at a moment that its times do not cover, as the clock was not right."""
        return self.doubted is not None and self.doubted[0] <= at < self.doubted[1] and not self.covers(at)


def tenures(decisions: Iterable[Decided], held: Iterable[Grant], now_s: float = math.inf) -> list[Tenure]:
    """Return all periods, in the order in which they began.

    decisions: in the order in which they were made. held: what is held now, of which the decisions may be too old to be
    known. now_s: the present moment.
    """
    every, known = list(decisions), set[str]()
    done: list[Tenure] = []
    open_: dict[str, Tenure] = {}
    for one, (earliest, latest) in zip(every, _bounds(every, now_s), strict=True):
        known.add(one.grant.id)
        before = open_.pop(one.grant.id, None)
        done += (_doubted_until(each, latest) for each in _ended(before, one))
        if (after := _lasting(before, one)) is not None:
            is_old = before is not None and _continues(before.grant, one.grant)
            open_[one.grant.id] = after if is_old else _doubted_from(after, earliest, latest)
    older = (Tenure(grant=one, since=one.granted_at) for one in held if one.id not in known)
    lasting = (*open_.values(), *(_doubted_from(one, -math.inf, now_s) for one in older))
    every_period = (*done, *(replace(one, lasts_at=now_s) for one in lasting))
    return sorted(every_period, key=lambda one: (one.since, one.grant.id))


def _bounds(decisions: Sequence[Decided], now_s: float) -> list[tuple[float, float]]:
    """Return for each decision when it was made at the earliest and at the latest, if no clock is ever behind: no later
    than those after it, and not earlier than the last one before it whose own time is no later than that."""
    latest, limits = now_s, list[float]()
    for one in reversed(decisions):
        latest = min(latest, one.at)
        limits.append(latest)
    earliest, found = -math.inf, list[tuple[float, float]]()
    for one, limit in zip(decisions, reversed(limits), strict=True):
        found.append((earliest, limit))
        earliest = one.at if one.at <= limit else earliest
    return found


def _doubted_from(period: Tenure, earliest: float, latest: float) -> Tenure:
    """Return a period with the doubts about its beginning, which lies between two moments."""
    return replace(period, doubted=(earliest, period.since)) if period.since > latest else period


def _doubted_until(period: Tenure, latest: float) -> Tenure:
    """Return a period that ended at a moment at the latest: after that nothing is in doubt."""
    if period.doubted is None:
        return period
    first, last = period.doubted
    return replace(period, doubted=(first, min(last, latest)))


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
