"""FPGAs: PCI functions below which the kernel shows a manager or a region, and those of a system on chip.

Documentation/ABI/testing/sysfs-class-fpga-manager, sysfs-class-fpga-region; Documentation/fpga/dfl.rst (nodes).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, node_edits, part_of, pci_device
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_DFL = re.compile(r"dfl-(fme|port)\.\d+")


class _Fpga(msgspec.Struct):
    attributes: dict[str, str] = msgspec.field(default_factory=dict)
    paths: list[str] = msgspec.field(default_factory=list)


class Fpga:
    """The kind `fpga`."""

    name = "fpga"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        devices = tuple(_device(context, place, fpga) for place, fpga in _fpgas(reader).items())
        return Found(state=KindState(kind="fpga", state=PRESENT), devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the ports' nodes, or the vfio nodes."""
        return node_edits(device, devices)


def _device(context: Context, place: str, fpga: _Fpga) -> Device:
    function = context.function_by_address.get(place)
    if function is None:
        return part_of(None, kind="fpga", id=f"fpga-{place}", paths=fpga.paths, attributes=fpga.attributes)
    return pci_device(context, function, "fpga", paths=fpga.paths, attributes=fpga.attributes)


def _fpgas(reader: Tolerant) -> dict[str, _Fpga]:
    """Return the FPGAs by PCI address, or by name of the platform device."""
    found: dict[str, _Fpga] = defaultdict(_Fpga)
    for name, path, address, _ in pci.members(reader, "sys/class/fpga_manager"):
        fpga = found[address or _platform(path)]
        fpga.attributes["manager"] = name
        told = ((key, reader.text(f"{path}/{key}")) for key in ("name", "state"))
        fpga.attributes.update((f"manager_{key}", value) for key, value in told if value is not None)
    for name, path, address, _ in pci.members(reader, "sys/class/fpga_region"):
        fpga = found[address or _platform(path)]
        fpga.attributes["regions"] = ",".join(filter(None, (fpga.attributes.get("regions"), name)))
        fpga.paths.extend(_dfl_nodes(reader, path))
    return dict(found)


def _platform(path: str) -> str:
    """Return the platform device of a path: f8007000.devcfg for
    "sys/devices/platform/axi/f8007000.devcfg/fpga_manager/fpga0"."""
    parts = path.split("/")
    return parts[-3] if len(parts) > 2 else parts[-1]


def _dfl_nodes(reader: Tolerant, path: str) -> Iterator[str]:
    for name in reader.names(path):
        if _DFL.fullmatch(name):
            yield f"/dev/{name}"
