"""Wires what the kernel divides among containers besides CPUs and memory: caches, and disk I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report
from nodeagent.core.model.container import Container, Pod
from nodeagent.daemon.caches import Both, Caches
from nodeagent.daemon.disk_io import DiskIo
from nodeagent.daemon.paths import Paths
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.cache_groups import CacheAnswer
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.state.agent import Agent


class Divided:
    """Caches and memory bandwidth, and limits of disk I/O, as pinning asks for both."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        table: ContainerTable,
        pinning: Callable[[], PinningManager],
        report: Report,
    ) -> None:
        """`pinning` knows what containers hold; it is asked for once everything is built."""
        self._caches = Caches(agent, where, config, table, pinning)
        self._io = DiskIo(agent, where, config, table, pinning, report)

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order."""
        return self._caches.manager, self._io.manager

    def document(self) -> dict[str, Any]:
        """Return what is divided, in plain types."""
        return {"caches": self._caches.document(), "io": self._io.document()}

    def with_both(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with caches and I/O after what is shared."""
        sharing, instances, passthrough = self._caches.with_caches(sharing, instances, passthrough)
        return Both(sharing, self._io), instances, passthrough

    async def created(self, pod: Pod, container: Container, grants: Sequence[str]) -> CacheAnswer:
        """Return the cache group of a container that is about to be created, and why it cannot have it or its limits of
        I/O."""
        answer = await self._caches.created(pod, container, grants)
        why = await self._io.created(pod, container, grants)
        return CacheAnswer(group=answer.group, error="; ".join(one for one in (answer.error, why) if one))

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str]) -> str:
        """Put a container that does not run yet into its cache group, and its limits of I/O in force. Return why
        something is not, or ""."""
        found = [await one.starting(container, cgroup, grants) for one in (self._caches, self._io)]
        return "; ".join(why for why in found if why)

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        every = list(pods)
        self._caches.learn(every)
        self._io.learn(every)
