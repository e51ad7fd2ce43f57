"""place() with the plain search."""

from __future__ import annotations

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement, Request
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
        raise explain(machine, ledger, request, free, lambda other: find(machine, free, ledger, other) is not None)
    return found


def find(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    if request.cpus > free.bit_count() or request.must_cpus.mask.bit_count() > request.cpus:
        return None
    return place_joint(machine, free, ledger, request)
