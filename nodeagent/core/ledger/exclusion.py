"""What cannot be given away together: exclusive is the thing that is handed over, not the id of a device.

Pure. A device hands over itself, its exclusive parts (Device.exclusive_parts: device nodes, a LUN's WWID), and all that
its own parts hand over. Two devices exclude each other if they hand over the same thing: a GPU and its MIG instance,
two controllers of one NVMe namespace, the functions of one IOMMU group under vfio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nodeagent.core.ledger.counters import spent
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by


def things_of(inventory: Inventory, ids: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return what some devices hand over, as sorted (device id, thing); Grant.things. A device that is not in the
    inventory hands over itself."""
    return tuple(sorted((one, thing) for one in set(ids) for thing in inventory.things_of.get(one, {one})))


def excluded_with(inventory: Inventory, ledger: Ledger, ids: Iterable[str]) -> frozenset[str]:
    """Return some devices and all that exclude them, also what they are a part of and is not in the inventory.

    Of held devices counts too what they handed over when they were granted: a container may still use what has left
    the inventory since."""
    found: set[str] = set()
    for one in ids:
        found |= {one, *inventory.wholes_of(one), *inventory.excluded_by.get(one, ())}
        for thing in ledger.things_by_device.get(one, ()):
            found |= inventory.devices_by_thing.get(thing, frozenset())
    return frozenset(found)


def blocked(inventory: Inventory, ledger: Ledger) -> frozenset[str]:
    """Return the devices of which nothing can be granted exclusively: those that anybody holds, all that exclude them,
    and those for which their counters do not last."""
    if not ledger.devices_taken:
        return frozenset()
    return kept_by(ledger, "_blocked", lambda: _blocked(inventory, ledger), inventory)


def _blocked(inventory: Inventory, ledger: Ledger) -> frozenset[str]:
    return excluded_with(inventory, ledger, ledger.devices_taken) | spent(inventory, ledger)


def most_together(inventory: Inventory, ids: Iterable[str]) -> list[str]:
    """Return a largest set of devices that can be given away together: parts before their wholes."""
    chosen: list[str] = []
    taken: set[str] = set()
    things: Mapping[str, frozenset[str]] = inventory.things_of
    for one in sorted(ids, key=lambda one: (len(things[one]), one)):
        if taken.isdisjoint(things[one]):
            taken |= things[one]
            chosen.append(one)
    return chosen
