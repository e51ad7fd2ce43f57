"""Pools and claims built in one line, and what the API server's rules say of a pool."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import Stamp
from nodeagent.core.dra.cpu_pool import PoolKind
from nodeagent.core.dra.pool import ALL_FEATURES, Features, Pool, PoolDevice
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import FROM_CLAIM, Claim, ClaimRef, Opaque, Result
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import NO_HEALTH, Evidence, Health, observe
from nodeagent.core.model.inventory import Inventory
from nodeagent.kube.resourceslice.render import Owner, render
from nodeagent.kube.resourceslice.validate import check

NODE, DRIVER = "node-a", "nodeagent.dev"
OWNER = Owner(driver=DRIVER, node_name=NODE, node_uid="u")
NOBODY = Ledger()
FORMS = [
    Features(consumable=consumable, counters=counters, taints=taints)
    for consumable, counters, taints in itertools.product((True, False), repeat=3)
]
"""What API servers of any age may keep."""


def pool_of(
    kind: PoolKind,
    inventory: Inventory,
    ledger: Ledger = NOBODY,
    health: Health = NO_HEALTH,
    features: Features = ALL_FEATURES,
) -> Pool:
    return kind.pool(inventory, ledger, health, features)


def shown(pool: Pool) -> dict[str, PoolDevice]:
    found = {one.name: one for one in pool.devices}
    assert len(found) == len(pool.devices), "a name stands for one device"
    return found


def amounts(pool: Pool, capacity: str) -> dict[str, int]:
    return {one.name: one.capacity[capacity].value for one in pool.devices}


def taints(pool: Pool) -> dict[str, list[str]]:
    """Keys of those devices that have any."""
    return {one.name: [taint.key for taint in one.taints] for one in pool.devices if one.taints}


def wrong_with(kind: PoolKind, inventory: Inventory, ledger: Ledger = NOBODY, health: Health = NO_HEALTH) -> list[str]:
    """Every rule that the pool breaks in any form, and every name that does not lead back to its part."""
    wrong = []
    for features in FORMS:
        pool = kind.pool(inventory, ledger, health, features)
        pool = replace(pool, counted=frozenset(name for one in pool.devices for name in one.costs))
        wrong += [f"{features}: {broken}" for broken in check(render(pool, OWNER, 1))]
        wrong += [f"{features}: {one.name}" for one in pool.devices if kind.part(inventory, one.name) != one.part]
        wrong += [f"{features}: {one.name} is tainted" for one in pool.devices if one.taints and not features.taints]
    return wrong


def health_of(**states: str) -> Health:
    return observe({}, [Evidence(device=one, source="s", state=state) for one, state in states.items()], 0)


def device(id: str, kind: str = "nic", **more: Any) -> Device:
    attributes = MappingProxyType(more.pop("attributes", {}))
    return Device(kind=kind, id=id, attributes=attributes, **more)


def stamp(at: float = 1000.0) -> Stamp:
    numbers = itertools.count()
    return Stamp(new_id=lambda: f"dp-{at}-{next(numbers)}", at=at, boot_id="b")


def result(
    kind: str, name: str, request: str = "r", *, admin: bool = False, share: str = "", **consumed: int
) -> Result:
    return Result(
        request=request,
        driver=DRIVER,
        pool=f"{NODE}/{kind}",
        device=name,
        share_id=share,
        admin=admin,
        consumed=MappingProxyType(consumed),
    )


def claim(name: str, *results: Result, uid: str = "", config: Mapping[str, Any] | None = None) -> Claim:
    said = {"apiVersion": "nodeagent.dev/v1alpha1", **(config or {})}
    return Claim(
        ref=ClaimRef(namespace="ns", name=name, uid=uid or f"uid-{name}"),
        allocated=True,
        results=results,
        configs=(Opaque(source=FROM_CLAIM, driver=DRIVER, parameters=said),) if config else (),
        reserved_for=("pod",),
    )
