"""How much more of what is short would admit a request: only what pods can give back, and tried before it is advised.

An advice names a number. Of all that could be given back, one choice of that number is made up here and the request is
placed on the state after it: if it does not fit then, other choices are not tried, and nothing is advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.exclusion import blocked, excluded_with, most_together
from nodeagent.core.ledger.free import MEMORY, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.request import BEST_EFFORT, Pages, Placement, Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.index import MachineIndex, may_have

Find = Callable[[int, Ledger, Request], Placement | None]
"""Where a request would go if the CPUs of a mask were free and the rest stood as in a ledger."""
Freed = Callable[[Request], bool]
"""Whether a request would fit if as much were given back as the advice says."""
_OTHERS = Holder(api="")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A request that does not fit, and the state on which it was asked."""

    machine: MachineIndex
    ledger: Ledger
    request: Request
    free: int
    """Mask of the CPUs that can be granted."""
    find: Find

    def fits(self, request: Request) -> bool:
        """Return whether another request would fit on the same state."""
        return self.find(self.free, self.ledger, request) is not None


def advice(question: Question, more: str, freed: Freed) -> str:
    """Return that so much more would admit the request, as it is or with fewer rules; "" if neither is known to."""
    if freed(question.request):
        return f"{more} would admit it"
    return next((f"{how}, {more} would admit it" for how, other in _looser(question.request) if freed(other)), "")


def _looser(request: Request) -> Iterator[tuple[str, Request]]:
    """Yield the request with fewer rules, the smallest changes first, each with its description."""
    loose = replace(request, numa=BEST_EFFORT)
    if request.numa != BEST_EFFORT:
        yield f"under NUMA policy {BEST_EFFORT}", loose
    for name in sorted(request.options):
        yield f"without option {name}", replace(request, options=request.options - {name})
    if request.options and request.numa != BEST_EFFORT:
        yield f"under NUMA policy {BEST_EFFORT} without options", replace(loose, options=frozenset())


def relaxed(request: Request) -> Iterator[tuple[str, Request]]:
    """Yield the request with fewer rules, and with one CPU more, as what would admit it if it fits."""
    for how, other in _looser(request):
        text = f"{how.removeprefix('under ')} would admit it" if how.startswith("under ") else f"{how} it would fit"
        yield text, other
    if request.cpus > 1 and opt.FULL_PCPUS in request.options:
        yield f"{request.cpus + 1} CPUs would fit", replace(request, cpus=request.cpus + 1)


# ---------------------------------------------------------------- CPUs


def with_cpus(question: Question, request: Request) -> bool:
    """Return whether a request would fit if some held CPUs were free, as many as it is short of."""
    machine, ledger = question.machine, question.ledger
    most = machine.usable & ~ledger.reserved.mask
    if request.within_cpus is not None:
        most &= request.within_cpus.mask
    # No more are given back than are missing: all that are free have to be among those that it gets.
    found = question.find(most | question.free, ledger, replace(request, must_cpus=CpuSet.of_mask(question.free)))
    return found is not None and question.find(question.free | found.cpus.mask, ledger, request) is not None


# ---------------------------------------------------------------- devices


def with_devices(question: Question, kind: str, request: Request) -> bool:
    """Return whether a request would fit if some held devices of a kind were free, as many as it is short of."""
    inventory, ledger = question.machine.inventory, question.ledger
    taken = blocked(inventory, ledger)
    mine = [one for one in inventory.devices if one.kind in request.devices and may_have(request, one)]
    free = frozenset(one.id for one in mine if one.id not in taken)
    own = most_together(inventory, (one.id for one in mine if one.kind == kind and one.id in free))
    asked = replace(
        request,
        within_devices=free | {one.id for one in mine if one.kind == kind},
        must_devices=request.must_devices | frozenset(own),
    )
    found = question.find(question.free, _without_devices(ledger, ledger.devices_taken), asked)
    if found is None:
        return False
    given_back = excluded_with(inventory, ledger, frozenset(found.devices) - free)
    return question.find(question.free, _without_devices(ledger, given_back), request) is not None


def _without_devices(ledger: Ledger, gone: frozenset[str]) -> Ledger:
    """Return the ledger with some devices given back by their holders."""

    def rest(grants: Mapping[str, Grant]) -> Mapping[str, Grant]:
        return MappingProxyType({id: _less(one, gone) for id, one in grants.items()})

    return replace(ledger, grants=rest(ledger.grants), foreign=rest(ledger.foreign))


def _less(grant: Grant, gone: frozenset[str]) -> Grant:
    if gone.isdisjoint((*grant.devices, *grant.shares)):
        return grant
    return replace(
        grant,
        devices=tuple(one for one in grant.devices if one not in gone),
        shares=tuple(one for one in grant.shares if one not in gone),
        amounts=tuple(one for one in grant.amounts if one[0] not in gone),
        things=tuple(one for one in grant.things if one[0] not in gone),
    )


# ---------------------------------------------------------------- pages and memory


def with_pages(question: Question, size: int, missing: int, request: Request) -> bool:
    """Return whether a request would fit if so many held pages of a size, or bytes of memory, were free: as many as one
    node has of them, the rest from the others, whichever node that is."""
    held = _held(question, size, request)
    if sum(held.values()) < missing:
        return False
    return any(
        question.find(question.free, _giving_back(question.ledger, size, given), request) is not None
        for given in _choices(held, missing)
    )


def _held(question: Question, size: int, request: Request) -> dict[NodeId, int]:
    """Return how much each node would get back if nothing were held."""
    inventory = question.machine.inventory
    now = Stock.of(inventory, question.ledger, request)
    row = [*now.want].index(size)
    then = Stock.of(inventory, Ledger(), request)
    amounts = zip(now.order, then.there[row], now.there[row], strict=True)
    return {node: whole - left for node, whole, left in amounts if whole > left}


def _choices(held: Mapping[NodeId, int], missing: int) -> Iterator[dict[NodeId, int]]:
    """Yield ways to give back so much: from one node first, then from the others in order."""
    for first in sorted(held):
        given, rest = {}, missing
        for node in (first, *(one for one in sorted(held) if one != first)):
            given[node] = min(held[node], rest)
            rest -= given[node]
        yield given


def _giving_back(ledger: Ledger, size: int, given: Mapping[NodeId, int]) -> Ledger:
    """Return the ledger with so much less held of one size on each node."""
    grants = {id: _without_size(one, size) for id, one in ledger.grants.items()}
    if size == MEMORY:
        left = {node: held - given.get(node, 0) for node, held in ledger.memory_held.items()}
        rest = Grant(id="\0others", holder=_OTHERS, memory=tuple(left.items()))
    else:
        counts = ((node, held) for (node, one), held in ledger.pages_held.items() if one == size)
        rest = Grant(id="\0others", holder=_OTHERS, hugepages=tuple(_pages(counts, size, given)))
    return replace(ledger, grants=MappingProxyType({**grants, rest.id: rest}))


def _pages(counts: Iterable[tuple[NodeId, int]], size: int, given: Mapping[NodeId, int]) -> Iterator[Pages]:
    for node, held in counts:
        yield Pages(node=node, page_bytes=size, pages=held - given.get(node, 0))


def _without_size(grant: Grant, size: int) -> Grant:
    if size == MEMORY:
        return replace(grant, memory=()) if grant.memory else grant
    return replace(grant, hugepages=tuple(one for one in grant.hugepages if one.page_bytes != size))
