"""place() with the plain search."""

from __future__ import annotations

import functools

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement import place as compiled
from nodeagent.core.placement.index import MachineIndex, machine_of
from nodeagent.core.placement.refusal import explain
from tests.oracles.search.joint import place_joint


def place(inventory: Inventory, ledger: Ledger, request: Request) -> Placement:
    """Return the cheapest placement of a request that is not for CPUs alone; Refused where nothing fits."""
    machine = machine_of(inventory)
    free = machine.usable & ~(ledger.cpus_held.mask | ledger.reserved.mask)
    if request.within_cpus is not None:
        free &= request.within_cpus.mask
    free |= request.must_cpus.mask & machine.usable
    found = find(machine, free, ledger, request)
    if found is None:
        raise explain(machine, ledger, request, free, functools.partial(find, machine))
    return found


def find(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    if request.cpus > free.bit_count() or request.must_cpus.mask.bit_count() > request.cpus:
        return None
    if not (request.devices or request.hugepages or request.memory_bytes or _is_near_something(request)):
        # A refusal asks about parts of the request, also about its CPUs by themselves: that search is not doubled here.
        return compiled._find(machine, free, ledger, request)
    return place_joint(machine, free, ledger, request)


def _is_near_something(request: Request) -> bool:
    return bool(request.near or request.near_cpus or request.near_nodes)
