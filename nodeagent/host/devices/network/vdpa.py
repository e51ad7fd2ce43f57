"""vDPA devices: the kind `vdpa`. Each is a part of the function, or of the scalable function, that it was made of.

The admin makes them (`vdpa dev add`) and binds them: to vhost_vdpa, whose node /dev/vhost-vdpa-N a virtual machine or a
program in user space opens, or to virtio_vdpa, which makes a network interface or a disk of the host's kernel and has
no node. Source: drivers/vdpa/vdpa.c; drivers/vhost/vdpa.c for the node's name and place; drivers/virtio/virtio_vdpa.c:
the virtio device is below what does its DMA, the PCI function, or below the vDPA device itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, nodes, part_of, short_id
from nodeagent.host.devices.nic import SCALABLE, is_representor
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

BUS = "sys/bus/vdpa/devices"
VHOST, VIRTIO = "vhost_vdpa", "virtio_vdpa"
_NODE, _VIRTIO_DEVICE = re.compile(r"vhost-vdpa-\d+"), re.compile(r"virtio\d+")


class Vdpa:
    """The kind `vdpa`."""

    name = "vdpa"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        devices = tuple(_devices(reader, context))
        state = KindState(kind="vdpa", state=PRESENT)
        if not devices:
            state = KindState(kind="vdpa", state=ABSENT, reason="no vDPA device was made (vdpa dev add)")
        return Found(state=state, devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the device's node, and one variable with the nodes of all."""
        every = ",".join(dict.fromkeys(path for one in devices for path in one.paths))
        return ContainerEdits(env=MappingProxyType({"NODEAGENT_VDPA_DEVICES": every}), device_nodes=nodes(device.paths))


def _devices(reader: Tolerant, context: Context) -> Iterator[Device]:
    seen = [(*one, reader.link_name(f"{one[1]}/driver")) for one in pci.members(reader, BUS)]
    virtio = Counter(address for _, _, address, _, driver in seen if driver == VIRTIO)
    for name, path, address, tail, driver in seen:
        owner = context.function_by_address.get(address or "")
        folders = [path, *([owner.path] if owner is not None and virtio[address] == 1 else [])]
        told = {"name": name, **(_uplink(reader, context, owner) if owner is not None else {})}
        if driver == VIRTIO and (netdevs := sorted(_interfaces(reader, folders))):
            told["netdevs"] = ",".join(netdevs)
        parent, paths = _parent(owner, tail), _nodes(reader, path) if driver == VHOST else ()
        made = part_of(owner, kind="vdpa", id=f"{parent or 'vdpa'}/{name}", paths=paths, attributes=told)
        yield replace(made, driver=driver, parent=parent)


def _parent(owner: Function | None, tail: str) -> str | None:
    """Return the id of the device that a vDPA device is a part of, or None if it is of none, as one in software.

    tail: its path below the function."""
    if owner is None:
        return None
    first = tail.split("/")[0]
    return short_id(f"{owner.address}/{first}") if SCALABLE.fullmatch(first) else owner.address


def _uplink(reader: Tolerant, context: Context, owner: Function) -> Mapping[str, str]:
    """Return the interface of the physical function, which identifies the network."""
    folder = f"{context.function_by_address.get(owner.physical or '', owner).path}/net"
    own = [name for name in reader.names(folder) if not is_representor(reader, f"{folder}/{name}")]
    return {"pf_name": own[0]} if own else {}


def _nodes(reader: Tolerant, path: str) -> tuple[str, ...]:
    """Return the node that is there."""
    named = (name for name in reader.names(path) if _NODE.fullmatch(name))
    return tuple(f"/dev/{name}" for name in named if reader.sysfs.exists(f"dev/{name}"))


def _interfaces(reader: Tolerant, folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        for name in reader.names(folder):
            if _VIRTIO_DEVICE.fullmatch(name):
                yield from reader.names(f"{folder}/{name}/net")
