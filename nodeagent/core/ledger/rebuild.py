"""A ledger that may lack decisions against everything that others know: what is put back, and what is still in use of
although no source says what exactly it holds. Pure.

A ledger counts as whole again only when every claim and every device in use is in it. Until then new grants are held
back, and nothing that is not in the ledger counts as an orphan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import ADOPTED, RELEASED, Change, Ledger
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant
from nodeagent.errors import InputError, Refused

Of = Callable[[str, tuple[str, ...], str, str], Grant | None]
"""A device-plugin grant for (resource, ids, pod UID, container name); None where the resource is not served here,
InputError where the ids mean nothing."""
KUBELET = "kubelet"
"""Key of Account.unaccounted for kubelet itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimInUse:
    """A claim of this driver that kubelet, a file or a container names."""

    name: str
    """NAMESPACE/NAME, or its UID where only that is known."""
    source: str
    """Who names it, as a clause: "kubelet has it prepared"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is known apart from the ledger. None: the source could not be asked."""

    recorded: Mapping[str, tuple[Grant, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """By claim UID: the grants that the claim's own file carries."""
    in_use: Mapping[str, ClaimInUse] = field(default_factory=lambda: MappingProxyType({}))
    """By claim UID: the claims that kubelet, a file or a container names."""
    given: Given | None = None
    """Kubelet's device checkpoint."""
    living: frozenset[str] = frozenset()
    """Ids of the grants, of the ledger or recorded, whose pods live."""
    kubelet_silent: str = ""
    """Why kubelet's word on claims and devices is not known at all; "": it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What comparing a ledger with the sources shows."""

    ledger: Ledger
    changes: tuple[Change, ...] = ()
    unaccounted: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why the ledger may still lack something, by claim UID (no source says what it holds), "recorded/UID" (it is
    known, and does not fit), "RESOURCE/POD UID/CONTAINER" or KUBELET."""


def account(ledger: Ledger, sources: Sources, of: Of) -> Account:
    """Put back what is known exactly, and name what is not. What an older copy of the ledger still has, and no
    source confirms, gives way."""
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
    """An account while it is drawn up."""

    def __init__(self, ledger: Ledger, sources: Sources) -> None:
        self.ledger = ledger
        self.changes: list[Change] = []
        self.unaccounted: dict[str, str] = {}
        self._sources = sources
        self._recorded = {part for parts in (sources.given or {}).values() for part in parts}

    def put_back(self, uid: str, grants: Iterable[Grant]) -> None:
        """All of a claim, or nothing with the reason."""
        before = self.ledger, list(self.changes)
        try:
            for one in grants:
                self._take(one)
        except Refused as refusal:
            self.ledger, self.changes = before
            self.unaccounted[f"recorded/{uid}"] = f"claim {uid} cannot be put back: {refusal.why}"

    def adopt(self, resource: str, ids: tuple[str, ...], uid: str, container: str, of: Of) -> None:
        """What kubelet has recorded for a container of a pod, as far as no grant has it."""
        strange = tuple(one for one in ids if (resource, one) not in self.ledger.by_id)
        if not strange:
            return
        try:
            grant = of(resource, strange, uid, container)
            if grant is not None:
                self._take(grant)
        except (InputError, Refused) as error:
            self.unaccounted[f"{resource}/{uid}/{container}"] = f"pod {uid} holds {', '.join(strange)}: {error}"

    def _take(self, grant: Grant) -> None:
        """Add a grant, in place of those that only the ledger knows; Refused where another one is attested too."""
        stale = [one for one in self.ledger.grants.values() if _overlap(one, grant) and not self._is_attested(one)]
        self.ledger = ledger_of.grant(ledger_of.release(self.ledger, [one.id for one in stale]), grant)
        self.changes += [Change(action=RELEASED, grant=one) for one in stale]
        self.changes.append(Change(action=ADOPTED, grant=grant))

    def _is_attested(self, grant: Grant) -> bool:
        """Whether a source confirms a grant, or could not be asked."""
        if grant.id in self._sources.living:
            return True
        if grant.holder.api == CLAIM:
            return grant.holder.uid in self._sources.recorded or grant.holder.uid in self._sources.in_use
        if grant.holder.api != DEVICE_PLUGIN or self._sources.given is None:
            return True
        return any((grant.holder.resource, one) in self._recorded for one in grant.ids)


def _overlap(one: Grant, other: Grant) -> bool:
    """Whether two grants cannot both be in a ledger."""
    try:
        ledger_of.grant(Ledger(grants=MappingProxyType({one.id: one})), other)
    except Refused:
        return one.id != other.id
    return False
