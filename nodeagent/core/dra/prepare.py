"""Decisions about claims: what the scheduler allocated becomes exact CPUs, pages and devices, or a refusal with reason.

Pure. The scheduler has already chosen the devices of the pools. What is decided here is which CPUs of a NUMA node,
socket or L3 group are granted (those nearest to the GPUs and NICs of the same pod), and whether all of it can be
granted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import Decision, Stamp, near, refuse_excluded, refuse_missing_pages
from nodeagent.core.deviceplugin.devices import SHARES, refuse_missing_amounts, refuse_missing_shares
from nodeagent.core.dra.cpu_pool import CPUS, CpuPool, PoolKind
from nodeagent.core.dra.interfaces import check_interface, check_names
from nodeagent.core.dra.memory_pools import BASE_PAGE_BYTES, SIZE
from nodeagent.core.dra.passthrough import check_driver, driver_for, refuse_members, things_with_members
from nodeagent.core.dra.pool import DevicePart
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.free import memory_left
from nodeagent.core.ledger.ledger import CONFIRMED, GRANTED, Change, Ledger, released
from nodeagent.core.model.claim import Claim, Result
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import FULL_PCPUS, check_options
from nodeagent.core.model.request import Pages, Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.opaque.decode import BUILT_IN, Forms, check_all, check_fit, settings_for
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.core.pinning.device_interrupts import check_interrupts
from nodeagent.core.pinning.pools import cpus_brought, pool_of
from nodeagent.core.pinning.threads import check_whole_core
from nodeagent.core.placement.place import place
from nodeagent.core.sharing.amounts import amounts
from nodeagent.core.sharing.rules import check_claim, check_device, refuse_otherwise_shared
from nodeagent.errors import InputError, Refused

_READ = "its claim was read again"
MOST_NAMED = 3
"""Highest number of holders named in a refusal."""

MOST_RESULTS = 32
"""Highest number of devices allocated to one claim (resource.k8s.io/v1, AllocationResultsMaxSize)."""


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """What this driver publishes on this node."""

    driver: str
    node_name: str = ""
    kinds: Mapping[str, PoolKind] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By name of the kind; the pool's name is NODE/KIND. By name of the pool, if nodes share it."""
    shared: frozenset[str] = frozenset()
    """Which of them nodes share."""
    passthrough: frozenset[str] = frozenset()
    """VFIO drivers that claims may have their devices bound to."""
    moves_interfaces: bool = False
    """Whether claims may have their adapters' interfaces in their pods."""
    vf_properties: frozenset[str] = frozenset()
    """What claims may set of virtual functions."""
    forms: Forms = BUILT_IN
    """Opaque configurations, with those of third-party kinds."""

    def find(self, inventory: Inventory, result: Result) -> tuple[PoolKind, DevicePart]:
        """Return the kind and what the device stands for. Raise InputError if there is no such pool or device."""
        node, _, name = result.pool.rpartition("/")
        mine = node == ("" if name in self.shared else self.node_name)
        kind = self.kinds.get(name) if mine else None
        if kind is None:
            pools = ", ".join(map(self.pool_name, self.kinds)) or "none"
            raise InputError(f"there is no pool {result.pool!r} on this node (there are: {pools})")
        part = kind.part(inventory, result.device)
        if part is None:
            raise InputError(f"pool {result.pool} has no device {result.device!r} (or no longer has it)")
        return kind, part

    def pool_name(self, kind: str) -> str:
        """Return the name of a pool by its key in `kinds`."""
        return kind if kind in self.shared else f"{self.node_name}/{kind}"


