"""What applies to any disk, including NVMe namespaces: its size, and whether the node itself uses it.

A disk is in use if anything names it or one of its partitions: a mount, a swap, a file system or a block device made
from it. ZFS, Ceph and databases leave no such trace; an exclusive open shows them, which only the running host can do.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

import msgspec

from nodeagent.host.sysfs.lenient import Tolerant

SECTOR_BYTES = 512
"""Unit of `size`, whatever the disk's own block size (Documentation/ABI/stable/sysfs-block)."""
UNKNOWN_USE = "unknown"
"""Value of the attribute `in_use` if nothing shows whether the node uses a disk; such a disk is not offered."""
_DEVICE = re.compile(r"[0-9]+:[0-9]+")
_OCTAL = re.compile(r"\\([0-7]{3})")
_FILE_SYSTEMS = ("xfs", "ext4", "f2fs")
"""File systems with a folder in /sys/fs for each mounted device (Documentation/ABI/testing/sysfs-fs-*)."""


class BlockUses(msgspec.Struct, frozen=True, kw_only=True):
    """What the node uses of all block devices."""

    numbers: frozenset[str]
    """MAJOR:MINOR."""
    names: frozenset[str]
    """Names in /sys/class/block."""
    hidden: bool
    """Whether a user of disks exists that /proc and /sys do not attribute to a disk: a ZFS pool."""
    servers: frozenset[str] = frozenset()
    """IP addresses of the servers of mounted file systems, some with a port."""


def block_uses(reader: Tolerant) -> BlockUses:
    """Return the block devices in use, as far as /proc and /sys show them."""
    mounts = tuple(_mounts(reader))
    names = {name for one in mounts for path in one.paths for name in _named(reader, path)}
    names.update(_swaps(reader), _of_file_systems(reader), _below_block_devices(reader))
    return BlockUses(
        numbers=frozenset(one.number for one in mounts),
        names=frozenset(names),
        servers=frozenset(server for one in mounts for server in one.servers),
        hidden=any(one.type == "zfs" for one in mounts) or bool(_below(reader, "proc/spl/kstat/zfs")),
    )


def in_use(reader: Tolerant, name: str, path: str, uses: BlockUses) -> bool | str:
    """Return whether the node uses a disk, or one of its partitions, or a volume, or UNKNOWN_USE with a warning.

    name: of the disk in /sys/class/block; path: its real folder.
    """
    parts = [(name, path), *((one, f"{path}/{one}") for one in reader.names(path) if is_part(reader, f"{path}/{one}"))]
    if any(_is_named(reader, uses, *part) for part in parts):
        return True
    if reader.sysfs.root == "/":
        return _is_claimed(reader, name)
    if uses.hidden:
        reader.warn(node(name)[1:], "a ZFS pool may use the disk, and only the running host can show it")
        return UNKNOWN_USE
    return False


def is_part(reader: Tolerant, path: str) -> bool:
    """Return whether a folder is that of a part of a disk: a partition, or a disk inside another, such as the boot
    partitions of an eMMC (mmcblk0boot0, drivers/mmc/core/block.c)."""
    return reader.sysfs.exists(f"{path}/partition") or all(
        reader.sysfs.exists(f"{one}/{file}") for one in (path, path.rpartition("/")[0]) for file in ("dev", "size")
    )


def node(name: str) -> str:
    """Return the device node of a block device, whose name has "!" where the node has a folder."""
    return f"/dev/{name.replace('!', '/')}"


def size_bytes(reader: Tolerant, path: str) -> int | None:
    """Return the capacity of the disk whose sysfs folder is `path`, or None if it cannot be read."""
    sectors = reader.number(f"{path}/size")
    return None if sectors is None else sectors * SECTOR_BYTES


def block_bytes(reader: Tolerant, path: str) -> int | None:
    """Return the logical block size of the disk whose sysfs folder is `path`, or None if it cannot be read."""
    return reader.number(f"{path}/queue/logical_block_size")


# ---------------------------------------------------------------- what names a block device


class _Mount(msgspec.Struct, frozen=True):
    number: str
    type: str
    paths: tuple[str, ...]
    """What it names below /dev."""
    servers: tuple[str, ...]
    """IP addresses that it names, some with a port."""


