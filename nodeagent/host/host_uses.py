"""What the node itself uses: a use counts for everything that cannot be given away without what is used.

A kind marks the devices that it sees in use. The same use is then marked on all that hand over the same thing (another
path to a LUN, the USB device of a disk), and on all wholes (the controller of a disk, the physical function of a
virtual one): who holds these can take away what the node uses. Parts stay as they are: a physical function that carries
the node's network has virtual functions for pods, an NVMe drive with the node's file systems other namespaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.inventory import Inventory

Use = bool | str
"""True, or a text such as "unknown"."""


def with_all_uses(devices: Iterable[Device]) -> tuple[Device, ...]:
    """Return the devices, marked with every use by the node that concerns them."""
    inventory = Inventory(devices=tuple(devices))
    found: dict[str, dict[str, Use]] = defaultdict(dict)
    for name, device, use in _uses(inventory):
        for one in _concerned(inventory, device):
            found[one][name] = True if use is True else found[one].get(name, use)
    return tuple(_marked(device, found[device.id]) if device.id in found else device for device in inventory.devices)


def _uses(inventory: Inventory) -> Iterator[tuple[str, Device, Use]]:
    for device in inventory.devices:
        for name in HOST_USES:
            use = device.attributes.get(name)
            if isinstance(use, bool | str) and use:
                yield name, device, use


def _concerned(inventory: Inventory, used: Device) -> set[str]:
    """Return the ids of the devices that share something exclusive with a used one, and of all their wholes."""
    parts = inventory.parts_of.get(used.id, ())
    others = (inventory.device_by_id[one] for one in inventory.excluded_by.get(used.id, ()) if one not in parts)
    things = {used.id, *used.exclusive_parts}
    alike = {used.id, *(one.id for one in others if not things.isdisjoint(one.exclusive_parts))}
    return alike.union(*(inventory.wholes_of(one) for one in alike))


def _marked(device: Device, uses: Mapping[str, Use]) -> Device:
    worse = {name: use for name, use in uses.items() if use is True or not device.attributes.get(name)}
    if all(device.attributes.get(name) is use for name, use in worse.items()):
        return device
    return replace(device, attributes=MappingProxyType({**device.attributes, **worse}))