class ClaimDemand(msgspec.Struct, frozen=True, kw_only=True):
    """One allocation result of a claim and everything needed to decide on it."""

    index: int
    """Index among the claim's results for this driver."""
    result: Result
    kind: PoolKind
    part: DevicePart
    settings: OpaqueConfig

    @property
    def cpus(self) -> int:
        """Return the number of CPUs it takes from its part; 0 if the part has no CPUs."""
        alone = len(self.part.cpus) == 1
        return self.result.consumed.get(CPUS, int(alone)) if self.part.cpus else 0

    @property
    def bytes(self) -> int:
        """Return the bytes of pages or memory it takes."""
        return self.result.consumed.get(SIZE, self.part.amount)

    @property
    def shares(self) -> int:
        """Return the number of shares it takes of a divided device."""
        return self.result.consumed.get(SHARES, 1)


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Claims decided together, in one durable write. Each claim is in either `grants` or `errors`, by UID."""

    ledger: Ledger
    changes: tuple[Change, ...] = ()
    grants: Mapping[str, tuple[Grant, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))


def prepare(inventory: Inventory, ledger: Ledger, catalog: Catalog, claims: Sequence[Claim], stamp: Stamp) -> Batch:
    """Grant each claim everything allocated to it, or nothing and record the reason.

    Kubelet passes all claims of a pod in one call, so their CPUs are placed near all their devices. A claim that is
    already granted keeps its grants, whether or not they are present or served at this moment.
    """
    call = _Call(inventory, catalog, stamp)
    grants: dict[str, tuple[Grant, ...]] = {}
    wanted: dict[str, tuple[ClaimDemand, ...]] = {}
    errors: dict[str, str] = {}
    changes: list[Change] = []
    every = {claim.ref.uid: claim for claim in claims}
    for uid, claim in every.items():
        with _said(errors, claim):
            results, held = results_of(catalog, claim), grants_of(ledger, uid)
            if [grant.result for grant in held] == results:
                pods = claim.pods_with(chain.from_iterable(grant.pods for grant in held))
                known = _record(ledger, held, pods, inventory, claim.pod_claim)
                ledger, grants[uid] = known.ledger, known.grants
                changes += known.changes
            else:
                wanted[uid] = _wanted(inventory, catalog, claim, results)
    nearby = _Nearby.of(inventory, ledger, wanted.values(), grants.values(), stamp.at)
    for uid, parts in wanted.items():
        with _said(errors, every[uid]):
            decision = _decide(call, ledger, every[uid], parts, nearby)
            ledger, grants[uid] = decision.ledger, decision.grants
            changes += decision.changes
            nearby = nearby.and_cpus(decision.grants)
    return Batch(ledger=ledger, changes=tuple(changes), grants=grants, errors=errors)


def record_reserved_for(ledger: Ledger, uid: str, pods: Sequence[str]) -> Decision:
    """Record the pods (UIDs) that may use a claim now; what it holds is unchanged."""
    held = grants_of(ledger, uid)
    return _recorded(ledger, held, [replace(grant, pods=tuple(pods)) for grant in held])


def _record(
    ledger: Ledger, held: Sequence[Grant], pods: Sequence[str], inventory: Inventory, pod_claim: str
) -> Decision:
    """Record what a claim that is prepared again shows: the pods that may use it, its name in the pod, and what its
    devices hand over now. After a reboot their nodes may have other names."""
    noted = [
        replace(
            grant,
            pods=tuple(pods),
            things=_things_now(grant, inventory),
            holder=replace(grant.holder, pod_claim=pod_claim),
        )
        for grant in held
    ]
    return _recorded(ledger, held, noted)


def _recorded(ledger: Ledger, held: Sequence[Grant], noted: Sequence[Grant]) -> Decision:
    held, noted = tuple(held), tuple(noted)
    if noted == held:
        return Decision(ledger=ledger, grants=held)
    changes = tuple(Change(action=CONFIRMED, grant=grant, why=_READ) for grant in noted)
    return Decision(ledger=ledger_of.amend(ledger, noted), changes=changes, grants=noted)


def _things_now(grant: Grant, inventory: Inventory) -> tuple[tuple[str, str], ...]:
    devices = (*grant.devices, *grant.shares)
    if any(one not in inventory.device_by_id for one in devices):
        return grant.things
    return things_with_members(inventory, devices, driver_for(grant))


def unprepare(ledger: Ledger, uids: Iterable[str], why: str) -> Decision:
    """Release everything that the claims hold, for a reason (a clause); claims that hold nothing are ignored."""
    gone = [grant for uid in dict.fromkeys(uids) for grant in grants_of(ledger, uid)]
    after = ledger_of.release(ledger, [grant.id for grant in gone])
    return Decision(ledger=after, changes=released(gone, why))


def grants_of(ledger: Ledger, uid: str) -> tuple[Grant, ...]:
    """Return what a claim holds, in allocation order.

    The grants are looked up by their fixed ids, as the ledger may be long.
    """
    known = ledger.grants
    return tuple(grant for index in range(MOST_RESULTS) if (grant := known.get(f"{uid}-{index}")) is not None)


def results_of(catalog: Catalog, claim: Claim) -> list[Result]:
    """Return the results allocated from this driver. Raise InputError if there are none, or too many."""
    if not claim.allocated:
        raise InputError("it is not allocated")
    mine = [result for result in claim.results if result.driver == catalog.driver]
    if not mine:
        drivers = ", ".join(sorted({result.driver for result in claim.results})) or "no driver"
        raise InputError(f"it has no device of driver {catalog.driver}, only of {drivers}")
    if len(mine) > MOST_RESULTS:
        raise InputError(f"it has {len(mine)} devices of driver {catalog.driver}, at most {MOST_RESULTS} are possible")
    return mine


# ---------------------------------------------------------------- demand


def _wanted(inventory: Inventory, catalog: Catalog, claim: Claim, results: Iterable[Result]) -> tuple[ClaimDemand, ...]:
    check_all(claim.configs, catalog.driver, catalog.forms)
    wanted = tuple(_one_wanted(inventory, catalog, claim, index, result) for index, result in enumerate(results))
    kinds = {one.result.request: one.kind.kind for one in wanted}
    check_fit(claim.configs, catalog.driver, kinds, catalog.forms)
    check_names(one.settings for one in wanted if not one.result.admin)
    shared = (one for one in wanted if not one.result.admin)
    check_claim(inventory, [(one.part.device, bool(one.part.shares), one.settings) for one in shared])
    return wanted


def _one_wanted(inventory: Inventory, catalog: Catalog, claim: Claim, index: int, result: Result) -> ClaimDemand:
    with _placed(result):
        kind, part = catalog.find(inventory, result)
        settings = settings_for(result, kind.kind, claim.configs, catalog.driver, catalog.forms)
        one = ClaimDemand(index=index, result=result, kind=kind, part=part, settings=settings)
        if not result.admin:
            check_device(inventory, part.device, settings)
            check_whole_core(inventory, part.cpus, settings)
            check_driver(inventory, part.device, settings, catalog.passthrough, shared=bool(part.shares))
            allowed, divided = catalog.moves_interfaces, bool(part.shares)
            check_interface(inventory, claim, part.device, settings, allowed=allowed, shared=divided)
            if settings.vf is not None:
                from nodeagent.core.network.vf_checks import check_vf

                check_vf(inventory, part.device, settings.vf, catalog.vf_properties, shared=divided)
            check_interrupts(inventory, part.device, settings.interrupts, shared=divided)
            _check_amounts(one)
    return one


def _check_amounts(one: ClaimDemand) -> None:
    """Raise InputError if the device cannot give the amount that is consumed."""
    part = one.part
    if part.cpus and not 1 <= one.cpus <= len(part.cpus):
        raise InputError(f"{one.cpus} CPUs are consumed of a device with {len(part.cpus)}")
    if part.node is not None:
        _check_bytes(one.bytes, part)
    if part.shares and not 1 <= one.shares <= part.shares:
        raise InputError(f"{one.shares} shares are consumed of a device with {part.shares}")
    for name, _ in part.each:
        if one.result.consumed.get(name, 1) < 1:
            raise InputError(f"{one.result.consumed[name]} of {name} is consumed, expected at least 1")


def _check_bytes(size: int, part: DevicePart) -> None:
    step = part.page_bytes or BASE_PAGE_BYTES
    if size < 1 or size % step:
        raise InputError(f"{size} bytes are consumed, expected a positive multiple of {step}")
    if part.amount and size != part.amount:
        raise InputError(f"{size} bytes are consumed of a device that is had whole, with {part.amount}")


@contextlib.contextmanager
def _said(errors: dict[str, str], claim: Claim) -> Iterator[None]:
    """Record an error as that claim's error, without affecting other claims."""
    try:
        yield
    except (Refused, InputError) as error:
        errors[claim.ref.uid] = f"cannot prepare claim {claim.ref}: {error}"


