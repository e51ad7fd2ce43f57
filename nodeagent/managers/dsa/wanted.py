"""A slot of an accelerator as a claim wants it made."""

from __future__ import annotations

import msgspec

from nodeagent.core.dsa.division import Held, Queue

Place = tuple[str, int]
"""The address of an accelerator, and a slot."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A slot as a claim wants it made. queues: what the accelerator is divided into."""

    address: str
    slot: int
    claim: str
    grant: str
    queues: tuple[Queue, ...]

    @property
    def place(self) -> Place:
        """Return its slot."""
        return self.address, self.slot

    def held(self) -> Held:
        """Return what is recorded before it is made."""
        return Held(slot=self.slot, claim=self.claim, grant=self.grant)

    @property
    def what(self) -> str:
        """Return it as errors call it."""
        return f"cannot make queue {self.slot} of {self.address}"
