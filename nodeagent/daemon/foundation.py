"""What all parts of one agent stand on: the machine as it was read, the ledger, kubelet and other plugins, and the
configuration in force."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.view import ResourceKind
from nodeagent.daemon.dsa import divided_accelerators
from nodeagent.daemon.network import with_interfaces_in_pods
from nodeagent.daemon.paths import Paths
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.devices import all_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.kube.kubelet.pod_resources import PodResources
from nodeagent.kube.kubelet.registration import KUBELET_SOCKET
from nodeagent.managers.deviceplugin.manager import PLUGINS, settings
from nodeagent.managers.deviceplugin.others import OtherOffers
from nodeagent.managers.dra.manager import node_name
from nodeagent.managers.kubelet_conflicts import KubeletConflicts, managed_elsewhere
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pod_witness import PodWitness
from nodeagent.resources.offer import Offer, offers, selectors
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings

POD_RESOURCES = "pod-resources/kubelet.sock"


class Foundation:
    """Building it starts nothing. A reload of the configuration replaces `config`."""

    def __init__(self, config: Config, where: Paths, families: Sequence[all_kinds.Kind], store: Store) -> None:
        """Read the machine, and what kubelet and the ledger have of it. Raise StateError. Blocks."""
        self.config = config
        self.where = where
        self.families = families
        self.store = store
        self.plugins = where.kubelet_dir / PLUGINS
        cgroup_root = config.pinning.cgroup_root
        boot_id = where.sysfs.text(BOOT_ID, "")
        self.divided = divided_accelerators(where, boot_id)
        """Reads which accelerators are divided into work queues, by PCI address; blocks."""
        look_for = selectors(config)
        look_for = replace(look_for, dsa=replace(look_for.dsa, divided=self.divided))
        inventory = scan(where.sysfs, families, look_for, cgroup_root=cgroup_root)
        self.pods = PodResources(where.kubelet_dir / POD_RESOURCES, self.plugins / KUBELET_SOCKET)
        self.kubelet = KubeletConflicts(where.sysfs, where.kubelet_dir)
        now = settings(config, self.kubelet.look(config), boot_id, inventory)
        self.containers = ContainerTable(layouts(cgroup_root))
        names = frozenset({node_name(config), socket.gethostname().lower(), *self.kubelet.names()})
        cgroups = PodCgroups(where.sysfs, cgroup_root)
        self.witness = PodWitness(cgroups, self.containers, self.plugins, names, now.boot_id)
        inventory = with_interfaces_in_pods(inventory, where, now.boot_id)
        self.agent = Agent(store, inventory, now, self.pods.list, living=self.witness.living)
        self.agent.begin_beside_others(self.witness.given(), self.resources())
        self.others = OtherOffers(self.plugins)
        self.others.read_checkpoint()

    def configured(self) -> tuple[Offer, ...]:
        """Return what the configuration asks for, whether it can be served or not."""
        return offers(self.config, self.families)

    def resources(self) -> Sequence[ResourceKind]:
        """Return the resources of that."""
        return [one.resource for one in self.configured()]

    def settings(self, config: Config) -> AgentSettings:
        """Return what a configuration, and kubelet as it is now, mean for the ledger."""
        return settings(config, self.kubelet.look(config), self.agent.settings.boot_id, self.agent.inventory)

    def refused(self, config: Config) -> Mapping[str, str]:
        """Return the resources of a configuration that cannot be served, by name, with the reason."""
        inventory, every = self.agent.inventory, offers(config, self.families)
        self.others.serve((one.name for one in every), config.domain)
        reserved = self.agent.settings.reserved
        kinds = managed_elsewhere(self.kubelet.kubelet, inventory, reserved)
        by_kubelet = {one.name: kinds[one.kind] for one in config.served if one.kind in kinds}
        return {**self.others.refusals(inventory, every, reserved), **by_kubelet}
