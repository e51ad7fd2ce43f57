"""Counters by which the scheduler never allocates a set of devices and one of its members.

Pure. A device may consume two counter sets, but any number of counters in one. So all sets that share members, directly
or through others, are in one counter set, which has one counter for each device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from nodeagent.core.dra.pool import CounterSet
from nodeagent.core.model.device import Device

Consumption = Mapping[str, Mapping[str, int]]
"""Counters by counter set."""


class LinkedCounters(msgspec.Struct, frozen=True):
    """counters: the counter sets. consumes: by device id, what sets and members take of them."""

    counters: tuple[CounterSet, ...]
    consumes: Mapping[str, Consumption]


def linked_counters(served: Iterable[Device], names: Mapping[str, str]) -> LinkedCounters:
    """Return the counters of the sets among served devices. names: the published name of each served device."""
    sets = {one.id: one.members for one in served if one.members}
    counters, consumes = list[CounterSet](), dict[str, Consumption]()
    for area in _areas(sets.values()):
        mine = {one: f"device-{number}" for number, one in enumerate(sorted(area))}
        own = {id: members for id, members in sets.items() if members[0] in area}
        name = f"linked-{names[min(own)]}"[:63].rstrip("-")
        counters.append(CounterSet(name=name, counters=dict.fromkeys(mine.values(), 1)))
        consumes |= {id: {name: {mine[one]: 1 for one in members}} for id, members in own.items()}
        consumes |= {one: {name: {counter: 1}} for one, counter in mine.items() if one in names}
    return LinkedCounters(tuple(counters), consumes)


def _areas(sets: Iterable[tuple[str, ...]]) -> list[set[str]]:
    """Return the members of sets that have members in common, directly or through others, in order."""
    areas: list[set[str]] = []
    for members in sets:
        joined = set(members).union(*(area for area in areas if not area.isdisjoint(members)))
        areas = [area for area in areas if area.isdisjoint(members)]
        areas.append(joined)
    return sorted(areas, key=min)
