"""Joint placement of the devices, CPUs, hugepages and memory of one request: translates it for the compiled core.

The order in which the core decides: first the devices with the best links (every best set, one for each set of places
where they are), then the CPUs nearest to them, then as few packages and NUMA nodes as possible for CPUs, pages and
memory together. A NUMA policy restricts which nodes all of it may be on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.core.ledger.exclusion import blocked
from nodeagent.core.ledger.free import MEMORY, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.request import BEST_EFFORT, SINGLE, Pages, Placement, PlacementCost, Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.cpu_choice import NO_LIMITS, allowed, core_rules, limits_of, tastes
from nodeagent.core.placement.index import DeviceIndex, MachineIndex
from nodeagent.core.placement.proximity import Place
from nodeagent.errors import InputError

if TYPE_CHECKING:
    from nodeagent._fastpath import Placed

Terms = dict[str, Any]
"""Parameters of the compiled core (Machine.place)."""


def place_joint(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    """Return the cheapest placement, or None if nothing fits. free: mask of the CPUs that can be granted."""
    places = _fixed_places(machine, request) if request.near or request.near_nodes or request.near_cpus.mask else ()
    terms = _of_cpus(machine, free, ledger, request, places) if request.cpus else {}
    stock = Stock.of(machine.inventory, ledger, request)
    if stock.want:
        terms["sizes"], terms["there"] = tuple(stock.want.values()), stock.there
        if places:
            terms["node_near"] = machine.proximity.node_weights(places)
    if request.devices:
        index = machine.pool(tuple(sorted(request.devices)))
        closed = _closed(machine, request, index)
        if closed is None:
            return None
        terms.update(_of_devices(machine, ledger, request, index), closed=closed)
    if request.numa != BEST_EFFORT:
        terms.update(_of_policy(machine, ledger, request))
    return _placement(machine.compiled.place(request.cpus, **terms), stock)


# ---------------------------------------------------------------- what is requested, as the compiled core takes it


def _of_cpus(machine: MachineIndex, free: int, ledger: Ledger, request: Request, places: Sequence[Place]) -> Terms:
    terms: Terms = {"free": free, "allowed": allowed(machine, request), "must": request.must_cpus.mask}
    if request.options:
        limits = limits_of(machine, ledger, request) if opt.REQUIRE_L3 in request.options else NO_LIMITS
        terms.update(core_rules(request), taste=tastes(machine, request.options))
        terms.update(most_packages=limits.packages, most_nodes=limits.nodes, most_groups=limits.groups)
    if places:
        terms["near"] = machine.proximity.cpu_weights(places)
    return terms


def _of_devices(machine: MachineIndex, ledger: Ledger, request: Request, index: DeviceIndex) -> Terms:
    terms: Terms = {
        "pool": index.compiled,
        "need": tuple(map(request.devices.__getitem__, index.kinds)),
        "held": blocked(machine.inventory, ledger),
        "must_devices": request.must_devices,
    }
    if request.near or request.near_nodes:
        near = [device_of(machine, one) for one in request.near]
        # A node counts as a device on it that shares no part of the PCIe tree.
        near += [Device(kind="node", id="", numa_node=node) for node in request.near_nodes]
        terms["alone"] = tuple(sum(machine.far(one, other) for other in near) for one in index.firsts)
    return terms


def _closed(machine: MachineIndex, request: Request, index: DeviceIndex) -> frozenset[str] | None:
    """Return the devices that the request rules out, or None if two that it demands exclude each other."""
    closed = index.withheld if request.within_devices is None else index.ids - request.within_devices
    if not request.must_devices:
        return closed
    excluded = machine.inventory.excluded_by
    barred = _NOTHING.union(*(excluded.get(one, _NOTHING) for one in request.must_devices))
    return None if barred & request.must_devices else closed | barred


_NOTHING: frozenset[str] = frozenset()


def _of_policy(machine: MachineIndex, ledger: Ledger, request: Request) -> Terms:
    terms: Terms = {
        "most_units": 1 if request.numa == SINGLE else 0,
        "count_packages": opt.ALIGN_SOCKET in request.options,
        "unreserved": machine.usable & ~ledger.reserved.mask,
    }
    if total := Stock.of(machine.inventory, ledger, request, empty=True).there:
        terms["total"] = total
    return terms


def _fixed_places(machine: MachineIndex, request: Request) -> tuple[Place, ...]:
    """Return the places that the whole request should be close to."""
    places = [machine.proximity.place(device_of(machine, one)) for one in request.near]
    places += [(0, node) for node in request.near_nodes]
    if request.near_cpus:
        places.append(machine.place(request.near_cpus))
    return tuple(places)


def device_of(machine: MachineIndex, name: str) -> Device:
    """Return the device with an id. Raise InputError if there is none."""
    device = machine.inventory.device_by_id.get(name)
    if device is None:
        raise InputError(f'cannot place near "{name}": there is no such device')
    return device


# ---------------------------------------------------------------- what is placed


def _placement(found: Placed | None, stock: Stock) -> Placement | None:
    if found is None:
        return None
    mask, cost, amounts, devices, exact = found
    pages: list[Pages] = []
    memory: list[tuple[NodeId, int]] = []
    sizes = tuple(stock.want) if amounts else ()
    for number, node, amount in amounts:
        size = sizes[number]
        if size == MEMORY:
            memory.append((stock.order[node], amount))
        else:
            pages.append(Pages(node=stock.order[node], page_bytes=size, pages=amount))
    return Placement(CpuSet.of_mask(mask), tuple(pages), tuple(memory), devices, PlacementCost(*cost), exact)
