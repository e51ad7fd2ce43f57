"""Wires what divides caches and memory bandwidth; loads it where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.model.container import Container, Pod
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.daemon.paths import Paths
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.pinning.cache_groups import CacheAnswer
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.resctrl.manager import ResctrlManager

_SETTINGS = '"cache_', '"memory_bandwidth_'
"""What the settings of a claim contain that asks for something of caches (core/resctrl/demand.py)."""

_CLASS = "/cache-class"
"""What the key of a pod's annotation contains that asks for a class (core/resctrl/demand.py)."""


class Caches:
    """Cache ways and memory bandwidth, for claims and for containers."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        table: ContainerTable,
        pinning: Callable[[], PinningManager],
    ) -> None:
        """`pinning` knows what containers hold; it is asked for once everything is built."""

        def resctrl() -> ResctrlManager:
            from nodeagent.managers.resctrl.manager import ResctrlManager

            pins = pinning()
            news = Revision(pins.revision, pins.reconciler.news)

            def grants_of(id: str) -> Sequence[str]:
                return pins.reconciler.pin(id).grants

            one = ResctrlManager(agent, where.sysfs, where.state_dir, config, table, grants_of, news)
            one.learn(self._asking.values())
            self._asking.clear()
            return one

        def is_divided() -> bool:
            return config().pinning.resctrl is not None or (where.state_dir / state_files.RESCTRL).exists()

        self._table = table
        self._asking: dict[str, Pod] = {}
        """Pods that ask for a class, by UID, while caches are not divided: a reload may begin to."""
        self.manager = OnDemand("resctrl", resctrl, is_divided, agent.revisions.ledger)

    def document(self) -> dict[str, Any]:
        """Return the groups, in plain types; empty if there are none."""
        return self.manager.document()

    # ---------------------------------------------------------------- for claims

    def with_caches(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with caches after what is shared."""
        return Both(sharing, self), instances, passthrough

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Make the groups of claims. Return errors by UID."""
        return await self.manager.load().prepare(claims) if _concerned(claims) else {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Remove the groups of claims. Return errors by UID."""
        return await self.manager.load().release(claims) if _concerned(claims) else {}

    # ---------------------------------------------------------------- for containers

    async def created(self, pod: Pod, container: Container, grants: Sequence[str]) -> CacheAnswer:
        """Return the group of a container that is about to be created."""
        if (one := self.manager.loaded) is not None:
            return await one.created(pod, container, grants)
        if _asks(pod):
            live = {entry.container.pod_uid for entry in self._table.entries.values()}
            self._asking = {uid: other for uid, other in self._asking.items() if uid in live} | {pod.uid: pod}
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str]) -> str:
        """Put a container that does not run yet into its group. Return why it is not in it, or ""."""
        one = self.manager.loaded
        return await one.starting(container, cgroup, grants) if one is not None else ""

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        if (one := self.manager.loaded) is not None:
            one.learn(pods)
        else:
            self._asking = {pod.uid: pod for pod in pods if _asks(pod)}


class Both:
    """Prepares claims with two, one after the other."""

    def __init__(self, first: Sharing, second: Sharing) -> None:
        self._first, self._second = first, second

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        errors = await self._first.prepare(claims)
        left = {uid: grants for uid, grants in claims.items() if uid not in errors}
        return {**errors, **await self._second.prepare(left)}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        return {**await self._first.release(claims), **await self._second.release(claims)}


def _asks(pod: Pod) -> bool:
    return any(_CLASS in key for key in pod.annotations)


def _concerned(claims: Mapping[str, Sequence[Grant]]) -> bool:
    every = (one for grants in claims.values() for one in grants if one.holder.api == CLAIM)
    return any(word in one.settings for one in every for word in _SETTINGS)
