"""Wires work queues that are made for claims; loads what makes them where that is configured, or has left some."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from nodeagent.config.schema import Config
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, InTurn, Passthrough, Sharing, Viewed
from nodeagent.managers.on_demand import OnDemand
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.queues.manager import QueuesManager


class Queues:
    """Work queues of Intel's DSA and IAA for claims."""

    def __init__(
        self, agent: Agent, where: Paths, config: Callable[[], Config], rescan: Callable[[], Awaitable[object]]
    ) -> None:
        """`rescan` reads the machine again."""
        self._agent, self._where = agent, where
        self._view: Callable[[Inventory], Inventory] | None = None

        def queues() -> QueuesManager:
            from nodeagent.host.idxd import Accelerators
            from nodeagent.managers.queues.manager import QueuesManager

            return QueuesManager(agent, Accelerators(where.sysfs), where.state_dir, config, rescan)

        def are_made() -> bool:
            return config().makes_queues or (where.state_dir / state_files.QUEUES).exists()

        self.manager = OnDemand("work queues", queues, are_made, agent.revisions.ledger)

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the nodes of the queues that are enabled for claims."""
        if not any(one.made_for_claims for one in inventory.devices_by_kind.get("dsa", ())):
            return inventory
        if self._view is None:
            from nodeagent.managers.queues.journal import QueueJournal
            from nodeagent.managers.queues.table import QueueTable

            self._view = QueueTable(QueueJournal(self._where.state_dir, self._agent.settings.boot_id)).view
        return self._view(inventory)

    def with_queues(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with queues after other devices."""
        return sharing, Viewed(instances, self.view), InTurn(passthrough, self.manager.if_needed)
