"""USB devices that the configuration selects by vendor, product and serial number, with the nodes of their drivers.

The id is the port ("usb-1-1.4"), which stays the same when a device without a serial number is plugged in again. The
holder of a device can reset it, and of a hub all that is plugged into it: so the nodes of all devices, disks and
drivers below belong to its holder alone too, and a network interface there may carry the node's network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, UsbSelector, node_edits, part_of, routed_in
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_BUS = "sys/bus/usb/devices"
_CLASSES = ("tty", "video4linux", "hidraw", "usbmisc", "sound")
_CLASSES_BELOW = ("block", "input", "scsi_generic")
"""Further classes whose nodes are not handed over with a USB device, and yet belong to its holder alone."""
_FOLDERS = {"sound": "snd/", "input": "input/"}
_TOLD = ("manufacturer", "product", "serial", "speed")


class Usb:
    """The kind `usb`."""

    name = "usb"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        if not context.usb:
            return Found(state=KindState(kind="usb", state=ABSENT, reason="no USB device is configured"))
        reader = Tolerant(sysfs)
        devices = tuple(_devices(reader, context))
        return Found(state=KindState(kind="usb", state=PRESENT), devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the raw USB node and the nodes of its drivers."""
        return node_edits(device, devices)


def _devices(reader: Tolerant, context: Context) -> Iterator[Device]:
    nodes, further = _nodes(reader, _CLASSES), {**_nodes(reader, _CLASSES_BELOW), **_raw_nodes(reader)}
    interfaces, routed = _interfaces(reader), routed_in(reader, context)
    for name, path, address, _ in pci.members(reader, _BUS):
        if ":" in name or not reader.sysfs.exists(f"{path}/idVendor"):
            continue  # interfaces
        told = {key: reader.text(f"{path}/{key}") or "" for key in ("idVendor", "idProduct", *_TOLD)}
        selector = next((one for one in context.usb if _matches(one, told)), None)
        if selector is None:
            continue
        paths = (*_raw_node(reader, path), *_below(nodes, name))
        # A hub has none of its own: those of what is plugged into it are below further devices (host/uses).
        netdevs = [one for real, one in interfaces.items() if f"/{name}/{name}:" in real]
        attributes: dict[str, str | int | bool] = {
            "selector": selector.name,
            "vendor_id": told["idVendor"],
            "product_id": told["idProduct"],
            **{key: told[key] for key in _TOLD if told[key]},
            **({"netdevs": ",".join(netdevs)} if netdevs else {}),
            **({"default_route": True} if not routed.isdisjoint(netdevs) else {}),
        }
        owner = context.function_by_address.get(address) if address is not None else None
        device = part_of(owner, kind="usb", id=f"usb-{name}", paths=paths, attributes=attributes)
        yield replace(device, exclusive=tuple(dict.fromkeys((*paths, *_below(further, name)))))


def _matches(selector: UsbSelector, told: Mapping[str, str]) -> bool:
    return (
        selector.vendor.lower() == told["idVendor"].lower()
        and selector.product.lower() in ("", told["idProduct"].lower())
        and selector.serial in ("", told["serial"])
    )


def _raw_node(reader: Tolerant, path: str) -> tuple[str, ...]:
    bus, number = reader.number(f"{path}/busnum"), reader.number(f"{path}/devnum")
    return () if bus is None or number is None else (f"/dev/bus/usb/{bus:03d}/{number:03d}",)


def _below(found: Mapping[str, str], port: str) -> tuple[str, ...]:
    """Return what is below the device at a port, of values by their real path."""
    return tuple(one for real, one in found.items() if f"/{port}/" in real)


def _nodes(reader: Tolerant, classes: Iterable[str]) -> dict[str, str]:
    """Return device nodes by the real path of their class device: serial ports, cameras, raw HID, modems, sound."""
    found = {}
    for name in classes:
        for member, real, _, _ in pci.members(reader, f"sys/class/{name}"):
            if "/usb" in real and reader.sysfs.exists(f"{real}/dev"):
                found[real] = f"/dev/{_FOLDERS.get(name, '')}{member}"
    return found


def _raw_nodes(reader: Tolerant) -> dict[str, str]:
    every = ((real, _raw_node(reader, real)) for name, real, _, _ in pci.members(reader, _BUS) if ":" not in name)
    return {real: node for real, nodes in every for node in nodes}


def _interfaces(reader: Tolerant) -> dict[str, str]:
    return {real: name for name, real, _, _ in pci.members(reader, "sys/class/net") if "/usb" in real}