@contextlib.contextmanager
def _placed(result: Result) -> Iterator[None]:
    """Prefix errors raised inside with the request and device they are about."""
    where = f"request {result.request}, device {result.pool}/{result.device}"
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Refused as error:
        why = f"{where}: {error.why}"
        raise Refused(why, want=error.want, free=error.free, unit=error.unit, would_admit=error.would_admit) from None


# ---------------------------------------------------------------- decision


class _Call(msgspec.Struct, frozen=True):
    """What all claims of a call have in common."""

    inventory: Inventory
    catalog: Catalog
    stamp: Stamp


class _Nearby(msgspec.Struct, frozen=True):
    """What the CPUs of a pod should be close to."""

    devices: tuple[str, ...]
    cpus: CpuSet
    nodes: tuple[NodeId, ...]

    @classmethod
    def of(
        cls,
        inventory: Inventory,
        ledger: Ledger,
        wanted: Iterable[Iterable[ClaimDemand]],
        held: Iterable[Iterable[Grant]],
        at: float,
    ) -> _Nearby:
        """Return what all claims of the pod want or have, and what its containers were just granted.

        at: seconds since the epoch.
        """
        given, grants = near(inventory, ledger, at), list(chain.from_iterable(held))
        parts = [one.part for one in chain.from_iterable(wanted) if not one.result.admin]
        devices = dict.fromkeys(
            (
                *given.devices,
                *(one for grant in grants for one in (*grant.devices, *grant.shares)),
                *(part.device for part in parts),
            )
        )
        nodes = {
            *given.nodes,
            *(pages.node for grant in grants for pages in grant.hugepages),
            *(node for grant in grants for node, _ in grant.memory),
            *(part.node for part in parts if part.node is not None),
        }
        there = tuple(one for one in devices if one in inventory.device_by_id)
        return cls(there, given.cpus, tuple(sorted(nodes & inventory.node_by_id.keys()))).and_cpus(grants)

    def and_cpus(self, grants: Iterable[Grant]) -> _Nearby:
        return replace(self, cpus=self.cpus | union(grant.cpus for grant in grants))

    def or_pool(self, ledger: Ledger, grant: Grant, part: DevicePart) -> _Nearby:
        """Return the CPUs of the grant's named pool in its group where the pod has nothing to be close to."""
        if self.devices or self.cpus or self.nodes or (pool := pool_of(grant)) is None:
            return self
        return replace(self, cpus=cpus_brought(ledger, pool) & part.cpus)


