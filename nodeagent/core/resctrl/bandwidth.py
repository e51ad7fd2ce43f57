"""Limits of memory bandwidth, as the hardware counts them. Pure.

Source: bw_validate in fs/resctrl/ctrlmondata.c: percentages are rounded up to a multiple of bandwidth_gran.
"""

from __future__ import annotations

from nodeagent.core.resctrl.model import Tree, Unit
from nodeagent.errors import InputError

_MIB, _EIGHTH = 1 << 20, 125_000_000
"""Bytes per second of one unit."""
_MEGA = 1_000_000
_WHOLE = 100


def limit(tree: Tree, percent: int | None, mbps: int | None) -> int | None:
    """Return a limit in the unit of the machine, or None if there is to be none.

    percent: rounded up to a step of the hardware. mbps: in 10^6 bytes per second, rounded down to one. If both are
    given, the one that the machine counts applies. Raise InputError if it cannot be set."""
    if percent is None and mbps is None:
        return None
    bandwidth = tree.bandwidth
    if bandwidth is None:
        raise InputError("memory bandwidth cannot be limited on this machine: resctrl has no MB")
    if bandwidth.unit == Unit.PERCENT:
        if percent is None:
            raise InputError(
                "memory bandwidth is limited in percent on this machine: give memoryBandwidthPercent, or mount resctrl "
                "with mba_MBps"
            )
        if percent < bandwidth.least:
            raise InputError(f"cannot limit memory bandwidth to {percent} %: the least is {bandwidth.least} %")
        return min(-(-percent // bandwidth.step), _WHOLE // bandwidth.step) * bandwidth.step
    if mbps is None:
        raise InputError("memory bandwidth is limited in MB/s on this machine: give memoryBandwidthMBps")
    unit = _MIB if bandwidth.unit == Unit.MIBPS else _EIGHTH
    return max(mbps * _MEGA // unit, bandwidth.least, 1)
