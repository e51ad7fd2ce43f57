"""The ledger: all grants at one moment. grant() and release() return a new Ledger and leave the old one unchanged.

No two exclusive grants overlap, regardless of the API they came through: `grant` raises Refused naming the conflicting
holder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.memo import seed
from nodeagent.core.model.topology import NodeId
from nodeagent.errors import Refused


class Ledger(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """All grants, and the CPUs reserved for the system."""

    grants: Mapping[str, Grant] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By grant id."""
    reserved: CpuSet = EMPTY
    """The system's own CPUs, which are never granted."""
    foreign: Mapping[str, Grant] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What other device plugins gave to pods, by grant id; core/ledger/foreign.py. None of it is granted. What was
    granted before it appeared stays granted."""

    @functools.cached_property
    def cpus_held(self) -> CpuSet:
        """Return the CPUs of all grants."""
        return union(grant.cpus for grant in self.grants.values())

    @functools.cached_property
    def pages_held(self) -> Mapping[tuple[NodeId, int], int]:
        """Return the pages held, by (node, page_bytes)."""
        held: dict[tuple[NodeId, int], int] = {}
        for grant in self.grants.values():
            for pages in grant.hugepages:
                key = pages.node, pages.page_bytes
                held[key] = held.get(key, 0) + pages.pages
        return held

    @functools.cached_property
    def memory_held(self) -> Mapping[NodeId, int]:
        """Return the bytes of memory held, by node."""
        held: dict[NodeId, int] = {}
        for grant in self.grants.values():
            for node, size in grant.memory:
                held[node] = held.get(node, 0) + size
        return held

    @functools.cached_property
    def devices_held(self) -> frozenset[str]:
        """Return the devices that are held whole or in shares."""
        return frozenset(one for grant in self.grants.values() for one in (*grant.devices, *grant.shares))

    @functools.cached_property
    def devices_foreign(self) -> frozenset[str]:
        """Return the devices that other device plugins gave to pods."""
        return frozenset(one for grant in self.foreign.values() for one in grant.devices)

    @property
    def devices_taken(self) -> frozenset[str]:
        """Return the devices that anybody holds, whole or in shares."""
        return self.devices_held | self.devices_foreign

    @functools.cached_property
    def devices_whole(self) -> frozenset[str]:
        """Return the devices that are held whole by one grant."""
        return frozenset(one for grant in self.grants.values() for one in grant.devices)

    @functools.cached_property
    def things_by_device(self) -> Mapping[str, frozenset[str]]:
        """What held devices handed over when they were granted, by their ids."""
        found: dict[str, frozenset[str]] = {}
        for grant in (*self.grants.values(), *self.foreign.values()):
            for device, thing in grant.things:
                found[device] = found.get(device, frozenset()) | {thing}
        return found

    @functools.cached_property
    def things_held(self) -> frozenset[str]:
        """Everything that held devices handed over."""
        return frozenset(thing for grant in self.grants.values() for _, thing in grant.things)

    @functools.cached_property
    def by_id(self) -> Mapping[tuple[str, str], Grant]:
        """Return the grants by the ids that their API uses: (resource, id)."""
        return {(grant.holder.resource, one): grant for grant in self.grants.values() for one in grant.ids}


def in_order(grants: Mapping[str, Grant]) -> list[Grant]:
    """Return grants in order of their ids. A refusal that names one of several names the same one whatever the order
    in which they were made or read from disk."""
    return [grants[one] for one in sorted(grants)]


class Action(StrEnum):
    """What happened to a grant."""

    GRANTED = "granted"
    REDUCED = "reduced"
    """Another grant has taken some of its ids; this is the remainder."""
    RELEASED = "released"
    CONFIRMED = "confirmed"
    """Its holder has become known or has changed."""
    ADOPTED = "adopted"
    """It was found to exist; the agent did not decide on it."""


GRANTED, REDUCED, RELEASED, CONFIRMED, ADOPTED = Action


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the audit: what happened to a grant."""

    action: Action
    grant: Grant
    why: str = ""
    """Who or what caused it, and by which rule, as a clause. A release always has one; "" if the action says it all."""


def released(grants: Iterable[Grant], why: str) -> tuple[Change, ...]:
    """Return the audit entries of grants that are released for the same reason, a clause."""
    return tuple(Change(action=RELEASED, grant=one, why=why) for one in grants)


