"""Memory that a hugepage pool can take without driving the machine into reclaim or eviction.

Sources: Documentation/filesystems/proc.rst (MemAvailable of /proc/meminfo), which no NUMA node has of its own; the
node's meminfo (Documentation/ABI/stable/sysfs-devices-node).
"""

from __future__ import annotations

import re

from nodeagent.core.model.topology import NodeId
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

MACHINE = "proc/meminfo"
_LINE = re.compile(r"(?:Node \d+ )?(\S+):\s+(\d{1,15}) kB")
_RECLAIMABLE = ("Active(file)", "Inactive(file)", "SReclaimable")
"""Of these the kernel can give back most; half of them counts, so that no application loses all of its page cache."""


def available_bytes(sysfs: SysFs, node: NodeId) -> int:
    """Return the bytes that are available on a node, at most those of the whole machine. Blocks. Raise HostError if
    either is not known."""
    path = f"sys/devices/system/node/node{node}/meminfo"
    here = _sizes(sysfs, path)
    own = _need(sysfs, path, here, "MemFree") + sum(here.get(name, 0) for name in _RECLAIMABLE) // 2
    return min(own, _need(sysfs, MACHINE, _sizes(sysfs, MACHINE), "MemAvailable"))


def _sizes(sysfs: SysFs, path: str) -> dict[str, int]:
    found = (_LINE.match(line) for line in sysfs.text(path).splitlines())
    return {one[1]: int(one[2]) << 10 for one in found if one is not None}


def _need(sysfs: SysFs, path: str, sizes: dict[str, int], name: str) -> int:
    if name not in sizes:
        raise HostError(f"cannot read {sysfs.path(path)}: expected a line {name}: N kB")
    return sizes[name]
