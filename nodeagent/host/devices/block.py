"""Whole disks other than NVMe: SCSI, SATA, virtio, SD cards. No partitions and no software devices.

The id is the disk's own identifier (wwid, serial), so it survives renaming; without one, it is the disk's position.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, node_edits, part_of, short_id
from nodeagent.host.devices.disks import BlockUses, block_uses, in_use, is_part, node, size_bytes
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_NOT_DISKS = re.compile(r"(loop|ram|zram|dm-|md|nbd|rbd|drbd|fd|sr|nvme|mtdblock)\d+.*")
_SOFTWARE = "sys/devices/virtual/"
"""Where the kernel has what is made in software, such as zd0 (a ZFS volume) and bcache0."""
_UNFIT = re.compile(r"[^A-Za-z0-9.:_-]+")


class Block:
    """The kind `block`."""

    name = "block"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        uses = context.block_uses or block_uses(reader)
        devices = tuple(_distinct(_disks(reader, context, uses)))
        if context.block_types:
            from nodeagent.host.devices.storage.parts import parts

            devices = (*devices, *parts(reader, context, devices, uses))
        return Found(state=KindState(kind="block", state=PRESENT), devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the disk's node."""
        return node_edits(device, devices)


def _disks(reader: Tolerant, context: Context, uses: BlockUses) -> Iterator[Device]:
    for name, path, address, _ in pci.members(reader, "sys/class/block"):
        if _NOT_DISKS.fullmatch(name) or path.startswith(_SOFTWARE) or is_part(reader, path):
            continue
        told = {
            "name": name,
            "model": reader.text(f"{path}/device/model"),
            "serial": reader.text(f"{path}/serial"),
            "wwid": reader.text(f"{path}/device/wwid") or reader.text(f"{path}/wwid"),
            "size_bytes": size_bytes(reader, path),
            "rotational": reader.text(f"{path}/queue/rotational") == "1",
            "removable": reader.text(f"{path}/removable") == "1",
            "in_use": in_use(reader, name, path, uses),
        }
        attributes = {key: value for key, value in told.items() if value is not None}
        owner = context.function_by_address.get(address) if address is not None else None
        id = _id(name, address, attributes.get("wwid") or attributes.get("serial"))
        disk = part_of(owner, kind="block", id=id, paths=[node(name)], attributes=attributes)
        wwid = attributes.get("wwid")
        # A LUN that is reached over several paths is a disk for each of them.
        yield disk if wwid is None else replace(disk, exclusive=(*disk.paths, f"wwid:{wwid}"))


def _distinct(disks: Iterator[Device]) -> Iterator[Device]:
    """Yield the disks with distinct ids. Virtual disks may all share one serial number; then the name is added."""
    found = list(disks)
    count = Counter(disk.id for disk in found)
    for disk in found:
        yield disk if count[disk.id] == 1 else replace(disk, id=short_id(f"{disk.id}-{disk.attributes['name']}"))


def _id(name: str, address: str | None, told: object) -> str:
    if told is not None:
        return f"block-{_UNFIT.sub('-', str(told))}"
    return f"block-{address}-{name}" if address is not None else f"block-{name}"
