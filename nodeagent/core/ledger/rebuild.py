"""Compare a ledger that may lack decisions with all other sources. Pure.

The result is what to put back, and what is still in use although no source shows exactly what it holds. The ledger
counts as whole again only when every claim and every device in use is in it. Until then no new grants are made, and
whatever is missing from the ledger does not count as an orphan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import ADOPTED, Change, Ledger, released
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant
from nodeagent.errors import InputError, Refused

Of = Callable[[str, tuple[str, ...], str, str], Grant | None]
"""Make a device-plugin grant for (resource, ids, pod UID, container name). Return None if the resource is not served
here; raise InputError if the ids are meaningless."""
KUBELET = "kubelet"
"""Key of Account.unaccounted for kubelet itself."""


class ClaimInUse(msgspec.Struct, frozen=True, kw_only=True):
    """A claim of this driver that kubelet, a file or a container refers to."""

    name: str
    """NAMESPACE/NAME, or its UID if only that is known."""
    source: str
    """Where it was found, as a clause: "kubelet has it prepared"."""


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What is known apart from the ledger. None means that the source could not be asked."""

    recorded: Mapping[str, tuple[Grant, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """The grants recorded in each claim's own file, by claim UID."""
    in_use: Mapping[str, ClaimInUse] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """The claims that kubelet, a file or a container refers to, by claim UID."""
    given: Given | None = None
    """Kubelet's device checkpoint."""
    living: frozenset[str] = frozenset()
    """Ids of those grants, in the ledger or recorded, whose pods are alive."""
    kubelet_silent: str = ""
    """Why kubelet's claims and devices are not known at all; "" if they are known."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """The result of comparing a ledger with the sources."""

    ledger: Ledger
    changes: tuple[Change, ...] = ()
    unaccounted: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why the ledger may still lack something, by claim UID (no source shows what it holds), "recorded/UID" (it is
    known, but does not fit), "RESOURCE/POD UID/CONTAINER" or KUBELET."""


def account(ledger: Ledger, sources: Sources, of: Of) -> Account:
    """Put back everything that is known exactly, and name what is not.

    A grant that only an older copy of the ledger has, and that no source confirms, gives way.
    """
    book = _Book(ledger, sources)
    for uid, grants in sources.recorded.items():
        book.put_back(uid, [one for one in grants if one.id not in book.ledger.grants])
    claims = {one.holder.uid for one in book.ledger.grants.values() if one.holder.api == CLAIM}
    for uid, claim in sources.in_use.items():
        if uid not in claims and uid not in sources.recorded:
            book.unaccounted[uid] = f"claim {claim.name} holds something unknown: {claim.source}"
    for (uid, container), parts in sorted((sources.given or {}).items()):
        for resource in sorted({name for name, _ in parts}):
            book.adopt(resource, tuple(sorted(one for name, one in parts if name == resource)), uid, container, of)
    if sources.kubelet_silent:
        book.unaccounted[KUBELET] = sources.kubelet_silent
    return Account(ledger=book.ledger, changes=tuple(book.changes), unaccounted=MappingProxyType(book.unaccounted))


class _Book:
    """An account that is being drawn up."""

    def __init__(self, ledger: Ledger, sources: Sources) -> None:
        self.ledger = ledger
        self.changes: list[Change] = []
        self.unaccounted: dict[str, str] = {}
        self._sources = sources
        self._recorded = {part for parts in (sources.given or {}).values() for part in parts}

    def put_back(self, uid: str, grants: Iterable[Grant]) -> None:
        """Put back all grants of a claim, or none and record the reason."""
        before = self.ledger, list(self.changes)
        try:
            for one in grants:
                self._take(one, "its claim's file has it, and the ledger lacked it")
        except Refused as refusal:
            self.ledger, self.changes = before
            self.unaccounted[f"recorded/{uid}"] = f"claim {uid} cannot be put back: {refusal.why}"

    def adopt(self, resource: str, ids: tuple[str, ...], uid: str, container: str, of: Of) -> None:
        """Adopt the ids that kubelet has recorded for a container of a pod and that are in no grant."""
        strange = tuple(one for one in ids if (resource, one) not in self.ledger.by_id)
        if not strange:
            return
        try:
            grant = of(resource, strange, uid, container)
            if grant is not None:
                self._take(grant, "kubelet's checkpoint has it, and the ledger lacked it")
        except (InputError, Refused) as error:
            self.unaccounted[f"{resource}/{uid}/{container}"] = f"pod {uid} holds {', '.join(strange)}: {error}"

    def _take(self, grant: Grant, why: str) -> None:
        """Add a grant in place of those that only the ledger knows; raise Refused if it overlaps another attested
        one."""
        stale = [one for one in self.ledger.grants.values() if _overlap(one, grant) and not self._is_attested(one)]
        self.ledger = ledger_of.grant(ledger_of.release(self.ledger, [one.id for one in stale]), grant)
        self.changes += released(stale, f"no source confirms it, and {grant.holder} has what it held")
        self.changes.append(Change(action=ADOPTED, grant=grant, why=why))

    def _is_attested(self, grant: Grant) -> bool:
        """Return whether a source confirms a grant, or could not be asked."""
        if grant.id in self._sources.living:
            return True
        if grant.holder.api == CLAIM:
            return grant.holder.uid in self._sources.recorded or grant.holder.uid in self._sources.in_use
        if grant.holder.api != DEVICE_PLUGIN or self._sources.given is None:
            return True
        return any((grant.holder.resource, one) in self._recorded for one in grant.ids)


def _overlap(one: Grant, other: Grant) -> bool:
    """Return whether two grants cannot both be in a ledger."""
    try:
        ledger_of.grant(Ledger(grants=MappingProxyType({one.id: one})), other)
    except Refused:
        return one.id != other.id
    return False
