"""Which pods to move so that a request lies as close together as on the empty machine. Nothing is moved here.

A plan is what the agent would do: the pods of the plan end, the request is placed, and the pods come back one after the
other in the order of the plan. Each is placed as any request is, must fit, and may not lie farther apart than before
(the parts of the cost up to numa_distance). Sets of pods are tried in order of disruption: fewest pods, then fewest
CPUs and devices. So the first plan that is found is the least disruptive, unless the search was cut short.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.advice.cost_words import as_well_as
from nodeagent.core.advice.hypothetical import empty, without
from nodeagent.core.advice.release import by_disruption
from nodeagent.core.advice.standing import as_held, request_of, unmovable
from nodeagent.core.advice.tenants import Tenant
from nodeagent.core.ledger.exclusion import blocked, most_together, things_of
from nodeagent.core.ledger.free import Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.place import find

MOST_TRIED, MOST_SETS = 4000, 100_000
"""How many sets of pods are tried, and how many of one size are compared, before the search gives up being exact."""
MOST_ORDERED = 4
"""Up to so many pods come back in every order; more than that only the largest first."""
Tick = Callable[[int], None]


class MovedUnit(msgspec.Struct, frozen=True, kw_only=True):
    """One container or claim before and after a move."""

    name: str
    request: Request
    before: Placement
    after: Placement


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant that is moved, with each of its parts in the order in which they come back."""

    tenant: Tenant
    units: tuple[MovedUnit, ...]


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """Which moves make a request aligned, if any are known to."""

    request: Request
    now: Placement | None
    """Where it would go without any move."""
    on_empty: Placement | None
    moves: tuple[Move, ...] = ()
    """In the order in which the pods come back."""
    after: Placement | None = None
    """Where it goes after the moves; None if no moves are known that make it aligned."""
    exact: bool = True
    """Whether no less disruptive set of moves does; without `after`, whether none does at all."""
    why_not: str = ""
    """Why no move can help, as a clause."""


class _Movable(msgspec.Struct, frozen=True):
    tenant: Tenant
    units: tuple[tuple[str, Request, Placement], ...]


def advise(
    inventory: Inventory,
    ledger: Ledger,
    request: Request,
    tenants: Sequence[Tenant],
    *,
    most_tried: int = MOST_TRIED,
    tick: Tick = lambda tried: None,
) -> Advice:
    """Return the least disruptive moves after which a request is placed as on the empty machine.

    inventory: with pages that holders use counted as granted only (hypothetical.untouched). tick: called with the
    number of sets that were tried.
    """
    return _Search(inventory, ledger, request).advise(tenants, most_tried, tick)


