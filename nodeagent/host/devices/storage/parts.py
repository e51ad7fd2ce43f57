"""Parts of disks as devices of the kind `block`, each with its `type`: NVMe namespaces, partitions, LVM volumes.

They are looked for only where a resource asks for their type, and a resource that does not gets none. A partition is a
part of its disk and a namespace of its controller: both cannot be held at once.
Sources: Documentation/ABI/stable/sysfs-block, Documentation/ABI/testing/sysfs-block-dm, drivers/nvme/host/sysfs.c,
disk_uevent in block/genhd.c; the UUIDs of LVM's devices: build_dm_uuid in lib/activate/dev_manager.c of LVM2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.host import pci
from nodeagent.host.devices.base import BLOCK_TYPES, Attributes, Context, part_of
from nodeagent.host.devices.disks import BlockUses, block_bytes, in_use, node, size_bytes
from nodeagent.host.devices.nvme import controller_id, controllers, is_target, namespaces
from nodeagent.host.sysfs.lenient import Tolerant

NAMESPACE, PARTITION, VOLUME = BLOCK_TYPES
_CLASS = "sys/class/block"
_LVM = re.compile(r"LVM-[A-Za-z0-9]{64}")
"""A volume that is a user's; what LVM has below one has a suffix ("-tpool", "-real")."""
_LVM_NAME = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")
"""VG-LV, each "-" in them written twice."""
_UNFIT = re.compile(r"[^A-Za-z0-9.:_-]+")


def parts(reader: Tolerant, context: Context, disks: Iterable[Device], uses: BlockUses) -> Iterator[Device]:
    """Yield the parts of all disks. disks: the whole disks that are devices of this kind.

    Namespaces come with partitions and volumes, too: these may lie on them.
    """
    wholes = {str(one.attributes["name"]): one for one in disks}
    for one in _namespaces(reader, context, uses):
        wholes[str(one.attributes["name"])] = one
        yield one
    if PARTITION in context.block_types:
        yield from _partitions(reader, wholes, uses)
    if VOLUME in context.block_types:
        yield from _volumes(reader, wholes, uses)


# ---------------------------------------------------------------- NVMe namespaces


def _namespaces(reader: Tolerant, context: Context, uses: BlockUses) -> Iterator[Device]:
    seen: set[str] = set()
    for controller in controllers(reader):
        if is_target(reader, context, controller):
            continue
        owner = context.function_by_address.get(controller.address or "")
        for name in namespaces(reader, controller):
            if name in seen or not reader.sysfs.exists(f"{_CLASS}/{name}"):
                continue
            seen.add(name)
            path = reader.sysfs.entry(_CLASS, name)
            wwid = reader.text(f"{path}/wwid")
            told = {
                "type": NAMESPACE,
                "name": name,
                "controller": controller.name,
                "nsid": reader.number(f"{path}/nsid"),
                "nguid": reader.text(f"{path}/nguid"),
                "eui64": reader.text(f"{path}/eui"),
                "wwid": wwid,
                "model": reader.text(f"{controller.path}/model"),
                "serial": reader.text(f"{controller.path}/serial"),
                "size_bytes": size_bytes(reader, path),
                "block_bytes": block_bytes(reader, path),
                "in_use": in_use(reader, name, path, uses),
            }
            id = f"block-{_UNFIT.sub('-', wwid)}" if wwid else f"block-{controller.address or 'fabrics'}-{name}"
            made = part_of(owner, kind="block", id=id, paths=[node(name)], attributes=_known(told))
            exclusive = (node(name), *([f"wwid:{wwid}"] if wwid else []))
            yield replace(made, exclusive=exclusive, parent=controller_id(reader, controller))


# ---------------------------------------------------------------- partitions


def _partitions(reader: Tolerant, wholes: Mapping[str, Device], uses: BlockUses) -> Iterator[Device]:
    for name, path, _, _ in pci.members(reader, _CLASS):
        number = reader.number(f"{path}/partition")
        disk = wholes.get(path.split("/")[-2])
        if number is None or disk is None:
            continue
        told = {
            "type": PARTITION,
            "name": name,
            "disk": disk.attributes["name"],
            "partition": number,
            "partlabel": _uevent(reader, path).get("PARTNAME"),
            "partuuid": _uevent(reader, path).get("PARTUUID"),
            "size_bytes": size_bytes(reader, path),
            "read_only": reader.text(f"{path}/ro") == "1",
            "in_use": in_use(reader, name, path, uses),
        }
        yield _below(disk, f"{disk.id}-part{number}", name, told, (node(name),))


def _uevent(reader: Tolerant, path: str) -> dict[str, str]:
    lines = (line.partition("=") for line in (reader.text(f"{path}/uevent") or "").splitlines())
    return {key: value for key, _, value in lines if value}


# ---------------------------------------------------------------- LVM


def _volumes(reader: Tolerant, wholes: Mapping[str, Device], uses: BlockUses) -> Iterator[Device]:
    for name, path, _, _ in pci.members(reader, _CLASS):
        uuid = reader.text(f"{path}/dm/uuid") or ""
        found = _LVM_NAME.fullmatch(reader.text(f"{path}/dm/name") or "")
        if not _LVM.fullmatch(uuid) or found is None:
            continue
        told = {
            "type": VOLUME,
            "name": name,
            "vg": found[1].replace("--", "-"),
            "lv": found[2].replace("--", "-"),
            "size_bytes": size_bytes(reader, path),
            "read_only": reader.text(f"{path}/ro") == "1",
            "in_use": in_use(reader, name, path, uses),
        }
        below = {disk for one in reader.names(f"{path}/slaves") for disk in _disks_below(reader, one)}
        on = [wholes[one] for one in sorted(below) if one in wholes]
        yield _below(
            on[0] if len(below) == len(on) == 1 else None, f"block-{uuid}", name, told, (node(name), f"dm:{uuid}")
        )


def _disks_below(reader: Tolerant, name: str, depth: int = 8) -> Iterator[str]:
    """Yield the whole disks that a block device lies on: a disk itself, a partition's, those of a stack of volumes."""
    path = reader.sysfs.entry(_CLASS, name)
    slaves = reader.names(f"{path}/slaves") if depth else []
    for one in slaves:
        yield from _disks_below(reader, one, depth - 1)
    if not slaves:
        yield path.split("/")[-2] if reader.sysfs.exists(f"{path}/partition") else name


# ---------------------------------------------------------------- what they have in common


def _below(disk: Device | None, id: str, name: str, told: Mapping[str, object], exclusive: tuple[str, ...]) -> Device:
    """Return a part of a disk, at the disk's place."""
    made = part_of(None, kind="block", id=id, paths=[node(name)], attributes=_known(told))
    if disk is None:
        return replace(made, exclusive=exclusive)
    return replace(
        made,
        exclusive=exclusive,
        parent=disk.id,
        numa_node=disk.numa_node,
        local_cpus=disk.local_cpus,
        pcie_root=disk.pcie_root,
        bridges=disk.bridges,
    )


def _known(told: Mapping[str, object]) -> Attributes:
    return {key: value for key, value in told.items() if isinstance(value, str | int | bool) and value != ""}
