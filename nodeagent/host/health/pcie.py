"""`pcie`: whether the PCIe links of a device have as many lanes as both of their ends can have.

Source: Documentation/ABI/testing/sysfs-bus-pci, {current,max}_link_{width,speed}, and drivers/pci/pci-sysfs.c (Linux
6.12). A link has a port above and a device, or the upstream port of a switch, below; both ends report its width.

Only the width counts: GPUs lower the speed while they idle. An x16 card in an x8 slot has all the lanes that it can
have. Drivers of AMD's GPUs lower the width too (pp_dpm_pcie, Documentation/gpu/amdgpu/thermal.rst), and in a virtual
machine the port above says nothing of the slot: there the width does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.host.health.source import Readings, Sight, Silence
from nodeagent.host.sysfs.lenient import Tolerant

WIDTHS = frozenset({1, 2, 4, 8, 12, 16, 32})
"""Others, such as 0 and 255, are those of devices without a link, as inside a processor."""
_SCALES_WIDTH = frozenset({"amdgpu", "radeon"})
_VIRTUAL = "1b36"
"""Vendor of QEMU's ports."""
_SPEED = re.compile(r"(\d+)(?:\.(\d))? GT/s")


class _Link(msgspec.Struct, frozen=True, kw_only=True):
    below: str
    """Address of the lower end."""
    lanes: int
    possible: int


class Pcie:
    """The source `pcie`."""

    name = "pcie"
    period_s = 0.0

    def __init__(self) -> None:
        self._guest: bool | None = None

    def concerns(self, device: Device) -> bool:
        return is_function(device) and bool(device.bridges) and device.driver not in _SCALES_WIDTH

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        if self._is_guest(reader) or reader.text(f"{folder(device.bridges[-1])}/vendor") == f"0x{_VIRTUAL}":
            return Silence.NOTHING_TO_SEE
        if reader.text(f"{folder(device.id)}/max_link_width") is None:
            return Silence.NOTHING_TO_SEE
        if sleeps(reader, device):
            return Silence.NO_ANSWER
        links = list(_links(reader, device))
        if not links or links[0].below != device.id:
            return Silence.NO_ANSWER
        slow = [_slow(one, device) for one in links if one.lanes < one.possible]
        return Sight(UNHEALTHY if slow else HEALTHY, "; ".join(slow), _readings(reader, device, links[0]))

    def _is_guest(self, reader: Tolerant) -> bool:
        """Return whether this is a virtual machine (x86 processors say so)."""
        if self._guest is None:
            flags = (line for line in (reader.text("proc/cpuinfo") or "").splitlines() if line.startswith("flags"))
            self._guest = "hypervisor" in next(flags, "").split()
        return self._guest


def is_function(device: Device) -> bool:
    """Return whether a device is a whole PCI function with registers of its own: no virtual function and no bridge."""
    whole = device.pci_address is not None and device.pci_address == device.id
    return whole and device.kind != "bridge" and device.attributes.get("sriov") != "vf"


def sleeps(reader: Tolerant, device: Device) -> bool:
    """Return whether the kernel has suspended a function: reading its registers could wake it up
    (Documentation/ABI/testing/sysfs-devices-power)."""
    return reader.text(f"{folder(device.id)}/power/runtime_status") == "suspended"


def folder(address: str) -> str:
    """Return the folder of a PCI function."""
    return f"sys/bus/pci/devices/{address}"


def _links(reader: Tolerant, device: Device) -> Iterator[_Link]:
    """Yield the links from a device up to the root, as far as both ends agree that there is one.

    A switch has two ports on the way: every second pair of neighbours is a link.
    """
    way = (*device.bridges, device.id)
    for at in range(len(way) - 1, 0, -2):
        if (link := _link(reader, way[at - 1], way[at])) is None:
            return
        yield link


def _link(reader: Tolerant, above: str, below: str) -> _Link | None:
    ends = [(_lanes(reader, one, "current"), _lanes(reader, one, "max")) for one in (above, below)]
    (lanes, most_above), (lanes_below, most_below) = ends
    if lanes != lanes_below or lanes is None or most_above is None or most_below is None:
        return None
    return _Link(below=below, lanes=lanes, possible=min(most_above, most_below))


def _lanes(reader: Tolerant, address: str, which: str) -> int | None:
    lanes = reader.number_if_told(f"{folder(address)}/{which}_link_width")
    return lanes if lanes in WIDTHS else None


def _slow(link: _Link, device: Device) -> str:
    where = "the PCIe link" if link.below == device.id else f"the PCIe link of {link.below} above"
    return f"{where} has {link.lanes} of {link.possible} lanes"


def _readings(reader: Tolerant, device: Device, link: _Link) -> Readings:
    found = {"lanes": link.lanes, "lanes_possible": link.possible}
    for which, name in (("current", "speed_mts"), ("max", "speed_max_mts")):
        speed = _SPEED.match(reader.if_told(f"{folder(device.id)}/{which}_link_speed") or "")
        found |= {name: int(speed[1]) * 1000 + int(speed[2] or 0) * 100} if speed else {}
    return found
