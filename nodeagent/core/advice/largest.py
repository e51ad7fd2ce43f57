"""The most CPUs that one NUMA node could give, together with the devices and pages of a request, if pods were moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.advice.moves import MOST_TRIED, Advice, Tick, advise
from nodeagent.core.advice.tenants import Tenant
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import FULL_PCPUS
from nodeagent.core.model.request import SINGLE, Request
from nodeagent.core.placement.index import machine_of
from nodeagent.core.placement.place import find

MOST_TRIED_IN_ALL = 40_000
"""How many sets of pods are tried for all numbers of CPUs together before numbers are left out."""


class Largest(msgspec.Struct, frozen=True, kw_only=True):
    """What fits now, and what would after moves."""

    now_cpus: int
    """The largest number of CPUs that one node gives without any move."""
    advice: Advice
    """How to make room for the largest number that was found."""
    exact: bool
    """Whether no larger number is possible."""


def largest(
    inventory: Inventory,
    ledger: Ledger,
    request: Request,
    tenants: Sequence[Tenant],
    *,
    most_tried: int = MOST_TRIED,
    tick: Tick = lambda tried: None,
) -> Largest:
    """Return the most CPUs that fit on one node after moves; the rest of the request comes with them.

    Every number is tried from the top until moves for one are known. Raise nothing: with no CPU at all the advice says
    why not.
    """
    one_node, tried, exact = replace(request, numa=SINGLE), 0, True
    now = _now(inventory, ledger, one_node)
    advice = advise(inventory, ledger, replace(one_node, cpus=max(now, 1)), tenants, most_tried=most_tried)
    for cpus in _numbers(inventory, ledger, one_node):
        if cpus <= now:
            break
        if tried >= MOST_TRIED_IN_ALL:
            return Largest(now_cpus=now, advice=advice, exact=False)
        asked = [0]

        def count(number: int, asked: list[int] = asked, before: int = tried) -> None:
            asked[0] = number
            tick(before + number)

        found = advise(inventory, ledger, replace(one_node, cpus=cpus), tenants, most_tried=most_tried, tick=count)
        tried += asked[0]
        if found.after is not None:
            return Largest(now_cpus=now, advice=found, exact=exact)
        exact = exact and found.exact
    return Largest(now_cpus=now, advice=advice, exact=exact)


def _step(inventory: Inventory, request: Request) -> int:
    cores = machine_of(inventory).cores.values()
    return max((core.bit_count() for core in cores), default=1) if FULL_PCPUS in request.options else 1


def _numbers(inventory: Inventory, ledger: Ledger, request: Request) -> Iterator[int]:
    """Yield the numbers of CPUs that one node may give, the largest first."""
    free = len(inventory.cpus_usable - ledger.cpus_held - ledger.reserved)
    most = max((len(node.cpus & inventory.cpus_usable) for node in inventory.numa_nodes), default=0)
    step = _step(inventory, request)
    yield from range(min(free, most) // step * step, 0, -step)


def _now(inventory: Inventory, ledger: Ledger, request: Request) -> int:
    numbers = _numbers(inventory, ledger, request)
    return next((one for one in numbers if find(inventory, ledger, replace(request, cpus=one)) is not None), 0)
