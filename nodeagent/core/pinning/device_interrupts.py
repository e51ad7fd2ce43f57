"""Where the interrupts of devices belong whose holders have exclusive CPUs. Pure.

A holder's exclusive CPUs are those of the same claim or container as the device; where these have none, those that its
pods hold otherwise. CPUs of named pools are not among them, nor hidden hyperthreads, which stay idle. What a claim
says of its device applies; where it says nothing, and for containers of the device plugin, what the node's
configuration says.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.settings import known_settings
from nodeagent.core.pinning.pools import pool_of
from nodeagent.core.pinning.threads import used_cpus
from nodeagent.errors import InputError

FOLLOW, AVOID, LEAVE = "follow", "avoid", "leave"
"""What may be said of a device's interrupts: they are confined to the holder's exclusive CPUs; they are kept off all
exclusive CPUs, also where `pinning.moveInterrupts` is off; they may be on the holder's exclusive CPUs, also where it is
on."""
_WORD = '"interrupts":'


class DeviceInterrupts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the interrupts of one held device belong."""

    device: str
    """Its id."""
    addresses: tuple[str, ...]
    """PCI addresses of its functions."""
    wanted: str
    """FOLLOW, AVOID or LEAVE."""
    cpus: CpuSet
    """The holder's exclusive CPUs, as far as they can be used at this moment."""
    holder: str


def device_interrupts(grants: Iterable[Grant], inventory: Inventory, default: str) -> tuple[DeviceInterrupts, ...]:
    """Return where the interrupts of held devices belong, by id of the device; those without a setting are left
    out. default: of devices whose claims say nothing, "" for nothing."""
    every = list(grants)
    found = list[DeviceInterrupts]()
    for one in every:
        wanted = _wanted(one) or default
        functions = {id: functions_of(inventory, id) for id in one.devices} if wanted else {}
        if any(functions.values()):
            cpus, holder = _cpus_of(one, every, inventory) & inventory.cpus_usable, str(one.holder)
            found += [
                DeviceInterrupts(device=id, addresses=addresses, wanted=wanted, cpus=cpus, holder=holder)
                for id, addresses in functions.items()
                if addresses
            ]
    return tuple(sorted(found, key=lambda one: one.device))


def functions_of(inventory: Inventory, id: str) -> tuple[str, ...]:
    """Return the PCI addresses of a device and, of a set of devices, of its members; only of whole functions: a part of
    a device has no interrupts of its own."""
    device = inventory.device_by_id.get(id)
    if device is None:
        return ()
    members = (inventory.device_by_id.get(one) for one in device.members or (id,))
    return tuple(one.id for one in members if one is not None and one.pci_address == one.id)


def check_interrupts(inventory: Inventory, id: str, wanted: str, *, shared: bool) -> None:
    """Raise InputError if a claim can say nothing of a device's interrupts. shared: whether it has a share only."""
    if not wanted:
        return
    if shared:
        raise InputError(f"interrupts: {id} is shared, and its interrupts are those of all who have it")
    if not functions_of(inventory, id):
        raise InputError(f"interrupts: {id} is not a whole PCI function, and only whole functions have interrupts")


def _wanted(grant: Grant) -> str:
    """Return what a claim says. Settings that a newer build wrote and this one cannot read count as nothing."""
    # Nearly all grants have no such setting: theirs are not decoded.
    if grant.holder.api != CLAIM or _WORD not in grant.settings:
        return ""
    return known_settings(grant.settings).interrupts


def _cpus_of(device: Grant, grants: Iterable[Grant], inventory: Inventory) -> CpuSet:
    """Return the exclusive CPUs of the one who holds a device."""
    every = [one for one in grants if one.cpus and pool_of(one) is None]
    same = union(used_cpus(inventory, one) for one in every if _same_holder(one, device))
    pods = {*device.pod_uids}
    return same or union(used_cpus(inventory, one) for one in every if not pods.isdisjoint(one.pod_uids))


def _same_holder(one: Grant, other: Grant) -> bool:
    a, b = one.holder, other.holder
    if a.api != b.api:
        return False
    if a.api == CLAIM:
        return a.uid == b.uid
    return bool(a.pod) and (a.namespace, a.pod, a.container) == (b.namespace, b.pod, b.container)
