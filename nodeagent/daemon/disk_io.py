"""Wires what limits disk I/O; loads it where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report
from nodeagent.core.model.container import Container, Pod
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.daemon.paths import Paths
from nodeagent.managers import state_files
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.blockio.manager import IoManager

_SETTINGS = '"io_'
"""What the settings of a claim contain that asks for limits of I/O (core/blockio/demand.py)."""
_CLASS = "/io-class"
"""What the key of a pod's annotation contains that asks for a class (core/blockio/demand.py)."""


class DiskIo:
    """Limits of disk I/O, for claims and for containers."""

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

        def limiting() -> IoManager:
            from nodeagent.managers.blockio.manager import IoManager

            pins = pinning()
            news = Revision(pins.revision, pins.reconciler.news, pins.io_written)
            pin_of, written = pins.reconciler.pin, pins.io_written
            one = IoManager(agent, where.sysfs, where.state_dir, config, table, pin_of, news, written, report)
            one.learn(self._asking.values())
            self._asking.clear()
            return one

        def is_limited() -> bool:
            return config().pinning.io is not None or (where.state_dir / state_files.IO).exists()

        self._table = table
        self._asking: dict[str, Pod] = {}
        """Pods that ask for a class, by UID, while nothing is limited: a reload may begin to."""
        self.manager = OnDemand("io", limiting, is_limited, agent.revisions.ledger)

    def document(self) -> dict[str, Any]:
        """Return the limits, in plain types; empty if there are none."""
        return self.manager.document()

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Return, by UID, why the limits of a claim cannot be set."""
        return await self.manager.load().prepare(claims) if _concerned(claims) else {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Do nothing: limits end with the control groups of the claim's containers, or in a round."""
        return {}

    async def created(self, pod: Pod, container: Container, grants: Sequence[str]) -> str:
        """Return why a container that is about to be created cannot have its limits, or ""."""
        if (one := self.manager.loaded) is not None:
            return await one.created(pod, container, grants)
        if _asks(pod):
            live = {entry.container.pod_uid for entry in self._table.entries.values()}
            self._asking = {uid: other for uid, other in self._asking.items() if uid in live} | {pod.uid: pod}
        return ""

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str]) -> str:
        """Put the limits of a container that does not run yet in force. Return why they are not, or ""."""
        one = self.manager.loaded
        return await one.starting(container, cgroup, grants) if one is not None else ""

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        if (one := self.manager.loaded) is not None:
            one.learn(pods)
        else:
            self._asking = {pod.uid: pod for pod in pods if _asks(pod)}


def _asks(pod: Pod) -> bool:
    return any(_CLASS in key for key in pod.annotations)


def _concerned(claims: Mapping[str, Sequence[Grant]]) -> bool:
    every = (one for grants in claims.values() for one in grants if one.holder.api == CLAIM)
    return any(_SETTINGS in one.settings for one in every)
