"""Parts that are made when they are granted, as devices of a pool: what each consumes of its whole, and what is
published of it.

Pure. There are many of them (25 on one H100), so only what claims select by is published, in few bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from nodeagent.core.dra.cpu_pool import STANDARD_NUMA, STANDARD_ROOT, standard_root
from nodeagent.core.dra.pool import CounterSet, Value
from nodeagent.core.model.device import Device

Name = Callable[[str], str]
"""Returns the name of the counter set of a whole, by its device id."""


def counter_sets(devices: Iterable[Device], name: Name) -> tuple[CounterSet, ...]:
    """Return one counter set for each whole of which parts can be made."""
    found = {one.parent: one.partition.counters for one in devices if one.partition is not None and one.parent}
    return tuple(CounterSet(name=name(whole), counters=counters) for whole, counters in found.items())


def consumed(device: Device, name: Name) -> dict[str, Mapping[str, int]]:
    """Return what a part takes of the counters of its whole, by counter set; nothing for any other device."""
    if device.partition is None or device.parent is None:
        return {}
    return {name(device.parent): device.partition.draws}


def attributes(device: Device, resource: str) -> dict[str, Value | None]:
    """Return the attributes of a part. resource: its name in the configuration."""
    node = device.numa_node if device.numa_node is not None and device.numa_node >= 0 else None
    return {
        STANDARD_NUMA: node,
        STANDARD_ROOT: standard_root(device),
        "kind": device.kind,
        "resource": resource,
        "parent": device.parent,
        "parentUUID": device.attributes.get("parent_uuid"),
        "migProfile": device.attributes.get("mig_profile"),
        "multiprocessors": device.attributes.get("multiprocessors"),
    }


def in_order(devices: Iterable[Device]) -> list[Device]:
    """Return devices in the order in which a scheduler shall take them, which takes the first that fits: small parts
    before large ones, one whole before the next, and each whole's parts by rank. All other devices come first, in their
    own order."""
    every = list(devices)
    wholes = {one.parent: number for number, one in reversed(list(enumerate(every)))}

    def key(device: Device) -> tuple[int, int, int, str, int, int]:
        if device.partition is None:
            return (0, 0, 0, "", 0, 0)
        memory, units = device.attributes.get("memory_bytes", 0), device.attributes.get("multiprocessors", 0)
        profile = str(device.attributes.get("mig_profile", ""))
        return (1, int(memory), int(units), profile, wholes[device.parent], device.partition.rank)

    return sorted(every, key=key)
