"""Device health derived from evidence, with hysteresis and recovery. Pure: the caller passes in the current time.

Bad evidence takes effect at once. After that, good evidence must persist for `recover_s` before the device is healthy
again, so that a flapping device is not granted in the meantime. Unknown is a separate state: it is reported as
unknown, and such a device is not offered. A latched cause does not end by good evidence, however often that comes: it
lasts until `clear`. Degraded evidence is good evidence that is worth a warning: the device is granted as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import msgspec


class DeviceState(StrEnum):
    """Health state of a device, or what one source says of it."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"
    DEGRADED = "degraded"
    """Of evidence only: it works, but not as well as it could. A device is never this as a whole but healthy."""


HEALTHY, UNHEALTHY, UNKNOWN, DEGRADED = DeviceState
_SEVERITY = (HEALTHY, DEGRADED, UNKNOWN, UNHEALTHY)
"""From the best to the worst."""


class Remedy(StrEnum):
    """What ends a cause, if it does not end by itself; each is more than the ones before."""

    NONE = ""
    DRAIN = "drain"
    """The programs that use the device have to end."""
    RESET = "reset"
    """The device has to be reset, or its driver loaded again."""
    REBOOT = "reboot"
    REPLACE = "replace"


_REMEDIES = tuple(Remedy)
RECOVER_S = 30.0


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One observation of one device by one source."""

    device: str
    source: str
    """The observer: "nvml", "carrier", "admin" …; only the newest evidence of each source counts."""
    state: DeviceState
    reason: str = ""
    latched: bool = False
    """Whether it lasts until it is cleared, whatever the source observes later."""
    remedy: Remedy = Remedy.NONE


class Observed(NamedTuple):
    """The newest evidence of one source."""

    state: DeviceState
    reason: str
    latched: bool = False
    remedy: Remedy = Remedy.NONE


class HealthState(msgspec.Struct, frozen=True, kw_only=True):
    """Health of one device. `since` and `good_since` are in seconds of the caller's clock."""

    state: DeviceState
    since: float
    reason: str = ""
    seen: Mapping[str, Observed] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By source."""
    good_since: float | None = None
    """When all evidence became good again; set only while the device is waiting to recover."""

    @property
    def remedy(self) -> Remedy:
        """Return the most that any of its causes needs."""
        needed = (one.remedy for one in self.seen.values() if one.state in (UNHEALTHY, UNKNOWN))
        return max(needed, key=_REMEDIES.index, default=Remedy.NONE)

    @property
    def latched(self) -> bool:
        """Return whether a cause lasts until it is cleared."""
        return any(one.latched for one in self.seen.values())

    @property
    def degradations(self) -> tuple[tuple[str, str], ...]:
        """Return (source, reason) of what is worth a warning, in order of source."""
        return tuple((source, one.reason) for source, one in sorted(self.seen.items()) if one.state == DEGRADED)


Health = Mapping[str, HealthState]
NO_HEALTH: Health = MappingProxyType({})
Said = tuple[str, str]
"""(device, source)."""


def observe(health: Health, evidence: Iterable[Evidence], now: float, recover_s: float = RECOVER_S) -> Health:
    """Return the health after taking in some evidence; the same object if nothing changed.

    now: seconds of the caller's clock. recover_s: how long good evidence must persist.
    """
    after = dict(health)
    for one in evidence:
        before = after.get(one.device)
        known = before.seen.get(one.source) if before is not None else None
        said = Observed(one.state, one.reason, one.latched, one.remedy)
        if known is None or not known.latched:
            after[one.device] = _judge(before, one.source, said, now, recover_s)
        elif one.latched:
            after[one.device] = _judge(before, one.source, outlasting(known, said), now, recover_s)
    return health if after == health else MappingProxyType(after)


def withdraw(health: Health, unseen: Iterable[Said], now: float, recover_s: float = RECOVER_S) -> Health:
    """Return the health without what sources said of devices that they have nothing to look at of any longer.

    That is no good evidence: the rest must be good for `recover_s` as well. What is latched stays.
    """
    after = dict(health)
    for device, source in unseen:
        before = after.get(device)
        known = before.seen.get(source) if before is not None else None
        if before is not None and known is not None and not known.latched:
            seen = {one: said for one, said in before.seen.items() if one != source}
            after[device] = _judged(before, seen, now, recover_s)
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


def clear(health: Health, device: str, now: float) -> Health:
    """Return the health without the latched causes of a device; the rest of its evidence counts at once."""
    before = health.get(device)
    if before is None or not any(one.latched for one in before.seen.values()):
        return health
    seen = {source: one for source, one in before.seen.items() if not one.latched}
    worst, reason = _worst(seen)
    after = HealthState(state=worst, since=now, reason=reason, seen=MappingProxyType(seen))
    return MappingProxyType({**health, device: after})


def latched_causes(health: Health) -> tuple[Evidence, ...]:
    """Return the evidence that lasts until it is cleared, in order of device and source."""
    return tuple(
        Evidence(device=device, source=source, state=one.state, reason=one.reason, latched=True, remedy=one.remedy)
        for device, state in sorted(health.items())
        for source, one in sorted(state.seen.items())
        if one.latched
    )


def outlasting(known: Observed, new: Observed) -> Observed:
    """Return what stands of two latched causes of one source: the worse, or the newer if they are alike, with the
    greater remedy of both."""
    stands = known if _gravity(known) > _gravity(new) else new
    return stands._replace(remedy=max(known.remedy, new.remedy, key=_REMEDIES.index))


def _gravity(one: Observed) -> tuple[int, int]:
    return _SEVERITY.index(one.state), _REMEDIES.index(one.remedy)


def _judge(before: HealthState | None, source: str, said: Observed, now: float, recover_s: float) -> HealthState:
    return _judged(before, {**(before.seen if before else {}), source: said}, now, recover_s)


def _judged(before: HealthState | None, all_seen: Mapping[str, Observed], now: float, recover_s: float) -> HealthState:
    seen = MappingProxyType(all_seen)
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


def _worst(seen: Mapping[str, Observed]) -> tuple[DeviceState, str]:
    for state in (UNHEALTHY, UNKNOWN):
        for source in sorted(seen):
            if seen[source].state == state:
                return state, seen[source].reason
    return HEALTHY, ""
