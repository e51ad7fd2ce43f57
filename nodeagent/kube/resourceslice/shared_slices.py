"""ResourceSlices of pools that nodes share: which they are, and the taints that nodes put on devices that they hold.

One agent of the cluster writes the slices; each agent adds and removes its own taints. So an agent that writes a slice
keeps the taints of others, and the server refuses whichever of two writes is older (resourceVersion).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nodeagent.core.dra.pool import PATH_TAINT, Taint

Object = dict[str, Any]


def is_shared(one: Object) -> bool:
    """Return whether a slice of this driver is of a pool that nodes share."""
    spec = one.get("spec", {})
    return not spec.get("nodeName") and "/" not in spec.get("pool", {}).get("name", "/")


def with_taints_of_nodes(wanted: Sequence[Object], stored: Mapping[str, Object]) -> tuple[Object, ...]:
    """Return slices with the taints that nodes have put on the devices, as stored. stored: by name; all of one pool."""
    every = {device["name"]: device for one in stored.values() for device in _devices(one)}
    for device in (it for one in wanted if is_shared(one) for it in _devices(one)):
        if found := [taint for taint in _taints(every.get(device["name"], {})) if taint["key"] == PATH_TAINT]:
            device["taints"] = [*_taints(device), *copy.deepcopy(found)]
    return tuple(wanted)


def with_taints(one: Object, node: str, wanted: Mapping[tuple[str, str], Taint]) -> Object | None:
    """Return a stored slice in which a node has these taints and no others, or None if that is so already.

    node: as its taints call it. wanted: by (pool, device).
    """
    after, changed = copy.deepcopy(one), False
    pool = one["spec"]["pool"]["name"]
    for device in _devices(after):
        mine = wanted.get((pool, device["name"]))
        new = [] if mine is None else [{"key": mine.key, "value": mine.value, "effect": mine.effect}]
        old = [taint for taint in _taints(device) if _is_of(taint, node)]
        if [{key: taint.get(key) for key in ("key", "value", "effect")} for taint in old] != new:
            device["taints"] = [*(taint for taint in _taints(device) if not _is_of(taint, node)), *new]
            if not device["taints"]:
                del device["taints"]
            changed = True
    return after if changed else None


def tainting_nodes(slices: Iterable[Object]) -> frozenset[str]:
    """Return which nodes have put taints on devices of some slices, as their taints call them."""
    every = (taint for one in slices for device in _devices(one) for taint in _taints(device))
    return frozenset(taint.get("value", "") for taint in every if taint.get("key") == PATH_TAINT)


def _is_of(taint: Mapping[str, Any], node: str) -> bool:
    return bool(taint.get("key") == PATH_TAINT and taint.get("value", "") == node)


def _devices(one: Object) -> Sequence[Object]:
    return one["spec"].get("devices") or ()


def _taints(device: Mapping[str, Any]) -> list[dict[str, Any]]:
    return device.get("taints") or []
