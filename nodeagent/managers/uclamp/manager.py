"""Keeps utilization clamps as the ledger, `pinning.uclamp` and pods' annotations say: values in the cpu.uclamp files of
containers that hold exclusive CPUs, and of the cgroups above them.

When they are written, repaired and taken out: `managers/cgroup_limits.py`. A clamp makes CPUs faster or slower and
keeps nothing from others, so no claim is refused and no container is kept from starting because it cannot be set: the
log and the status name the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from nodeagent.core.model.container import Container
from nodeagent.core.model.grant import Grant
from nodeagent.core.pinning.plan import Pin
from nodeagent.core.uclamp.clamps import NO_CLAMP, Clamp
from nodeagent.core.uclamp.demand import Classes, clamp_of, clamp_of_claims, concerned
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.cgroup_limits import CgroupLimits, Followed, LimitsReport, Wanted
from nodeagent.managers.pinning.containers import ContainerEntry
from nodeagent.managers.state_files import UCLAMP
from nodeagent.managers.uclamp.rounds import UclampRounds, classes_of

MOST_SAID = 3
"""Maximum number of containers named in a note."""
log = structlog.get_logger()


class UclampManager(CgroupLimits[Clamp]):
    """Keeps utilization clamps. Building one starts nothing and reads nothing."""

    name = "uclamp"
    key = "pinning.uclamp"
    act, act_its = "clamp utilization", "clamp its utilization"
    done, not_done = "utilization-clamped", "utilization-not-clamped"
    lock = "uclamp.lock"

    def __init__(self, sysfs: SysFs, state_dir: Path, followed: Followed) -> None:
        super().__init__(state_dir, followed)
        self._rounds = UclampRounds(sysfs, followed.table.layouts, state_dir / UCLAMP)
        self._warned: set[str] = set()
        """UIDs of claims of which it was logged that they cannot have their clamp."""

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put the clamp of a container that does not run yet in force. It starts in any case."""
        if why := await super().starting(container, cgroup, grants, within_s):
            log.warning("started-unclamped", container=str(container), error=why)
        return ""

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        self._warned -= claims.keys()
        return await super().release(claims)

    def _asks(self, container: Container, grants: Iterable[str]) -> tuple[Clamp, ...]:
        annotations, domain = self._annotations_of(container), self._config().domain
        found = clamp_of(self._grants(grants), annotations, domain, container.name, self._classes())
        return () if found == NO_CLAMP else (found,)

    def _concerned(self, grant: Grant) -> bool:
        return concerned(grant)

    async def _unavailable(self, grants: Sequence[Grant]) -> str:
        """Log once for each claim what the machine cannot do. An unknown class alone refuses it."""
        clamp_of_claims(grants, self._classes())
        uid = grants[0].holder.uid
        try:
            why = "" if uid in self._warned else await asyncio.to_thread(self._rounds.unavailable)
        except HostError as error:
            why = str(error)
        if why:
            self._warned.add(uid)
            log.warning(self.not_done, claim=str(grants[0].holder), error=why)
        return ""

    def _is_configured(self) -> bool:
        return self._config().pinning.uclamp is not None

    def _classes(self) -> Classes | None:
        return classes_of(self._config().pinning.uclamp)

    def _is_known(self, entry: ContainerEntry, pin: Pin) -> bool:
        """Return whether it is known what a container asks for: what its claims say comes before annotations, and
        without NRI these are never seen."""
        if self._config().pinning.mode == "cgroup" or any(map(concerned, self._grants(pin.grants))):
            return entry.named and not pin.unproven
        return super()._is_known(entry, pin)

    def _reach(self, uid: str) -> str:
        """All pods: what a cgroup above them needs follows from all."""
        return ""

    def _round(self, wanted: Wanted[Clamp], leave: Callable[[str], bool]) -> LimitsReport:
        if why := self._rounds.unavailable():
            needed = wanted.asking or self._is_configured()
            return LimitsReport(error=f"cannot {self.act}: {why}" if needed else "")
        return self._rounds.keep(wanted, leave)

    def _notes(self) -> list[str]:
        """Say once for all containers or classes why there are no clamps."""
        found = super()._notes()
        if self._found.error and self._asked is not None:
            found[0] = f"{found[0]}: {self._without(self._asked)}"
        return found

    def _without(self, asked: Wanted[Clamp]) -> str:
        """Return what has no clamp."""
        names = sorted(one.whose for one in asked.asking)
        if not names:
            return "no class has an effect"
        more = f" and {len(names) - MOST_SAID} more" if len(names) > MOST_SAID else ""
        return f"{', '.join(names[:MOST_SAID])}{more} run without"
