"""What the node itself uses: a use counts for everything that cannot be given away without what is used.

A kind marks the devices that it sees in use. The same use is then marked on all that hand over the same thing (another
path to a LUN, the USB device of a disk), on all wholes (the controller of a disk, the physical function of a virtual
one), and on everything between the CPU and what is used (a USB hub, the controller of a network adapter), whether or
not a kind found what is used: who holds these can take away what the node uses. Parts stay as they are: a physical
function that carries the node's network has virtual functions for pods, an NVMe drive with the node's file systems
other namespaces. The ports of a modem are no such parts: who holds its serial line or its control channel can end the
connection of its network interface. So the use of an interface is also marked on the ports of its device. Other uses
are not: of a serial adapter with several lines, one may be the console.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from types import MappingProxyType
from typing import NamedTuple

from msgspec.structs import replace

from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.host import pci
from nodeagent.host.devices.disks import BlockUses
from nodeagent.host.sysfs.lenient import Tolerant

Use = bool | str
"""True, or a text such as "unknown"."""
USB, BRIDGE = "usb", "bridge"
"""Kinds: devices that are named by their port, and functions that are never given away."""
PORT_OF = "port_of"
"""Attribute of a character device: what `port_of` returns for it."""
_ROOT_HUB, _USB_PORT = re.compile(r"usb[0-9]+"), re.compile(r"[0-9]+-[0-9]+(\.[0-9]+)*")
_USB_DEVICE_MAJOR = 189
"""Of /dev/bus/usb, whose nodes are the USB devices themselves (USB_DEVICE_MAJOR in include/linux/usb.h)."""


class UsedPath(NamedTuple):
    """Something that the node uses, at its place in the machine."""

    use: str
    """One of HOST_USES."""
    path: str
    """Real path in sysfs, below the root."""
    node: str = ""
    """Device node of a console: who holds it holds the console."""

    @property
    def names(self) -> frozenset[str]:
        """Return the names of everything that leads to it: addresses of PCI functions, ports of USB devices."""
        return frozenset(self.path.split("/"))

    @property
    def is_interface(self) -> bool:
        """Return whether it is a network interface."""
        return "net" in self.names


def port_of(folder: str) -> str:
    """Return what a character device is a port of, or "" for none: the port of its USB device ("1-1.4"), or the address
    of the PCI function of a modem.

    folder: its real path in sysfs. PCI functions have many nodes that end no connection, such as the clock of an
    adapter; those that do are of the class wwan (drivers/net/wwan/wwan_core.c).
    """
    parts = iter(folder.split("/"))
    if any(_ROOT_HUB.fullmatch(one) for one in parts) and (ports := [*takewhile(_USB_PORT.fullmatch, parts)]):
        return ports[-1]
    address, below = pci.split(folder)
    return address if address is not None and "wwan" in below.split("/") else ""


def used_paths(
    reader: Tolerant, routed: frozenset[str], blocks: BlockUses, storage: frozenset[str] = frozenset()
) -> tuple[UsedPath, ...]:
    """Return what carries the node's default routes, file systems, swap and consoles, without what is only software.

    routed, storage: network interfaces with default routes, and those that lead to its disks. Consoles:
    Documentation/ABI/testing/sysfs-tty, /sys/class/tty/console/active.
    """
    consoles = frozenset((reader.text("sys/class/tty/console/active") or "").split())
    found = (
        *(UsedPath("default_route", path) for _, path in _entries(reader, "sys/class/net", routed)),
        *(UsedPath("in_use", path) for _, path in _entries(reader, "sys/class/block", blocks.names)),
        *(UsedPath("in_use", path) for _, path in _entries(reader, "sys/class/net", storage)),
        *(UsedPath("in_use", path, f"/dev/{name}") for name, path in _entries(reader, "sys/class/tty", consoles)),
    )
    return tuple(one for one in found if "/virtual/" not in one.path)


def _entries(reader: Tolerant, folder: str, names: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield those of some names that a class has, each with its real path."""
    there = names.intersection(reader.names(folder)) if names else ()
    yield from ((name, reader.sysfs.entry(folder, name)) for name in sorted(there))


