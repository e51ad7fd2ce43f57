"""What an Xid, an error that NVIDIA's driver reports, says about the health of its GPU. docs/health.md has the table.

Source: the immediate action of NVIDIA's Xid catalog for Ampere and later (docs.nvidia.com/deploy/xid-errors,
analyzing-xid-catalog, October 2025), which tests/data/nvidia/xids.json has row by row; for 61, which it lists as
unused, the listing for earlier GPUs on the same pages; 109 otherwise than there (docs/decisions/0016).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType

from nodeagent.core.model.health import Remedy


class XidEffect(StrEnum):
    """What an Xid does to health."""

    APPLICATION = "application"
    """A fault of the program that runs on the GPU, or of its driver's part: the GPU is as good as before."""
    INFORMATION = "information"
    """Nothing by itself: it describes another Xid, or is a test."""
    DEGRADED = "degraded"
    """The GPU works as before, but something of it wears out or was corrected."""
    CONTAINED = "contained"
    """The GPU has dealt with the error. It is unhealthy until it has been without new ones for a while."""
    FATAL = "fatal"
    """The GPU works again only after a reset, a reload of the driver, or a reboot."""
    UNLISTED = "unlisted"
    """Not in the table: the GPU's health is unknown until an admin says otherwise or the driver is reloaded."""


def _engines(name: str, codes: str, first: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (code, text) of the engines of one kind, in order of their numbers."""
    for number, code in enumerate(map(int, codes.split()), first):
        yield code, f"{name} {number} exception"


_APPLICATION = {
    8: "GPU stopped processing",
    11: "invalid or corrupted push buffer stream",
    13: "graphics engine exception",
    25: "invalid or illegal push buffer stream",
    31: "GPU memory page fault",
    32: "invalid or corrupted push buffer stream",
    37: "unknown method of the driver's firmware",
    38: "watchdog of the driver's firmware",
    43: "GPU stopped processing",
    44: "graphics engine fault during a context switch",
    45: "preemptive cleanup, due to previous errors",
    60: "video processor exception",
    66: "illegal access by the driver",
    67: "illegal access by the driver",
    69: "graphics engine class error",
    80: "corrupted data sent to the GPU",
    108: "NVLink fault of a remote translation",
    109: "context switch timeout",
    137: "NVLink fault of a peer's memory access",
    141: "CUDA fast path error",
    152: "DLA SMMU error",
    153: "DLA timeout",
    **dict(_engines("copy engine", "39 40 41 70 71 72 75 76 77 85 126 127 128 129 130 131 132 133 134 135")),
    **dict(_engines("video decoder", "68 83 84 88 89 96 97 98")),
    **dict(_engines("JPEG decoder", "82 99 100 101 102 103 104 105")),
    **dict(_engines("optical flow engine", "86 139")),
}
_INFORMATION = {
    14: "test of the error handling",
    106: "test message of the management interface",
    107: "silent test message of the management interface",
    154: "the recovery that the driver asks for has changed",
    162: "power smoothing is engaged again",
    171: "the double-bit error was in DRAM",
    172: "the double-bit error was in SRAM",
}
_DEGRADED = {
    63: "a memory row was remapped or a page retired",
    92: "high rate of corrected memory errors",
    93: "the InfoROM has been written more often than it is made for",
    121: "corrected errors of the link to the CPU (C2C)",
    157: "a faulty part could not be retired",
    160: "a memory channel was retired",
    161: "a memory channel could not be retired",
    163: "power smoothing is disengaged",
    164: "power smoothing is near the end of its life",
    165: "power smoothing is at the end of its life",
}
_CONTAINED = {
    94: "contained memory error",
    144: "NVLink error (SAW)",
    145: "NVLink error (RLW)",
    146: "NVLink error (TLW)",
    147: "NVLink error (TREX)",
    148: "NVLink error (NVLPW_CTRL)",
    149: "NVLink error (NETIR)",
    150: "NVLink error (MSE)",
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
    151: "key rotation failure",
    155: "NVLink brought down by software",
    156: "a faulty part is retired at the next reset",
    158: "fatal timeout",
}
XIDS: Mapping[int, tuple[XidEffect, str]] = MappingProxyType(
    {
        code: (effect, text)
        for effect, some in (
            (XidEffect.APPLICATION, _APPLICATION),
            (XidEffect.INFORMATION, _INFORMATION),
            (XidEffect.DEGRADED, _DEGRADED),
            (XidEffect.CONTAINED, _CONTAINED),
            (XidEffect.FATAL, _FATAL),
        )
        for code, text in some.items()
    }
)
"""Effect and short name, by code."""
SAYS_NOTHING = frozenset({XidEffect.APPLICATION, XidEffect.INFORMATION})
"""Effects that are no evidence against a GPU."""
LASTING = frozenset({XidEffect.FATAL, XidEffect.UNLISTED})
"""Effects that last until they are cleared."""
ASK_NVML = frozenset({63, 64, 109, 154, 156, *range(144, 151)})
"""Codes of which NVML says more at once: rows that wait for a reset, and the recovery that the driver asks for. What
144 to 150 mean is in details that NVML's event does not carry; for the fatal ones the driver asks for a reset. A
program can bring about 109, and only the driver knows whether the GPU got over it (docs/decisions/0016)."""
_REBOOTS = frozenset({79, 151})


def effect_of(code: int) -> XidEffect:
    """Return what an Xid does to health."""
    return XIDS.get(code, (XidEffect.UNLISTED, ""))[0]


def remedy_of(code: int) -> Remedy:
    """Return what ends the effect of an Xid on the health of its GPU."""
    if effect_of(code) not in LASTING:
        return Remedy.NONE
    return Remedy.REBOOT if code in _REBOOTS else Remedy.RESET


def describe(code: int) -> str:
    """Return an Xid as text, such as "Xid 79 (GPU has fallen off the bus)"."""
    known = XIDS.get(code)
    return f"Xid {code} ({known[1]})" if known else f"Xid {code}, which is not in the table of docs/health.md"