def _mounts(reader: Tolerant) -> Iterator[_Mount]:
    """Yield the mounts in the namespace of process 1 (Documentation/filesystems/proc.rst, 3.5)."""
    for line in (reader.text("proc/1/mountinfo") or "").splitlines():
        words, _, rest = line.partition(" - ")
        fields, (type, source, options, *_) = words.split(), (*rest.split(), "", "", "")
        if len(fields) > 3 and _DEVICE.fullmatch(fields[2]):
            # kubelet binds the node of a raw block volume into its own folders.
            bound = (f"/dev{fields[3]}",) if type == "devtmpfs" else ()
            paths = (*_sources(_plain(source)), *map(_plain, bound))
            yield _Mount(fields[2], type, paths, tuple(_servers(type, source, options)))


def _sources(source: str) -> list[str]:
    """Return the devices in the source of a mount, of which bcachefs writes several with ":" between."""
    return re.split(":(?=/dev/)", source) if source.startswith("/dev/") else []


def _servers(type: str, source: str, options: str) -> Iterator[str]:
    """Yield the addresses of a mount's servers: in options of NFS and SMB (fs/nfs/super.c, fs/smb/client/cifsfs.c), and
    the monitors of Ceph in its source or in an option (fs/ceph/super.c)."""
    for option in options.split(",") if "addr=" in options else ():
        name, _, value = option.partition("=")
        if name in ("addr", "mountaddr", "mon_addr"):
            yield from value.split("/")
    if type == "ceph" and ":/" in source:
        yield from source.partition(":/")[0].split(",")


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


def _named(reader: Tolerant, path: str) -> Iterator[str]:
    """Yield the name of the block device that a path below /dev leads to."""
    if path.startswith("/dev/"):
        yield reader.sysfs.real(path[1:]).removeprefix("dev/").replace("/", "!")


def _swaps(reader: Tolerant) -> Iterator[str]:
    for line in (reader.text("proc/swaps") or "").splitlines()[1:]:
        yield from _named(reader, _plain("".join(line.split()[:1])))


def _of_file_systems(reader: Tolerant) -> Iterator[str]:
    """Yield the devices of mounted file systems, whose mounts may be in another namespace or name only one device."""
    for kind in _FILE_SYSTEMS:
        yield from reader.names(f"sys/fs/{kind}")
    for folder, names in _below(reader, "sys/fs/btrfs"):
        yield from reader.names(f"{folder}/devices") if "devices" in names else ()
    for folder, names in _below(reader, "sys/fs/bcachefs"):
        links = (reader.link_name(f"{folder}/{one}/block") for one in names if one.startswith("dev-"))
        yield from filter(None, links)


def _below_block_devices(reader: Tolerant) -> Iterator[str]:
    """Yield the members of arrays, volumes and caches, and the disks behind loop devices."""
    for name in reader.names("sys/class/block"):
        yield from reader.names(f"sys/class/block/{name}/slaves")
        if name.startswith("loop"):
            yield from _named(reader, reader.text(f"sys/class/block/{name}/loop/backing_file") or "")


def _is_named(reader: Tolerant, uses: BlockUses, name: str, path: str) -> bool:
    """Return whether a use names a block device, or something holds it (a bcache set has no entry in holders)."""
    return (
        name in uses.names
        or reader.text(f"{path}/dev") in uses.numbers
        or bool(reader.names(f"{path}/holders"))
        or reader.sysfs.exists(f"{path}/bcache")
    )


def _below(reader: Tolerant, path: str) -> list[tuple[str, list[str]]]:
    """Return the folders in a folder that are not empty, each with the names in it."""
    folders = ((f"{path}/{name}", reader.names(f"{path}/{name}")) for name in reader.names(path))
    return [(folder, names) for folder, names in folders if names]


# ---------------------------------------------------------------- the last witness


def _is_claimed(reader: Tolerant, name: str) -> bool | str:
    """Return whether an exclusive open of a disk fails because it or a partition is claimed (open(2), O_EXCL).

    File systems, ZFS, md and Ceph claim what they use. Nothing is written, and the claim ends at once.
    """
    path = reader.sysfs.path(node(name)[1:])
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):  # noqa: PTH116
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        if error.errno == errno.ENOMEDIUM:
            return False
        reader.warn(node(name)[1:], f"{error.strerror}; whether the node uses the disk is unknown")
        return UNKNOWN_USE
    return False
