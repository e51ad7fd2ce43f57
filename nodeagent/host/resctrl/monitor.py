"""What the hardware has counted for a group of resctrl: occupied cache, and bytes moved to and from memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from nodeagent.host.resctrl.read import folder
from nodeagent.host.sysfs.sysfs import SysFs

OCCUPANCY, TOTAL, LOCAL = "llc_occupancy", "mbm_total_bytes", "mbm_local_bytes"
_DOMAIN = re.compile(r"mon_L3_(\d+)", re.ASCII)


def measured(sysfs: SysFs, group: str) -> Mapping[tuple[str, int], int]:
    """Return bytes by (event, L3 cache). What the hardware does not count at this moment (Unavailable, Unassigned) is
    left out. Raise HostError if the folder cannot be listed."""
    return dict(_measured(sysfs, group))


def _measured(sysfs: SysFs, group: str) -> Iterator[tuple[tuple[str, int], int]]:
    data = f"{folder(group)}/mon_data"
    for name in sysfs.names(data):
        if found := _DOMAIN.fullmatch(name):
            for event in (OCCUPANCY, TOTAL, LOCAL):
                text = sysfs.text(f"{data}/{name}/{event}", "")
                if text.isascii() and text.isdigit():
                    yield (event, int(found[1])), int(text)
