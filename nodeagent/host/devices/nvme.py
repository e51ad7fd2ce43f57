"""NVMe controllers with all their namespaces, on PCI and over fabrics (Documentation/ABI/testing/sysfs-nvme).

A controller is one device: its namespaces share queues and have the same location. A controller with a disk that the
node itself uses is marked `in_use`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Attributes, Context, Found, node_edits, part_of, pci_device, short_id
from nodeagent.host.devices.disks import UNKNOWN_USE, BlockUses, block_uses, in_use, size_bytes
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_NAMESPACE = re.compile(r"nvme(\d+)(?:c\d+)?n(\d+)")
_TOLD = ("model", "serial", "transport", "firmware_rev", "state")


class Controller(msgspec.Struct, frozen=True, kw_only=True):
    """A controller, with its PCI address if it has one."""

    name: str
    path: str
    address: str | None


class Nvme:
    """The kind `nvme`."""

    name = "nvme"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        known, uses = controllers(reader), context.block_uses or block_uses(reader)
        others = [one for one in known if not is_target(reader, context, one)]
        devices = (*_on_pci(reader, context, known, uses), *_on_fabrics(reader, others, uses))
        warnings = tuple(dict.fromkeys(reader.warnings))
        return Found(state=KindState(kind="nvme", state=PRESENT), devices=devices, warnings=warnings)

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the namespaces as block devices, or the vfio nodes."""
        return node_edits(device, devices)


def controllers(reader: Tolerant) -> list[Controller]:
    """Return all controllers."""
    return [
        Controller(name=name, path=path, address=address if tail == f"nvme/{name}" else None)
        for name, path, address, tail in pci.members(reader, "sys/class/nvme")
    ]


def is_target(reader: Tolerant, context: Context, controller: Controller) -> bool:
    """Return whether a controller leads to a target that is configured, or connected for a claim: its disks belong to
    that device."""
    if controller.address is not None or not (context.targets or context.connected_nqns):
        return False
    nqn = reader.text(f"{controller.path}/subsysnqn")
    return nqn in context.connected_nqns or any(one.port.nqn == nqn for one in context.targets)


def controller_id(reader: Tolerant, controller: Controller) -> str:
    """Return the id of the device that a controller is."""
    if controller.address is not None:
        return controller.address
    serial = reader.text(f"{controller.path}/serial")
    known = controller.name if serial is None else serial
    return short_id(f"nvme-{known}-{reader.text(f'{controller.path}/cntlid') or 0}")


def _on_pci(reader: Tolerant, context: Context, known: list[Controller], uses: BlockUses) -> Iterator[Device]:
    by_address = {one.address: one for one in known if one.address is not None}
    for function in context.functions:
        controller = by_address.get(function.address)
        if controller is None and not function.is_class("0108"):
            continue
        names = namespaces(reader, controller) if controller is not None else []
        attributes = _attributes(reader, controller, names, uses) if controller is not None else {}
        paths = [f"/dev/{name}" for name in names]
        device = pci_device(context, function, "nvme", paths=paths, attributes=attributes)
        yield device if function.has_vfio else _with_wwids(reader, device, names)


def _on_fabrics(reader: Tolerant, known: list[Controller], uses: BlockUses) -> Iterator[Device]:
    for controller in known:
        if controller.address is None:
            names = namespaces(reader, controller)
            told = _attributes(reader, controller, names, uses)
            id = controller_id(reader, controller)
            device = part_of(None, kind="nvme", id=id, paths=[f"/dev/{name}" for name in names], attributes=told)
            yield _with_wwids(reader, device, names)


def _with_wwids(reader: Tolerant, device: Device, names: list[str]) -> Device:
    """Several controllers may lead to one namespace: by one disk (native multipath), or by a disk for each of them."""
    told = (reader.text(f"sys/class/block/{name}/wwid") for name in names)
    return replace(device, exclusive=(*device.paths, *(f"wwid:{wwid}" for wwid in told if wwid)))


def namespaces(reader: Tolerant, controller: Controller) -> list[str]:
    """Return the names of the disks. With multipath, the folder holds nvme0c1n1 and the disk is nvme0n1."""
    matches = (_NAMESPACE.fullmatch(name) for name in reader.names(controller.path))
    return [f"nvme{match[1]}n{match[2]}" for match in matches if match is not None]


def _attributes(reader: Tolerant, controller: Controller, names: list[str], uses: BlockUses) -> Attributes:
    found: dict[str, str | int | bool] = {"controller": controller.name}
    for name in _TOLD:
        value = reader.text(f"{controller.path}/{name}")
        if value is not None:
            found[name] = value
    if names:
        folders = {name: reader.sysfs.entry("sys/class/block", name) for name in names}
        found["namespaces"] = ",".join(names)
        found["size_bytes"] = sum(size_bytes(reader, folder) or 0 for folder in folders.values())
        found["in_use"] = _most(in_use(reader, *one, uses) for one in folders.items())
    return found


def _most(answers: Iterable[bool | str]) -> bool | str:
    """Return whether any namespace is in use; if none is, UNKNOWN_USE if that of any is unknown."""
    return max(answers, key=(False, UNKNOWN_USE, True).index)