def grant(ledger: Ledger, new: Grant) -> Ledger:
    """Return the ledger with one grant added, or replaced if the id exists; an identical grant changes nothing.

    Raise Refused if any part is reserved or held by another grant.
    """
    if ledger.grants.get(new.id) == new:
        return ledger
    others = release(ledger, [new.id])
    if _may_overlap(others, new):
        for old in in_order(others.grants):
            _refuse_overlap(old, new)
    if taken := new.cpus & ledger.reserved:
        raise Refused(
            f"cannot grant CPUs {taken}: they are reserved", want=len(new.cpus), free=len(new.cpus - taken), unit="CPUs"
        )
    return _plus(others, new)


def release(ledger: Ledger, ids: Iterable[str]) -> Ledger:
    """Return the ledger without the given grants; unknown ids are ignored."""
    gone = frozenset(ids) & ledger.grants.keys()
    if not gone:
        return ledger
    after = _with(ledger, {key: value for key, value in ledger.grants.items() if key not in gone})
    lost = {(old.holder.resource, one) for old in map(ledger.grants.__getitem__, gone) for one in old.ids}
    seed(after, by_id={key: value for key, value in ledger.by_id.items() if key not in lost})
    return after


def amend(ledger: Ledger, changed: Iterable[Grant]) -> Ledger:
    """Return the ledger with updated holders of some grants; what they hold must be unchanged."""
    grants = dict(ledger.grants)
    for one in changed:
        known = grants[one.id]
        grants[one.id] = replace(known, holder=one.holder, confirmed=one.confirmed, pods=one.pods, things=one.things)
    return _with(ledger, grants)


def with_reserved(ledger: Ledger, reserved: CpuSet) -> Ledger:
    """Return the ledger with the same grants and other reserved CPUs."""
    return ledger if ledger.reserved == reserved else replace(ledger, reserved=reserved)


def with_foreign(ledger: Ledger, foreign: Mapping[str, Grant]) -> Ledger:
    """Return the ledger with the same grants, and with what other device plugins gave to pods."""
    return ledger if ledger.foreign == foreign else replace(ledger, foreign=foreign)


def _with(ledger: Ledger, grants: Mapping[str, Grant]) -> Ledger:
    return replace(ledger, grants=MappingProxyType(dict(grants)))


def _plus(ledger: Ledger, new: Grant) -> Ledger:
    """Return the ledger with a grant that overlaps no other.

    Cached properties of the old ledger are carried over, so that a decision costs as much with hundreds of grants as
    with a few.
    """
    after = _with(ledger, {**ledger.grants, new.id: new})
    seed(
        after,
        by_id={**ledger.by_id, **{(new.holder.resource, one): new for one in new.ids}},
        cpus_held=ledger.cpus_held | new.cpus,
        devices_held=ledger.devices_held.union(new.devices, new.shares),
        devices_whole=ledger.devices_whole.union(new.devices),
        things_held=ledger.things_held.union(thing for _, thing in new.things),
    )
    return after


def _may_overlap(ledger: Ledger, new: Grant) -> bool:
    return not (
        ledger.cpus_held.isdisjoint(new.cpus)
        and ledger.devices_held.isdisjoint(new.devices)
        and ledger.devices_whole.isdisjoint(new.shares)
        and ledger.things_held.isdisjoint(thing for _, thing in new.things)
        and not any((new.holder.resource, one) in ledger.by_id for one in new.ids)
    )


def _refuse_overlap(old: Grant, new: Grant) -> None:
    """Refused, naming the holder, where two grants share a CPU, a device held whole by either, a thing that two devices
    hand over, or an id."""
    if taken := old.cpus & new.cpus:
        why = f"cannot grant CPUs {new.cpus}: {taken} held by {old.holder}"
        raise Refused(why, want=len(new.cpus), free=len(new.cpus - taken), unit="CPUs")
    whole = frozenset(new.devices) & {*old.devices, *old.shares} | frozenset(new.shares) & frozenset(old.devices)
    whole |= {f"{device} ({thing})" for device, thing in new.things if _is_taken(old, device, thing)}
    same = frozenset(new.ids) & frozenset(old.ids) if new.holder.resource == old.holder.resource else frozenset()
    for want, shared, unit in ((len(new.devices) + len(new.shares), whole, "devices"), (len(new.ids), same, "ids")):
        if shared:
            why = f"cannot grant {', '.join(sorted(shared))}: held by {old.holder}"
            raise Refused(why, want=want, free=want - len(shared), unit=unit)


def _is_taken(old: Grant, device: str, thing: str) -> bool:
    """Return whether a grant has a thing through a device other than `device`."""
    return any(one != device and other == thing for one, other in old.things)
