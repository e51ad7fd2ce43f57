"""The configuration of pinning, and of caches, bandwidth, disk I/O and utilization clamps of containers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import AT_START, Absolute, Base, Seconds


class TuningConfig(Base, frozen=True):
    """What exclusive CPUs are set to while containers hold them. Everything is left alone unless it is given."""

    governor: Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{0,15}$")] = ""
    """Of cpufreq, such as performance."""
    energy_performance_preference: Annotated[str, msgspec.Meta(pattern=r"^([a-z_]{0,31}|[0-9]{1,3})$")] = ""
    min_frequency_mhz: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    """A core that cannot reach it gets its own limit."""
    max_frequency_mhz: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    wakeup_latency_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    """The longest tolerated time for leaving an idle state; 0: none."""


CacheMask = Annotated[str, msgspec.Meta(pattern=r"^0x0{0,7}[1-9a-fA-F][0-9a-fA-F]{0,7}$")]
CacheWays = Annotated[int, msgspec.Meta(ge=1, le=32)]


class ResctrlClassConfig(Base, frozen=True):
    """A class of cache ways and memory bandwidth that containers share."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]
    caches: dict[Literal["L3", "L3CODE", "L3DATA", "L2", "L2CODE", "L2DATA"], CacheMask | CacheWays] = {}
    """By the kernel's name of a cache: a mask of ways, or how many of the highest ones. What is left out is shared with
    the default group."""
    memory_bandwidth_percent: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    memory_bandwidth_mbps: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = msgspec.field(
        default=None, name="memoryBandwidthMBps"
    )
    """In 10^6 bytes per second, for each L3 cache."""


class ResctrlConfig(Base, frozen=True):
    """How caches and memory bandwidth are divided (resctrl)."""

    exclusive_ways: Annotated[int, msgspec.Meta(ge=0, le=31)] = 0
    """How many ways of each L3 cache the default group gives up, for claims."""
    classes: list[ResctrlClassConfig] = []


BytesPerSecond = (
    Annotated[int, msgspec.Meta(ge=2, le=10**15)]
    | Annotated[str, msgspec.Meta(pattern=r"^([2-9]|[1-9][0-9]{1,14}|[1-9][0-9]{0,5}(Ki|Mi|Gi|k|M|G))$")]
)
OperationsPerSecond = Annotated[int, msgspec.Meta(ge=2, le=1_000_000_000)]


class IoClassConfig(Base, frozen=True):
    """A class of limits of disk I/O that claims and pods name."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]
    disks: list[Annotated[str, msgspec.Meta(pattern=r"^(/dev/[^\0]+|[^/\0]+)$", max_length=256)]] = []
    """On which disks pods that name it are limited: shell patterns of the kernel's names, or paths below /dev. A claim
    that names it is limited on its own."""
    read_bytes_per_second: BytesPerSecond | None = None
    write_bytes_per_second: BytesPerSecond | None = None
    read_iops: OperationsPerSecond | None = msgspec.field(default=None, name="readIOPS")
    write_iops: OperationsPerSecond | None = msgspec.field(default=None, name="writeIOPS")
    weight: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """Relative to other pods of the same QoS class, of which each has 100 without one."""
    latency_target_microseconds: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = None


class IoConfig(Base, frozen=True):
    """How disk I/O is limited."""

    classes: list[IoClassConfig] = []


Utilization = (
    Annotated[int, msgspec.Meta(ge=0, le=100)]
    | Annotated[str, msgspec.Meta(pattern=r"^(max|100(\.0{1,2})?|[0-9]{1,2}(\.[0-9]{1,2})?)$")]
)
"""In percent of the largest CPU at its highest frequency, with up to two decimals; max is 100."""


class UclampClassConfig(Base, frozen=True):
    """A utilization clamp that claims and pods name."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]
    min: Utilization | None = None
    """The kernel chooses frequencies and CPUs as for at least this utilization."""
    max: Utilization | None = None
    """The same for at most this utilization."""


class UclampConfig(Base, frozen=True):
    """How utilization is clamped in containers that hold exclusive CPUs (cgroup v2, cpu.uclamp)."""

    default: Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?)?$")] = ""
    """The class of containers whose claims and pods name none. Empty: they are not clamped."""
    classes: list[UclampClassConfig] = []


class PinningConfig(Base, frozen=True):
    """How containers are confined to what they hold, and all others kept off it."""

    mode: Annotated[Literal["auto", "nri", "cgroup", "off"], AT_START] = "auto"
    """auto: through the runtime (NRI) if its socket exists, otherwise by cgroups alone."""
    nri_socket: Annotated[Absolute, AT_START] = "/var/run/nri/nri.sock"
    nri_index: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{2}$"), AT_START] = "90"
    """The agent's place among the runtime's plugins."""
    on_failure: Literal["refuse", "warn"] = "refuse"
    """What happens to a container that cannot be confined to what it holds: it is not
    started, or started with a warning."""
    memory: Literal["granted", "local"] = "granted"
    """The NUMA nodes to which a container's memory is bound: those of the pages and memory that it holds; with local,
    if it holds neither, those of its CPUs."""
    strict_reservation: bool = True
    """Whether containers without exclusive CPUs are kept off the reserved CPUs too."""
    verify_seconds: Annotated[Seconds, AT_START] = 30.0
    """How often everything is read back without an event."""
    cgroup_root: Annotated[Absolute, AT_START] = "/"
    """Kubelet's cgroupRoot."""
    partition: Literal["none", "root", "isolated"] = "none"
    """Whether a container with exclusive CPUs becomes a cpuset partition."""
    move_interrupts: bool = False
    """Whether interrupts are moved away from exclusive CPUs."""
    device_interrupts: Literal["", "follow", "avoid", "leave"] = ""
    """Where the interrupts of held devices belong whose claims say nothing of them: on the exclusive CPUs of their
    holder, off all exclusive CPUs, or wherever they are. Empty: as moveInterrupts says."""
    intruders_seconds: Seconds = 60.0
    """How often to look for host threads and interrupts on exclusive CPUs."""
    tuning: TuningConfig = TuningConfig()
    resctrl: ResctrlConfig | None = None
    """null: caches and memory bandwidth are left alone."""
    io: IoConfig | None = None
    """null: there are no classes of disk I/O; claims may still have limits on their own disks."""
    uclamp: UclampConfig | None = None
    """null: there are no classes of utilization clamps; claims may still have their own."""

    @property
    def writes_interrupts(self) -> bool:
        """Return whether interrupts are moved whatever claims say."""
        return self.move_interrupts or self.device_interrupts in ("follow", "avoid")
