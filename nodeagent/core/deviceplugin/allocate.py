"""Decisions about device-plugin containers: how granting exact ids changes the ledger, or why they cannot be granted.

Pure. Kubelet has already chosen the ids. What is decided here is whether they can be granted, and which older grants
they are taken from: a grant whose pod was never listed, or has gone, gives way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import msgspec
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import (
    DeviceResource,
    refuse_missing_amounts,
    refuse_missing_shares,
    shares_of,
    without,
)
from nodeagent.core.deviceplugin.view import Near, ResourceKind
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.counters import refuse_overdrawn
from nodeagent.core.ledger.exclusion import excluded_with, things_of
from nodeagent.core.ledger.free import grantable
from nodeagent.core.ledger.ledger import GRANTED, REDUCED, RELEASED, Change, Ledger
from nodeagent.core.model.cpuset import union
from nodeagent.core.model.grant import DEVICE_PLUGIN, Amount, Grant, Holder, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import NO_NODE
from nodeagent.core.sharing.amounts import amounts, per_share
from nodeagent.errors import InputError, Refused

SAME_POD_S = 5.0
"""Kubelet admits one pod after another: a grant made this recently and not listed yet is probably of the same pod."""


_ADOPTED, _TAKEN = "kubelet lists it, and the ledger lacked it", "kubelet allocated its ids again"
MOST_NAMED = 4
"""How many shared things a refusal names."""


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What a new grant is marked with. `at` is in seconds since the epoch."""

    new_id: Callable[[], str]
    at: float
    boot_id: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: the resulting ledger, the changes that lead to it, and the grant of each container."""

    ledger: Ledger
    changes: tuple[Change, ...] = ()
    grants: tuple[Grant, ...] = ()


def allocate(
    inventory: Inventory, ledger: Ledger, resource: ResourceKind, containers: Sequence[Sequence[str]], stamp: Stamp
) -> Decision:
    """Grant each container its ids, all or nothing.

    A repeated request for what is granted and not listed yet returns the same grant. Raise InputError naming ids that
    are unknown or requested twice, and Refused naming the conflicting holder.
    """
    check_ids(inventory, resource, containers)
    decision = Decision(ledger=ledger)
    for ids in containers:
        decision = _one_more(inventory, decision, resource, ids, stamp)
    return decision


def check_ids(inventory: Inventory, resource: ResourceKind, containers: Sequence[Sequence[str]]) -> None:
    """Raise InputError if there is no container, one requests no id, or an id is unknown or requested twice."""
    check_asked(resource.name, containers)
    resource.parts(inventory, list(chain.from_iterable(containers)))


def check_asked(name: str, containers: Sequence[Sequence[str]]) -> None:
    """Raise InputError unless the request has a container, each container names ids, and no id occurs twice."""
    if not containers:
        raise InputError(f"cannot allocate {name}: the request names no container")
    if not all(containers):
        raise InputError(f"cannot allocate {name}: the request of a container names no id")
    twice = sorted(one for one, times in Counter(chain.from_iterable(containers)).items() if times > 1)
    if twice:
        raise InputError(f"cannot allocate {name}: asked for twice: {', '.join(twice)}")


def grant_of(inventory: Inventory, resource: ResourceKind, ids: Sequence[str], grant_id: str, stamp: Stamp) -> Grant:
    """Return a grant of these ids to a container whose name is not known yet. Raise InputError if an id is unknown."""
    parts = resource.parts(inventory, ids)
    grant = Grant(
        id=grant_id,
        holder=Holder(api=DEVICE_PLUGIN, resource=resource.name),
        ids=tuple(ids),
        cpus=parts.cpus,
        hugepages=parts.hugepages,
        devices=parts.devices,
        shares=parts.shares,
        things=things_of(inventory, (*parts.devices, *parts.shares)),
        granted_at=stamp.at,
        boot_id=stamp.boot_id,
    )
    return replace(grant, amounts=_amounts(inventory, resource, grant)) if grant.shares else grant


def _amounts(inventory: Inventory, resource: ResourceKind, grant: Grant) -> tuple[Amount, ...]:
    """Return what the shares of a grant have of the memory and the cores of their devices."""
    if not isinstance(resource, DeviceResource):
        return ()
    devices = (inventory.device_by_id[one] for one in sorted(grant.shares))
    parts = (amounts(one.id, shares_of(grant, one.id), per_share(one, resource.replicas), {}) for one in devices)
    return tuple(chain.from_iterable(parts))


def adopt(inventory: Inventory, ledger: Ledger, grants: Iterable[Grant]) -> tuple[Decision, tuple[str, ...]]:
    """Record holdings that kubelet reports and the ledger lacks. Return the decision and the conflicts."""
    changes: list[Change] = []
    conflicts: list[str] = []
    for grant in grants:
        try:
            refuse_excluded(inventory, ledger, grant)
            ledger = ledger_of.grant(ledger, grant)
            changes.append(Change(action=ledger_of.ADOPTED, grant=grant, why=_ADOPTED))
        except Refused as refusal:
            conflicts.append(f"{grant.holder}: {refusal.why}")
    decision = Decision(ledger=ledger, changes=tuple(changes), grants=tuple(one.grant for one in changes))
    return decision, tuple(conflicts)


def near(inventory: Inventory, ledger: Ledger, now: float) -> Near:
    """Return what the pod currently being admitted is thought to hold already. now: seconds since the epoch."""
    recent = [g for g in ledger.grants.values() if not g.confirmed and 0 <= now - g.granted_at < SAME_POD_S]
    known = inventory.device_by_id
    devices = tuple(one for grant in recent for one in (*grant.devices, *grant.shares) if one in known)
    cpus = union(grant.cpus for grant in recent) & inventory.cpus_online
    nodes = {inventory.cpu_by_id[one].numa_node for one in cpus} - {NO_NODE}
    nodes |= {pages.node for grant in recent for pages in grant.hugepages}
    nodes |= {node for one in devices if (node := known[one].numa_node) is not None}
    return Near(devices=devices, cpus=cpus, nodes=tuple(sorted(nodes)))


def _one_more(
    inventory: Inventory, before: Decision, resource: ResourceKind, ids: Sequence[str], stamp: Stamp
) -> Decision:
    keys = [(resource.name, one) for one in ids]
    old = {held.id: held for key in keys if (held := before.ledger.by_id.get(key)) is not None}
    same = next((held for held in old.values() if set(held.ids) == set(ids)), None)
    again = same is not None and not same.confirmed
    # What a listed pod held now belongs to another pod. The old id stays with the old pod, in the audit and in its
    # environment variables.
    grant = grant_of(inventory, resource, ids, same.id if same is not None and again else stamp.new_id(), stamp)
    if same is not None and _says_the_same(same, grant):
        return replace(before, grants=(*before.grants, same))
    ledger, changes = before.ledger, list(before.changes)
    for held in old.values():
        ledger, change = _give_way(inventory, ledger, resource, held, ids)
        changes.append(change)
    refuse_excluded(inventory, ledger, grant)
    refuse_missing_pages(inventory, ledger, grant)
    if isinstance(resource, DeviceResource):
        for device in grant.shares:
            refuse_missing_shares(ledger, grant, device, resource.replicas, shares_of(grant, device))
            refuse_missing_amounts(ledger, grant, inventory.device_by_id[device], resource.replicas)
    ledger = ledger_of.grant(ledger, grant)
    changes.append(Change(action=GRANTED, grant=grant))
    return Decision(ledger=ledger, changes=tuple(changes), grants=(*before.grants, grant))


def _says_the_same(held: Grant, asked: Grant) -> bool:
    """Return whether an unconfirmed grant is exactly what is requested: then the call is a repetition."""
    if held.confirmed:
        return False
    return held == replace(asked, ids=held.ids, granted_at=held.granted_at, boot_id=held.boot_id)


def _give_way(
    inventory: Inventory, ledger: Ledger, resource: ResourceKind, held: Grant, ids: Sequence[str]
) -> tuple[Ledger, Change]:
    """Return the ledger after some ids have been taken from a grant, and the change."""
    taken = [one for one in held.ids if one in ids]
    rest = without(held, taken, resource.parts(inventory, taken))
    ledger = ledger_of.release(ledger, [held.id])
    if rest is None:
        return ledger, Change(action=RELEASED, grant=held, why=_TAKEN)
    return ledger_of.grant(ledger, rest), Change(action=REDUCED, grant=rest, why=_TAKEN)


def refuse_excluded(inventory: Inventory, ledger: Ledger, grant: Grant) -> None:
    """Raise Refused if two devices of a grant exclude each other, if a device that anybody else holds excludes one of
    them, or if counters do not last for them."""
    mine = frozenset((*grant.devices, *grant.shares))
    names = ", ".join(sorted(mine))
    for one in sorted(mine):
        if others := mine & inventory.excluded_by.get(one, frozenset()):
            why = f"cannot grant {names}: {_clash(inventory, one, others)}"
            raise Refused(why, want=len(mine), free=len(mine) - len(others), unit="devices")
    for other in ledger_of.in_order(ledger.foreign):
        if taken := mine & excluded_with(inventory, ledger, other.devices):
            why = f"cannot grant {names}: {', '.join(sorted(taken))} held by {other.holder} as {other.holder.resource}"
            raise Refused(why, want=len(mine), free=len(mine - taken), unit="devices")
    kin = (excluded_with(inventory, ledger, mine) - mine) & ledger.devices_held
    for other in ledger_of.in_order(ledger.grants) if kin else ():
        if taken := kin.intersection((*other.devices, *other.shares)):
            same = ", ".join(sorted(taken))
            why = f"cannot grant {names}: {same} is of the same device and held by {other.holder}"
            raise Refused(why, want=len(mine), free=0, unit="devices")
    refuse_overdrawn(inventory, ledger, grant)


def _clash(inventory: Inventory, one: str, others: frozenset[str]) -> str:
    """Return why a device and others cannot be granted together."""
    if parts := others.intersection(inventory.parts_of.get(one, ())):
        return f"{', '.join(sorted(parts))} is a part of {one}"
    if wholes := [other for other in sorted(others) if one in inventory.parts_of.get(other, ())]:
        return f"{one} is a part of {wholes[0]}"
    shared = sorted({thing for other in others for thing in inventory.things_of[one] & inventory.things_of[other]})
    return f"{one} and {', '.join(sorted(others))} both hand over {', '.join(shared[:MOST_NAMED])}"


def refuse_missing_pages(inventory: Inventory, ledger: Ledger, grant: Grant) -> None:
    """Raise Refused if the host has taken so many of the pages in the meantime that too few are left."""
    for want in grant.hugepages:
        node = inventory.node_by_id[want.node]
        free = sum(grantable(pool, ledger) for pool in node.hugepages if pool.page_bytes == want.page_bytes)
        if want.pages > free:
            raise Refused(
                f"cannot grant {want.pages} hugepages of {want.page_bytes} bytes on NUMA node {want.node}: "
                f"{free} can be granted",
                want=want.pages,
                free=free,
                unit="pages",
            )


def refuse_living(
    resource: ResourceKind, ids: Sequence[str], old: Mapping[str, Grant], living: Mapping[str, str]
) -> None:
    """Raise Refused if a living container holds some of the ids, whatever kubelet has forgotten."""
    taken = {one: grant for one, grant in old.items() if grant.id in living}
    if taken:
        grant = next(iter(taken.values()))
        why = f"cannot grant {', '.join(taken)} of {resource.name}: held by {grant.holder}, and {living[grant.id]}"
        raise Refused(why, want=len(ids), free=len(ids) - len(taken), unit="ids")


def refuse_listed(resource: ResourceKind, ids: Sequence[str], holding: Holding) -> None:
    """Raise Refused if kubelet lists some of the ids with another container."""
    taken = sorted(set(holding.ids) & set(ids)) if holding.resource == resource.name else []
    if taken:
        where = f"{holding.namespace}/{holding.pod}/{holding.container}"
        why = f"cannot grant {', '.join(taken)} of {resource.name}: held by {where}"
        raise Refused(why, want=len(ids), free=len(ids) - len(taken), unit="ids")
