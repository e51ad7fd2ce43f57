"""Device health derived from evidence, with hysteresis and recovery. Pure: the caller passes in the current time.

Bad evidence takes effect at once. After that, good evidence must persist for `recover_s` before the device is healthy
again, so that a flapping device is not granted in the meantime. Unknown is a state of its own: it is reported as
unknown, and such a device is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class DeviceState(StrEnum):
    """Health state of a device."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


HEALTHY, UNHEALTHY, UNKNOWN = DeviceState
RECOVER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One observation of one device by one source."""

    device: str
    source: str
    """The observer: "inventory", "nvml", "admin" …; only the newest evidence of each source counts."""
    state: DeviceState
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """Health of one device. `since` and `good_since` are in seconds of the caller's clock."""

    state: DeviceState
    since: float
    reason: str = ""
    seen: Mapping[str, tuple[DeviceState, str]] = field(default_factory=lambda: MappingProxyType({}))
    """Newest (state, reason) by source."""
    good_since: float | None = None
    """When all evidence became good again; set only while the device is waiting to recover."""


Health = Mapping[str, HealthState]
NO_HEALTH: Health = MappingProxyType({})


def observe(health: Health, evidence: Iterable[Evidence], now: float, recover_s: float = RECOVER_S) -> Health:
    """Return the health after taking in some evidence; the same object if nothing changed.

    now: seconds of the caller's clock. recover_s: how long good evidence must persist.
    """
    after = dict(health)
    for one in evidence:
        after[one.device] = _judge(after.get(one.device), one, now, recover_s)
    return health if after == health else MappingProxyType(after)


def recovered(health: Health, now: float, recover_s: float = RECOVER_S) -> Health:
    """Return the health at `now`: devices whose evidence has been good for `recover_s` become healthy."""
    after = {device: _recovered(state, now, recover_s) for device, state in health.items()}
    return health if after == health else MappingProxyType(after)


def next_recovery(health: Health, recover_s: float = RECOVER_S) -> float | None:
    """Return when `recovered` next has an effect, or None if nothing changes without new evidence."""
    return min((s.good_since + recover_s for s in health.values() if s.good_since is not None), default=None)


def forget(health: Health, devices: Iterable[str]) -> Health:
    """Return the health without the given devices."""
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
