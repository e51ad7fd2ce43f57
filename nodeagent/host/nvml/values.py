"""What the daemon and the process that calls NVML exchange: values, and the frames that carry them.

A frame is four bytes of length, little endian, followed by JSON. The question is {"ask": N}; the answer is a Reply with
the same N; an Xid that happens meanwhile is a Reply with N = 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mig:
    """One MIG instance: a part of a GPU that is allocated separately."""

    uuid: str
    profile: str
    memory_bytes: int
    gpu_instance: int
    compute_instance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """The GPUs of several nodes among which NVLinks reach: those of one cluster and clique."""

    cluster: str
    """UUID."""
    clique: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NvGpu:
    """One GPU as NVML sees it. What the GPU does not support is None."""

    pci_address: str
    """In sysfs form: 0000:3b:00.0."""
    uuid: str
    """Empty if unknown."""
    name: str
    minor: int | None = None
    """N of /dev/nvidiaN."""
    memory_bytes: int | None = None
    mig_enabled: bool | None = False
    """None if unknown."""
    migs: tuple[Mig, ...] = ()
    nvlinks: dict[str, int] = field(default_factory=dict)
    """Number of active NVLinks by the PCI address of the other end, which may be a switch."""
    nvlinks_active: tuple[int, ...] = ()
    """Numbers of the NVLinks that are active."""
    nvlinks_inactive: tuple[int, ...] = ()
    """Numbers of those that are not: there is no bridge, or the link has failed."""
    fabric: Fabric | None = None
    """None if the GPU is in none, or is not registered with its fabric manager yet."""
    ecc_uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    rows_pending: bool | None = None
    """Whether memory rows are to be remapped at the next reset."""
    rows_failed: bool | None = None
    """Whether memory rows could not be remapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The current state according to NVML. errors: one message for each GPU that does not answer."""

    driver_version: str
    gpus: tuple[NvGpu, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """NVML does not answer. absent: there is no library, so there is nothing to repair."""

    absent: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """A critical error that the driver reported (docs.nvidia.com/deploy/xid-errors)."""

    pci_address: str
    code: int
    instance: tuple[int, int] | None = None
    """(GPU instance, compute instance) of MIG; None: the whole GPU."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame from the helper; exactly one of the last three fields is set."""

    to: int = 0
    snapshot: Snapshot | None = None
    failure: Failure | None = None
    xid: Xid | None = None


def sysfs_address(bus_id: str) -> str:
    """Return NVML's "00000000:3B:00.0" in sysfs form: at least four domain digits, lower case."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next frame, or None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None
