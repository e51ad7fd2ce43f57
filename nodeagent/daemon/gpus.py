"""Wires what divides and shares GPUs, and binds devices to other drivers, for claims; loads it where it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.config.schema import Config
from nodeagent.core.dra.passthrough import driver_for
from nodeagent.core.events.happenings import Report
from nodeagent.core.events.states import PodOf
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.sharing.mps import DAEMONS, asks_for_sharing
from nodeagent.daemon.paths import Paths
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Unmade
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.partitions.amd import AmdPartitionsManager
    from nodeagent.managers.partitions.manager import PartitionsManager
    from nodeagent.managers.passthrough.manager import PassthroughManager
    from nodeagent.managers.sharing.manager import SharingManager


def instance_table(agent: Agent, where: Paths) -> InstanceTable:
    """Return what is recorded of the MIG instances that the agent makes."""
    return InstanceTable(PartitionJournal(where.state_dir, agent.settings.boot_id), where.sysfs)


def _recorded(where: Paths, *names: str) -> bool:
    return any((where.state_dir / name).exists() for name in names)


class _Sharing:
    """MPS daemons and time slices for the DRA manager."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        report: Report,
        pod_of: PodOf,
        view: Callable[[Inventory], Inventory],
    ) -> None:
        """view: returns an inventory with the MIG instances that exist."""

        def sharing() -> SharingManager:
            from nodeagent.host.driver_programs import DriverSearch
            from nodeagent.managers.sharing.manager import SharingManager

            search = DriverSearch(top=where.sysfs.root, configured=config().nvidia.driver_root)
            return SharingManager(agent, search, where.state_dir, where.runtime_dir, report, pod_of, view)

        held = any(map(asks_for_sharing, agent.ledger.grants.values()))

        def is_shared() -> bool:
            return held or _recorded(where, state_files.SHARING) or (where.runtime_dir / DAEMONS).exists()

        self.manager = OnDemand("sharing", sharing, is_shared, agent.revisions.ledger)

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        return await self.manager.load().prepare(claims) if _shared(claims) else {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        return await self.manager.load().release(claims) if _shared(claims) else {}

    async def settle(self) -> None:
        """End the daemons that no claim has."""
        if (one := self.manager.if_needed()) is not None:
            await one.settle()


def _shared(claims: Mapping[str, Sequence[Grant]]) -> bool:
    return any(asks_for_sharing(grant) for grants in claims.values() for grant in grants)


class _Instances:
    """MIG instances for the DRA manager."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        scanner: InventoryScanner,
        table: InstanceTable,
        sharing: _Sharing,
    ) -> None:
        """sharing: its daemons end before the instances that they use."""

        def partitions() -> PartitionsManager:
            from nodeagent.managers.partitions.manager import PartitionsManager

            return PartitionsManager(agent, scanner, table, where.state_dir, config, sharing.settle)

        def is_divided() -> bool:
            return bool(config().divided) or _recorded(where, state_files.PARTITIONS, state_files.MIG_MODES)

        self.manager = OnDemand("partitions", partitions, is_divided, agent.revisions.ledger)
        self._table = table

    def concerned(self, grants: Sequence[Grant]) -> bool:
        one = self.manager.if_needed()
        return one is not None and one.concerned(grants)

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        return await self.manager.load().make(claims)

    async def settle(self) -> None:
        await self.manager.load().settle()

    async def ready(self) -> None:
        if (one := self.manager.if_needed()) is not None:
            await one.ready()

    def view(self, inventory: Inventory) -> Inventory:
        return self._table.view(inventory)


class _Passthrough:
    """VFIO drivers for the DRA manager."""

    def __init__(
        self, agent: Agent, where: Paths, config: Callable[[], Config], rescan: Callable[[], Awaitable[object]]
    ) -> None:
        """rescan: reads the machine again."""

        def passthrough() -> PassthroughManager:
            from nodeagent.host.vfio import Functions
            from nodeagent.managers.passthrough.manager import PassthroughManager

            return PassthroughManager(agent, Functions(where.sysfs), where.state_dir, rescan)

        def is_passed() -> bool:
            return bool(config().dra.passthrough_drivers) or _recorded(where, state_files.PASSTHROUGH)

        self.manager = OnDemand("passthrough", passthrough, is_passed, agent.revisions.ledger)

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        one = self.manager.if_needed()
        return one.concerned(uids) if one is not None else ()

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        wanted = any(driver_for(grant) for grants in claims.values() for grant in grants)
        one = self.manager.load() if wanted else self.manager.if_needed()
        return await one.bind(claims) if one is not None else {}

    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]:
        one = self.manager.if_needed()
        return await one.give_back(uids) if one is not None else {}


def _amd(
    agent: Agent, where: Paths, config: Callable[[], Config], rescan: Callable[[], Awaitable[object]]
) -> OnDemand[AmdPartitionsManager]:
    """Return what partitions GPUs of AMD. rescan: reads the machine again."""

    def amd() -> AmdPartitionsManager:
        from nodeagent.managers.partitions.amd import AmdPartitionsManager

        return AmdPartitionsManager(agent, where.sysfs, where.state_dir, config, rescan)

    def is_partitioned() -> bool:
        return bool(config().amd.partitions) or _recorded(where, state_files.AMD_PARTITIONS)

    return OnDemand("AMD partitions", amd, is_partitioned, agent.revisions.ledger)


class Gpus:
    """MIG instances that are made on demand, partitions of AMD's GPUs, MPS daemons and time slices, and devices for
    virtual machines."""

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
        self._sharing = _Sharing(agent, where, config, report, pod_of, table.view)
        self._instances = _Instances(agent, where, config, scanner, table, self._sharing)
        self._passthrough = _Passthrough(agent, where, config, scanner.rescan)
        self._amd = _amd(agent, where, config, scanner.rescan)
        self.for_claims = self._sharing, self._instances, self._passthrough
        """What prepares claims, in the order in which the DRA manager takes it."""

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order: what is shared has to exist."""
        return self._amd, self._instances.manager, self._sharing.manager, self._passthrough.manager

    def document(self) -> dict[str, Any]:
        """Return the daemons and time slices, the MIG instances that the agent makes, and the partitions of AMD's GPUs
        that it keeps, in plain types."""
        return {
            "sharing": self._sharing.manager.document(),
            "mig": self._instances.manager.document(),
            "amd": self._amd.document(),
        }
