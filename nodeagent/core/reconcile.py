"""What kubelet lists against what the ledger holds: who holds what by name, what is released, what was never recorded.

Pure. A grant that kubelet does not list is released only after it has been missing for long enough: a pod that is being
admitted is not listed yet, and a kubelet that has just started lists nothing at first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace

from nodeagent.core.ledger import Ledger
from nodeagent.core.model import DEVICE_PLUGIN, Grant, Holder, Holding
from nodeagent.errors import InputError

Adopt = Callable[[Holding], Grant]
"""A grant for a holding that the ledger does not know; InputError where its ids mean nothing (any more)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a grant may be missing from kubelet's list, in seconds."""

    unconfirmed_s: float = 60.0
    """Never listed yet: its pod may still be being admitted."""
    confirmed_s: float = 5.0

    def of(self, grant: Grant) -> float:
        return self.confirmed_s if grant.confirmed else self.unconfirmed_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a list changes."""

    confirmed: tuple[Grant, ...] = ()
    """Grants whose holder is known now, or is another than before."""
    missing: Mapping[str, float]
    """Since when each unlisted grant has been missing, by grant id."""
    released: tuple[Grant, ...] = ()
    adopted: tuple[Grant, ...] = ()
    unknown: tuple[tuple[Holding, str], ...] = ()
    """Holdings that cannot be adopted, with the reason."""


def compare(
    ledger: Ledger,
    holdings: Iterable[Holding],
    missing: Mapping[str, float],
    now: float,
    patience: Patience,
    resources: Container[str],
    adopt: Adopt,
    young: Container[str] = frozenset(),
    allocated: Container[tuple[str, str]] = frozenset(),
) -> Findings:
    """Compare a fresh list with the ledger.

    missing: Findings.missing of the list before. resources: what is served, and so may be adopted; what was served once
    is held for as long as kubelet lists it. young: ids of grants that the list is too old to know; they are left alone.
    allocated: (resource, id) that kubelet's own checkpoint has with a container. The list leaves init containers out
    and the checkpoint does not: a grant that was never listed is missing only if the checkpoint lacks it too.
    """
    every = list(holdings)
    listed = _listed(ledger, every)
    named = [_named(ledger.grants[one], holding) for one, holding in listed.items() if one not in young]
    away = [
        grant
        for grant in ledger.grants.values()
        if grant.holder.api == DEVICE_PLUGIN
        and grant.id not in listed
        and grant.id not in young
        and (grant.confirmed or not any((grant.holder.resource, one) in allocated for one in grant.ids))
    ]
    since = {grant.id: missing.get(grant.id, now) for grant in away}
    adopted, unknown = _adopted(ledger, [one for one in every if one.resource in resources], adopt)
    return Findings(
        confirmed=tuple(grant for grant in named if grant != ledger.grants[grant.id]),
        missing=since,
        released=tuple(grant for grant in away if now - since[grant.id] >= patience.of(grant)),
        adopted=tuple(adopted),
        unknown=tuple(unknown),
    )


def _listed(ledger: Ledger, holdings: Iterable[Holding]) -> dict[str, Holding]:
    """The holding of each grant that kubelet lists: the one with the same ids, else with most of them, else the first.
    A sidecar is listed beside the container that it shares ids with."""
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
    """Grants for what the ledger does not know, and what cannot be made one."""
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
    """The grant with the holder that kubelet names."""
    holder = Holder(
        api=DEVICE_PLUGIN,
        resource=grant.holder.resource,
        namespace=holding.namespace,
        pod=holding.pod,
        container=holding.container,
    )
    return replace(grant, holder=holder, confirmed=True)