def with_all_uses(devices: Iterable[Device], used: Iterable[UsedPath] = ()) -> tuple[Device, ...]:
    """Return the devices, marked with every use by the node that concerns them.

    used: what is in use besides what the devices say, whether or not it is one of them."""
    inventory = Inventory(devices=tuple(devices))
    above = _Above(inventory)
    found: dict[str, dict[str, Use]] = defaultdict(dict)
    for name, device, use in _uses(inventory):
        for one in _concerned(inventory, above, device):
            found[one][name] = True if use is True else found[one].get(name, use)
    for path in used:
        for one in above.named(path.names, path.node, ports=path.is_interface):
            found[one][path.use] = True
    return tuple(_marked(device, found[device.id]) if device.id in found else device for device in inventory.devices)


class _Above:
    """Devices by the names that paths in sysfs have for them."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_node: dict[str, list[str]] = defaultdict(list)
        self._by_port: dict[str, list[str]] = defaultdict(list)
        for device in inventory.devices:
            for name in _own_names(device, inventory):
                self._by_name[name].append(device.id)
            for node in device.exclusive_parts:
                self._by_node[node].append(device.id)
            if PORT_OF in device.attributes:
                self._by_port[str(device.attributes[PORT_OF])].append(device.id)

    def named(self, names: Iterable[str], node: str = "", *, ports: bool = False) -> set[str]:
        """Return the devices with one of these names or with this node, and their wholes. ports: also those that are
        ports of what has one of these names."""
        tables = (self._by_name, self._by_port) if ports else (self._by_name,)
        found = {one for name in names for table in tables for one in table.get(name, ())}
        found.update(self._by_node.get(node, ()))
        return found.union(*(self._inventory.wholes_of(one) for one in found))


def _own_names(device: Device, inventory: Inventory) -> Iterator[str]:
    """Yield the names of a device itself: a part of a PCI function has the function's address, which is not its own."""
    whole = inventory.device_by_id.get(device.parent) if device.parent is not None else None
    address = device.pci_address
    if address is not None and device.kind != BRIDGE and (whole is None or whole.pci_address != address):
        yield address
    if device.kind == USB:
        yield device.id.removeprefix(f"{USB}-")
    if PORT_OF in device.attributes and device.attributes.get("major") == _USB_DEVICE_MAJOR:
        yield str(device.attributes[PORT_OF])


def _uses(inventory: Inventory) -> Iterator[tuple[str, Device, Use]]:
    for device in inventory.devices:
        for name in HOST_USES:
            use = device.attributes.get(name)
            if isinstance(use, bool | str) and use:
                yield name, device, use


def _concerned(inventory: Inventory, above: _Above, used: Device) -> set[str]:
    """Return the ids of the devices that share something exclusive with a used one, of all their wholes, and of the
    functions above them."""
    parts = inventory.parts_of.get(used.id, ())
    others = (inventory.device_by_id[one] for one in inventory.excluded_by.get(used.id, ()) if one not in parts)
    things = {used.id, *used.exclusive_parts}
    alike = {used.id, *(one.id for one in others if not things.isdisjoint(one.exclusive_parts))}
    every = alike.union(*(inventory.wholes_of(one) for one in alike))
    # All of these are devices but the last whole, which may have been found by no kind.
    there = [inventory.device_by_id[one] for one in every if one in inventory.device_by_id]
    return every | above.named(address for one in there for address in one.bridges)


def _marked(device: Device, uses: Mapping[str, Use]) -> Device:
    worse = {name: use for name, use in uses.items() if use is True or not device.attributes.get(name)}
    if all(device.attributes.get(name) is use for name, use in worse.items()):
        return device
    return replace(device, attributes=MappingProxyType({**device.attributes, **worse}))
