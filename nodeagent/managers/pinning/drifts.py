"""What was found otherwise than it is to be, by control group: how often, what of it could not be put right yet, and
which containers had run elsewhere before they were confined for the first time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.host.cgroup.enforcer import Target
from nodeagent.host.cgroup.read import CgroupState
from nodeagent.host.cgroup.write import Drift
from nodeagent.telemetry import metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """A container that ran elsewhere than it was to."""

    file: str
    """cpuset.cpus.effective or cpuset.mems.effective."""
    found: str
    wanted: str
    until_unix_s: float | None = None
    """When it was put right; None: it still runs there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What was found of some control groups."""

    found: int = 0
    open: int = 0
    """Those among them that could not be put right yet."""
    elsewhere: Elsewhere | None = None

    @property
    def repaired(self) -> int:
        """Return how many were put right."""
        return self.found - self.open


NONE = Tally()


@dataclass(slots=True)
class Drifts:
    """Of the control groups that are there. clock: in seconds since the epoch."""

    clock: Callable[[], float] = time.time
    _tallies: dict[str, Tally] = field(default_factory=dict)

    def found(self, path: str, drift: Iterable[Drift], *, repaired: bool) -> None:
        """A control group was not what it is to be. repaired: it is now, as was read back."""
        for one in drift:
            file = one.file.partition(" ")[0]
            metrics.DRIFT.labels(file).inc()
            if not repaired:
                metrics.DRIFT_UNREPAIRED.labels(file).inc()
        before = self.of(path)
        self._tallies[path] = replace(before, found=before.found + 1, open=before.open + (not repaired))

    def ran_elsewhere(self, path: str, drift: Drift, *, repaired: bool) -> None:
        """A container, or a pod, had run elsewhere before it was confined for the first time."""
        self.found(path, [drift], repaired=repaired)
        until = self.clock() if repaired else None
        elsewhere = Elsewhere(file=drift.file, found=drift.found, wanted=drift.wanted, until_unix_s=until)
        self._tallies[path] = replace(self._tallies[path], elsewhere=elsewhere)

    def put_right(self, path: str) -> None:
        """A control group is what it is to be, whatever was wrong before."""
        before = self._tallies.get(path)
        if before is None or not before.open:
            return
        one = before.elsewhere
        if one is not None and one.until_unix_s is None:
            one = replace(one, until_unix_s=self.clock())
        self._tallies[path] = replace(before, open=0, elsewhere=one)

    def forget(self, path: str) -> None:
        """A control group is gone."""
        self._tallies.pop(path, None)

    def of(self, *paths: str) -> Tally:
        """What was found of some control groups together; what ran elsewhere is of the first."""
        some = [self._tallies.get(path, NONE) for path in paths]
        return Tally(
            found=sum(one.found for one in some), open=sum(one.open for one in some), elsewhere=some[0].elsewhere
        )

    def total(self) -> Tally:
        """Of all that are there."""
        every = self._tallies.values()
        return Tally(found=sum(one.found for one in every), open=sum(one.open for one in every))


def elsewhere(state: CgroupState, target: Target, *, own: bool, held: CpuSet) -> Drift | None:
    """Where a control group that was never confined before had its processes instead of where they are to be; None
    where nothing is wrong with that. own: whether it is to be on CPUs of its own: then on no other ones. held: the CPUs
    that anybody holds: all others are to be off these, and whatever else they ran on did no harm."""
    now, wanted = state.cpus_effective, target.cpus
    if wanted is not None and now is not None and now != wanted and (own or not (now - wanted).isdisjoint(held)):
        return Drift(file="cpuset.cpus.effective", found=str(now), wanted=str(wanted))
    if target.mems is not None and state.mems_effective not in (None, target.mems):
        return Drift(file="cpuset.mems.effective", found=str(state.mems_effective), wanted=str(target.mems))
    return None
