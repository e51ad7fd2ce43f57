"""Drift from the desired state, by cgroup: how often it was found, what is not repaired yet, and which containers ran
elsewhere before they were first confined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.host.cgroup.enforcer import Target
from nodeagent.host.cgroup.read import CgroupState
from nodeagent.host.cgroup.write import Drift
from nodeagent.telemetry import metrics


class Elsewhere(msgspec.Struct, frozen=True, kw_only=True):
    """A container that ran on other CPUs or NUMA nodes than desired."""

    file: str
    """cpuset.cpus.effective or cpuset.mems.effective."""
    found: str
    wanted: str
    until_unix_s: float | None = None
    """When it was corrected, or None if it still runs there."""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Drift found in some cgroups."""

    found: int = 0
    open: int = 0
    """How many of them are not repaired yet."""
    elsewhere: Elsewhere | None = None

    @property
    def repaired(self) -> int:
        """Return how many were repaired."""
        return self.found - self.open


NONE = Tally()


class Drifts(msgspec.Struct):
    """Drift of the existing cgroups. `clock` returns seconds since the epoch."""

    clock: Callable[[], float] = time.time
    _tallies: dict[str, Tally] = msgspec.field(default_factory=dict)
    _noticed_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Since when cgroups that are not repaired yet are known to differ (time.monotonic)."""

    def found(self, path: str, drift: Iterable[Drift], *, repaired: bool, noticed_s: float) -> None:
        """Record that a cgroup differed from its desired state.

        repaired: a read-back has confirmed the repair. noticed_s: when the change was noticed (time.monotonic).
        """
        self._noticed_s.setdefault(path, noticed_s)
        if repaired:
            self._time_repair(path)
        self._count(path, drift, repaired=repaired)

    def _time_repair(self, path: str) -> None:
        """Record how long a cgroup has differed, if it did, now that it does no longer."""
        if (noticed_s := self._noticed_s.pop(path, None)) is not None:
            metrics.DRIFT_REPAIR_SECONDS.observe(time.monotonic() - noticed_s)

    def _count(self, path: str, drift: Iterable[Drift], *, repaired: bool) -> None:
        for one in drift:
            file = one.file.partition(" ")[0]
            metrics.DRIFT.labels(file).inc()
            if not repaired:
                metrics.DRIFT_UNREPAIRED.labels(file).inc()
        before = self.of(path)
        self._tallies[path] = replace(before, found=before.found + 1, open=before.open + (not repaired))

    def ran_elsewhere(self, path: str, drift: Drift, *, repaired: bool) -> None:
        """Record that a container or pod had run elsewhere before it was first confined."""
        self._count(path, [drift], repaired=repaired)
        until = self.clock() if repaired else None
        elsewhere = Elsewhere(file=drift.file, found=drift.found, wanted=drift.wanted, until_unix_s=until)
        self._tallies[path] = replace(self._tallies[path], elsewhere=elsewhere)

    def record_repaired(self, path: str) -> None:
        """Record that a cgroup is in its desired state, whatever was wrong before."""
        self._time_repair(path)
        before = self._tallies.get(path)
        if before is None or not before.open:
            return
        one = before.elsewhere
        if one is not None and one.until_unix_s is None:
            one = replace(one, until_unix_s=self.clock())
        self._tallies[path] = replace(before, open=0, elsewhere=one)

    def forget(self, path: str) -> None:
        """Drop a cgroup that is gone."""
        self._tallies.pop(path, None)
        self._noticed_s.pop(path, None)

    def of(self, *paths: str) -> Tally:
        """Return the combined tally of some cgroups; `elsewhere` is that of the first."""
        some = [self._tallies.get(path, NONE) for path in paths]
        return Tally(
            found=sum(one.found for one in some), open=sum(one.open for one in some), elsewhere=some[0].elsewhere
        )

    def total(self) -> Tally:
        """Return the tally of all existing cgroups."""
        every = self._tallies.values()
        return Tally(found=sum(one.found for one in every), open=sum(one.open for one in every))


def elsewhere(state: CgroupState, target: Target, *, own: bool, held: CpuSet) -> Drift | None:
    """Return where a cgroup that was never confined ran instead of where it should, or None if that does no harm.

    `own`: it is to have exclusive CPUs, so any other CPUs are wrong. `held`: the CPUs of all grants. A cgroup without
    exclusive CPUs must only stay off these; running elsewhere did no harm.
    """
    now, wanted = state.cpus_effective, target.cpus
    if wanted is not None and now is not None and now != wanted and (own or not (now - wanted).isdisjoint(held)):
        return Drift(file="cpuset.cpus.effective", found=str(now), wanted=str(wanted))
    if target.mems is not None and state.mems_effective not in (None, target.mems):
        return Drift(file="cpuset.mems.effective", found=str(state.mems_effective), wanted=str(target.mems))
    return None
