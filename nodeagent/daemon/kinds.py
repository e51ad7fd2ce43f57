"""Wires the hooks of third-party kinds; loads what calls them where a kind has them, or has left something behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.host.devices.base import Kind
from nodeagent.host.devices.hooks import preparing
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing, Then, WithView
from nodeagent.managers.on_demand import OnDemand
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.kinds.manager import KindsManager

View = Callable[[Inventory], Inventory]


class Kinds:
    """What kinds do for claims."""

    def __init__(
        self, agent: Agent, where: Paths, families: Sequence[Kind], rescan: Callable[[], Awaitable[object]]
    ) -> None:
        """`rescan` reads the machine again."""
        self._hooked = bool(preparing(families))
        self._view: View | None = None
        self._agent, self._where = agent, where

        def kinds() -> KindsManager:
            from nodeagent.managers.kinds.journal import KindsJournal
            from nodeagent.managers.kinds.manager import KindsManager

            journal = KindsJournal(where.state_dir, agent.settings.boot_id)
            return KindsManager(agent, journal, families, where.state_dir, rescan)

        def is_hooked() -> bool:
            return self._hooked or (where.state_dir / state_files.KINDS).exists()

        self.manager = OnDemand("kinds", kinds, is_hooked, agent.revisions.ledger)

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with what kinds have prepared."""
        if not self._hooked:
            return inventory
        if self._view is None:
            from nodeagent.managers.kinds.journal import KindsJournal
            from nodeagent.managers.kinds.table import PreparedTable

            self._view = PreparedTable(KindsJournal(self._where.state_dir, self._agent.settings.boot_id)).view
        return self._view(inventory)

    def with_hooks(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with hooks after other drivers."""
        return sharing, WithView(instances, self.view), Then(passthrough, self.manager)
