"""One round over resctrl: read it, plan, carry the plan out, put tasks where they belong, read what was counted. All of
it blocks, in one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.config.isolation import ResctrlClassConfig, ResctrlConfig
from nodeagent.core.model.grant import Grant
from nodeagent.core.resctrl.demand import class_group, cpus_of, partitions
from nodeagent.core.resctrl.model import Partition, SharedClass, Tree
from nodeagent.core.resctrl.plan import ResctrlPlan, plan
from nodeagent.errors import HostError
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.resctrl.keeper import GroupKeeper, KeptGroups
from nodeagent.host.resctrl.monitor import measured
from nodeagent.host.resctrl.read import l3_domains, read, unmounted
from nodeagent.host.resctrl.tasks import TaskMover
from nodeagent.host.sysfs.sysfs import SysFs

_FLAGS = frozenset({"cat_l3", "cat_l2", "mba"})
"""What the runtime looks for in /proc/cpuinfo before it takes a class (runc, libcontainer/intelrdt)."""


class ResctrlReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one round."""

    tree: Tree = msgspec.field(default_factory=Tree)
    plan: ResctrlPlan = msgspec.field(default_factory=ResctrlPlan)
    kept: KeptGroups = msgspec.field(default_factory=KeptGroups)
    claims: Mapping[str, Partition] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What claims have for themselves, by group."""
    moved: int = 0
    """Tasks that were in another group than their container's."""
    astray: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why tasks of a container are not in its group, by the container's cgroup."""
    counted: Mapping[str, Mapping[tuple[str, int], int]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Bytes by (event, L3 cache), by group."""
    error: str = ""
    """Why the round was not completed."""

    def why(self, group: str) -> str:
        """Return why a group is not as it should be, or ""."""
        if group in self.kept.made:
            return ""
        return self.kept.errors.get(group) or self.plan.errors.get(group) or self.error or "it is not made yet"

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is not as configured, one sentence each."""
        errors = [why for group, why in self.kept.errors.items() if group not in self.claims]
        known = self.kept.errors
        claims = [f"{one.holder}: {known[name]}" for name, one in self.claims.items() if name in known]
        first = [self.error] if self.error else []
        found = [*first, *self.plan.notes, *errors, *claims, *self.astray.values(), *self.kept.notes]
        return tuple(dict.fromkeys(found))


class ResctrlRounds:
    """Does rounds. Building it reads nothing."""

    def __init__(self, sysfs: SysFs, memory: Path) -> None:
        """memory: the record of what was done."""
        self._sysfs = sysfs
        self._keeper = GroupKeeper(sysfs, memory)
        self._domains: dict[int, int] = {}
        """The L3 cache of each CPU; those of CPUs that went offline too."""
        self._mover: TaskMover | None = None
        self._runtime: bool | None = None

    def keep(
        self,
        config: ResctrlConfig | None,
        grants: Sequence[Grant],
        containers: Mapping[str, str],
        *,
        ended: bool,
    ) -> ResctrlReport:
        """Do one round.

        config: None if nothing is to be divided any longer. containers: the group of each container that has one, by
        its cgroup. ended: whether groups of claims that the ledger does not have may be removed.
        """
        held = self._keeper.held()
        if config is None and not (held.groups or held.root or held.aside):
            return ResctrlReport()
        try:
            claims = self._claims(grants) if config is not None else []
            by_group = MappingProxyType({one.group: one for one in claims})
        except HostError as error:
            return ResctrlReport(error=str(error))
        if why := unmounted(self._sysfs):
            if config is None:  # without it there are no groups, and the default one has everything
                self._keeper.forget()
                return ResctrlReport()
            return ResctrlReport(claims=by_group, error=f"cannot divide caches: {why}")
        planned, kept = ResctrlPlan(), KeptGroups()
        try:
            tree = read(self._sysfs)
            classes = [shared_class(one) for one in config.classes] if config is not None else []
            ways = config.exclusive_ways if config is not None else 0
            planned = plan(tree, held, ways, classes, claims)
            kept = self._keeper.keep(tree, planned, ended=ended)
        except HostError as error:
            return ResctrlReport(plan=planned, claims=by_group, error=str(error))
        moved, astray = self._assign({path: one for path, one in containers.items() if one in kept.made})
        counted = {name: dict(measured(self._sysfs, name)) for name in sorted(kept.made)} if tree.rmids else {}
        return ResctrlReport(
            tree=tree, plan=planned, kept=kept, claims=by_group, moved=moved, astray=astray, counted=counted
        )

    def assign(self, group: str, cgroup: str) -> int:
        """Put all tasks of a container into a group. Return how many were in another. Raise HostError."""
        if self._mover is None:
            found = hierarchy(self._sysfs)
            if found.unsupported:
                raise HostError(f"cannot see the tasks of containers: {found.unsupported}")
            self._mover = TaskMover(self._sysfs, found.mount)
        return self._mover.assign(group, cgroup)

    def runtime_takes_classes(self) -> bool:
        """Return whether the runtime can be expected to put a container into a class: it refuses to create one on
        processors without these flags, such as Arm's."""
        if self._runtime is None:
            lines = self._sysfs.text("proc/cpuinfo", "").splitlines()
            flags = next((line for line in lines if line.startswith("flags")), "")
            self._runtime = bool(_FLAGS & set(flags.split()))
        return self._runtime

    def _claims(self, grants: Sequence[Grant]) -> list[Partition]:
        cpus = cpus_of(grants)
        self._domains |= l3_domains(self._sysfs, [one for one in cpus if one not in self._domains])
        return partitions(grants, self._domains)

    def _assign(self, containers: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        moved, astray = 0, dict[str, str]()
        for cgroup, group in containers.items():
            try:
                moved += self.assign(group, cgroup)
            except HostError as error:
                astray[cgroup] = str(error)
        return moved, astray


def shared_class(config: ResctrlClassConfig) -> SharedClass:
    """Return a configured class as a core value."""
    return SharedClass(
        group=class_group(config.name),
        name=config.name,
        masks=MappingProxyType({key: int(one, 16) for key, one in config.caches.items() if isinstance(one, str)}),
        ways=MappingProxyType({key: one for key, one in config.caches.items() if isinstance(one, int)}),
        percent=config.memory_bandwidth_percent,
        mbps=config.memory_bandwidth_mbps,
    )


def class_names(config: ResctrlConfig | None) -> Iterable[str]:
    """Return the names of all configured classes."""
    return () if config is None else [one.name for one in config.classes]
