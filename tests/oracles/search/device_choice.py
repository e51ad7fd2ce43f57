"""Choice of devices: every set with the best links, one for each set of places where its members are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nodeagent._fastpath import choose_devices
from nodeagent.core.ledger.exclusion import blocked
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.request import Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.index import MachineIndex
from nodeagent.core.placement.proximity import Place
from nodeagent.errors import InputError
from tests.oracles.search.device_index import DeviceIndex
from tests.oracles.search.device_sets import Candidates, without_conflicts


@dataclass(frozen=True, slots=True)
class Pick:
    """One best set of devices."""

    devices: tuple[str, ...]
    links: int
    cut: int
    places: tuple[Place, ...]
    exact: bool


def pick_devices(
    machine: MachineIndex, ledger: Ledger, request: Request, nodes: frozenset[NodeId] | None
) -> Sequence[Pick]:
    """Every best set of the devices asked for, one for each set of places they lie in. No two of a set exclude each
    other (core/ledger/exclusion.py)."""
    if not request.devices:
        return (Pick((), 0, 0, (), True),)
    pool = DeviceIndex.of(machine, tuple(sorted(request.devices)))
    taken = blocked(machine.inventory, ledger)
    usable = _usable_members(pool, taken, request, nodes)
    excluded = machine.inventory.excluded_by
    if not excluded:
        return _picks_among(machine, request, pool, usable, taken)
    numbered = [(device, number) for number, members in enumerate(usable) for device in members]
    some = Candidates(
        kinds={device.id: device.kind for device, _ in numbered},
        classes={device.id: number for device, number in numbered},
        excluded=excluded,
        things=machine.inventory.things_of,
        must=request.must_devices,
        want=request.devices,
    )
    sets, complete = without_conflicts(some)
    found: dict[tuple[str, ...], Pick] = {}
    for left_out in sets:
        kept = [[device for device in members if device.id not in left_out] for members in usable]
        for pick in _picks_among(machine, request, pool, kept if left_out else usable, taken):
            found.setdefault(pick.devices, pick if complete else replace(pick, exact=False))
    least = min((pick.links for pick in found.values()), default=0)
    return [pick for pick in found.values() if pick.links == least]


def _picks_among(
    machine: MachineIndex,
    request: Request,
    pool: DeviceIndex,
    usable: Sequence[Sequence[Device]],
    taken: frozenset[str],
) -> Sequence[Pick]:
    """The best sets of some devices, none of which excludes another. usable: by class of the pool. taken: devices that
    cannot be granted."""
    kinds = tuple(sorted(request.devices))
    index = {kind: number for number, kind in enumerate(kinds)}
    near = [device_of(machine, one) for one in request.near]
    # A node counts as a device on it that shares no part of the PCIe tree.
    near += [Device(kind="node", id="", numa_node=node) for node in request.near_nodes]
    rows = [
        (
            index[members[0].kind],
            len(free),
            sum(1 for device in free if device.id in request.must_devices) if request.must_devices else 0,
            place,
            sum(machine.far(members[0], other) for other in near) if near else 0,
            max(len(free), sum(1 for device in members if device.id not in taken) if taken else len(members)),
        )
        for members, free, place in zip(pool.classes, usable, pool.place_numbers, strict=True)
    ]
    found = choose_devices(rows, [request.devices[kind] for kind in kinds], pool.far, pool.links)
    if found is None:
        return ()
    cost, ties, exact = found
    return [_pick_of(request, pool, usable, cost, cut, counts, exact) for cut, counts in ties]


def _usable_members(
    pool: DeviceIndex, taken: frozenset[str], request: Request, nodes: frozenset[NodeId] | None
) -> Sequence[Sequence[Device]]:
    """Of each class the devices that may be taken."""
    if nodes is None and not taken and request.within_devices is None:
        return pool.classes
    return [[device for device in members if _usable(device, taken, request, nodes)] for members in pool.classes]


def _usable(device: Device, taken: frozenset[str], request: Request, nodes: frozenset[NodeId] | None) -> bool:
    if device.id in request.must_devices:
        return True
    if request.within_devices is not None and device.id not in request.within_devices:
        return False
    return device.id not in taken and inside(device, nodes)


def _pick_of(
    request: Request,
    pool: DeviceIndex,
    usable: Sequence[Sequence[Device]],
    cost: int,
    cut: int,
    taken: Sequence[int],
    exact: bool,
) -> Pick:
    """Return a pick that takes from each class the mandatory devices first, then those with the lowest ids."""
    devices: list[str] = []
    places: list[Place] = []
    for free, place, count in zip(usable, pool.places, taken, strict=True):
        if count:
            # Already in order of id.
            must = request.must_devices
            first = sorted(free, key=lambda one: one.id not in must)[:count] if must else free[:count]
            devices += [device.id for device in first]
            places += [place] * count
    return Pick(tuple(sorted(devices)), cost, cut, tuple(places), exact)


def inside(device: Device, nodes: frozenset[NodeId] | None) -> bool:
    """Return whether a device can be used with some nodes; one whose node is unknown can be used with any."""
    return nodes is None or device.numa_node is None or device.numa_node in nodes


def device_of(machine: MachineIndex, name: str) -> Device:
    """Return the device with an id. Raise InputError if there is none."""
    device = machine.inventory.device_by_id.get(name)
    if device is None:
        raise InputError(f'cannot place near "{name}": there is no such device')
    return device
