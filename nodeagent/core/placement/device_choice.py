"""Choice of devices: every set with the best links, one for each set of places where its members are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nodeagent._fastpath import choose_devices
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.request import Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.index import DeviceIndex, MachineIndex
from nodeagent.core.placement.proximity import Place
from nodeagent.errors import InputError


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
    """Return every best set of the requested devices, one for each set of places where they are.

    nodes: use only devices on these NUMA nodes, or on any if None.
    """
    held = ledger.devices_held
    if not request.devices:
        return (Pick((), 0, 0, (), True),)
    kinds = tuple(sorted(request.devices))
    index = {kind: number for number, kind in enumerate(kinds)}
    pool = machine.pool(kinds)
    usable = _usable_members(pool, held, request, nodes)
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
            max(len(free), sum(1 for device in members if device.id not in held) if held else len(members)),
        )
        for members, free, place in zip(pool.classes, usable, pool.place_numbers, strict=True)
    ]
    found = choose_devices(rows, [request.devices[kind] for kind in kinds], pool.far, pool.links)
    if found is None:
        return ()
    cost, ties, exact = found
    return [_pick_of(request, pool, usable, cost, cut, taken, exact) for cut, taken in ties]


def _usable_members(
    pool: DeviceIndex, held: frozenset[str], request: Request, nodes: frozenset[NodeId] | None
) -> Sequence[Sequence[Device]]:
    """Return the devices of each class that can be taken."""
    if nodes is None and not held and request.within_devices is None:
        return pool.classes
    return [[device for device in members if _usable(device, held, request, nodes)] for members in pool.classes]


def _usable(device: Device, held: frozenset[str], request: Request, nodes: frozenset[NodeId] | None) -> bool:
    if device.id in request.must_devices:
        return True
    if request.within_devices is not None and device.id not in request.within_devices:
        return False
    return device.id not in held and inside(device, nodes)


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
