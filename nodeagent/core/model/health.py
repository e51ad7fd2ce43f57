"""From evidence to a state, with hysteresis and recovery. Pure: the clock is a number that the caller brings.

Bad evidence counts at once. Good evidence must hold for `recover_s` before what was unhealthy is healthy again,
so that a device that comes and goes is not given out in between. Unknown is neither: it is said as such, and what is
unknown is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class DeviceState(StrEnum):
    """How a device is."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


HEALTHY, UNHEALTHY, UNKNOWN = DeviceState
RECOVER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one source saw of one device."""

    device: str
    source: str
    """Who saw it: "inventory", "nvml", "admin" …; each source's newest evidence counts."""
    state: DeviceState
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """One device's health. since and good_since are in seconds of the caller's clock."""

    state: DeviceState
    since: float
    reason: str = ""
    seen: Mapping[str, tuple[DeviceState, str]] = field(default_factory=lambda: MappingProxyType({}))
    """Newest (state, reason) by source."""
    good_since: float | None = None
    """Since when all evidence is good again, while the state is not yet."""


Health = Mapping[str, HealthState]
NO_HEALTH: Health = MappingProxyType({})


def observe(health: Health, evidence: Iterable[Evidence], now: float, recover_s: float = RECOVER_S) -> Health:
    """The health after some evidence; the same object where nothing changed."""
    after = dict(health)
    for one in evidence:
        after[one.device] = _judge(after.get(one.device), one, now, recover_s)
    return health if after == health else MappingProxyType(after)


def recovered(health: Health, now: float, recover_s: float = RECOVER_S) -> Health:
    """The health once time has passed: what has been good for long enough is healthy."""
    after = {device: _recovered(state, now, recover_s) for device, state in health.items()}
    return health if after == health else MappingProxyType(after)


def next_recovery(health: Health, recover_s: float = RECOVER_S) -> float | None:
    """When `recovered` next has something to do; None: not before new evidence."""
    return min((s.good_since + recover_s for s in health.values() if s.good_since is not None), default=None)


def forget(health: Health, devices: Iterable[str]) -> Health:
    """The health without some devices."""
    gone = frozenset(devices) & health.keys()
    return MappingProxyType({one: state for one, state in health.items() if one not in gone}) if gone else health


def _judge(before: HealthState | None, one: Evidence, now: float, recover_s: float) -> HealthState:
    seen = MappingProxyType({**(before.seen if before else {}), one.source: (one.state, one.reason)})
    worst, reason = _worst(seen)
    if before is None:
        return HealthState(state=worst, since=now, reason=reason, seen=seen)
    if worst != HEALTHY or before.state == HEALTHY:
        since = before.since if worst == before.state else now
        return HealthState(state=worst, since=since, reason=reason, seen=seen)
    good_since = now if before.good_since is None else before.good_since
    waiting = HealthState(
        state=before.state, since=before.since, reason=before.reason, seen=seen, good_since=good_since
    )
    return _recovered(waiting, now, recover_s)


def _recovered(state: HealthState, now: float, recover_s: float) -> HealthState:
    if state.good_since is None or now - state.good_since < recover_s:
        return state
    return HealthState(state=HEALTHY, since=now, seen=state.seen)


def _worst(seen: Mapping[str, tuple[DeviceState, str]]) -> tuple[DeviceState, str]:
    for state in (UNHEALTHY, UNKNOWN):
        for source in sorted(seen):
            if seen[source][0] == state:
                return state, seen[source][1]
    return HEALTHY, ""
