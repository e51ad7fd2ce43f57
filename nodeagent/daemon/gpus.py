"""Wires what divides and shares GPUs, and binds devices to other drivers, for claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report
from nodeagent.core.events.states import PodOf
from nodeagent.daemon.paths import Paths
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.vfio import Functions
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.managers.manager import Manager
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.partitions.manager import PartitionsManager
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.managers.passthrough.manager import PassthroughManager
from nodeagent.managers.sharing.manager import SharingManager
from nodeagent.state.agent import Agent


def instance_table(agent: Agent, where: Paths) -> InstanceTable:
    """Return what is recorded of the MIG instances that the agent makes."""
    return InstanceTable(PartitionJournal(where.state_dir, agent.settings.boot_id), where.sysfs)


class Gpus:
    """MIG instances that are made on demand, MPS daemons and time slices, and devices for virtual machines."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        scanner: InventoryScanner,
        table: InstanceTable,
        report: Report,
        pod_of: PodOf,
    ) -> None:
        """`scanner` asks NVML; `pod_of` returns the pod with a UID, if its name is known."""
        self.partitions = PartitionsManager(agent, scanner, table, where.state_dir, config)
        search = DriverSearch(top=where.sysfs.root, configured=config().nvidia.driver_root)
        self.sharing = SharingManager(agent, search, where.state_dir, where.runtime_dir, report, pod_of, table.view)
        self.passthrough = PassthroughManager(agent, Functions(where.sysfs), where.state_dir, scanner.rescan)

    @property
    def for_claims(self) -> tuple[SharingManager, PartitionsManager, PassthroughManager]:
        """Return what prepares claims, in the order in which the DRA manager takes it."""
        return self.sharing, self.partitions, self.passthrough

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order: what is shared has to exist."""
        return self.partitions, self.sharing, self.passthrough
