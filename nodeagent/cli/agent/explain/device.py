"""`nodeagent explain device ID`: who holds a device, its health, what it hands over, and why it is not offered."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nodeagent.cli.agent.explain.unit import moment
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.core.advice.repair import degradations, repair
from nodeagent.core.fabrics.target import KIND as NVMEOF
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Grant
from nodeagent.errors import InputError

Document = dict[str, Any]
_WITHHELD = {
    "in_use": "the host itself uses it",
    "default_route": "the host reaches the network through it",
    "mig": "it is a GPU in MIG mode, which computes only through its instances",
    "group": "it is a set of GPUs",
    "type": "it is a part of a disk, which a resource has to ask for by its type",
}


def explain_device(facts: Facts, state: NodeState, id: str) -> Document:
    """Return what is known of a device. Raise InputError if the machine has none of that id, PCI address or name."""
    device = _device(state, id)
    inventory = state.inventory
    offered = [one for one in facts.page("/v1/devices") if _is_of(one["id"], device.id)]
    others = sorted(excluded_with(inventory, state.ledger, [device.id]) - {device.id})
    health = state.health.get(device.id)
    return {
        "device": device.id,
        "kind": device.kind,
        "numa_node": device.numa_node,
        "pcie_root": device.pcie_root,
        "driver": device.driver,
        "parent": device.parent,
        "parts": list(inventory.parts_of.get(device.id, ())),
        "holders": [_held(one) for one in _holders(state, [device.id])],
        "hands_over": list(device.paths),
        "exclusive": [one for one in device.exclusive_parts if one not in device.paths],
        "excludes": {one: [str(grant.holder) for grant in _holders(state, [one])] for one in others},
        "health": state.ill().get(device.id, "healthy"),
        "advice": repair(device, state.health),
        "degraded": list(degradations(device, state.health)),
        "causes": {source: f"{one.state}: {one.reason}" for source, one in sorted(health.seen.items())}
        if health is not None
        else {},
        "offered": [_offer(one) for one in offered],
        "pool": _pool(state, device),
        "not_offered": list(_reasons(state, device, offered, others)),
    }


def _device(state: NodeState, id: str) -> Device:
    known = state.inventory.device_by_id
    same = [one for one in state.inventory.devices if id in (one.id, one.pci_address, *one.paths)]
    if len(same) == 1 or id in known:
        return known.get(id) or same[0]
    if same:
        named = ", ".join(one.id for one in same)
        raise InputError(f"cannot explain device {id!r}: {len(same)} devices have that address or path: {named}")
    near = difflib.get_close_matches(id, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`nodeagent devices` lists those that are offered"
    raise InputError(f"cannot explain device {id!r}: this machine has none of that id, address or path; {hint}")


def _is_of(offered: str, device: str) -> bool:
    """Return whether an id of the device plugin is that of a device, or of a share of it."""
    return offered == device or offered.rpartition("::")[0] == device


def _holders(state: NodeState, devices: Sequence[str]) -> list[Grant]:
    every = (*state.ledger.grants.values(), *state.ledger.foreign.values())
    return [one for one in every if not {*one.devices, *one.shares}.isdisjoint(devices)]


def _held(grant: Grant) -> Document:
    return {
        "holder": str(grant.holder),
        "grant": grant.id,
        "resource": grant.holder.resource,
        "shared": bool(grant.shares),
        "granted_at": grant.granted_at,
    }


def _offer(one: Mapping[str, Any]) -> Document:
    return {name: one[name] for name in ("resource", "id", "healthy", "holder", "reason")}


def _reasons(
    state: NodeState, device: Device, offered: Sequence[Mapping[str, Any]], others: Sequence[str]
) -> Iterator[str]:
    """Yield why a device cannot be granted to another holder now."""
    if why := state.ill().get(device.id):
        yield f"it is {why}"
    yield from (_WITHHELD[name] for name in device.withheld_for if not offered)
    if not offered and not _pool(state, device):
        yield f"neither a resource of the device plugin nor a pool of DRA serves it ({device.kind})"
    for refused, why in state.status["refused"].items():
        if device.kind in refused:
            yield f"resource {refused} is not served: {why}"
    for other in others:
        for grant in _holders(state, [other]):
            yield f"{other}, which cannot be given away together with it, is held by {grant.holder}"


def _pool(state: NodeState, device: Device) -> str:
    """Return the name of the pool that a device is published in through DRA, or ""."""
    if device.kind == NVMEOF:
        shared = (state.status.get("fabrics") or {}).get("pools") or ()
        return device.id if device.id in shared else ""
    slices = (state.status["dra"] or {}).get("slices") or {}
    return {one["name"].rpartition("/")[2]: str(one["name"]) for one in slices.get("pools", ())}.get(device.kind, "")


# ---------------------------------------------------------------- as text


def print_device(document: Mapping[str, Any]) -> None:
    """Print what is known of a device."""
    node = f"NUMA node {document['numa_node']}" if document["numa_node"] is not None else "NUMA node unknown"
    driver = f", driver {document['driver']}" if document["driver"] else ""
    print(f"{document['kind']} {document['device']}: {node}{driver}")
    for line in (*_about_parts(document), *_about_use(document)):
        print(line)


def _about_parts(document: Mapping[str, Any]) -> Iterator[str]:
    if document["parent"]:
        yield f"it is a part of {document['parent']}"
    if document["parts"]:
        yield f"its parts: {', '.join(document['parts'])}"
    if document["hands_over"]:
        yield f"it hands over {', '.join(document['hands_over'])}"
    if document["exclusive"]:
        yield f"only one holder may have of it: {', '.join(document['exclusive'])}"
    if document["excludes"]:
        yield f"it cannot be given away together with {', '.join(document['excludes'])}"


def _about_use(document: Mapping[str, Any]) -> Iterator[str]:
    for one in document["holders"]:
        shared = " (in shares)" if one["shared"] else ""
        yield f"held by {one['holder']}{shared}, grant {one['grant']} of {moment(one['granted_at'])}"
    if not document["holders"]:
        yield "it is not held"
    yield f"health: {document['health']}"
    yield from (f"health by {source}: {cause}" for source, cause in document["causes"].items())
    yield from (f"degraded: {reason}" for reason in document["degraded"])
    if document["advice"]:
        yield f"what to do: {document['advice']}"
    for one in document["offered"]:
        yield f"offered as {one['id']} of {one['resource']}: {'healthy' if one['healthy'] else 'Unhealthy'}"
    if document["pool"]:
        yield f"kind {document['kind']} is published in pool {document['pool']}"
    yield from (f"not available: {why}" for why in document["not_offered"])
