"""USB devices that the configuration selects by vendor, product and serial number, with the nodes of their drivers.

The id is the port ("usb-1-1.4"), which stays the same when a device without a serial number is plugged in again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, UsbSelector, node_edits, part_of
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_BUS = "sys/bus/usb/devices"
_CLASSES = ("tty", "video4linux", "hidraw", "usbmisc", "sound")
_FOLDERS = {"sound": "snd/"}
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
    nodes = _driver_nodes(reader)
    for name, path, address, _ in pci.members(reader, _BUS):
        if ":" in name or not reader.sysfs.exists(f"{path}/idVendor"):
            continue  # interfaces
        told = {key: reader.text(f"{path}/{key}") or "" for key in ("idVendor", "idProduct", *_TOLD)}
        selector = next((one for one in context.usb if _matches(one, told)), None)
        if selector is None:
            continue
        paths = (*_raw_node(reader, path), *(node for real, node in nodes.items() if f"/{name}/" in real))
        attributes = {
            "selector": selector.name,
            "vendor_id": told["idVendor"],
            "product_id": told["idProduct"],
            **{key: told[key] for key in _TOLD if told[key]},
        }
        owner = context.function_by_address.get(address) if address is not None else None
        yield part_of(owner, kind="usb", id=f"usb-{name}", paths=paths, attributes=attributes)


def _matches(selector: UsbSelector, told: Mapping[str, str]) -> bool:
    return (
        selector.vendor.lower() == told["idVendor"].lower()
        and selector.product.lower() in ("", told["idProduct"].lower())
        and selector.serial in ("", told["serial"])
    )


def _raw_node(reader: Tolerant, path: str) -> tuple[str, ...]:
    bus, number = reader.number(f"{path}/busnum"), reader.number(f"{path}/devnum")
    return () if bus is None or number is None else (f"/dev/bus/usb/{bus:03d}/{number:03d}",)


def _driver_nodes(reader: Tolerant) -> dict[str, str]:
    """Return device nodes by the real path of their class device: serial ports, cameras, raw HID, modems, sound."""
    found = {}
    for name in _CLASSES:
        for member, real, _, _ in pci.members(reader, f"sys/class/{name}"):
            if "/usb" in real and reader.sysfs.exists(f"{real}/dev"):
                found[real] = f"/dev/{_FOLDERS.get(name, '')}{member}"
    return found
