"""Compare kubelet's list with the ledger: name holders, find grants to release and holdings that were never recorded.

Pure. core/ledger/release.py decides when a grant that is not listed may be released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import CONFIRMED, RELEASED, Change, Ledger
from nodeagent.core.ledger.release import Absences, Memory, Patience, judge
from nodeagent.core.ledger.witness import NO_WITNESSES, Given, Witnesses, pods_by_checkpoint
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder, Holding
from nodeagent.errors import InputError

Adopt = Callable[[Holding], Grant]
"""Make a grant for a holding that the ledger does not know. Raise InputError if its ids are unknown or no longer
exist."""
_NAMED = {True: "kubelet names its holder", False: "kubelet's checkpoint names its pod"}
"""Why a grant is confirmed, by whether kubelet has ever listed it."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """The changes that follow from a list."""

    confirmed: tuple[Grant, ...] = ()
    """Grants whose holder has become known or has changed."""
    absences: Absences = msgspec.field(default_factory=lambda: Absences(memory=Memory()))
    adopted: tuple[Grant, ...] = ()
    unknown: tuple[tuple[Holding, str], ...] = ()
    """Holdings that cannot be adopted, with the reason."""

    @property
    def released(self) -> tuple[Grant, ...]:
        """Return the grants to release."""
        return self.absences.released

    @property
    def changes(self) -> tuple[Change, ...]:
        """Return the changes to grants that the ledger has, each with its reason."""
        listed = (Change(action=CONFIRMED, grant=one, why=_NAMED[one.confirmed]) for one in self.confirmed)
        gone = (Change(action=RELEASED, grant=one, why=self.absences.why[one.id]) for one in self.released)
        return (*listed, *gone)


def compare(
    ledger: Ledger,
    holdings: Iterable[Holding],
    memory: Memory,
    now: float,
    patience: Patience,
    resources: Container[str],
    adopt: Adopt,
    young: Container[str] = frozenset(),
    witnesses: Witnesses = NO_WITNESSES,
) -> Findings:
    """Compare a fresh list with the ledger.

    memory: Findings.absences.memory of the previous list. now: when kubelet was asked, in seconds of any steady clock.
    resources: what is served and may therefore be adopted; a resource no longer served is held for as long as kubelet
    lists it. young: ids of grants that are newer than the list; they are left alone.
    """
    every = list(holdings)
    listed = _listed(ledger, every)
    named = {one: _named(ledger.grants[one], holding) for one, holding in listed.items() if one not in young}
    old = [one for one in ledger.grants.values() if one.holder.api == DEVICE_PLUGIN and one.id not in young]
    confirmed = tuple(_with_pods(old, named, witnesses.given))
    adopted, unknown = _adopted(ledger, [one for one in every if one.resource in resources], adopt)
    known = ledger_of.amend(ledger, confirmed) if confirmed else ledger
    return Findings(
        confirmed=confirmed,
        absences=judge(known, listed, young, memory, witnesses, now, patience),
        adopted=tuple(adopted),
        unknown=tuple(unknown),
    )


def _with_pods(grants: Sequence[Grant], named: Mapping[str, Grant], given: Given | None) -> Iterator[Grant]:
    """Yield the grants that have news: their holders' names, or the UIDs of their pods according to the checkpoint."""
    pods = pods_by_checkpoint(grants, given)
    for old in grants:
        new = replace(named.get(old.id, old), pods=pods[old.id])
        if new != old:
            yield new


def _listed(ledger: Ledger, holdings: Iterable[Holding]) -> dict[str, Holding]:
    """Return each listed grant's holding: the one with the same ids, else with most of them, else the first.

    A sidecar is listed alongside the container with which it shares ids.
    """
    best: dict[str, tuple[bool, int, Holding]] = {}
    for holding in holdings:
        keys = [(holding.resource, one) for one in holding.ids]
        for one, ids in Counter(ledger.by_id[key].id for key in keys if key in ledger.by_id).items():
            same = set(ledger.grants[one].ids) == set(holding.ids)
            if one not in best or (same, ids) > best[one][:2]:
                best[one] = same, ids, holding
    return {one: holding for one, (_, _, holding) in best.items()}


def _adopted(
    ledger: Ledger, holdings: Iterable[Holding], adopt: Adopt
) -> tuple[list[Grant], list[tuple[Holding, str]]]:
    """Return grants for holdings that the ledger does not know, and the holdings for which no grant can be made."""
    adopted: list[Grant] = []
    unknown: list[tuple[Holding, str]] = []
    for holding in holdings:
        strange = tuple(one for one in holding.ids if (holding.resource, one) not in ledger.by_id)
        if not strange:
            continue
        try:
            adopted.append(adopt(replace(holding, ids=strange)))
        except InputError as error:
            unknown.append((holding, str(error)))
    return adopted, unknown


def _named(grant: Grant, holding: Holding) -> Grant:
    """Return the grant with the holder that kubelet names."""
    holder = Holder(
        api=DEVICE_PLUGIN,
        resource=grant.holder.resource,
        namespace=holding.namespace,
        pod=holding.pod,
        container=holding.container,
    )
    return replace(grant, holder=holder, confirmed=True)
