"""One pool on its way to the API server: what of it can be published, the pace of writes, and why a write waits."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.core.dra.pool import Pool
from nodeagent.errors import PeerError
from nodeagent.kube.resourceslice.render import NO_TIMES, Object, Owner, pool_name, render
from nodeagent.kube.resourceslice.taint_times import of_pool, taint_times
from nodeagent.kube.resourceslice.validate import Broken, check


class PublishState(StrEnum):
    """Publication status of a pool."""

    WAITING = "waiting"
    PUBLISHED = "published"
    FAILED = "failed"


WAITING, PUBLISHED, FAILED = PublishState
"""State of one pool, or of all: not written yet, without any error; stored by the server; the last attempt failed."""

log = structlog.get_logger()


class PublishPace(msgspec.Struct, frozen=True, kw_only=True):
    """Timing of writes and retries, in seconds."""

    start_jitter_s: float = 10.0
    """The first list request is delayed by a random part of this. If 5,000 nodes with 8 slices each are powered on in
    the same second, they write 4,000 slices a second for 10 s rather than all at once; if their start is already spread
    over a minute, they write 700 a second."""
    batch_s: float = 1.0
    """Average interval between writes of one pool."""
    burst: int = 3
    """Writes allowed back to back after a quiet period: a change, and its rewrite for an older server."""
    settle_s: float = 0.1
    """How long to wait after a deletion by another client before listing and writing again."""
    first_retry_s: float = 0.2
    last_retry_s: float = 30.0
    steady_s: float = 5.0
    """After a session of at least this length, retries start from first_retry_s again."""
    refused_s: float = 60.0
    """First wait after a lasting refusal (no permission, not valid); doubled up to most_s."""
    doubt_s: float = 0.5
    """First wait after a slice may have been forbidden only because the server does not know it (see `doubts`)."""
    most_doubts: int = 3
    free_repeats: int = 5
    """How often identical content is rewritten without extra delay when another writer undoes it; after that the wait
    doubles up to most_s."""
    most_s: float = 600.0
    withdraw_s: float = 3.0
    """Deadline of withdraw()."""


DEFAULT_PACE = PublishPace()


class PoolStanding(msgspec.Struct, frozen=True, kw_only=True):
    """Publication status of one pool, and what the server stores of it."""

    kind: str
    name: str
    state: PublishState = WAITING
    reason: str = ""
    generation: int = 0
    """As stored by the server, or 0 if it stores no slice of the pool."""
    slices: int = 0
    devices: int = 0


class PoolLane:
    """State of one pool between writes. Times are from a monotonic clock, in seconds."""

    def __init__(self, pace: PublishPace, *, name: str = "") -> None:
        self.name = name
        self.pool = Pool(kind="")
        """The publishable part of the pool."""
        self.broken: tuple[Broken, ...] = ()
        self.unfit = False
        """Whether rules are broken by more than single devices. What the server stores is then left unchanged."""
        self.taint_times = NO_TIMES
        """Of the taints that the pool still has, as last stored: a starting kubelet deletes the slices of its node."""
        self._pace = pace
        self._given: tuple[Pool, Owner] | None = None
        self._written_of: dict[str, str] | None = None
        self._state, self._reason = WAITING, ""
        self._written: Pool | None = None
        self._wrote_s = self._free_s = self._held_until_s = 0.0
        self._why_held = ""
        self._repeats = self._refusals = self._doubts = 0

    def take(self, pool: Pool, owner: Owner) -> None:
        """Take the latest state of the pool. Devices that break a rule are left out and logged."""
        if self._given == (pool, owner):
            return
        before, sound = self.broken, self._known_sound(pool, owner)
        self._given, self._written_of = (pool, owner), None
        self.name = pool_name(owner, pool.kind)
        self._refusals, self._held_until_s = 0, 0.0
        self.pool, self.broken = _sound(pool, owner, sound)
        self.taint_times = of_pool(self.taint_times, pool)
        self.unfit = any(not one.device for one in self.broken)
        for one in self.broken:
            if one not in before:
                log.error("slice-rule-broken", pool=one.pool, device=one.device, error=one.why)

    def _known_sound(self, pool: Pool, owner: Owner) -> frozenset[str]:
        """Return the devices already checked: the identical objects with the same counters, which is most of a large
        pool."""
        before = self._given[0] if self._given is not None and self._given[1] == owner else Pool(kind="")
        if replace(before, devices=()) != replace(pool, devices=()):
            return frozenset()
        checked, bad = {id(one) for one in before.devices}, {one.device for one in self.broken}
        return frozenset(one.name for one in pool.devices if id(one) in checked and one.name not in bad)

    def is_written(self, stored: Mapping[str, Object]) -> bool:
        """Return whether neither the pool nor its stored slices have changed since mark_written()."""
        return self._written_of is not None and self._written_of == self._versions(stored)

    def mark_written(self, stored: Mapping[str, Object]) -> None:
        """Record that everything publishable is stored."""
        self._written_of = self._versions(stored)
        self.taint_times = taint_times(self._own(stored))
        self._state, self._reason = PUBLISHED, ""
        if self.unfit:
            self._state, self._reason = FAILED, str(next(one for one in self.broken if not one.device))

    def wait_s(self, now_s: float) -> float:
        """Return how long the next write has to wait."""
        paced_s = self._free_s - (self._pace.burst - 1) * self._pace.batch_s
        if self._held_until_s > now_s:
            self._state, self._reason = FAILED, self._why_held
        elif paced_s > now_s:
            self._state, self._reason = WAITING, "written a moment ago, waiting before the next write"
        return max(0.0, paced_s - now_s, self._held_until_s - now_s)

    def wrote(self, now_s: float) -> None:
        """Record that a batch was written completely."""
        again = self.pool == self._written and now_s - self._wrote_s < 2 * self._pace.most_s
        self._repeats = self._repeats + 1 if again else 0
        self._written, self._wrote_s = self.pool, now_s
        self._spend(now_s)
        self._refusals = self._doubts = 0
        self._written_of = None
        beyond = self._repeats - self._pace.free_repeats
        if beyond >= 0:
            self._hold(now_s, beyond + 1, self._pace.batch_s, "it is changed back or taken away after each write")
        if beyond == 0:
            log.warning("pool-contested", pool=self.name, writes=self._repeats + 1)

    def missed(self, now_s: float) -> None:
        """Record that the plan was out of date when it was written. The attempt counts towards the pace like a
        write."""
        self._spend(now_s)

    def doubts(self, now_s: float, error: PeerError) -> bool:
        """Return whether to list again before a 403 for a slice that was stored counts as a refusal.

        With the credentials of a kubelet, a slice that was just deleted is forbidden instead of not found, and one that
        was just created is forbidden until the server's node authorizer has seen it (plugin/pkg/auth/authorizer/node,
        Kubernetes 1.34 to 1.37).
        """
        if self._doubts >= self._pace.most_doubts:
            return False
        self._hold(now_s, self._doubts, self._pace.doubt_s, str(error))
        self._doubts += 1
        return True

    def refused(self, now_s: float, error: PeerError) -> float:
        """Record a refusal that will not clear soon; return after how many seconds to retry."""
        if not self._refusals or self._why_held != str(error):
            log.warning("pool-refused", pool=self.name, error=str(error))
        self._spend(now_s)
        self._hold(now_s, self._refusals, self._pace.refused_s, str(error))
        self._held_until_s = max(self._held_until_s, now_s + retry_after_s(error))
        self._refusals += 1
        return self.wait_s(now_s)

    def standing(self, stored: Mapping[str, Object]) -> PoolStanding:
        """Return the status of the pool, given the stored slices."""
        found = [one["spec"] for one in self._own(stored)]
        return PoolStanding(
            kind=self.pool.kind,
            name=self.name,
            state=self._state,
            reason=self._reason,
            generation=max((one["pool"]["generation"] for one in found), default=0),
            slices=len(found),
            devices=sum(len(one.get("devices", ())) for one in found),
        )

    def _spend(self, now_s: float) -> None:
        self._free_s = max(now_s, self._free_s) + self._pace.batch_s

    def _hold(self, now_s: float, doublings: int, first_s: float, why: str) -> None:
        # The exponent is bounded: a very large one would overflow the float.
        self._held_until_s = now_s + min(first_s * 2.0 ** min(doublings, 64), self._pace.most_s)
        self._why_held = why

    def _versions(self, stored: Mapping[str, Object]) -> dict[str, str]:
        return {one["metadata"]["name"]: version(one) for one in self._own(stored)}

    def _own(self, stored: Mapping[str, Object]) -> list[Object]:
        return [one for one in stored.values() if one["spec"]["pool"]["name"] == self.name]


def retry_after_s(error: Exception) -> float:
    """Return how long the server asked to wait, in seconds, or 0 if it did not."""
    return error.retry_after_s if isinstance(error, PeerError) else 0.0


def uid(one: Object) -> str:
    """Return metadata.uid of an object."""
    return str(one["metadata"].get("uid", ""))


def version(one: Object) -> str:
    """Return metadata.resourceVersion of an object."""
    return str(one["metadata"].get("resourceVersion", ""))


def _sound(pool: Pool, owner: Owner, sound: frozenset[str]) -> tuple[Pool, tuple[Broken, ...]]:
    """Return the pool without the devices that break a rule, and all broken rules. `sound` is passed to `check`."""
    broken = check(render(pool, owner, 1), sound)
    bad = {one.device for one in broken if one.device}
    if not bad:
        return pool, tuple(broken)
    rest = replace(pool, devices=tuple(one for one in pool.devices if one.name not in bad))
    return rest, (*(one for one in broken if one.device), *check(render(rest, owner, 1), sound))
