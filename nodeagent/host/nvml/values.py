"""What the daemon and the process that calls NVML exchange: values, and the frames that carry them.

A frame is four bytes of length, little endian, followed by JSON. The answer to a Question is a Reply with its number;
an Xid that happens meanwhile is a Reply with the number 0.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from nodeagent.core.partitions.geometry import Profiles

LENGTH = struct.Struct("<I")


class Mig(msgspec.Struct, frozen=True, kw_only=True):
    """One MIG instance: a part of a GPU that is allocated separately."""

    uuid: str
    profile: str
    memory_bytes: int
    gpu_instance: int
    compute_instance: int
    ecc_uncorrected: int | None = None
    """Uncorrected errors of its SRAM since it was made. None if unknown."""


class Fabric(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs of several nodes among which NVLinks reach: those of one cluster and clique."""

    cluster: str
    """UUID."""
    clique: int


class FabricProbe(msgspec.Struct, frozen=True, kw_only=True):
    """Where a GPU stands in being registered with its fabric manager (nvmlGpuFabricInfo_v3_t)."""

    state: int
    """NVML_GPU_FABRIC_STATE_*."""
    status: int
    """An nvmlReturn_t; counts once the state is "completed"."""
    health: int = 0
    """NVML_GPU_FABRIC_HEALTH_MASK_*; 0, of which no field is supported, if the driver does not say."""


class LinkErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of all NVLinks of a GPU together since the driver was loaded. What is not counted is None."""

    replays: int | None = None
    recoveries: int | None = None
    crc: int | None = None
    """Of flits and data, which the link corrects by sending again."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """Further signs of how a GPU is. What the GPU, its mode or the driver does not support is None."""

    ecc_lifetime: int | None = None
    """Uncorrected memory errors since the GPU was made."""
    rows_remapped: int | None = None
    banks_without_spare: int | None = None
    """Memory banks in which no further row can be remapped."""
    sram_exceeded: bool | None = None
    """Whether there were more uncorrected errors of the SRAM than NVIDIA's field diagnostics tolerate."""
    clock_reasons: int | None = None
    """Why the clocks are as they are (nvmlClocksEventReasons, bits)."""
    fabric: FabricProbe | None = None
    links: LinkErrors = LinkErrors()
    recovery: int | None = None
    """What the driver asks for (NVML_GPU_RECOVERY_ACTION_*)."""


class GpuInstance(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU instance, with or without compute instances: it holds its memory slices either way."""

    id: int
    profile: int
    """Profile.id."""
    start: int
    size: int
    """In memory slices."""


class NvGpu(msgspec.Struct, frozen=True, kw_only=True):
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
    mig_pending: bool | None = None
    """Whether it will be in MIG mode after its next reset. None if unknown."""
    profiles: Profiles = ()
    """What it can be divided into, if it is in MIG mode."""
    instances: tuple[GpuInstance, ...] | None = ()
    """None if they cannot be listed."""
    processes: int | None = None
    """How many processes compute on it. None if unknown."""
    nvlinks: dict[str, int] = msgspec.field(default_factory=dict)
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
    condition: Condition = Condition()


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The current state according to NVML. errors: one message for each GPU that does not answer."""

    driver_version: str
    gpus: tuple[NvGpu, ...] = ()
    errors: tuple[str, ...] = ()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """NVML does not answer. absent: there is no library, so there is nothing to repair."""

    absent: bool
    reason: str


def for_scans(answer: Snapshot | Failure | None) -> Snapshot | Failure | None:
    """Return an answer without what says only how the GPUs are: two that are equal then give the same inventory."""
    if not isinstance(answer, Snapshot):
        return answer
    return replace(answer, gpus=tuple(map(_for_scans, answer.gpus)))


def _for_scans(gpu: NvGpu) -> NvGpu:
    return replace(
        gpu,
        migs=tuple(replace(one, ecc_uncorrected=None) for one in gpu.migs),
        mig_pending=None,
        processes=None,
        nvlinks_active=(),
        nvlinks_inactive=(),
        rows_pending=None,
        rows_failed=None,
        condition=Condition(),
    )


class Xid(msgspec.Struct, frozen=True, kw_only=True):
    """A critical error that the driver reported (docs.nvidia.com/deploy/xid-errors)."""

    pci_address: str
    code: int
    instance: tuple[int, int] | None = None
    """(GPU instance, compute instance) of MIG; None: the whole GPU."""


class Create(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Make a GPU instance at exactly one placement, with one compute instance over all of it."""

    gpu: str
    """The GPU's UUID."""
    profile: int
    start: int
    size: int
    gi: int | None = None
    """An instance that is there and only lacks its compute instance."""


class Destroy(msgspec.Struct, frozen=True, kw_only=True):
    """Destroy a GPU instance with its compute instances."""

    gpu: str
    gi: int


class SetMode(msgspec.Struct, frozen=True, kw_only=True):
    """Switch a GPU into or out of MIG mode."""

    gpu: str
    enabled: bool


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame to the helper: at most one of the other fields is set; with none, a snapshot is wanted."""

    ask: int
    look: str = ""
    """UUID of the GPU whose instances are wanted."""
    create: Create | None = None
    destroy: Destroy | None = None
    mode: SetMode | None = None


class MigState(msgspec.Struct, frozen=True, kw_only=True):
    """The instances of one GPU at this moment."""

    instances: tuple[GpuInstance, ...] | None
    """None if they cannot be listed."""
    migs: tuple[Mig, ...]


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that was created: what containers and NVML name it by."""

    gi: int
    ci: int
    uuid: str


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A request was carried out. pending: it takes effect when the GPU is reset."""

    pending: bool = False


class RefusedByDriver(msgspec.Struct, frozen=True, kw_only=True):
    """The driver refused a request, and nothing has changed."""

    reason: str
    in_use: bool = False
    """Whether it is refused because a process uses the GPU or the instance."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame from the helper; exactly one of the fields after `to` is set."""

    to: int = 0
    snapshot: Snapshot | None = None
    failure: Failure | None = None
    xid: Xid | None = None
    state: MigState | None = None
    made: Made | None = None
    completed: Completed | None = None
    refused: RefusedByDriver | None = None


def sysfs_address(bus_id: str) -> str:
    """Return NVML's "00000000:3B:00.0" in sysfs form: at least four domain digits, lower case."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next frame, or None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None
