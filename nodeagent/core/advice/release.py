"""Who stands in the way of a request that does not fit: the smallest set of pods whose end would admit it.

Fewer pods come before fewer CPUs and devices, those before names. Every set of one pod is tried before any of two, and
so on: what is found is the smallest there is. With many pods that takes too long; then pods are let go one after the
other as long as the rest still admits the request, the most disruptive first. What is left cannot be made smaller by
leaving one out, but another set may be smaller, and `exact` is False.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

from nodeagent.core.advice.hypothetical import without
from nodeagent.core.advice.tenants import Tenant
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.place import find

MOST_TRIED, MOST_SETS = 4000, 100_000
"""How many sets of pods are tried, and how many of one size are compared, before the search gives up being exact."""
Admits = Callable[[Sequence[Tenant]], bool]


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """Tenants whose end would admit a request, and where it would then go."""

    tenants: tuple[Tenant, ...]
    placement: Placement
    exact: bool
    """Whether no smaller set does."""


def smallest_release(
    inventory: Inventory, ledger: Ledger, request: Request, tenants: Sequence[Tenant], *, most_tried: int = MOST_TRIED
) -> Release | None:
    """Return the smallest set of tenants whose end would admit a request, or None if none would.

    inventory: with pages that holders use counted as granted only (hypothetical.untouched).
    """

    def admits(some: Sequence[Tenant]) -> bool:
        return find(inventory, _after(ledger, some), request) is not None

    some = [one for one in tenants if _matters(inventory, ledger, request, one)]
    if not admits(some):
        return None
    chosen, exact = smallest_set(some, admits, _enough(inventory, ledger, request), most_tried=most_tried)
    placement = find(inventory, _after(ledger, chosen), request)
    assert placement is not None
    return Release(tenants=tuple(chosen), placement=placement, exact=exact)


def smallest_set(
    tenants: Sequence[Tenant],
    admits: Admits,
    may_admit: Admits = lambda some: True,
    *,
    most_tried: int = MOST_TRIED,
    most_sets: int = MOST_SETS,
) -> tuple[list[Tenant], bool]:
    """Return the least disruptive set that `admits`, and whether it is known to be. All tenants together must.

    may_admit: a cheaper test that no set that admits fails.
    """
    tried = 0
    for some in by_disruption(tenants, most_sets):
        if not may_admit(some):
            continue
        if tried == most_tried:
            break
        tried += 1
        if admits(some):
            return list(some), True
    return _without_needless(tenants, admits), False


def by_disruption(tenants: Sequence[Tenant], most_sets: int) -> Iterator[tuple[Tenant, ...]]:
    """Yield sets of tenants, the least disruptive first; ends before the first size with more than `most_sets` sets.

    A tenant of several pods counts with all of them, so sets are ordered by the number of pods that they have.
    """
    weights = [one.weight for one in tenants]

    def weight(some: tuple[int, ...]) -> tuple[int, int, list[tuple[str, ...]]]:
        pods, parts, names = zip(*map(weights.__getitem__, some), strict=True) if some else ((), (), ())
        return sum(pods), sum(parts), sorted(names)

    waiting: list[tuple[int, ...]] = []
    for size in range(len(tenants) + 1):
        if math.comb(len(tenants), size) > most_sets:
            return
        waiting += itertools.combinations(range(len(tenants)), size)
        waiting.sort(key=weight)
        # Sets of more tenants have more pods than this size.
        ready = sum(weight(one)[0] <= size for one in waiting)
        yield from (tuple(map(tenants.__getitem__, one)) for one in waiting[:ready])
        waiting = waiting[ready:]
    yield from (tuple(map(tenants.__getitem__, one)) for one in waiting)


def _without_needless(tenants: Sequence[Tenant], admits: Admits) -> list[Tenant]:
    needed = list(tenants)
    for one in sorted(tenants, key=lambda one: one.weight, reverse=True):
        fewer = [other for other in needed if other is not one]
        if admits(fewer):
            needed = fewer
    return needed


def _after(ledger: Ledger, gone: Sequence[Tenant]) -> Ledger:
    return without(ledger, (grant for one in gone for grant in one.grants))


def _matters(inventory: Inventory, ledger: Ledger, request: Request, tenant: Tenant) -> bool:
    """Return whether a tenant holds anything of the kinds that are requested."""
    if request.cpus and tenant.cpus & inventory.cpus_usable:
        return True
    if any(size in request.hugepages for one in tenant.grants for size in (p.page_bytes for p in one.hugepages)):
        return True
    if request.memory_bytes and any(one.memory for one in tenant.grants):
        return True
    known = inventory.device_by_id
    blocked = excluded_with(inventory, ledger, tenant.devices) if request.devices else frozenset()
    return any(one in known and known[one].kind in request.devices for one in blocked)


def _enough(inventory: Inventory, ledger: Ledger, request: Request) -> Admits:
    """Return a test whether a set gives back enough CPUs, wherever they are."""
    free = inventory.cpus_usable - ledger.cpus_held - ledger.reserved
    return lambda some: len(free) + sum(len(one.cpus) for one in some) >= request.cpus
