"""Wires what the kernel divides among containers besides CPUs and memory: caches with memory bandwidth, disk I/O, and
utilization clamps. Each is loaded where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report
from nodeagent.core.model.container import Container, Pod
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.daemon.paths import Paths
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.pinning.cache_groups import CacheAnswer, deadline_s, left_s
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.blockio.manager import IoManager
    from nodeagent.managers.cgroup_limits import Followed
    from nodeagent.managers.resctrl.manager import ResctrlManager
    from nodeagent.managers.uclamp.manager import UclampManager

M = TypeVar("M", "ResctrlManager", "IoManager", "UclampManager")


class Part(Generic[M]):
    """One of them, for claims and for containers."""

    def __init__(
        self,
        name: str,
        build: Callable[[], M],
        needed: Callable[[], bool],
        agent: Agent,
        table: ContainerTable,
        *,
        settings: Sequence[str],
        annotation: str,
    ) -> None:
        """For the first three, see OnDemand. settings: what the settings of a claim contain that asks for something.
        annotation: what the key of a pod's annotation contains that names a class."""

        def built() -> M:
            one = build()
            one.learn(self._asking.values())
            self._asking.clear()
            return one

        def is_needed() -> bool:
            """A claim that was prepared by an earlier run asks for it when its containers start."""
            grants = agent.ledger.grants.values()
            return needed() or any(map(self._asked_by, grants))

        self.manager: OnDemand[M] = OnDemand(name, built, is_needed, agent.revisions.ledger)
        self._table = table
        self._settings = settings
        self._annotation = annotation
        self._asking: dict[str, Pod] = {}
        """Pods that name a class, by UID, while nothing is divided: a reload may begin to."""

    def document(self) -> dict[str, Any]:
        """Return what is divided, in plain types; empty if nothing is."""
        return self.manager.document()

    # ---------------------------------------------------------------- for claims

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Give claims their part. Return errors by UID."""
        return await self.manager.load().prepare(claims) if self._concerned(claims) else {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Take it back. Return errors by UID."""
        one = self.manager.if_needed() if self._concerned(claims) else None
        return await one.release(claims) if one is not None else {}

    def _concerned(self, claims: Mapping[str, Sequence[Grant]]) -> bool:
        return any(self._asked_by(one) for grants in claims.values() for one in grants)

    def _asked_by(self, grant: Grant) -> bool:
        return grant.holder.api == CLAIM and any(word in grant.settings for word in self._settings)

    # ---------------------------------------------------------------- for containers

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        """Return what a container gets that is about to be created, and why it cannot have it."""
        if (one := self.manager.if_needed()) is not None:
            return await one.created(pod, container, grants, within_s)
        if self._asks(pod):
            live = {entry.container.pod_uid for entry in self._table.entries.values()}
            self._asking = {uid: other for uid, other in self._asking.items() if uid in live} | {pod.uid: pod}
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put it in force for a container that does not run yet. Return why it is not, or ""."""
        one = self.manager.if_needed()
        return await one.starting(container, cgroup, grants, within_s) if one is not None else ""

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        if (one := self.manager.loaded) is not None:
            one.learn(pods)
        else:
            self._asking = {pod.uid: pod for pod in pods if self._asks(pod)}

    def _asks(self, pod: Pod) -> bool:
        return any(self._annotation in key for key in pod.annotations)


def caches(
    agent: Agent,
    where: Paths,
    config: Callable[[], Config],
    table: ContainerTable,
    pinning: Callable[[], PinningManager],
) -> Part[ResctrlManager]:
    """Return cache ways and memory bandwidth; what asks for them: core/resctrl/demand.py. `pinning` knows what
    containers hold; it is asked for once everything is built."""

    def build() -> ResctrlManager:
        from nodeagent.managers.resctrl.manager import ResctrlManager

        pins = pinning()
        news = Revision(pins.revision, pins.reconciler.news)

        def grants_of(id: str) -> Sequence[str]:
            return pins.reconciler.pin(id).grants

        return ResctrlManager(agent, where.sysfs, where.state_dir, config, table, grants_of, news)

    def is_needed() -> bool:
        return config().pinning.resctrl is not None or (where.state_dir / state_files.RESCTRL).exists()

    settings = ('"cache_', '"memory_bandwidth_')
    return Part("resctrl", build, is_needed, agent, table, settings=settings, annotation="/cache-class")


def disk_io(
    agent: Agent,
    where: Paths,
    config: Callable[[], Config],
    table: ContainerTable,
    pinning: Callable[[], PinningManager],
    report: Report,
) -> Part[IoManager]:
    """Return limits of disk I/O; what asks for them: core/blockio/demand.py. For `pinning`, see caches()."""

    def build() -> IoManager:
        from nodeagent.managers.blockio.manager import IoManager

        return IoManager(where.sysfs, where.state_dir, _followed(agent, config, table, pinning(), report))

    def is_needed() -> bool:
        return config().pinning.io is not None or (where.state_dir / state_files.IO).exists()

    return Part("io", build, is_needed, agent, table, settings=('"io_',), annotation="/io-class")


def uclamp(
    agent: Agent,
    where: Paths,
    config: Callable[[], Config],
    table: ContainerTable,
    pinning: Callable[[], PinningManager],
    report: Report,
) -> Part[UclampManager]:
    """Return utilization clamps; what asks for them: core/uclamp/demand.py. For `pinning`, see caches()."""

    def build() -> UclampManager:
        from nodeagent.managers.uclamp.manager import UclampManager

        return UclampManager(where.sysfs, where.state_dir, _followed(agent, config, table, pinning(), report))

    def is_needed() -> bool:
        return config().pinning.uclamp is not None or (where.state_dir / state_files.UCLAMP).exists()

    return Part("uclamp", build, is_needed, agent, table, settings=('"uclamp_',), annotation="/uclamp-class")


def _followed(
    agent: Agent, config: Callable[[], Config], table: ContainerTable, pins: PinningManager, report: Report
) -> Followed:
    """Return what limits of control groups follow."""
    from nodeagent.managers.cgroup_limits import Followed

    written = pins.limits_written
    news = Revision(pins.revision, pins.reconciler.news, written)
    pin_of = pins.reconciler.pin
    return Followed(agent=agent, config=config, table=table, pin_of=pin_of, news=news, written=written, report=report)


class Divided:
    """All of them, as pinning asks for them."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        table: ContainerTable,
        pinning: Callable[[], PinningManager],
        report: Report,
    ) -> None:
        """For `pinning`, see caches()."""
        self._caches = caches(agent, where, config, table, pinning)
        self._io = disk_io(agent, where, config, table, pinning, report)
        self._uclamp = uclamp(agent, where, config, table, pinning, report)
        self._parts = self._caches, self._io, self._uclamp

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order."""
        return self._caches.manager, self._io.manager, self._uclamp.manager

    def document(self) -> dict[str, Any]:
        """Return what is divided, in plain types."""
        return {
            "caches": self._caches.document(),
            "io": self._io.document(),
            "uclamp": self._uclamp.document(),
        }

    def with_parts(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with caches, I/O and clamps after what is shared."""
        every = _Both(_Both(_Both(sharing, self._caches), self._io), self._uclamp)
        return every, instances, passthrough

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        """Return the cache group of a container that is about to be created, and why it cannot have it, its limits of
        I/O or its clamp."""
        until_s = deadline_s(within_s)
        answers = [await one.created(pod, container, grants, left_s(until_s)) for one in self._parts]
        return CacheAnswer(group=answers[0].group, error="; ".join(one.error for one in answers if one.error))

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put a container that does not run yet into its cache group, and its limits of I/O and its clamp in force.
        Return why something is not, or ""."""
        until_s = deadline_s(within_s)
        found = [await one.starting(container, cgroup, grants, left_s(until_s)) for one in self._parts]
        return "; ".join(why for why in found if why)

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        every = list(pods)
        for one in self._parts:
            one.learn(every)


class _Both:
    """Prepares claims with two, one after the other."""

    def __init__(self, first: Sharing, second: Sharing) -> None:
        self._first, self._second = first, second

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        errors = await self._first.prepare(claims)
        left = {uid: grants for uid, grants in claims.items() if uid not in errors}
        return {**errors, **await self._second.prepare(left)}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        return {**await self._first.release(claims), **await self._second.release(claims)}
