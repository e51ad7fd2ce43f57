"""Binds the IOMMU groups of devices to a VFIO driver and gives them back, each step recorded first. Blocks.

After a crash at any point the same call completes what it had begun: it looks at the journal and at the kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import structlog

from nodeagent.errors import HostError
from nodeagent.host.vfio import Functions
from nodeagent.managers.passthrough.journal import Bound, PassthroughJournal

log = structlog.get_logger()


class Binder:
    """One caller at a time."""

    def __init__(self, journal: PassthroughJournal, functions: Functions) -> None:
        self._journal = journal
        self._functions = functions

    def records(self, *, certain: bool = False) -> Mapping[str, Bound]:
        """Return what is recorded, by address. certain: raise HostError if that cannot be told for the moment."""
        return self._journal.read(certain=certain)

    def bind(self, claim: str, address: str, driver: str, known: Collection[str]) -> None:
        """Bind the whole IOMMU group of a function for a claim. known: the functions that may be bound, as the claim
        holds them. Raise HostError."""
        group = self._functions.group(address)
        if strangers := [one for one in group if one not in known]:
            raise HostError(f"cannot bind {address} to {driver}: its IOMMU group has {', '.join(strangers)} as well")
        records = self._journal.read()
        if others := [one for one in group if one in records and records[one].claim != claim]:
            raise HostError(f"cannot bind {address} to {driver}: {', '.join(others)} is not given back yet")
        self._journal.add(self._new(claim, one, driver) for one in group)
        for one in group:
            self._functions.bind(one, driver)
        log.info("passthrough-bound", device=address, functions=group, driver=driver, claim=claim)

    def _new(self, claim: str, address: str, driver: str) -> Bound:
        before, override = self._functions.driver(address), self._functions.override(address)
        return Bound(address=address, claim=claim, driver=driver, before=before, override=override)

    def give_back(self, claims: Collection[str]) -> dict[str, str]:
        """Give back what was bound for some claims. Return, by UID, why something is left."""
        errors: dict[str, str] = {}
        for one in self._journal.read(certain=True).values():
            if one.claim not in claims:
                continue
            try:
                self._functions.give_back(one.address, one.before, one.override)
                self._journal.forget(one.address)
            except HostError as error:
                errors[one.claim] = str(error)
            else:
                log.info("passthrough-given-back", device=one.address, driver=one.before, claim=one.claim)
        return errors

    def orphans(self, held: Collection[str]) -> Sequence[str]:
        """Return the claims for which something is bound although they hold nothing."""
        return sorted({one.claim for one in self._journal.read().values()} - set(held))
