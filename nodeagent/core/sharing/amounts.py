"""What the shares of a GPU have of its memory and of its cores, and what is left of both over all holders.

Pure. A GPU that is divided into N shares has `memory` (bytes) and `cores` (percent of its compute). A share has an Nth
of both, in whole MiB and percent, unless a claim asks for other amounts. The sums never exceed the device, over both
APIs. SGX has `memory` alone, that of enclaves. Sets of GPUs and other kinds of devices have shares without amounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Amount, Grant
from nodeagent.errors import Refused

MEMORY, CORES = "memory", "cores"
"""Names of capacities: bytes, and percent of the compute of a GPU."""
MIB = 1 << 20
ALL_CORES = 100
_UNITS = {MEMORY: "bytes", CORES: "percent"}


def totals(device: Device, replicas: int) -> dict[str, int]:
    """Return the amounts that the shares of a device divide among them; empty if its shares have none."""
    memory = device.attributes.get("memory_bytes")
    if device.members or not isinstance(memory, int) or not 1 < replicas <= memory // MIB:
        return {}
    if device.kind == "gpu" and replicas <= ALL_CORES:
        return {MEMORY: memory // MIB * MIB, CORES: ALL_CORES}
    return {MEMORY: memory // MIB * MIB} if device.kind == "sgx" else {}


def per_share(device: Device, replicas: int) -> dict[str, int]:
    """Return the amounts of one of `replicas` equal shares of a device; empty if its shares have none."""
    steps = {MEMORY: MIB, CORES: 1}
    return {name: size // steps[name] // replicas * steps[name] for name, size in totals(device, replicas).items()}


def amounts(device: str, shares: int, each: Mapping[str, int], consumed: Mapping[str, int]) -> tuple[Amount, ...]:
    """Return what a holder of some shares of a device has: what it consumes, otherwise what so many shares have.

    each: of one share.
    """
    return tuple((device, name, consumed.get(name, shares * size)) for name, size in sorted(each.items()))


def held(grant: Grant, device: str, shares: int, each: Mapping[str, int]) -> dict[str, int]:
    """Return what a grant has of a device. A grant of a build that did not record it has what its shares have.

    shares: how many it holds. each: of one share now.
    """
    known = {name: size for id, name, size in grant.amounts if id == device}
    return known or {name: shares * size for name, size in each.items()}


def left(whole: Mapping[str, int], others: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return what others leave of the amounts of a device."""
    some = list(others)
    return {name: max(0, size - sum(one.get(name, 0) for one in some)) for name, size in whole.items()}


def shares_left(free: Mapping[str, int], each: Mapping[str, int]) -> int | None:
    """Return how many equal shares the free amounts of a device allow; None if its shares have no amounts."""
    return min((free[name] // size for name, size in each.items()), default=None)


def refuse_missing(device: str, wanted: Mapping[str, int], free: Mapping[str, int], holders: str) -> None:
    """Raise Refused if more is wanted of a device than is free. holders: who has the rest, or ""."""
    for name, size in wanted.items():
        if size > free.get(name, 0):
            unit, by = _UNITS[name], f", the rest is held by {holders}" if holders else ""
            why = f"cannot grant {size} {unit} of the {name} of {device}: {free.get(name, 0)} are left{by}"
            raise Refused(why, want=size, free=free.get(name, 0), unit=unit)
