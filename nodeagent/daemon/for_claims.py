"""Joins what sets up the devices of claims, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Unmade


class WithView:
    """Instances, and something else that the inventory has as containers get it."""

    def __init__(self, made: Instances, view: Callable[[Inventory], Inventory]) -> None:
        self._made, self._view = made, view

    def concerned(self, grants: Sequence[Grant]) -> bool:
        return self._made.concerned(grants)

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        return await self._made.make(claims)

    async def settle(self) -> None:
        await self._made.settle()

    async def ready(self) -> None:
        await self._made.ready()

    def view(self, inventory: Inventory) -> Inventory:
        return self._view(self._made.view(inventory))


P_co = TypeVar("P_co", bound=Passthrough, covariant=True)


class Needed(Protocol, Generic[P_co]):
    """A manager that is loaded when something needs it."""

    def if_needed(self) -> P_co | None:
        """Return it, or None if nothing needs it."""
        ...


class Then:
    """Sets up devices in one way, and then in another if that is needed; gives back in reverse order."""

    def __init__(self, first: Passthrough, second: Needed[Passthrough]) -> None:
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
