"""Disks by the numbers under which cgroup v2 limits I/O on them.

The kernel takes whole disks alone; a partition's number is ENODEV (blkg_conf_open_bdev in block/blk-cgroup.c). A limit
counts what a cgroup does on the disk, so for a partition it is set on the disk, and nothing outside the cgroup notices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from nodeagent.core.blockio.limits import BFQ_WEIGHT, WEIGHT
from nodeagent.errors import HostError
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.sysfs.sysfs import SysFs

_CLASS = "sys/class/block"
_NUMBER = re.compile(r"[0-9]+:[0-9]+")
_CURRENT = re.compile(r"\[([a-z0-9-]+)\]")


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A whole disk."""

    name: str
    """The kernel's."""
    number: str
    """MAJOR:MINOR."""


def disk_at(sysfs: SysFs, path: str) -> Disk:
    """Return the disk of a device node (/dev/sda) or of what links to one; for a partition, the disk that it is on.

    Raise HostError if there is none.
    """
    node = sysfs.real(path.lstrip("/"))
    name = node.removeprefix("dev/").replace("/", "!")
    if "/" in name or not sysfs.exists(f"{_CLASS}/{name}"):
        raise HostError(f"cannot limit I/O on {path}: it is no disk of this machine")
    if sysfs.exists(f"{_CLASS}/{name}/partition"):
        name = sysfs.entry(_CLASS, name).split("/")[-2]
    return _disk(sysfs, name)


def disks_like(sysfs: SysFs, patterns: Iterable[str]) -> list[Disk]:
    """Return the whole disks that patterns of a class mean, each once: shell patterns of the kernel's names, and paths
    below /dev. What there is not on this machine is left out."""
    names = [name for name in sysfs.names(_CLASS) if not sysfs.exists(f"{_CLASS}/{name}/partition")]
    found: dict[str, Disk] = {}
    for pattern in patterns:
        if pattern.startswith("/"):
            if sysfs.exists(pattern.lstrip("/")):
                one = disk_at(sysfs, pattern)
                found[one.number] = one
        else:
            found |= {one.number: one for name in names if fnmatchcase(name, pattern) and (one := _disk(sysfs, name))}
    return list(found.values())


def _disk(sysfs: SysFs, name: str) -> Disk:
    number = sysfs.text(f"{_CLASS}/{name}/dev", "")
    if not _NUMBER.fullmatch(number):
        raise HostError(f"cannot read {sysfs.path(f'{_CLASS}/{name}/dev')}: {number[:40]!r} is not MAJOR:MINOR")
    return Disk(name=name, number=number)


def is_there(sysfs: SysFs, number: str) -> bool:
    """Return whether there is a disk with a number."""
    return sysfs.exists(f"sys/dev/block/{number}")


def weight_file(sysfs: SysFs, disk: Disk) -> str:
    """Return the file that a weight on a disk is written to. Raise HostError if nothing distributes the disk's time."""
    scheduler = _CURRENT.search(sysfs.text(f"{_CLASS}/{disk.name}/queue/scheduler", ""))
    if scheduler is not None and scheduler[1] == "bfq":
        return BFQ_WEIGHT
    path = f"{hierarchy(sysfs).mount}/io.cost.qos".removeprefix(sysfs.root)
    for line in sysfs.text(path, "").splitlines():
        number, *words = line.split()
        if number == disk.number and "enable=1" in words:
            return WEIGHT
    raise HostError(
        f"cannot weigh I/O on {disk.name}: its scheduler is {scheduler[1] if scheduler else 'none'}, not bfq, and "
        f"{sysfs.path(path)} does not enable iocost for {disk.number}"
    )


def check_queue(sysfs: SysFs, disk: Disk) -> None:
    """Raise HostError if a disk has no queue of requests, so that latency targets and weights would do nothing: volumes
    of the device mapper, arrays, NVMe disks with several paths."""
    if not sysfs.exists(f"{_CLASS}/{disk.name}/mq"):
        raise HostError(
            f"cannot weigh I/O on {disk.name}, or keep to a latency: it has no queue of requests, only the disks below "
            "it have"
        )
