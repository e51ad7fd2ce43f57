"""The configured resources, each kept registered with kubelet, except those that kubelet or another device plugin
manages; and whether kubelet shows what was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import cancel_all, supervise
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report, unreported
from nodeagent.core.ledger.release import Patience
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import PeerError
from nodeagent.host.devices import all_kinds
from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.kube.kubelet.pod_resources import PodResources
from nodeagent.kube.kubelet.registration import Registrar, Registration, RegistrationState, RegistrationTiming
from nodeagent.managers.deviceplugin.adapter import OfferAdapter
from nodeagent.managers.deviceplugin.shown import ShownCheck
from nodeagent.managers.kubelet import Kubelet
from nodeagent.managers.kubelet_conflicts import reserved_cpus
from nodeagent.managers.manager import Followed, Manager, nothing_follows
from nodeagent.resources.offer import Offer, misspelt, offers
from nodeagent.state.agent import Agent
from nodeagent.state.values import AgentSettings

PLUGINS = "device-plugins"
"""In kubelet's folder."""
PACE = RegistrationTiming(poll_s=15.0)
"""Changes are detected by the folder watch; frequent polling would cost every idle node."""
READ_BACK_LIMIT_S = 2.0
log = structlog.get_logger()


class _One(msgspec.Struct, frozen=True):
    """One offer, and the task that keeps it registered."""

    offer: Offer
    adapter: OfferAdapter
    registrar: Registrar
    task: asyncio.Task[None]


class DevicePluginManager(Manager):
    """Serves resources to kubelet, only on the leading agent."""

    name = "device plugin"

    def __init__(
        self,
        agent: Agent,
        kubelet_dir: Path,
        families: Sequence[all_kinds.Kind],
        refused: Callable[[Config], Mapping[str, str]],
        leads: Callable[[], bool],
        report: Report = unreported,
        granted: Followed = nothing_follows,
    ) -> None:
        """Set up without serving. `granted` is called after each allocation, before kubelet is answered.

        `refused` returns the resources of a configuration that cannot be served alongside kubelet's own managers and
        other device plugins, with the reason. `leads` returns whether this agent leads.
        """
        self._leads = leads
        self._report = report
        self._granted = granted
        self.refused: Mapping[str, str] = MappingProxyType({})
        """Configured resources that are not served, with the reason."""
        self.revision = Revision()
        """Increases whenever a resource's registration status changes."""
        self._agent = agent
        self._kubelet_dir = kubelet_dir
        self._families = families
        self._refused = refused
        self._now: Mapping[str, _One] = MappingProxyType({})
        self._shown = ShownCheck()

    def offers(self) -> tuple[Offer, ...]:
        """Return what is served, in the order of the configuration."""
        return tuple(one.offer for one in self._now.values())

    def registrations(self) -> tuple[Registration, ...]:
        """Return the registration status of each resource, in the same order."""
        return tuple(found for one in self._now.values() for found in one.registrar.registrations())

    async def apply(self, config: Config) -> None:
        """Serve what is configured: stop removed resources, start new ones, leave unchanged ones alone."""
        if not self._leads():
            return
        wanted = {offer.name: offer for offer in self._admissible(config)}
        kept_on = {name: one for name, one in self._now.items() if wanted.get(name) == one.offer}
        # Kubelet up to 1.36 ends a resource's new registration when its old stream ends, so end that first.
        await cancel_all(one.task for name, one in self._now.items() if name not in kept_on)
        for name, one in kept_on.items():
            one.adapter.take(wanted[name])
        self._now = MappingProxyType({name: kept_on.get(name) or self._begin(offer) for name, offer in wanted.items()})
        self.revision.bump()

    async def withdraw(self) -> None:
        """Stop everything and remove the sockets."""
        await cancel_all(one.task for one in self._now.values())
        self._now = MappingProxyType({})

    def _begin(self, offer: Offer) -> _One:
        adapter = OfferAdapter(self._agent, offer, self._report, self._granted)
        registrar = Registrar([adapter], self._kubelet_dir / PLUGINS, pace=PACE)
        task = asyncio.create_task(supervise(offer.name, lambda: self._run(registrar)), name=offer.name)
        return _One(offer, adapter, registrar, task)

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
        """Return the configured offers without those that cannot be served here."""
        # Settings for DRA do not concern device plugins: their sockets stay as they are.
        found = [one.by_device_plugin_alone() for one in offers(config, self._families) if one.by_device_plugin]
        reasons = self._refused(config)
        refused = {one.name: reasons[one.config.name] for one in found if one.config.name in reasons}
        if refused != self.refused:
            for name, reason in refused.items():
                log.warning("resource-refused", resource=name, reason=reason)
        self.refused = MappingProxyType(refused)
        return [one for one in found if one.name not in refused]

    # ---------------------------------------------------------------- what kubelet shows

    def not_ready(self) -> list[str]:
        """Return why kubelet does not show what was sent, one sentence per resource; empty if it does."""
        reasons = [_standing(one) for one in self.registrations() if not one.ready]
        return reasons or [f"{name}: kubelet does not show what was sent" for name in self._shown.unshown]

    def notes(self) -> list[str]:
        """Return the keys of the configuration that no device of this machine has."""
        return list(misspelt(self.offers(), self._agent.inventory))

    @property
    def awaited(self) -> bool:
        """Return whether kubelet is still to show something that was sent."""
        return bool(self._shown.differing)

    def _sent(self) -> set[tuple[str, str]]:
        every = ((offer, one) for offer in self.offers() for one in self._agent.advertised(offer.resource))
        return {(offer.name, one.id) for offer, one in every if one.healthy}

    async def read_back(self, pods: PodResources) -> Mapping[str, Sequence[str]] | None:
        """Ask kubelet what it counts as allocatable, of all plugins, and return it; None if kubelet does not answer,
        which is not reported as a failure."""
        before = self._sent()
        try:
            shown = await pods.allocatable(READ_BACK_LIMIT_S)
        except PeerError:
            self._shown.forget()
            return None
        pairs = {(name, one) for name, ids in shown.items() for one in ids}
        self._shown.compare(self._now.keys(), before, self._sent(), pairs)
        return shown


def _standing(one: Registration) -> str:
    reason = one.reason or (
        "registered, and kubelet does not watch it" if one.state == RegistrationState.REGISTERED else one.state
    )
    return f"{one.resource}: {reason}"


def check(config: Config, families: Sequence[all_kinds.Kind], kubelet_dir: Path) -> None:
    """Raise ConfigError if a resource has an unknown kind or option, or its socket path would be too long."""
    for offer in offers(config, families):
        if offer.by_device_plugin:
            PluginPaths(kubelet_dir / PLUGINS, offer.name)


def settings(config: Config, kubelet: Kubelet, boot_id: str, inventory: Inventory) -> AgentSettings:
    """Return the agent's settings that follow from the configuration, kubelet and the inventory."""
    return AgentSettings(
        boot_id=boot_id,
        reserved=reserved_cpus(config, kubelet, inventory),
        patience=Patience(
            unconfirmed_s=config.release.unconfirmed_seconds,
            confirmed_s=config.release.confirmed_seconds,
            unobserved_s=config.release.unobserved_seconds,
        ),
        recover_s=config.health.recover_seconds,
    )