class _Search:
    """One request on one machine."""

    def __init__(self, inventory: Inventory, ledger: Ledger, request: Request) -> None:
        self._inventory = inventory
        self._ledger = ledger
        self._request = request
        self._empty = empty(ledger)
        self._on_empty = find(inventory, self._empty, request)

    def advise(self, tenants: Sequence[Tenant], most_tried: int, tick: Tick) -> Advice:
        advice = Advice(
            request=self._request,
            now=find(self._inventory, self._ledger, self._request),
            on_empty=self._on_empty,
        )
        if self._on_empty is None:
            return replace(advice, why_not="it would be refused on the empty machine as well")
        if why := self._lacking():
            return replace(advice, why_not=why)
        movable = [found for one in tenants if (found := self._movable(one)) is not None]
        if self._placed_without([one.tenant for one in movable]) is None:
            return replace(advice, why_not="what cannot be moved is in the way")
        return self._least_disruptive(advice, movable, most_tried, tick) or self._by_node(advice, movable)

    def _least_disruptive(
        self, advice: Advice, movable: Sequence[_Movable], most_tried: int, tick: Tick
    ) -> Advice | None:
        """Return the first plan in order of disruption, or that there is none; None if too few sets could be tried."""
        known, exact, tried = {id(one.tenant): one for one in movable}, True, 0
        for tried, some in enumerate(by_disruption([one.tenant for one in movable], MOST_SETS), start=1):
            if tried > most_tried:
                return None
            tick(tried)
            exact = exact and len(some) <= MOST_ORDERED
            if plan := self._plan([known[id(one)] for one in some]):
                return replace(advice, moves=plan[0], after=plan[1], exact=exact)
        if tried < 1 << len(movable) or not exact:
            return None
        return replace(advice, why_not="no set of pods that come back as close together as now makes room")

    def _lacking(self) -> str:
        """Return of what too little is free, wherever it lies: pods that come back take as much as before."""
        inventory, ledger, request = self._inventory, self._ledger, self._request
        free = len(inventory.cpus_usable - ledger.cpus_held - ledger.reserved)
        if request.cpus > free:
            return f"only {free} CPUs are free, and pods that are moved take theirs again"
        taken = blocked(inventory, ledger)
        for kind, want in request.devices.items():
            every = (one for one in inventory.devices_by_kind.get(kind, ()) if not one.members)
            left = [one.id for one in every if one.id not in taken]
            if want > len(most_together(inventory, left)):
                return f"only {len(left)} devices of kind {kind} are free, and pods that are moved take theirs again"
        stock = Stock.of(inventory, ledger, request)
        if any(want > stock.sum(size) for size, want in stock.want.items()):
            return "too few pages or too little memory is free, and pods that are moved take theirs again"
        return ""

    def _movable(self, tenant: Tenant) -> _Movable | None:
        """Return a tenant with what each of its parts asks for and where it is; None if it cannot be planned with."""
        units = []
        for unit in tenant.units():
            if unmovable(self._inventory, unit):
                return None
            request = request_of(self._inventory, unit)
            here = as_held(self._inventory, self._empty, unit, request)
            if here is None:
                return None
            units.append((unit.name, request, here))
        return _Movable(tenant, tuple(units))

    def _placed_without(self, gone: Sequence[Tenant]) -> Placement | None:
        """Return where the request goes without some tenants, or None if it is not aligned there."""
        rest = without(self._ledger, (grant for one in gone for grant in one.grants))
        placed = find(self._inventory, rest, self._request)
        assert self._on_empty is not None
        return placed if placed is not None and as_well_as(placed, self._on_empty) else None

    def _plan(self, some: Sequence[_Movable]) -> tuple[tuple[Move, ...], Placement] | None:
        """Return the moves of some tenants in the first order in which all come back, and where the request goes."""
        placed = self._placed_without([one.tenant for one in some])
        if placed is None:
            return None
        rest = without(self._ledger, (grant for one in some for grant in one.tenant.grants))
        ledger = self._with(rest, "request", placed)
        for order in _orders(some):
            if (moves := self._all_back(ledger, order)) is not None:
                return moves, placed
        return None

    def _all_back(self, ledger: Ledger, order: Sequence[_Movable]) -> tuple[Move, ...] | None:
        moves = []
        for one in order:
            moved = []
            for name, request, before in one.units:
                after = find(self._inventory, ledger, request)
                if after is None or not as_well_as(after, before):
                    return None
                ledger = self._with(ledger, f"\0{len(ledger.grants)}", after)
                moved.append(MovedUnit(name=name, request=request, before=before, after=after))
            moves.append(Move(tenant=one.tenant, units=tuple(moved)))
        return tuple(moves)

    def _with(self, ledger: Ledger, grant_id: str, placed: Placement) -> Ledger:
        grant = Grant(
            id=grant_id,
            holder=Holder(api=""),
            cpus=placed.cpus,
            hugepages=placed.hugepages,
            memory=placed.memory,
            devices=placed.devices,
            things=things_of(self._inventory, placed.devices),
        )
        return replace(ledger, grants=MappingProxyType({**ledger.grants, grant.id: grant}))

    def _by_node(self, advice: Advice, movable: Sequence[_Movable]) -> Advice:
        """Return a plan that clears one NUMA node, tenant by tenant, the least disruptive first; if there is one."""
        plans = []
        for node in self._inventory.numa_nodes:
            here = [
                one for one in movable if not one.tenant.cpus.isdisjoint(node.cpus) or self._has_device(one, node.id)
            ]
            for count in range(1, len(here) + 1):
                if plan := self._plan(here[:count]):
                    plans.append((sum(len(one.tenant.pods) for one in here[:count]), node.id, plan))
                    break
        if not plans:
            return replace(advice, exact=False)
        _, _, (moves, after) = min(plans, key=lambda one: one[:2])
        return replace(advice, moves=moves, after=after, exact=False)

    def _has_device(self, one: _Movable, node: int) -> bool:
        return any(self._inventory.device_by_id[id].numa_node == node for id in one.tenant.devices)


def _orders(some: Sequence[_Movable]) -> Iterator[Sequence[_Movable]]:
    """Yield the orders in which tenants come back: the largest first, then all others if they are few."""
    largest_first = sorted(some, key=lambda one: one.tenant.weight, reverse=True)
    return itertools.permutations(largest_first) if len(some) <= MOST_ORDERED else iter([largest_first])
