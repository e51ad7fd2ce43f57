"""What the devices of a claim may need besides their grant: instances that are made on demand, other drivers, and what
programs share a device through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory


class Unmade(msgspec.Struct, frozen=True, kw_only=True):
    """A MIG instance does not exist. refused: the driver said so; otherwise it is unknown and is looked up again."""

    why: str
    refused: bool


class Instances(Protocol):
    """What the preparation of claims needs: instances that exist as long as they are granted."""

    def concerned(self, grants: Sequence[Grant]) -> bool:
        """Return whether something has to be made for what was granted."""
        ...

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        """Make what was granted to claims, by their UIDs. Return why that of some does not exist."""
        ...

    async def settle(self) -> None:
        """Destroy what no grant holds any longer. What cannot be destroyed now is destroyed later."""
        ...

    async def ready(self) -> None:
        """Wait, for a while, until it is known what can be made."""
        ...

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with what exists of it as containers get it."""
        ...


class NoInstances:
    """Nothing is made on demand."""

    def concerned(self, grants: Sequence[Grant]) -> bool:
        return False

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        return {}

    async def settle(self) -> None:
        return

    async def ready(self) -> None:
        return

    def view(self, inventory: Inventory) -> Inventory:
        return inventory


NO_INSTANCES = NoInstances()


class Sharing(Protocol):
    """What GPUs that are shared need in addition to a grant, such as MPS daemons: made before a claim is answered,
    ended before its release is. Each returns errors by the UID of the claim."""

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]: ...
    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]: ...


class NothingShared:
    """Does nothing."""

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Return no errors."""
        return {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Return no errors."""
        return {}


NOTHING_SHARED = NothingShared()


class Passthrough(Protocol):
    """Binds devices to other drivers for claims. bind: returns, by UID, "" for claims whose device was bound, or an
    error. give_back: before these are released; returns errors by UID."""

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        """Return the claims for which something is bound. Raise HostError if that cannot be told for the moment."""
        ...

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]: ...
    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]: ...


class NothingBound:
    """Does nothing."""

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        """Return no claims."""
        return ()

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        """Return no claims."""
        return {}

    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]:
        """Return no errors."""
        return {}


NOTHING_BOUND = NothingBound()


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


class Needed(Protocol):
    """Something that is loaded when it is needed."""

    def if_needed(self) -> Passthrough | None:
        """Return it, or None if nothing needs it."""
        ...


class Then:
    """Sets up devices in one way, and then in another if that is needed; gives back in reverse order."""

    def __init__(self, first: Passthrough, second: Needed) -> None:
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