def _decide(call: _Call, ledger: Ledger, claim: Claim, wanted: Sequence[ClaimDemand], nearby: _Nearby) -> Decision:
    """Grant everything that a claim wants, or raise Refused.

    What was allocated to it before under the same UID is released: the driver is not notified when an old allocation
    ends.
    """
    before = unprepare(ledger, [claim.ref.uid], "its claim was allocated something else")
    ledger, made = before.ledger, dict[int, Grant]()
    for one in sorted(wanted, key=_first_fixed):
        with _placed(one.result):
            new = _grant(call, ledger, claim, one, nearby.and_cpus(made.values()))
            ledger = ledger_of.grant(ledger, new)
        made[one.index] = new
    grants = tuple(made[one.index] for one in wanted)
    granted = (Change(action=GRANTED, grant=grant) for grant in grants)
    return Decision(ledger=ledger, changes=(*before.changes, *granted), grants=grants)


def _first_fixed(one: ClaimDemand) -> tuple[bool, int, int]:
    """Return the sort key of a result: those without a choice first, then the largest sets of CPUs."""
    return len(one.part.cpus) > 1, -one.cpus, one.index


def _grant(call: _Call, ledger: Ledger, claim: Claim, one: ClaimDemand, nearby: _Nearby) -> Grant:
    """Return the grant for one result. Raise Refused with the holders if its pages, memory, CPUs or shares are gone."""
    grant = Grant(
        id=f"{claim.ref.uid}-{one.index}",
        holder=Holder(
            api=CLAIM,
            resource=f"{one.kind.kind}.{call.catalog.driver}",
            namespace=claim.ref.namespace,
            claim=claim.ref.name,
            uid=claim.ref.uid,
            pod_claim=claim.pod_claim,
        ),
        ids=(_own_id(claim, one),),
        granted_at=call.stamp.at,
        confirmed=True,
        boot_id=call.stamp.boot_id,
        result=one.result,
        settings=to_json(one.settings),
        pods=claim.pods_with(()),
    )
    if one.result.admin:
        return grant
    try:
        grant = _holding(call.inventory, ledger, grant, one, nearby)
        _refuse_missing(call.inventory, ledger, one, grant)
    except Refused as refusal:
        raise _naming_holders(refusal, ledger, one.part) from None
    return grant


