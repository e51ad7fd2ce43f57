"""Wires work queues of Intel's DSA and IAA; loads what makes them where accelerators are given to the agent, or an
earlier agent has left some divided."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from nodeagent.config.schema import Config
from nodeagent.core.dsa.division import KIND, Division
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing, Then, WithView
from nodeagent.managers.on_demand import OnDemand
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.dsa.journal import DsaJournal
    from nodeagent.managers.dsa.manager import DsaManager

View = Callable[[Inventory], Inventory]


class DsaQueues:
    """Queues as claims see them."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        render: Callable[[], Awaitable[None]],
    ) -> None:
        """rescan: reads the machine again. render: writes the files of claims that have changed, and removes those of
        queues that are no longer theirs; called once everything is built."""
        self._agent, self._where = agent, where
        self._view: View | None = None

        def queues() -> DsaManager:
            from nodeagent.host.dsa.accelerators import Accelerators
            from nodeagent.managers.dsa.manager import DsaManager

            return DsaManager(agent, Accelerators(where.sysfs), where.state_dir, config, rescan, render)

        def is_used() -> bool:
            return bool(config().accelerators.dsa) or (where.state_dir / state_files.DSA_QUEUES).exists()

        self.manager = OnDemand("DSA queues", queues, is_used, agent.revisions.ledger)

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the queues that are made."""
        if not inventory.devices_by_kind.get(KIND):
            return inventory
        if self._view is None:
            from nodeagent.managers.dsa.journal import DsaJournal
            from nodeagent.managers.dsa.table import QueueTable

            self._view = QueueTable(DsaJournal(self._where.state_dir, self._agent.settings.boot_id)).view
        return self._view(inventory)

    def with_queues(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with queues after other devices."""
        return sharing, WithView(instances, self.view), Then(passthrough, self.manager)


def divided_accelerators(where: Paths, boot_id: str) -> Callable[[], Mapping[str, Division]]:
    """Return what reads which accelerators the agent has divided; it blocks, and loads nothing where there are none.
    While that cannot be read, it returns what was read last."""
    last: Mapping[str, Division] = {}
    journal: DsaJournal | None = None  # one, which logs once that it cannot be read

    def divided() -> Mapping[str, Division]:
        nonlocal last, journal
        try:
            is_there = (where.state_dir / state_files.DSA_QUEUES).exists()
        except OSError:  # it may be
            return last
        if not is_there:
            last = {}
            return last
        if journal is None:
            from nodeagent.managers.dsa.journal import DsaJournal

            journal = DsaJournal(where.state_dir, boot_id)
        with contextlib.suppress(HostError):  # the journal has logged it
            last = journal.read(certain=True)
        return last

    return divided
