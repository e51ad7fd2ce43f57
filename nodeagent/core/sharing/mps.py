"""Which MPS daemons the ledger asks for: one for the GPUs of a claim, one for each device that claims share.

Pure. A container has one pipe folder, so the GPUs that one claim has whole belong to one daemon; a daemon serves one
MIG instance at most, and a claim uses MPS on one shared device at most (core/sharing/rules.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger.ledger import Ledger, in_order
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig, from_json
from nodeagent.core.sharing.amounts import CORES, MEMORY, MIB
from nodeagent.errors import InputError

MPS, ADVISORY = "MPS", "advisory"
"""What enforces the amounts of shares."""
DAEMONS = "mps"
"""In the runtime folder: a folder for each daemon."""
ALL_THREADS = 100
"""NVIDIA's default of the active thread percentage."""


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What each program of one grant may use of its device. None: as much as there is."""

    threads_percent: int | None = None
    memory_mib: int | None = None


class MpsSet(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon: the devices that it serves and the highest limits of its clients."""

    name: str
    """The name of its folder: hexadecimal digits, the same for the same claim or device."""
    devices: tuple[str, ...]
    """Device.id, in the order in which CUDA numbers them for the daemon."""
    holders: tuple[str, ...]
    uuids: tuple[str, ...] = ()
    """Of the devices, in the same order; empty if `fault` is not."""
    parents: tuple[str, ...] = ()
    """UUIDs of the GPUs whose compute mode applies."""
    shared: bool = False
    """Whether several claims may use it."""
    threads_percent: int = ALL_THREADS
    memory_mib: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By number of the device; none for a device with a client that is not limited."""
    fault: str = ""
    """Why no daemon can be started at present."""


def settings_of(grant: Grant) -> OpaqueConfig:
    """Return a grant's settings. Those that a newer build wrote and this one cannot read count as none."""
    if not grant.settings:
        return NO_SETTINGS
    try:
        return from_json(grant.settings)
    except InputError:
        return NO_SETTINGS


def uses_mps(grant: Grant) -> bool:
    """Return whether the programs of a grant share its device through MPS."""
    return grant.holder.api == CLAIM and bool(grant.devices or grant.shares) and settings_of(grant).mps


def asks_for_sharing(grant: Grant) -> bool:
    """Return whether a grant's settings ask for MPS or for a time slice."""
    return uses_mps(grant) or bool(settings_of(grant).time_slice)


def set_name(grant: Grant) -> str:
    """Return the name of the daemon that serves a grant: of the device if it is shared, of the claim otherwise."""
    whose = f"device {grant.shares[0]}" if grant.shares else f"claim {grant.holder.uid}"
    return hashlib.sha256(whose.encode(errors="surrogateescape")).hexdigest()[:12]


def limits_of(grant: Grant) -> ClientLimits:
    """Return what each program of a grant may use: what the grant has of a shared device, or less if its settings say
    so."""
    settings, has = settings_of(grant), {name: size for _, name, size in grant.amounts}
    size = settings.mps_pinned_bytes
    return ClientLimits(
        threads_percent=_lower(settings.mps_threads_percent, has.get(CORES)),
        memory_mib=_lower(None if size is None else -(-size // MIB), has[MEMORY] // MIB if MEMORY in has else None),
    )


def _lower(one: int | None, other: int | None) -> int | None:
    return min((size for size in (one, other) if size is not None), default=None)


def enforcement(grants: Iterable[Grant]) -> str:
    """Return what keeps programs to the amounts of their grants: MPS, or nothing (ADVISORY)."""
    return MPS if all(map(uses_mps, grants)) else ADVISORY


def mps_sets(inventory: Inventory, ledger: Ledger) -> dict[str, MpsSet]:
    """Return the daemons that the grants of a ledger need, by name."""
    by_name: dict[str, list[Grant]] = {}
    for grant in in_order(ledger.grants):
        if uses_mps(grant):
            by_name.setdefault(set_name(grant), []).append(grant)
    return {name: _set(inventory, name, grants) for name, grants in by_name.items()}


def devices_of(inventory: Inventory, grants: Iterable[Grant]) -> tuple[str, ...]:
    """Return the devices of some grants, a set of GPUs as its members, as CUDA numbers them: by PCI address."""
    held = {one for grant in grants for one in (*grant.devices, *grant.shares)}
    known = inventory.device_by_id
    return tuple(sorted({one for id in held for one in (known[id].members if id in known else ()) or (id,)}))


def _set(inventory: Inventory, name: str, grants: list[Grant]) -> MpsSet:
    devices = devices_of(inventory, grants)
    uuids, parents, faults = [], [], []
    for id in devices:
        found = inventory.device_by_id.get(id)
        uuid = str(found.attributes.get("uuid", "")) if found is not None else ""
        above = inventory.device_by_id.get(found.parent) if found is not None and found.parent else found
        if found is None or not uuid:
            faults.append(f"{id} is not there at this moment" if found is None else f"the UUID of {id} is not known")
        uuids.append(uuid)
        parents.append(str(above.attributes.get("uuid", "")) if above is not None else "")
    limits = [(devices.index(id), limits_of(one)) for one in grants for id in devices_of(inventory, [one])]
    return MpsSet(
        name=name,
        devices=devices,
        holders=tuple(sorted({str(one.holder) for one in grants})),
        uuids=() if faults else tuple(uuids),
        parents=tuple(dict.fromkeys(one for one in parents if one)),
        shared=any(one.shares for one in grants),
        threads_percent=max(ALL_THREADS if one.threads_percent is None else one.threads_percent for _, one in limits),
        memory_mib=MappingProxyType(_most_memory(limits)),
        fault="; ".join(faults),
    )


def _most_memory(limits: Iterable[tuple[int, ClientLimits]]) -> dict[int, int]:
    """Return the largest limit of each device, without those that have a client without one."""
    found: dict[int, int] = {}
    unlimited = {device for device, one in limits if one.memory_mib is None}
    for device, one in limits:
        if device not in unlimited and one.memory_mib is not None:
            found[device] = max(found.get(device, 0), one.memory_mib)
    return found
