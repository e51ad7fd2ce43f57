"""What is held as a placement: which request it answers, what it costs where it is, and where it would go now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from nodeagent.core.advice.hypothetical import empty, leaving_only, without
from nodeagent.core.advice.tenants import Unit
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import FULL_PCPUS
from nodeagent.core.model.request import BEST_EFFORT, Pages, Placement, Request
from nodeagent.core.model.topology import DRAM, NodeId
from nodeagent.core.opaque.settings import from_json
from nodeagent.core.placement.index import machine_of
from nodeagent.core.placement.place import find


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How a unit stands. Every cost is what the choice would cost if the rest were held and the unit were not."""

    request: Request
    """What it amounts to in one decision."""
    held: Placement | None
    """Where it is, or None if placement cannot be asked about that."""
    now: Placement | None
    """Where placement would put it today."""
    on_empty: Placement | None
    """Where it would go if nothing were held."""


def standing_of(inventory: Inventory, ledger: Ledger, unit: Unit) -> Standing:
    """Return how a unit of the ledger stands.

    inventory: with pages that holders use counted as granted only (hypothetical.untouched).
    """
    request, rest = request_of(inventory, unit), without(ledger, unit.grants)
    return Standing(
        request=request,
        held=as_held(inventory, rest, unit, request),
        now=find(inventory, rest, request),
        on_empty=find(inventory, empty(ledger), request),
    )


def unmovable(inventory: Inventory, unit: Unit) -> str:
    """Return why nothing can be planned with a unit, as a clause, or "" if something can."""
    for grant in unit.grants:
        if grant.holder.api not in (CLAIM, DEVICE_PLUGIN):
            return "the agent did not choose what it holds"
        if grant.shares:
            return "it holds shares of devices"
        if missing := [one for one in grant.devices if one not in inventory.device_by_id]:
            return f"{missing[0]} has disappeared"
        if lost := grant.cpus - inventory.cpus_usable:
            return f"CPUs {lost} are offline or not for pods"
    if len(_memory_kinds(inventory, unit)) > 1:
        return "it holds memory of several kinds"
    return ""


def request_of(inventory: Inventory, unit: Unit) -> Request:
    """Return what a unit holds as one request, limited to devices like those that it has."""
    cpus, kinds = unit.cpus & inventory.cpus_online, Counter[str]()
    held = [one for id in unit.devices if (one := inventory.device_by_id.get(id)) is not None]
    kinds.update(one.kind for one in held)
    pages: Counter[int] = Counter()
    for some in _pages(unit):
        pages[some.page_bytes] += some.pages
    options, numa = _preferences(inventory, unit, cpus)
    return Request(
        cpus=len(cpus),
        hugepages=dict(pages),
        memory_bytes=sum(size for _, size in _memory(unit)),
        memory_kind=min(_memory_kinds(inventory, unit), default=DRAM),
        devices=dict(kinds),
        within_devices=_like(inventory, held) if held else None,
        options=options,
        numa=numa,
    )


def _preferences(inventory: Inventory, unit: Unit, cpus: CpuSet) -> tuple[frozenset[str], str]:
    """Return the options and the NUMA policy of a unit: those that a claim names, else whole cores if it has them."""
    for grant in unit.grants:
        said = from_json(grant.settings)
        if grant.cpus and (said.options or said.numa):
            return said.options, said.numa or BEST_EFFORT
    cores = machine_of(inventory).cores
    mine = [cores[inventory.cpu_by_id[one].core] for one in cpus]
    threads = max((core.bit_count() for core in mine), default=1)
    whole = threads > 1 and not any(core & ~cpus.mask for core in mine)
    return frozenset({FULL_PCPUS} if whole else ()), BEST_EFFORT


def as_held(inventory: Inventory, rest: Ledger, unit: Unit, request: Request) -> Placement | None:
    """Return what a unit holds as a placement with its cost, or None if it cannot be had like that.

    rest: the ledger without the unit.
    """
    cpus, devices = unit.cpus & inventory.cpus_usable, frozenset(unit.devices)
    left = leaving_only(inventory, rest, _pages(unit), _memory(unit))
    exact = replace(
        request, within_cpus=cpus, must_cpus=cpus, within_devices=devices, must_devices=devices, numa=BEST_EFFORT
    )
    if len(cpus) != request.cpus or not devices <= inventory.device_by_id.keys():
        return None
    return find(inventory, left, exact) or find(inventory, left, replace(exact, options=frozenset()))


def _pages(unit: Unit) -> list[Pages]:
    found: Counter[tuple[NodeId, int]] = Counter()
    for grant in unit.grants:
        for one in grant.hugepages:
            found[one.node, one.page_bytes] += one.pages
    return [Pages(node=node, page_bytes=size, pages=count) for (node, size), count in sorted(found.items())]


def _memory(unit: Unit) -> list[tuple[NodeId, int]]:
    found: Counter[NodeId] = Counter()
    for grant in unit.grants:
        for node, size in grant.memory:
            found[node] += size
    return sorted(found.items())


def _memory_kinds(inventory: Inventory, unit: Unit) -> set[str]:
    nodes = {one.node for one in _pages(unit)} | {node for node, _ in _memory(unit)}
    return {inventory.node_by_id[one].kind for one in nodes if one in inventory.node_by_id}


def _like(inventory: Inventory, held: Iterable[Device]) -> frozenset[str]:
    """Return the devices that would do as well: of the same kind, make and model, as whole, and withheld for nothing
    for which those that are held are not."""
    wanted, own = {_model(one) for one in held}, {one.id for one in held}
    same = (one for one in inventory.devices if _model(one) in wanted)
    named = {name for one in held for name in one.withheld_for}
    return frozenset(one.id for one in same if one.id in own or named.issuperset(one.withheld_for))


def _model(device: Device) -> tuple[object, ...]:
    whole = device.parent is None
    return device.kind, device.vendor, device.device, device.attributes.get("product"), whole
