"""What is served: the configured resources, each kept registered with kubelet, less those that kubelet manages itself;
and whether kubelet shows what was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import structlog

from nodeagent import beside
from nodeagent.agent import Agent, Settings
from nodeagent.config import Config
from nodeagent.core.model import Inventory
from nodeagent.core.release import Patience
from nodeagent.errors import PeerError
from nodeagent.host import kinds
from nodeagent.kube.devicepluginsockets import PluginPaths
from nodeagent.kube.podresources import PodResources
from nodeagent.kube.registration import Pace, Registrar, Registration, State
from nodeagent.kube.waiting import Revision
from nodeagent.kubelet import Kubelet
from nodeagent.offer import Offer, offers
from nodeagent.parts import end, kept
from nodeagent.served import Served

PLUGINS = "device-plugins"
"""Below kubelet's folder."""
PACE = Pace(poll_s=15.0)
"""The watch of the folder is what counts; the poll below it costs every idle node."""
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _One:
    """One offer, and the task that keeps it registered."""

    offer: Offer
    registrar: Registrar
    task: asyncio.Task[None]


class Serving:
    """The resources that are served at this moment. Building it serves nothing."""

    def __init__(
        self,
        agent: Agent,
        kubelet_dir: Path,
        families: Sequence[kinds.Kind],
        managed_elsewhere: Callable[[], Mapping[str, str]],
    ) -> None:
        """managed_elsewhere: kinds that cannot be served beside kubelet's own managers, with the reason."""
        self.refused: Mapping[str, str] = MappingProxyType({})
        """Configured resources that are not served, with the reason."""
        self.revision = Revision()
        """Rises whenever a resource stands differently with kubelet."""
        self._agent = agent
        self._kubelet_dir = kubelet_dir
        self._families = families
        self._managed_elsewhere = managed_elsewhere
        self._now: Mapping[str, _One] = MappingProxyType({})
        self._shown: frozenset[tuple[str, str]] | None = None

    def offers(self) -> tuple[Offer, ...]:
        """What is served, in the order of the configuration."""
        return tuple(one.offer for one in self._now.values())

    def registrations(self) -> tuple[Registration, ...]:
        """How each resource stands with kubelet, in the same order."""
        return tuple(found for one in self._now.values() for found in one.registrar.registrations())

    async def apply(self, config: Config) -> None:
        """Serve what is configured: end what is no longer, begin what is new, leave alone what stays."""
        wanted = {offer.name: offer for offer in self._admissible(config)}
        kept_on = {name: one for name, one in self._now.items() if wanted.get(name) == one.offer}
        # Kubelet up to 1.36 ends the new registration of a resource when the stream of its old one ends: that first.
        await end(one.task for name, one in self._now.items() if name not in kept_on)
        self._now = MappingProxyType({name: kept_on.get(name) or self._begin(offer) for name, offer in wanted.items()})
        self._agent.revision.bump()
        self.revision.bump()

    async def stop(self) -> None:
        """End everything and remove the sockets."""
        await end(one.task for one in self._now.values())
        self._now = MappingProxyType({})

    def _begin(self, offer: Offer) -> _One:
        registrar = Registrar([Served(self._agent, offer)], self._kubelet_dir / PLUGINS, pace=PACE)
        task = asyncio.create_task(kept(offer.name, lambda: self._run(registrar)), name=offer.name)
        return _One(offer, registrar, task)

    async def _run(self, registrar: Registrar) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(registrar.run())
            tasks.create_task(self._relay(registrar))

    async def _relay(self, registrar: Registrar) -> None:
        seen = 0
        while True:
            seen = await registrar.changed(seen)
            self.revision.bump()

    def _admissible(self, config: Config) -> Iterable[Offer]:
        """The configured offers without those that would collide with kubelet's own managers."""
        # What else is served through DRA does not concern kubelet's device plugins: their sockets stay as they are.
        found = [one.by_device_plugin_alone() for one in offers(config, self._families) if one.by_device_plugin]
        managed = self._managed_elsewhere()
        refused = {one.name: managed[one.resource.kind] for one in found if one.resource.kind in managed}
        if refused != self.refused:
            for name, reason in refused.items():
                log.warning("resource-refused", resource=name, reason=reason)
        self.refused = MappingProxyType(refused)
        return [one for one in found if one.name not in refused]

    # ---------------------------------------------------------------- what kubelet makes of it

    def not_ready(self) -> list[str]:
        """Why kubelet does not show what was sent, one sentence a resource; none: it does."""
        reasons = [_standing(one) for one in self.registrations() if not one.ready]
        return reasons or [f"{name}: kubelet does not show what was sent" for name in self._unshown()]

    def _unshown(self) -> list[str]:
        if self._shown is None:
            return []
        sent = {(offer.name, one.id) for offer in self.offers() for one in self._agent.advertised(offer) if one.healthy}
        shown = {(name, one) for name, one in self._shown if name in self._now}
        return sorted({name for name, _ in sent ^ shown})

    async def read_back(self, pods: PodResources) -> None:
        """Ask kubelet what it counts as allocatable; a kubelet that cannot say is not held against it."""
        try:
            shown = await pods.allocatable()
        except PeerError:
            self._shown = None
        else:
            self._shown = frozenset((name, one) for name, ids in shown.items() for one in ids)


def _standing(one: Registration) -> str:
    reason = one.reason or ("registered, and kubelet does not watch it" if one.state == State.REGISTERED else one.state)
    return f"{one.resource}: {reason}"


def check(config: Config, families: Sequence[kinds.Kind], kubelet_dir: Path) -> None:
    """ConfigError where what is configured cannot be served anywhere."""
    for offer in offers(config, families):
        if offer.by_device_plugin:
            PluginPaths(kubelet_dir / PLUGINS, offer.name)


def settings(config: Config, kubelet: Kubelet, boot_id: str, inventory: Inventory) -> Settings:
    """What of the configuration the agent itself goes by."""
    return Settings(
        boot_id=boot_id,
        reserved=beside.reserved(config, kubelet, inventory),
        patience=Patience(
            unconfirmed_s=config.release.unconfirmed_seconds,
            confirmed_s=config.release.confirmed_seconds,
            unobserved_s=config.release.unobserved_seconds,
        ),
        recover_s=config.health.recover_seconds,
    )
