"""When the taints of a pool were added, as the API server stores it.

A server sets a missing `timeAdded` to the current time at every write, for every taint of the slice (SetDefaults of
DeviceTaint, Kubernetes 1.34 to 1.38). Pods tolerate a taint for `tolerationSeconds` from then on, so a write for any
other reason must send back the stored time, or it postpones their eviction. A taint is the same as long as its device,
key, value and effect are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nodeagent.core.dra.pool import Pool


class TaintId(NamedTuple):
    """One taint of one device."""

    device: str
    key: str
    value: str
    effect: str


TaintTimes = Mapping[TaintId, str]
"""`timeAdded` by taint, as text of the server."""


def taint_times(slices: Iterable[dict[str, Any]]) -> TaintTimes:
    """Return the times in the stored slices of one pool; where two disagree, the later slice's."""
    tainted = ((it["name"], taint) for one in slices for it in one["spec"].get("devices", ()) for taint in _taints(it))
    return {_id(device, taint): taint["timeAdded"] for device, taint in tainted if taint.get("timeAdded")}


def add_taint_times(slices: Iterable[dict[str, Any]], times: TaintTimes) -> None:
    """Set `timeAdded` of each taint in `slices`, which are changed in place, for which `times` has one."""
    for device in (it for one in slices for it in one["spec"].get("devices", ()) if times):
        for taint in _taints(device):
            if added := times.get(_id(device["name"], taint)):
                taint["timeAdded"] = added


def of_pool(times: TaintTimes, pool: Pool) -> TaintTimes:
    """Return the times of the taints that the pool has."""
    present = {TaintId(it.name, one.key, one.value, one.effect) for it in pool.devices for one in it.taints}
    return {taint: added for taint, added in times.items() if taint in present}


def _taints(device: Mapping[str, Any]) -> list[dict[str, Any]]:
    return device.get("taints") or []


def _id(device: str, taint: Mapping[str, Any]) -> TaintId:
    return TaintId(device, taint.get("key", ""), taint.get("value", ""), taint.get("effect", ""))
