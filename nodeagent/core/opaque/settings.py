"""The effective configuration of one device, and how the ledger stores it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from nodeagent.core.network.interface import Interface
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import InputError


class OpaqueConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The effective configuration of one device. For fields that are empty the node's own configuration applies."""

    options: frozenset[str] = frozenset()
    """Names from core.model.options, including those for the core type."""
    numa: str = ""
    """Request.numa."""
    named_pool: str = ""
    """The named pool of its namespace into which the CPUs are brought; "" if they are exclusive."""
    hide_hyperthreads: bool = False
    """Whether containers run on one thread of each granted core."""
    mount_path: str = ""
    """Where a hugetlbfs of the granted page size is mounted in the container."""
    time_slice: str = ""
    """Default, Short, Medium or Long: how long a container may use a shared GPU before it is the next one's turn."""
    mps: bool = False
    """True if the GPU is shared through NVIDIA's Multi-Process Service."""
    mps_threads_percent: int | None = None
    mps_pinned_bytes: int | None = None
    driver_capabilities: frozenset[str] = frozenset()
    """What a container gets of NVIDIA's driver in addition to what computing needs: graphics, video."""
    driver: str = ""
    """A VFIO driver that the device is bound to while the claim is prepared: for a virtual machine."""
    rdma: bool | None = None
    """Whether a container gets an adapter's RDMA device nodes."""
    interface: Interface | None = None
    """What an adapter's interface is in the pod that it is moved into; None leaves it on the host."""
    vf: VfProperties | None = None
    """What a virtual function is set to on its physical one; None leaves it as it is."""
    interrupts: str = ""
    """Where the interrupts of the device belong if its holder has exclusive CPUs: follow, avoid or leave
    (core/pinning/device_interrupts.py)."""
    cache_ways: int | None = None
    """How many ways of their L3 caches the CPUs have for themselves."""
    cache_class: str = ""
    """The shared class of pinning.resctrl that its containers are in."""
    memory_bandwidth_percent: int | None = None
    memory_bandwidth_mbps: int | None = None
    """In 10^6 bytes per second, for each L3 cache."""
    uclamp_min_hundredths: int | None = None
    """Of the utilization that the CPUs run for at least, in hundredths of a percent of the largest CPU."""
    uclamp_max_hundredths: int | None = None
    """The same at most."""
    uclamp_class: str = ""
    """The class of pinning.uclamp, instead of these."""
    io_read_bps: int | None = None
    """Limit of I/O on each of the device's disks, in bytes per second."""
    io_write_bps: int | None = None
    io_read_iops: int | None = None
    """In operations per second."""
    io_write_iops: int | None = None
    io_weight: int | None = None
    io_latency_us: int | None = None
    io_class: str = ""
    """The class of pinning.io, instead of these."""
    env: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    own: Mapping[str, Any] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What a third-party kind's own configuration says, in plain types."""


NO_SETTINGS = OpaqueConfig()
_KEPT_SETTINGS = 4096


def to_json(settings: OpaqueConfig) -> str:
    """Return the settings that are not empty, in a fixed order, or "" if there are none."""
    every = msgspec.structs.asdict(settings)
    said = {name: value for name, value in every.items() if value != getattr(NO_SETTINGS, name)}
    return msgspec.json.encode(said, order="deterministic", enc_hook=dict).decode() if said else ""


def from_json(text: str) -> OpaqueConfig:
    """Read what `to_json` wrote. Raise InputError if the text is anything else."""
    try:
        found = msgspec.json.decode(text or "{}", type=dict[str, Any])
        settings = msgspec.convert(found, OpaqueConfig)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InputError(f"cannot read settings {text[:60]!r}: {error}") from None
    for key in sorted(found.keys() - set(OpaqueConfig.__struct_fields__)):
        raise InputError(f"cannot read settings {text[:60]!r}: unknown key {key}")
    own = MappingProxyType(dict(settings.own))
    return replace(settings, env=MappingProxyType(dict(settings.env)), own=own)


@functools.lru_cache(_KEPT_SETTINGS)
def known_settings(text: str) -> OpaqueConfig:
    """Return what `to_json` wrote, or no settings if a later version wrote what this one cannot read."""
    try:
        return from_json(text)
    except InputError:
        return NO_SETTINGS
