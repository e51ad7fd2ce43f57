"""Wires the hooks of third-party kinds; loads what calls them where a kind has them, or has left something behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.host.devices.base import Kind
from nodeagent.host.devices.hooks import preparing
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing, Unmade
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
        return sharing, _Instances(instances, self), _Both(passthrough, self.manager)


class _Instances:
    """The inventory as containers get it."""

    def __init__(self, made: Instances, kinds: Kinds) -> None:
        self._made, self._kinds = made, kinds

    def concerned(self, grants: Sequence[Grant]) -> bool:
        return self._made.concerned(grants)

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        return await self._made.make(claims)

    async def settle(self) -> None:
        await self._made.settle()

    async def ready(self) -> None:
        await self._made.ready()

    def view(self, inventory: Inventory) -> Inventory:
        return self._kinds.view(self._made.view(inventory))


class _Both:
    """Binds devices to drivers, and has kinds prepare them."""

    def __init__(self, first: Passthrough, second: OnDemand[KindsManager]) -> None:
        self._first, self._second = first, second

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        one = self._second.if_needed()
        mine = {*self._first.concerned(uids), *(one.concerned(uids) if one is not None else ())}
        return [uid for uid in uids if uid in mine]

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        bound, one = await self._first.bind(claims), self._second.if_needed()
        if one is None:
            return bound
        left = {uid: grants for uid, grants in claims.items() if not bound.get(uid)}
        return {**bound, **await one.bind(left)}

    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]:
        one = self._second.if_needed()
        left = await one.give_back(uids) if one is not None else {}
        return {**await self._first.give_back([uid for uid in uids if uid not in left]), **left}
