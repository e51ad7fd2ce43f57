"""What applies to any disk, including NVMe namespaces: its size, and whether the node itself uses it."""

from __future__ import annotations

import re

from nodeagent.host.sysfs.lenient import Tolerant

SECTOR_BYTES = 512
"""Unit of `size`, whatever the disk's own block size (Documentation/ABI/stable/sysfs-block)."""
_DEVICE = re.compile(r"[0-9]+:[0-9]+")


def mounted(reader: Tolerant) -> frozenset[str]:
    """Return MAJOR:MINOR of every mounted file system and swap in the host's namespace (that of process 1)."""
    lines = (line.split() for line in (reader.text("proc/1/mountinfo") or "").splitlines())
    found = {words[2] for words in lines if len(words) > 2 and _DEVICE.fullmatch(words[2])}
    for line in (reader.text("proc/swaps") or "").splitlines()[1:]:
        path = line.split()[0]
        number = reader.text(f"sys/class/block/{path.rsplit('/', 1)[-1]}/dev")
        found.update([number] if number else [])
    return frozenset(found)


def in_use(reader: Tolerant, path: str, mounts: frozenset[str]) -> bool:
    """Return whether the disk or one of its partitions is mounted, used as swap, or held by device mapper or md."""
    parts = [
        path,
        *(f"{path}/{name}" for name in reader.names(path) if reader.sysfs.exists(f"{path}/{name}/partition")),
    ]
    return any(reader.names(f"{part}/holders") or reader.text(f"{part}/dev") in mounts for part in parts)


def size_bytes(reader: Tolerant, path: str) -> int | None:
    """Return the capacity of the disk whose sysfs folder is `path`, or None if it cannot be read."""
    sectors = reader.number(f"{path}/size")
    return None if sectors is None else sectors * SECTOR_BYTES
