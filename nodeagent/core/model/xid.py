"""What an Xid, an error that NVIDIA's driver reports, says about the health of its GPU. docs/health.md has the table.

Source: NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors) and GPU memory error management guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from nodeagent.core.model.health import Remedy


class XidEffect(StrEnum):
    """What an Xid does to health."""

    APPLICATION = "application"
    """A fault of the program that runs on the GPU: the GPU is as good as before."""
    CONTAINED = "contained"
    """The GPU has dealt with the error. It is unhealthy until it has been without new ones for a while."""
    FATAL = "fatal"
    """The GPU works again only after a reset, a reload of the driver, or a reboot."""
    UNLISTED = "unlisted"
    """Not in the table: the GPU's health is unknown until an admin says otherwise or the driver is reloaded."""


_APPLICATION = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    32: "invalid or corrupted push buffer stream",
    43: "GPU stopped processing",
    45: "preemptive cleanup, due to previous errors",
    68: "NVDEC0 exception",
    69: "graphics engine class error",
    109: "context switch timeout",
    137: "NVLink fault of a peer's memory access",
}
_CONTAINED = {
    63: "a memory row was remapped or a page retired",
    92: "high rate of corrected memory errors",
    94: "contained memory error",
}
_FATAL = {
    46: "GPU stopped processing in the driver",
    48: "double-bit memory error",
    61: "internal microcontroller breakpoint",
    62: "internal microcontroller halt",
    64: "a memory row could not be remapped or a page not retired",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "timeout of the GPU's system processor (GSP)",
    120: "error of the GPU's system processor (GSP)",
    136: "NVLink training failure",
    140: "unrecovered memory error",
    143: "GPU initialization failure",
    158: "fatal timeout",
}
XIDS: Mapping[int, tuple[XidEffect, str]] = MappingProxyType(
    {
        **{code: (XidEffect.APPLICATION, text) for code, text in _APPLICATION.items()},
        **{code: (XidEffect.CONTAINED, text) for code, text in _CONTAINED.items()},
        **{code: (XidEffect.FATAL, text) for code, text in _FATAL.items()},
    }
)
"""Effect and short name, by code."""
_OFF_THE_BUS = 79


def effect_of(code: int) -> XidEffect:
    """Return what an Xid does to health."""
    return XIDS.get(code, (XidEffect.UNLISTED, ""))[0]


def remedy_of(code: int) -> Remedy:
    """Return what ends the effect of an Xid on the health of its GPU."""
    if effect_of(code) in (XidEffect.APPLICATION, XidEffect.CONTAINED):
        return Remedy.NONE
    return Remedy.REBOOT if code == _OFF_THE_BUS else Remedy.RESET


def describe(code: int) -> str:
    """Return an Xid as text, such as "Xid 79 (GPU has fallen off the bus)"."""
    known = XIDS.get(code)
    return f"Xid {code} ({known[1]})" if known else f"Xid {code}, which is not in the table of docs/health.md"
