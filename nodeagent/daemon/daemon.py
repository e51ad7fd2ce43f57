"""All parts wired together. `build` reads the machine and opens the ledger but starts nothing; `run` is one TaskGroup
with one stop order: serving parts end before deciding ones, and the store closes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from nodeagent.admin.metrics_endpoint import MetricsEndpoint
from nodeagent.admin.metrics_page import MetricsPage
from nodeagent.admin.reasons import merged
from nodeagent.admin.status import Status
from nodeagent.admin.status_endpoint import StatusEndpoint
from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import cancel_all, race, supervise
from nodeagent.config.load import differences, placed
from nodeagent.config.load import load as load_config
from nodeagent.config.schema import Config, keys_applied_at_start
from nodeagent.core.events.states import Node
from nodeagent.daemon.cluster import Cluster
from nodeagent.daemon.divided import Divided
from nodeagent.daemon.exclusive_cpus import ExclusiveCpus
from nodeagent.daemon.gpus import Gpus, instance_table
from nodeagent.daemon.kinds import Kinds
from nodeagent.daemon.network import Network, with_interfaces_in_pods
from nodeagent.daemon.observed import observed
from nodeagent.daemon.paths import STATUS_SOCKET, Paths, check_served, checked, log_start
from nodeagent.daemon.reload import rewrites
from nodeagent.errors import ConfigError, LedgerTooNewError, NodeagentError, StateError
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.devices import all_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.host.systemd.notify import Notifier
from nodeagent.kube.kubelet.pod_resources import PodResources
from nodeagent.kube.kubelet.registration import KUBELET_SOCKET, Registration
from nodeagent.managers.deviceplugin.kubelet_starts import kubelets
from nodeagent.managers.deviceplugin.manager import PLUGINS, DevicePluginManager, settings
from nodeagent.managers.deviceplugin.others import OtherOffers
from nodeagent.managers.deviceplugin.reconciler import HolderReconciler
from nodeagent.managers.dra.manager import CLAIMS, DraManager, node_name
from nodeagent.managers.hugepages.manager import HugepagesManager
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.managers.kubelet_conflicts import (
    KubeletConflicts,
    confines_all,
    managed_elsewhere,
    undetermined,
    unprotected,
)
from nodeagent.managers.ledger_recovery import LedgerRecovery
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.managers.pod_witness import PodWitness
from nodeagent.resources.offer import Offer, offers, selectors
from nodeagent.state.agent import Agent
from nodeagent.state.audit import CONFIGURATION, Happening
from nodeagent.state.leader import Leader
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from nodeagent.telemetry import log as log_of

POD_RESOURCES = "pod-resources/kubelet.sock"
LOCKED_RETRY_S = 2.0
READ_BACK_S, UNSHOWN_POLL_S, SETTLE_S = 30.0, 1.0, 0.2
"""Intervals of reading back what kubelet shows: without news; while it differs from what was sent; after news."""
SWITCH_S = 0.001
"""The interpreter's switch interval: how long a busy thread may delay the loop, and so kubelet's answer, each time."""
Parts = Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
log = structlog.get_logger()


def build(config: Config, where: Paths, families: Sequence[all_kinds.Kind]) -> Daemon:
    """Read the machine and open the ledger, but start nothing. Raise StateError if another
    agent has the ledger. Blocks."""
    store = Store(where.state_dir, accept_loss=where.accept_loss)
    try:
        plugins, cgroup_root = where.kubelet_dir / PLUGINS, config.pinning.cgroup_root
        inventory = scan(where.sysfs, families, selectors(config), cgroup_root=cgroup_root)
        pods = PodResources(where.kubelet_dir / POD_RESOURCES, plugins / KUBELET_SOCKET)
        kubelet = KubeletConflicts(where.sysfs, where.kubelet_dir)
        now = settings(config, kubelet.look(config), where.sysfs.text(BOOT_ID, ""), inventory)
        containers = ContainerTable(layouts(cgroup_root))
        names = frozenset({node_name(config), socket.gethostname().lower(), *kubelet.names()})
        witness = PodWitness(PodCgroups(where.sysfs, cgroup_root), containers, plugins, names, now.boot_id)
        inventory = with_interfaces_in_pods(inventory, where, now.boot_id)
        agent = Agent(store, inventory, now, pods.list, living=witness.living)
        agent.begin_beside_others(witness.given(), [one.resource for one in offers(config, families)])
        return Daemon(config, where, families, agent, pods, witness, containers, store, kubelet)
    except BaseException:
        store.close()
        raise


class Daemon:
    """All parts of one running agent."""

    def __init__(
        self,
        config: Config,
        where: Paths,
        families: Sequence[all_kinds.Kind],
        agent: Agent,
        pods: PodResources,
        witness: PodWitness,
        containers: ContainerTable,
        store: Store,
        kubelet: KubeletConflicts,
    ) -> None:
        self.config = config
        self.config_error = ""
        """Why the newest configuration is not in force."""
        self.config_file = str(where.config_file or "")
        self.agent = agent
        self.started_at = time.time()
        self._where = where
        self._families = families
        self._pods = pods
        self._store = store
        self._kubelet = kubelet
        self._plugins = where.kubelet_dir / PLUGINS
        self._refused_now: Mapping[str, str] = {}
        """What cannot be served, as it was when the managers were last told."""
        self._others = OtherOffers(self._plugins)
        self._others.read_checkpoint()
        self._leader = Leader(agent, store, where.state_dir, lambda: self.config.audit_days)
        instances = instance_table(agent, where)
        self._scanner = InventoryScanner(
            agent, where.sysfs, families, where.state_dir, lambda: self.config, self._page_holders, instances
        )
        cluster = Cluster(config)
        self._gpus = Gpus(
            agent, where, lambda: self.config, self._scanner, instances, cluster.report, containers.pod_of
        )
        rescan = self._scanner.rescan
        self._divided = Divided(agent, where, lambda: self.config, containers, lambda: self._pinning, cluster.report)
        self._kinds = Kinds(agent, where, families, rescan)
        self._network = Network(agent, where, families, lambda: self.config, rescan, lambda: self._pinning)
        granted, leads = self._network.granted, lambda: self._leader.held
        self._device_plugin = DevicePluginManager(
            agent, where.kubelet_dir, families, self._refused, leads, cluster.report, granted
        )
        self._hugepages = HugepagesManager(agent, where.sysfs, where.state_dir, lambda: self.config, rescan)
        self._dra = DraManager(
            agent,
            config,
            families,
            where.sysfs,
            where.kubelet_dir,
            where.runtime_dir,
            pods,
            cluster.api,
            cluster.report,
            self._refused,
            self._hugepages.growing,
            *self._kinds.with_hooks(*self._network.with_interfaces(*self._divided.with_both(*self._gpus.for_claims))),
            granted,
        )
        self._pinning = PinningManager(
            agent,
            where.sysfs,
            containers,
            self._plugins,
            lambda: self.config.pinning,
            cluster.api.claim,
            pods.listing,
            rescan,
            kubelet_confines=lambda: confines_all(self._kubelet.kubelet),
            kubelet_counts_claims=self._dra.kubelet_counts_claims,
            report=cluster.report,
            caches=self._divided,
            networks=self._network,
        )
        self._exclusive = ExclusiveCpus(agent, where, lambda: self.config.pinning, self._pinning)
        self._recovery = LedgerRecovery(
            agent,
            pods,
            witness,
            containers,
            where.kubelet_dir,
            self._plugins,
            CdiFolder(Path(config.dra.cdi_dir), config.dra.driver, where.sysfs),
            ClaimFiles(where.runtime_dir / CLAIMS),
            config.dra.driver,
            self._device_plugin.offers,
        )
        holders = HolderReconciler(
            agent,
            pods,
            witness,
            self._device_plugin.offers,
            self._plugins,
            containers.ended,
            lambda: self.config.release.poll_seconds,
            config.dra.driver,
            Path(config.dra.cdi_dir),
        )
        self._news = Revision(
            *agent.revisions, self._device_plugin.revision, self._pinning.revision, self._others.revision
        )
        """Rises with everything that is reported to systemd."""
        domain, topology = lambda: self.config.domain, kubelet.topology_manager
        page = MetricsPage(self)
        # In start order. Losses of the ledger are resolved first; what kubelet is shown comes before what follows it.
        self._managers: Sequence[Manager] = (
            self._recovery,
            self._scanner,
            self._device_plugin,
            *self._gpus.managers,
            *self._network.managers,
            self._kinds.manager,
            self._dra,
            self._pinning,
            self._hugepages,
            *self._exclusive.managers,
            *self._divided.managers,
            holders,
            cluster.events(self._observed, containers.pod_of, self._news),
            cluster.published(agent, self._news, where.state_dir, domain, self.offers, topology),
            cluster.other_drivers(self._others.learn_slices),
            StatusEndpoint(where.runtime_dir / STATUS_SOCKET, Status(self, page).handle, config),
            MetricsEndpoint(page, self.not_ready),
        )
        self._recovery.look_for_losses(store, [one.resource for one in offers(config, families)])
        self._notifier = Notifier()
        self._reload_asked = asyncio.Event()
        self._reloading = asyncio.Lock()

    def _page_holders(self) -> list[str] | None:
        return self._pinning.page_holders()

    # ---------------------------------------------------------------- what status reads

    @property
    def notes(self) -> list[str]:
        by_managers = [note for one in self._managers for note in one.notes()]
        return merged((*self._leader.notes, *self._kubelet.notes, *by_managers))

    @property
    def refused(self) -> Mapping[str, str]:
        return {
            **self._device_plugin.refused,
            **{f"{name} through DRA": why for name, why in self._dra.refused.items()},
        }

    def offers(self) -> tuple[Offer, ...]:
        return self._device_plugin.offers()

    def configured(self) -> tuple[Offer, ...]:
        return offers(self.config, self._families)

    def registrations(self) -> tuple[Registration, ...]:
        return self._device_plugin.registrations()

    def health_readings(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        return self._scanner.health_readings()

    async def clear_health(self, device: str, who: str) -> bool:
        return await self._scanner.clear_health(device, who)

    def not_ready(self) -> list[str]:
        """Return why nothing can be granted, kubelet or the API server does not show what was sent, containers may not
        be pinned, what was granted is not exclusive, or resources are refused because kubelet's files cannot be
        read."""
        not_exclusive = unprotected(self._kubelet.kubelet, self.agent.ledger)
        unread = undetermined(self._kubelet.kubelet, self.config)
        by_managers = [why for one in self._managers for why in one.not_ready()]
        return merged((*by_managers, *([not_exclusive] if not_exclusive else []), *unread))

    def _not_shown(self) -> list[str]:
        return [*self._device_plugin.not_ready(), *self._dra.not_ready()]

    def _observed(self) -> Node:
        refused, error = self._refused_now, self.config_error
        return observed(self.agent, self._kubelet, self.configured(), refused, self._leader.notes, error)

    def kubelet_document(self) -> dict[str, Any]:
        return self._kubelet.document()

    def dra_document(self) -> dict[str, Any]:
        return self._dra.document()

    def gpus_document(self) -> dict[str, Any]:
        return self._gpus.document()

    def pinning_document(self) -> dict[str, Any]:
        return {**self._pinning.document(), **self._exclusive.document(), **self._divided.document()}

    # ---------------------------------------------------------------- running

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop`, then stop in order. Raise StateError if another agent has taken
        over the lead from this one."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._apply(self.config)
                serving = self._begin(tasks, self._always())
                await race(self._leader.take(), stop.wait())
                leading = await self._begin_to_lead(tasks) if self._leader.held else []
                await race(stop.wait(), self._leader.lost())
                log.info("stopping")
                self._notifier.stopping()
                for one in self._managers:
                    await one.withdraw()
                await cancel_all(leading)
                await cancel_all(serving)
        finally:
            for one in reversed(self._managers):
                await one.close()
            await self.agent.close()
            self._pods.close()
        self._leader.close()

    async def _begin_to_lead(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        self._others.learn(await self._device_plugin.read_back(self._pods))
        await self._apply_kubelet_settings()
        leading = self._begin(tasks, self._while_leading())
        self._notifier.ready()
        return leading

    def _begin(self, tasks: asyncio.TaskGroup, parts: Parts) -> list[asyncio.Task[None]]:
        return [tasks.create_task(supervise(name, part), name=name) for name, part in parts.items()]

    def _always(self) -> Parts:
        """Return the parts that every agent runs, even while another one leads."""
        own = {"kubelet's starts": self._follow_starts, "configuration": self._follow_config}
        return {one.name: one.serve for one in self._managers} | own

    def _while_leading(self) -> Parts:
        """Return the parts that only one agent on a node may run."""
        own = {
            "kubelet": self._follow_kubelet,
            "housekeeping": self._leader.keep,
            "watchdog": self._notifier.keep_alive,
        }
        return {one.name: one.lead for one in self._managers} | own

    async def _follow_starts(self) -> None:
        """Apply the settings of each kubelet as soon as it starts."""
        async with contextlib.aclosing(kubelets(self._plugins)) as starts:
            async for _ in starts:
                await self._apply_kubelet_settings()

    async def _follow_kubelet(self) -> None:
        """Read back what kubelet shows; report the status to systemd."""
        while True:
            seen = self._news.value
            self._others.learn(await self._device_plugin.read_back(self._pods))
            if self._kubelet.recovered(self.config) or self._refused(self.config) != self._refused_now:
                await self._apply_kubelet_settings()
            self._kubelet.watch(self.agent.ledger)
            self._notifier.status(self._summary())
            await self._news_since(seen)

    async def _apply_kubelet_settings(self) -> None:
        """Apply kubelet's settings. A kubelet that starts may reserve and manage other CPUs than before, so look
        before it asks for anything."""
        if (now := self._settings(self.config)) != self.agent.settings:
            self.agent.apply_settings(now)
        async with self._reloading:
            await self._apply(self.config)

    async def _apply(self, config: Config) -> None:
        self._refused_now = self._refused(config)
        for one in self._managers:
            await one.apply(config)

    def _refused(self, config: Config) -> Mapping[str, str]:
        """Return the resources of a configuration that cannot be served, by name, with the reason."""
        inventory, every = self.agent.inventory, offers(config, self._families)
        self._others.serve((one.name for one in every), config.domain)
        kinds = managed_elsewhere(self._kubelet.kubelet, inventory, self.agent.settings.reserved)
        by_kubelet = {one.name: kinds[one.kind] for one in config.served if one.kind in kinds}
        return {**self._others.refusals(inventory, every), **by_kubelet}

    async def _news_since(self, seen: int) -> None:
        """Return when kubelet may show something else: after news from here or the poll interval, plus the moment that
        kubelet needs to show it."""
        waits = [one.ready for one in self.registrations()]
        soon = self._device_plugin.awaited or (self._not_shown() and all(waits))
        poll_s = UNSHOWN_POLL_S if soon else READ_BACK_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(poll_s):
                await self._news.changed(seen)
        await asyncio.sleep(SETTLE_S)

    def _summary(self) -> str:
        reasons = self.not_ready()
        state = f"{len(self.offers())} resources, {len(self.agent.ledger.grants)} grants"
        return f"{state}; {reasons[0]}" if reasons else state

    # ---------------------------------------------------------------- configuration, live

    async def _follow_config(self) -> None:
        """Reload when the file changes or a SIGHUP arrives."""
        path = self._where.config_file
        if path is None:
            return
        async with contextlib.aclosing(rewrites(path, self._reload_asked)) as reasons:
            async for why in reasons:
                await self._reload_said(why)

    async def _reload_said(self, why: str) -> None:
        try:
            log.info("configuration-reloaded", why=why, changed=await self.reload())
        except ConfigError as error:
            log.error("configuration-refused", why=why, error=str(error), kept="the old one")

    async def reload(self) -> list[str]:
        """Read the configuration again, apply it and return what changed. On ConfigError the old one stays."""
        async with self._reloading:
            self._notifier.reloading()
            try:
                changed = await self._take(self._where.config_file)
                self.config_error = ""
                self._note_config(f"applied: {'; '.join(changed) or 'nothing has changed'}")
            except ConfigError as error:
                self.config_error = str(error)
                self._note_config("refused", self.config_error)
                raise
            finally:
                self._notifier.ready()
        return changed

    def _note_config(self, what: str, why: str = "") -> None:
        self.agent.record_happenings([Happening(action=CONFIGURATION, what=what, why=why)])

    async def _take(self, path: Path | None) -> list[str]:
        """Apply a configuration. Everything that can be refused comes before anything that changes."""
        new = load_config(path) if path is not None else self.config
        with placed(path):
            check_served(new, self._families, self._where.kubelet_dir)
            now = self._settings(new)
        changed, self.config = differences(self.config, new), new
        log_of.configure(new.log.level, new.log.format)
        self.agent.apply_settings(now)
        await self._scanner.rescan()
        await self._apply(new)
        at_start = keys_applied_at_start()
        return [f"{one} (after a restart)" if one.partition(":")[0] in at_start else one for one in changed]

    def _settings(self, config: Config) -> AgentSettings:
        return settings(config, self._kubelet.look(config), self.agent.settings.boot_id, self.agent.inventory)


async def run(config: Config, where: Paths) -> None:
    """Build, waiting while another agent still has the ledger, and run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    sys.setswitchinterval(SWITCH_S)
    loop.set_exception_handler(_log_unhandled)
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # must not kill the process while nothing can be reloaded yet
    daemon = await _built(config, where, stop)
    # Existing objects are permanent: collecting them again and again would occasionally cost a call 20 ms.
    gc.collect()
    gc.freeze()
    if daemon is not None:
        log_start(where)
        await daemon.run(stop)


async def _built(config: Config, where: Paths, stop: asyncio.Event) -> Daemon | None:
    """Return a daemon that can run, or None if `stop` is set first."""
    said, families = "", checked(config, where)
    while not stop.is_set():
        try:
            return build(config, where, families)
        except LedgerTooNewError:
            raise
        except StateError as error:
            if str(error) != said:
                log.error("cannot-start-yet", error=str(error), retry_s=LOCKED_RETRY_S)
            said = str(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOCKED_RETRY_S):
                await stop.wait()
    return None


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    error = context.get("exception")
    log.error("unforeseen", what=context.get("message", ""), exc_info=error, known=isinstance(error, NodeagentError))
