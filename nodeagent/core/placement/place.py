"""Entry point of placement: the same inventory, ledger and request give the same placement on every machine.

Costs are compared component by component; the smallest wins. cpu_choice.py defines what options and NUMA policies mean
for CPUs; joint.py brings together the devices, CPUs and pages of one request.
"""

from __future__ import annotations

import functools

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, Placement, PlacementCost, Request
from nodeagent.core.placement.cpu_choice import limits_of, search_cpus
from nodeagent.core.placement.index import MachineIndex, machine_of
from nodeagent.core.placement.joint import place_joint
from nodeagent.core.placement.refusal import explain
from nodeagent.errors import InputError

_NOTHING = Placement()


def place(inventory: Inventory, ledger: Ledger, request: Request) -> Placement:
    """Return the cheapest placement of a request. Raise Refused with the numbers and what would admit it."""
    machine = machine_of(inventory)
    _check(machine, request)
    free = _free_cpus(machine, ledger, request) if request.cpus else 0
    found = _find(machine, free, ledger, request)
    if found is None:
        raise explain(machine, ledger, request, free, functools.partial(_find, machine))
    return found


def find(inventory: Inventory, ledger: Ledger, request: Request) -> Placement | None:
    """Return what `place` returns, or None where it refuses: for those who ask often and need no reasons."""
    machine = machine_of(inventory)
    _check(machine, request)
    return _find(machine, _free_cpus(machine, ledger, request) if request.cpus else 0, ledger, request)


def _free_cpus(machine: MachineIndex, ledger: Ledger, request: Request) -> int:
    """Return a mask of the CPUs that can be granted."""
    free = machine.usable & ~(ledger.cpus_held.mask | ledger.reserved.mask)
    if request.within_cpus is not None:
        free &= request.within_cpus.mask
    return free | request.must_cpus.mask & machine.usable


def _check(machine: MachineIndex, request: Request) -> None:
    """Raise InputError if the machine has no such kind of devices or size of hugepages: then no change of what is held
    would admit the request."""
    if not (request.devices or request.hugepages):
        return
    kinds = machine.device_kinds
    if machine.inventory.kinds and not kinds.issuperset(request.devices):
        unknown = min(request.devices.keys() - kinds)
        raise InputError(f"cannot place devices of kind {unknown!r}: expected one of {', '.join(sorted(kinds))}")
    sizes = machine.page_sizes
    if not sizes.issuperset(request.hugepages) and (
        strange := sorted(size for size, count in request.hugepages.items() if count and size not in sizes)
    ):
        known = ", ".join(format_size(one) for one in sorted(sizes)) or "none"
        raise InputError(f"cannot place hugepages of {format_size(strange[0])}: the sizes of this machine are {known}")


def _find(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    if request.cpus > free.bit_count() or request.must_cpus.mask.bit_count() > request.cpus:
        return None
    alone = not (request.devices or request.hugepages or request.memory_bytes)
    if not alone or request.near or request.near_cpus.mask or request.near_nodes:
        return place_joint(machine, free, ledger, request)
    return _place_cpus(machine, free, ledger, request)


def _place_cpus(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    if request.cpus == 0:
        return _NOTHING
    if request.numa == BEST_EFFORT and not request.options and not request.must_cpus.mask:
        found = machine.layout.choose(free, request.cpus)
    else:
        found = search_cpus(machine, free, request, limits_of(machine, ledger, request))
    if found is None:
        return None
    cost = PlacementCost._make((0, *found[1:11], 0, found[11]))
    return Placement(CpuSet.of_mask(found[0]), (), (), (), cost, found[12])
