"""Counters that devices of a kind share (Device.draws), as counter sets of a pool.

Pure. What containers of the device plugin draw is missing in what is published: the scheduler does not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from nodeagent.core.dra.pool import CounterSet
from nodeagent.core.model.device import Device

Name = Callable[[str], str]
"""Returns the name of a counter set, by Draws.of."""


def counter_sets(devices: Iterable[Device], name: Name) -> tuple[CounterSet, ...]:
    """Return one counter set for each that devices draw on, in their order."""
    found = {one.draws.of: one.draws.has for one in devices if one.draws is not None}
    return tuple(CounterSet(name=name(of), counters=dict(has)) for of, has in found.items())


def consumed(device: Device, name: Name) -> dict[str, Mapping[str, int]]:
    """Return what a device takes, by counter set; nothing if it draws on no counters."""
    return {} if device.draws is None else {name(device.draws.of): device.draws.takes}


def left(counters: tuple[CounterSet, ...], drawn: Mapping[tuple[str, str], int]) -> tuple[CounterSet, ...]:
    """Return counter sets without what was drawn of them, by (counter set, counter)."""
    if not drawn:
        return counters
    return tuple(
        replace(one, counters={key: max(0, has - drawn.get((one.name, key), 0)) for key, has in one.counters.items()})
        for one in counters
    )
