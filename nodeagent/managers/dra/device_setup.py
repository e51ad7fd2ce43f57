"""What the devices of a claim may need besides their grant: instances that are made on demand, other drivers, and what
programs share a device through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
