"""What was refused, from the audit of the ledger file, and who stands in the way of it now."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.agent.explain.unit import moment
from nodeagent.cli.agent.explain.words import holdings
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.core.advice.release import smallest_release
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import CpuPool, PoolKind
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import MemoryPool, PagePool
from nodeagent.core.dra.pool import DevicePart
from nodeagent.core.fabrics.target import kind_of
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.placement.place import find
from nodeagent.errors import StateError
from nodeagent.state.audit import REFUSED, AuditEntry, newest
from nodeagent.state.store import FILE

_WANTED = re.compile(r"(?P<pool>[^ ,()]+)/(?P<device>[^ ,()/]+)(?: \((?P<amounts>[^()]*)\))?")
"""A result as the audit writes it: POOL/DEVICE (cpus=4)."""
Document = dict[str, Any]


def refusals(state_dir: Path, about: Callable[[AuditEntry], bool]) -> tuple[list[AuditEntry], str]:
    """Return the refusals that are about something, newest first, and why the audit cannot be read, or ""."""
    try:
        every = newest(state_dir / FILE, -1)
    except StateError as error:
        return [], str(error)
    return [one for one in reversed(every) if one.action == REFUSED and about(one)], ""


def refusal_documents(state: NodeState, found: Sequence[AuditEntry]) -> list[Document]:
    """Return refusals in plain types; the newest with who stands in the way now."""
    documents = [msgspec.structs.asdict(one) for one in found]
    for document, entry in zip(documents[:1], found, strict=False):
        document["now"] = in_the_way_now(state, entry.what)
    return documents


def in_the_way_now(state: NodeState, want: str) -> Document:
    """Return who holds what was refused, and the smallest set of pods whose end would admit it now."""
    parts = _parts_wanted(state.inventory, want)
    request = _request(parts)
    holders = [one for one in state.tenants() if _has_of(state, one.grants, parts)]
    if request is None:
        return {"fits": None, "holders": [str(one) for one in holders], "in_the_way": []}
    if find(state.inventory, state.ledger, request) is not None:
        return {"fits": True, "holders": [str(one) for one in holders], "in_the_way": []}
    found = smallest_release(state.inventory, state.ledger, request, state.tenants())
    return {
        "fits": False,
        "holders": [str(one) for one in holders],
        "in_the_way": [holdings(one) for one in found.tenants] if found is not None else [],
        "smallest": found.exact if found is not None else True,
    }


class _Wanted(msgspec.Struct, frozen=True):
    part: DevicePart
    kind: str
    cpus: int = 0


def _parts_wanted(inventory: Inventory, want: str) -> list[_Wanted]:
    """Return what the text of a refusal names: ids of the device plugin, or the scheduler's results."""
    found = []
    for match in _WANTED.finditer(want):
        kind = kind_of(match["pool"])
        part = _pool(inventory, kind).part(inventory, match["device"])
        if part is not None:
            found.append(_Wanted(part, kind, _cpus(match["amounts"] or "", part)))
    for id in re.split(r"[;,] ", want):
        if (number := re.fullmatch(r"cpu([0-9]{1,7})", id)) and int(number[1]) in inventory.cpu_by_id:
            found.append(_Wanted(DevicePart(cpus=CpuSet([int(number[1])])), "cpu", 1))
        elif (device := inventory.device_by_id.get(id.rpartition("::")[0] or id)) is not None:
            found.append(_Wanted(DevicePart(device=device.id), device.kind))
    return found


def _cpus(amounts: str, part: DevicePart) -> int:
    said = re.search(r"cpus=([0-9]+)", amounts)
    return int(said[1]) if said else len(part.cpus) if len(part.cpus) == 1 else 0


def _pool(inventory: Inventory, kind: str) -> PoolKind:
    sizes = {pool.page_bytes for node in inventory.numa_nodes for pool in node.hugepages}
    known: Mapping[str, PoolKind] = {
        "cpu": CpuPool(),
        "hugepages": PagePool(sizes=tuple(sorted(sizes))),
        "memory": MemoryPool(),
    }
    return known.get(kind) or DevicePool(kind=kind, resources=(DeviceResource(name=kind, kind=kind),))


def _request(parts: Sequence[_Wanted]) -> Request | None:
    """Return CPUs and devices that were wanted as a request; None if there are none, or they are of several groups."""
    groups = [one for one in parts if one.cpus]
    devices = [one for one in parts if one.part.device]
    cpus = CpuSet()
    for one in groups:
        cpus |= one.part.cpus
    if not groups and not devices:
        return None
    ids = frozenset(one.part.device for one in devices)
    return Request(
        cpus=sum(one.cpus for one in groups),
        within_cpus=cpus if groups else None,
        devices={one.kind: sum(other.kind == one.kind for other in devices) for one in devices},
        within_devices=ids if ids else None,
    )


def _has_of(state: NodeState, grants: Sequence[Any], parts: Sequence[_Wanted]) -> bool:
    wanted = {one.part.device for one in parts if one.part.device}
    excluded = excluded_with(state.inventory, state.ledger, wanted)
    return any(
        not grant.cpus.isdisjoint(one.part.cpus)
        or not excluded.isdisjoint((*grant.devices, *grant.shares))
        or any(p.node == one.part.node and p.page_bytes == one.part.page_bytes for p in grant.hugepages)
        or (one.part.node is not None and any(node == one.part.node for node, _ in grant.memory))
        for grant in grants
        for one in parts
    )


# ---------------------------------------------------------------- as text


def print_refusals(documents: Sequence[Mapping[str, Any]], most: int = 5) -> None:
    """Print the newest refusals, and who stands in the way of the last one."""
    for one in documents[:most]:
        times = f", {one['times']} times since {moment(one['first_at'])}" if one["times"] > 1 else ""
        print(f"refused at {moment(one['at'])}{times}: {one['why']}")
    if len(documents) > most:
        print(f"and {len(documents) - most} older refusals (-o json has all)")
    if documents:
        print(f"now: {_now(documents[0]['now'])}")


def _now(now: Mapping[str, Any]) -> str:
    if now["fits"]:
        return "nothing stands in the way, it would fit"
    named = [pod for one in now["in_the_way"] for pod in one["pods"]]
    if named:
        return f"the end of {', '.join(named)} would admit it" + ("" if now["smallest"] else "; fewer may do")
    return f"held there by {', '.join(now['holders'])}" if now["holders"] else "what was wanted is not held"
