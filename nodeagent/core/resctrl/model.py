"""What resctrl offers on a machine, and its groups. Frozen values; no decisions.

The names are those of the kernel, which are the same on Intel, AMD and Arm: L3 and L2, with code and data apart as
L3CODE and L3DATA, and MB. A domain is one cache, or what shares one memory bandwidth, by the id of its cache.
Source: Documentation/filesystems/resctrl.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec

ROOT = ""
"""Name of the default group, which everything belongs to that is in no other."""
BANDWIDTH = "MB"
Values = Mapping[int, int]
"""Masks of cache ways or limits of bandwidth, by domain."""
Schemata = Mapping[str, Values]
"""Values by resource, such as "L3"."""


class Unit(StrEnum):
    """What a limit of bandwidth counts."""

    PERCENT = "percent"
    """Of what the hardware can do: Intel and Arm."""
    MIBPS = "MiB/s"
    """Intel, mounted with mba_MBps."""
    EIGHTHS = "1/8 GB/s"
    """AMD."""


class Mode(StrEnum):
    """How a group shares its ways."""

    SHAREABLE = "shareable"
    EXCLUSIVE = "exclusive"
    """The kernel refuses every mask of others that overlaps it."""
    LOCK_SETUP = "pseudo-locksetup"
    LOCKED = "pseudo-locked"


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """A resource whose ways are given by masks."""

    name: str
    full: int
    """The mask of all ways."""
    least_ways: int = 1
    """Fewest consecutive ways that a mask begins with."""
    sparse: bool = False
    """Whether a mask may have gaps."""
    hardware: int = 0
    """Ways that devices use too (shareable_bits)."""
    closids: int
    domains: tuple[int, ...]

    @property
    def level(self) -> int:
        """Return the level of the cache."""
        return int(self.name[1])

    @property
    def ways(self) -> int:
        """Return the number of ways."""
        return self.full.bit_count()


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """The resource of memory bandwidth."""

    unit: Unit
    least: int
    step: int
    closids: int
    domains: tuple[int, ...]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A control group of resctrl."""

    name: str
    mode: Mode
    schemata: Schemata = msgspec.field(default_factory=lambda: MappingProxyType({}))


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """The file system as it is mounted."""

    caches: Mapping[str, Cache] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By name of the resource."""
    bandwidth: Bandwidth | None = None
    groups: Mapping[str, Group] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By name, the default group too."""
    events: tuple[str, ...] = ()
    """What can be monitored: llc_occupancy, mbm_total_bytes, mbm_local_bytes."""
    rmids: int = 0
    """How many groups can be monitored; 0 if none can."""

    @property
    def closids(self) -> int:
        """Return how many control groups there can be, with the default group; 0 if nothing can be controlled."""
        limits = [one.closids for one in self.caches.values()]
        return min(limits + ([self.bandwidth.closids] if self.bandwidth else []), default=0)

    @property
    def root(self) -> Group:
        """Return the default group."""
        return self.groups[ROOT]

    def at_level(self, level: int) -> tuple[Cache, ...]:
        """Return the resources of a cache: two where code and data are apart, none if it cannot be divided."""
        return tuple(one for one in self.caches.values() if one.level == level)


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """What the CPUs of one claim are to have for themselves."""

    group: str
    holder: str
    """For messages, such as "claim default/a"."""
    ways: Values = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """How many ways of each L3 cache."""
    domains: frozenset[int] = frozenset()
    """The L3 caches of its CPUs."""
    percent: int | None = None
    """Limit of its memory bandwidth."""
    mbps: int | None = None
    """Limit of its memory bandwidth in 10^6 bytes per second."""


class SharedClass(msgspec.Struct, frozen=True, kw_only=True):
    """A class that any number of containers can be in."""

    group: str
    name: str
    masks: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Masks by resource, for all its domains; L3 means L3CODE and L3DATA where they are apart."""
    ways: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Numbers of ways by resource: the highest that the default group has."""
    percent: int | None = None
    mbps: int | None = None