def _holding(inventory: Inventory, ledger: Ledger, grant: Grant, one: ClaimDemand, nearby: _Nearby) -> Grant:
    """Return the grant with what it holds."""
    part = one.part
    if part.cpus:
        return replace(grant, cpus=_cpus(inventory, ledger, one, nearby.or_pool(ledger, grant, part)))
    if part.shares:
        held = amounts(part.device, one.shares, dict(part.each), one.result.consumed)
        return replace(grant, shares=(part.device,), amounts=held, things=things_of(inventory, [part.device]))
    if part.node is None:
        things = things_with_members(inventory, [part.device], one.settings.driver)
        return replace(grant, devices=(part.device,), things=things)
    if not part.page_bytes:
        return replace(grant, memory=((part.node, one.bytes),))
    pages = Pages(node=part.node, page_bytes=part.page_bytes, pages=one.bytes // part.page_bytes)
    return replace(grant, hugepages=(pages,))


def _own_id(claim: Claim, one: ClaimDemand) -> str:
    """Return the device's name, with a distinguishing suffix if several claims may have the device."""
    result, part = one.result, one.part
    several = result.admin or part.shares or len(part.cpus) > 1 or (part.node is not None and not part.amount)
    apart = result.share_id or (f"{claim.ref.uid}-{one.index}" if several else "")
    return f"{result.device}/{apart}" if apart else result.device


def _cpus(inventory: Inventory, ledger: Ledger, one: ClaimDemand, nearby: _Nearby) -> CpuSet:
    """Return the best CPUs of a group."""
    if len(one.part.cpus) == 1:
        return one.part.cpus
    options, numa = _preferences(one)
    request = Request(
        cpus=one.cpus,
        within_cpus=one.part.cpus,
        near=nearby.devices,
        near_cpus=nearby.cpus & inventory.cpus_online,
        near_nodes=nearby.nodes,
        options=options,
        numa=numa,
    )
    return place(inventory, ledger, request).cpus


def _preferences(one: ClaimDemand) -> tuple[frozenset[str], str]:
    """Return (options, NUMA policy) of the claim, or of the pool where the claim has none; whole cores stay whole."""
    own = one.kind if isinstance(one.kind, CpuPool) else CpuPool()
    said = one.settings
    whole = frozenset({FULL_PCPUS}) if own.whole_cores else frozenset()
    return check_options(said.options | whole) if said.options else own.options, said.numa or own.numa


def _refuse_missing(inventory: Inventory, ledger: Ledger, one: ClaimDemand, grant: Grant) -> None:
    """Refused where pages, memory or shares are gone meanwhile, or where a held device excludes one."""
    refuse_excluded(inventory, ledger, grant)
    refuse_members(inventory, ledger, grant)
    refuse_missing_pages(inventory, ledger, grant)
    for node, size in grant.memory:
        free = memory_left(inventory.node_by_id[node]) - ledger.memory_held.get(node, 0)
        if size > free:
            why = f"cannot grant {size} bytes of memory on NUMA node {node}: {max(0, free)} can be granted"
            raise Refused(why, want=size, free=max(0, free), unit="bytes")
    for device in grant.shares:
        refuse_otherwise_shared(ledger, device, one.settings)
        refuse_missing_shares(ledger, grant, device, one.part.shares, one.shares)
        refuse_missing_amounts(ledger, grant, inventory.device_by_id[device], one.part.shares)


def _naming_holders(refusal: Refused, ledger: Ledger, part: DevicePart) -> Refused:
    """Return the refusal with the holders of CPUs, pages or memory of the same part; for devices it already has
    them."""
    holders = sorted({str(grant.holder) for grant in ledger.grants.values() if _has_of(grant, part)})
    if not holders:
        return refusal
    others = f" and {len(holders) - MOST_NAMED} more" if len(holders) > MOST_NAMED else ""
    why = f"{refusal.why}; held there by {', '.join(holders[:MOST_NAMED])}{others}"
    return Refused(why, want=refusal.want, free=refusal.free, unit=refusal.unit, would_admit=refusal.would_admit)


def _has_of(grant: Grant, part: DevicePart) -> bool:
    if part.page_bytes:
        return any((one.node, one.page_bytes) == (part.node, part.page_bytes) for one in grant.hugepages)
    return not grant.cpus.isdisjoint(part.cpus) or any(node == part.node for node, _ in grant.memory)
