"""All managers of one agent: which there are, what each knows of the others, and the order in which they start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import Features, Pool
from nodeagent.core.events.states import Node
from nodeagent.daemon.cluster import Cluster
from nodeagent.daemon.divided import Divided
from nodeagent.daemon.dsa import DsaQueues
from nodeagent.daemon.exclusive_cpus import ExclusiveCpus
from nodeagent.daemon.fabrics import connected_nqns
from nodeagent.daemon.foundation import Foundation
from nodeagent.daemon.gpus import Gpus, instance_table
from nodeagent.daemon.kinds import Kinds
from nodeagent.daemon.network import Network
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.managers.deviceplugin.manager import DevicePluginManager
from nodeagent.managers.deviceplugin.reconciler import HolderReconciler
from nodeagent.managers.dra.manager import CLAIMS, DraManager
from nodeagent.managers.hugepages.manager import HugepagesManager
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.managers.kubelet_conflicts import confined_by, confines_all
from nodeagent.managers.ledger_recovery import LedgerRecovery
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.manager import PinningManager


class Wiring:
    """The managers that others ask by name. What only some nodes need is loaded there when something needs it."""

    def __init__(self, base: Foundation, leads: Callable[[], bool]) -> None:
        """Build them without starting anything. leads: returns whether this agent leads the node."""
        self._base = base
        self._leads = leads
        self._cluster = Cluster(base.config)
        self._instances = instance_table(base.agent, base.where)
        self.scanner = self._scanner()
        self.gpus = self._gpus()
        self.divided = Divided(
            base.agent, base.where, self._config, base.containers, lambda: self.pinning, self._cluster.report
        )
        self._dsa = DsaQueues(base.agent, base.where, self._config, self.scanner.rescan, self._render_claims)
        self._kinds = Kinds(base.agent, base.where, base.families, self.scanner.rescan)
        self._network = Network(
            base.agent, base.where, base.families, self._config, self.scanner.rescan, lambda: self.pinning
        )
        self.fabrics = self._cluster.fabrics(
            base.agent, base.where, self._config, self._shared_pools, self._render_claims
        )
        self.device_plugin = self._device_plugin()
        self._hugepages = HugepagesManager(
            base.agent, base.where.sysfs, base.where.state_dir, self._config, self.scanner.rescan
        )
        self.dra = self._dra()
        self.pinning = self._pinning()
        self.exclusive = ExclusiveCpus(base.agent, base.where, lambda: base.config.pinning, self.pinning)
        self.recovery = self._recovery()
        self.news = Revision(
            *base.agent.revisions, self.device_plugin.revision, self.pinning.revision, base.others.revision
        )
        """Rises with everything that is reported to systemd."""

    def in_start_order(self, look: Callable[[], Node], pages: Iterable[Manager]) -> Sequence[Manager]:
        """Return all managers. Losses of the ledger are resolved first; what kubelet is shown comes before what follows
        it. look: returns the state of the node. pages: what serves pages on it."""
        return (
            self.recovery,
            self.scanner,
            self.device_plugin,
            *self.gpus.managers,
            *self._network.managers,
            self._dsa.manager,
            self._kinds.manager,
            self.dra,
            *self.fabrics.managers,
            self.pinning,
            self._hugepages,
            *self.exclusive.managers,
            *self.divided.managers,
            self._holders(),
            *self._in_cluster(look),
            *pages,
        )

    def _config(self) -> Config:
        return self._base.config

    # ---------------------------------------------------------------- the machine

    def _scanner(self) -> InventoryScanner:
        base = self._base
        agent, where = base.agent, base.where
        return InventoryScanner(
            agent,
            where.sysfs,
            base.families,
            where.state_dir,
            self._config,
            self._page_holders,
            self._instances,
            connected_nqns(where, agent),
            base.divided,
        )

    def _page_holders(self) -> list[str] | None:
        return self.pinning.page_holders()

    def _gpus(self) -> Gpus:
        base, report = self._base, self._cluster.report
        return Gpus(base.agent, base.where, self._config, self.scanner, self._instances, report, base.containers.pod_of)

    # ---------------------------------------------------------------- kubelet's two APIs

    def _device_plugin(self) -> DevicePluginManager:
        base = self._base
        return DevicePluginManager(
            base.agent,
            base.where.kubelet_dir,
            base.families,
            base.refused,
            self._leads,
            self._cluster.report,
            self._network.granted,
        )

    def _dra(self) -> DraManager:
        """Return what serves claims. Their devices are set up from the inside out: GPUs, then what the kernel divides,
        interfaces, targets on the network, work queues, and third-party kinds."""
        base, where = self._base, self._base.where
        for_claims = self._network.with_interfaces(*self.divided.with_parts(*self.gpus.for_claims))
        for_claims = self._dsa.with_queues(*self.fabrics.with_targets(*for_claims))
        return DraManager(
            base.agent,
            base.config,
            base.families,
            where.sysfs,
            where.kubelet_dir,
            where.runtime_dir,
            base.pods,
            self._cluster.api,
            self._cluster.report,
            base.refused,
            self._hugepages.growing,
            *self._kinds.with_hooks(*for_claims),
            self._network.granted,
        )

    async def _render_claims(self) -> None:
        await self.dra.render()

    def _shared_pools(self, features: Features) -> Sequence[Pool]:
        return self.dra.pools.shared(features)

    # ---------------------------------------------------------------- containers and the ledger

    def _pinning(self) -> PinningManager:
        base = self._base
        return PinningManager(
            base.agent,
            base.where.sysfs,
            base.containers,
            base.plugins,
            lambda: base.config.pinning,
            self._cluster.api.claim,
            base.pods.listing,
            self.scanner.rescan,
            kubelet_confines=lambda: confines_all(base.kubelet.kubelet),
            kubelet_cpus=lambda: confined_by(base.kubelet.kubelet),
            kubelet_counts_claims=self.dra.kubelet_counts_claims,
            report=self._cluster.report,
            caches=self.divided,
            networks=self._network,
        )

    def _recovery(self) -> LedgerRecovery:
        base, where, dra = self._base, self._base.where, self._base.config.dra
        return LedgerRecovery(
            base.agent,
            base.pods,
            base.witness,
            base.containers,
            where.kubelet_dir,
            base.plugins,
            CdiFolder(Path(dra.cdi_dir), dra.driver, where.sysfs),
            ClaimFiles(where.runtime_dir / CLAIMS),
            dra.driver,
            self.device_plugin.offers,
        )

    def _holders(self) -> HolderReconciler:
        base, dra = self._base, self._base.config.dra
        return HolderReconciler(
            base.agent,
            base.pods,
            base.witness,
            self.device_plugin.offers,
            base.plugins,
            base.containers.ended,
            lambda: base.config.release.poll_seconds,
            dra.driver,
            Path(dra.cdi_dir),
        )

    # ---------------------------------------------------------------- the API server

    def _in_cluster(self, look: Callable[[], Node]) -> Sequence[Manager]:
        base, cluster, offers = self._base, self._cluster, self.device_plugin.offers
        domain, topology = lambda: base.config.domain, base.kubelet.topology_manager
        return (
            cluster.events(look, base.containers.pod_of, self.news),
            cluster.published(base.agent, self.news, base.where.state_dir, domain, offers, topology),
            cluster.other_drivers(base.others.learn_slices),
        )
