"""Limits of I/O on one disk, and the lines by which cgroup v2 has them. Pure.

Source: Documentation/admin-guide/cgroup-v2.rst (IO Interface Files); tg_set_limit in block/blk-throttle.c,
iolatency_set_limit in block/blk-iolatency.c, ioc_weight_write in block/blk-iocost.c, bfq_io_set_device_weight in
block/bfq-cgroup.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from nodeagent.errors import InputError

THROTTLE, LATENCY = "io.max", "io.latency"
WEIGHT, BFQ_WEIGHT = "io.weight", "io.bfq.weight"
"""The file for a weight depends on what distributes the disk's time: iocost or the scheduler BFQ."""
FILES = (THROTTLE, LATENCY, WEIGHT, BFQ_WEIGHT)
REMOVED: Mapping[str, str] = MappingProxyType(
    {
        THROTTLE: "rbps=max wbps=max riops=max wiops=max",
        LATENCY: "target=max",
        WEIGHT: "default",
        BFQ_WEIGHT: "default",
    }
)
"""What a file takes for a disk in order to have no line for it any longer."""
MOST_BFQ_WEIGHT = 1000


class IoLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on one disk. What is None is not limited."""

    read_bps: int | None = None
    """Bytes per second."""
    write_bps: int | None = None
    read_iops: int | None = None
    """Operations per second."""
    write_iops: int | None = None
    weight: int | None = None
    """Relative to the pods of the same QoS class, of which each has 100 without one; 1 to 10000."""
    latency_us: int | None = None
    """While operations take longer on average, the kernel slows down pods of the same QoS class with longer targets or
    none."""

    def with_both(self, other: IoLimits) -> IoLimits:
        """Return what satisfies both: the lower limits and target, the higher weight."""
        weights = [one for one in (self.weight, other.weight) if one is not None]
        return IoLimits(
            read_bps=_lower(self.read_bps, other.read_bps),
            write_bps=_lower(self.write_bps, other.write_bps),
            read_iops=_lower(self.read_iops, other.read_iops),
            write_iops=_lower(self.write_iops, other.write_iops),
            weight=max(weights, default=None),
            latency_us=_lower(self.latency_us, other.latency_us),
        )

    @property
    def of_container(self) -> IoLimits:
        """Return what applies to each container by itself."""
        return msgspec.structs.replace(self, weight=None, latency_us=None)

    @property
    def of_pod(self) -> IoLimits:
        """Return what applies to the pod: the kernel compares a cgroup with those that have the same parent."""
        return IoLimits(weight=self.weight, latency_us=self.latency_us)


NO_LIMITS = IoLimits()


def _lower(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def lines_of(limits: IoLimits, weight_file: str) -> dict[str, str]:
    """Return what each file has to say of one disk, by the file's name. Files that need not say anything are left out.

    weight_file: WEIGHT or BFQ_WEIGHT. Raise InputError if it does not take the weight.
    """
    found: dict[str, str] = {}
    rates = limits.read_bps, limits.write_bps, limits.read_iops, limits.write_iops
    if any(one is not None for one in rates):
        keys = zip(("rbps", "wbps", "riops", "wiops"), rates, strict=True)
        found[THROTTLE] = " ".join(f"{key}={'max' if one is None else one}" for key, one in keys)
    if limits.latency_us is not None:
        found[LATENCY] = f"target={limits.latency_us}"
    if limits.weight is not None:
        if weight_file == BFQ_WEIGHT and limits.weight > MOST_BFQ_WEIGHT:
            raise InputError(f"a weight of {limits.weight}: the scheduler bfq takes 1 to {MOST_BFQ_WEIGHT}")
        found[weight_file] = str(limits.weight)
    return found


def parse(text: str) -> dict[str, str]:
    """Return what a file says of disks, by MAJOR:MINOR, without what it says of all disks."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {number: rest.strip() for number, _, rest in pairs if ":" in number}


def alike(one: str, other: str) -> bool:
    """Return whether two lines say the same; the order of their words does not count."""
    return sorted(one.split()) == sorted(other.split())
