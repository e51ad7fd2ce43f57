"""Wires NVMe over fabrics: connections for claims, and the pools that nodes share; loads it where it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import Features, Pool
from nodeagent.core.fabrics.target import KIND
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing, Then, WithView
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.fabrics.manager import FabricsManager
    from nodeagent.managers.fabrics.pools import SharedPoolsManager


class Fabrics:
    """Targets on the network, as claims and the API server see them."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        api: LazyApi,
        node_name: str,
        pools: Callable[[Features], Sequence[Pool]],
        render: Callable[[], Awaitable[None]],
        *,
        configured: bool,
    ) -> None:
        """pools: returns those that nodes share; render: writes the files of claims that have changed, and removes
        those of disks that are gone; both are called once everything is built. configured: whether there is an API
        server."""
        self._agent, self._where = agent, where
        self._view: Callable[[Inventory], Inventory] | None = None

        def connected() -> FabricsManager:
            from nodeagent.managers.fabrics.manager import FabricsManager

            return FabricsManager(agent, where.sysfs, where.state_dir, config, render)

        def shared() -> SharedPoolsManager:
            from nodeagent.managers.fabrics.pools import SharedPoolsManager

            return SharedPoolsManager(agent, api, config, node_name, pools, configured=configured)

        def is_served() -> bool:
            return bool(config().targets)

        def is_used() -> bool:
            return is_served() or (where.state_dir / state_files.FABRICS).exists()

        ledger = agent.revisions.ledger
        self.connections = OnDemand("NVMe over fabrics", connected, is_used, ledger)
        self.pools = OnDemand("shared pools", shared, is_served, ledger)

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order. They follow the one that serves claims."""
        return self.connections, self.pools

    def document(self) -> dict[str, Any]:
        """Return who publishes the pools, in plain types; empty if no node shares any."""
        return self.pools.document()

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the disks of connected targets."""
        if not inventory.devices_by_kind.get(KIND):
            return inventory
        if self._view is None:
            from nodeagent.managers.fabrics.journal import FabricsJournal
            from nodeagent.managers.fabrics.table import ConnectedTable

            self._view = ConnectedTable(FabricsJournal(self._where.state_dir, self._agent.settings.boot_id)).view
        return self._view(inventory)

    def with_targets(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with targets after other devices."""
        return sharing, WithView(instances, self.view), Then(passthrough, self.connections)


def connected_nqns(where: Paths, agent: Agent) -> Callable[[], frozenset[str]]:
    """Return what reads which subsystems the agent has connected; it blocks, and loads nothing where there are none."""

    def connected() -> frozenset[str]:
        if not (where.state_dir / state_files.FABRICS).exists():
            return frozenset()
        from nodeagent.managers.fabrics.journal import FabricsJournal

        records = FabricsJournal(where.state_dir, agent.settings.boot_id).read()
        return frozenset(one.port.nqn for one in records.values())

    return connected
