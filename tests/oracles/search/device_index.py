"""Devices of some kinds with the costs of their pairs, as Python values."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from nodeagent.core.model.device import Device
from nodeagent.core.placement.index import MachineIndex
from nodeagent.core.placement.proximity import Place


@dataclass(frozen=True, slots=True)
class DeviceIndex:
    """All devices of some kinds, grouped into classes of interchangeable devices."""

    classes: tuple[tuple[Device, ...], ...]
    places: tuple[Place, ...]
    """Where the devices of each class are."""
    place_numbers: tuple[int, ...]
    """Number of each class's place; equal for equal places."""
    links: array[int]
    """classes x classes: link weights, row by row; those within a class are on the diagonal."""
    far: array[int]
    """classes x classes: cost of a pair."""

    @classmethod
    def of(cls, machine: MachineIndex, kinds: tuple[str, ...]) -> DeviceIndex:
        near = machine.proximity
        devices = sorted(machine.inventory.devices, key=lambda device: (device.kind, device.id))
        classes = near.classes([device for device in devices if device.kind in kinds])
        pairs = [(a[0], b[-1]) for a in classes for b in classes]
        places = tuple(near.place(members[0]) for members in classes)
        numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
        return cls(
            classes=tuple(tuple(sorted(members, key=lambda device: device.id)) for members in classes),
            places=places,
            place_numbers=tuple(numbers[place] for place in places),
            links=array("q", [near.weight(a, b) for a, b in pairs]),
            far=array("q", [machine.far(a, b) for a, b in pairs]),
        )
