"""Pools as ResourceSlices (resource.k8s.io/v1): rendering, and the smallest difference from what is stored.

Pure: nothing here talks to a server. The same pool yields the same objects with the same names on every run, so after a
restart the published slices match and nothing is written. The writes of a plan, performed as replace, create, delete,
never show the scheduler a complete pool that mixes two states: either a single slice changes, or the higher generation
stays incomplete until all its slices are written.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import msgspec

from nodeagent.core.dra.pool import (
    READY_CONDITION,
    REFUSED_CONDITION,
    Capacity,
    CounterSet,
    Features,
    NodeCost,
    Pool,
    PoolDevice,
    Scope,
    Taint,
    Value,
)
from nodeagent.kube.resourceslice.shared_slices import is_shared, with_taints_of_nodes
from nodeagent.kube.resourceslice.taint_times import TaintTimes, add_taint_times, taint_times

Object = dict[str, Any]
"""A Kubernetes object, or a part of one, as decoded JSON."""

API_VERSION, KIND = "resource.k8s.io/v1", "ResourceSlice"
DEVICES_A_SLICE = 64
"""Half the maximum of a slice: the limit drops to 64 as soon as one device is tainted, and taints come and go. With
larger slices a taint would force the devices to be split differently, which changes every following slice and raises
the pool's generation; this way it changes one slice."""
COUNTER_SETS_A_SLICE = 8
LONGEST_NAME = 253

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|([KMGTPE]i|[numkMGTPE]))?")
_SUFFIXES: Mapping[str, Fraction] = {
    **{suffix: Fraction(1024) ** power for power, suffix in enumerate(_BINARY)},
    **{suffix: Fraction(1000) ** power for power, suffix in enumerate("numkMGTPE", start=-3) if suffix in "num"},
    **{suffix: Fraction(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
}
_QUANTITY_FIELDS = frozenset({"value", "default", "min", "max", "step", "validValues"}) | {
    "capacityMultiplier",
    "deviceMultiplier",
    "perPod",
    "perContainer",
}
ALLOCATABLE = "nodeAllocatableResources"
"""The field of a device that says what an allocation takes of the Node's resources."""
CONDITIONS = "bindingConditions"
"""The field of a device that says for which conditions of its status the scheduler waits before it binds a pod."""
_LIST_FORM: Mapping[type, str] = {int: "ints", str: "strings"}
NO_TIMES: TaintTimes = MappingProxyType({})
T = TypeVar("T")


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Driver and node that the slices belong to."""

    driver: str
    node_name: str
    node_uid: str = ""
    """UID of the Node object. Without it (an empty string) the slices get no owner reference."""
    shared: bool = False
    """Whether these are the slices of pools that nodes share, which belong to none of them. `node_name` is "" then."""


class SlicePlan(NamedTuple):
    """The writes after which the server stores the desired pool. The publisher replaces, creates, then deletes."""

    create: tuple[Object, ...] = ()
    replace: tuple[Object, ...] = ()
    """Each carries the resourceVersion that it replaces."""
    delete: tuple[Object, ...] = ()
    """As stored."""

    def __bool__(self) -> bool:
        return any(self)


def pool_name(owner: Owner, kind: str) -> str:
    """Return the name of one kind's pool: unique in the cluster, as a driver's pool names must be."""
    return kind if owner.shared else f"{owner.node_name}/{kind}"


def render(pool: Pool, owner: Owner, generation: int) -> tuple[Object, ...]:
    """Return the pool's slices in a fixed order, counters first; none for a pool without devices."""
    if not pool.devices:
        return ()
    parts: list[tuple[str, Object]] = [
        (f"counters-{index:04d}", {"sharedCounters": [_counter_set(one) for one in chunk]})
        for index, chunk in enumerate(_chunks(pool.counters, COUNTER_SETS_A_SLICE))
    ]
    parts += [
        (f"{index:04d}", {"devices": [_device(one, pool) for one in chunk]})
        for index, chunk in enumerate(_chunks(pool.devices, DEVICES_A_SLICE))
    ]
    place = {"name": pool_name(owner, pool.kind), "generation": generation, "resourceSliceCount": len(parts)}
    head = _name_head(owner, pool.kind)
    nodes = {"nodeName": owner.node_name} if pool.scope is None else _shared_by(pool.scope)
    return tuple(_slice(f"{head}-{tail}", owner, {**nodes, "pool": place}, part) for tail, part in parts)


def plan(stored: Iterable[Object], pool: Pool, owner: Owner, times: TaintTimes = NO_TIMES) -> SlicePlan:
    """Return the smallest difference between the stored slices of this pool and the pool; empty if they are equal.

    `stored` may contain slices of other pools. The generation rises unless only one slice changes, or the stored slices
    of the newest generation are a subset of the desired ones (an interrupted write, or a slice deleted by another
    client). Taints keep the time at which the server has them as added, or that of `times` if their slice is gone.
    """
    place = pool_name(owner, pool.kind)
    found = {
        one["metadata"]["name"]: one for one in stored if belongs(one, owner) and _pool_of(one).get("name") == place
    }
    newest = max((_generation(one) for one in found.values()), default=0)
    wanted = with_taints_of_nodes(render(pool, owner, max(newest, 1)), found)
    if not _may_keep_generation(found, wanted, newest):
        wanted = with_taints_of_nodes(render(pool, owner, newest + 1), found)
    add_taint_times(wanted, {**times, **taint_times(sorted(found.values(), key=_generation))})
    names = {one["metadata"]["name"] for one in wanted}
    return SlicePlan(
        create=tuple(one for one in wanted if one["metadata"]["name"] not in found),
        replace=tuple(_replacement(old, one) for old, one in _pairs(found, wanted) if not same(old, one)),
        delete=tuple(one for name, one in found.items() if name not in names),
    )


def strays(stored: Iterable[Object], kinds: Iterable[str], owner: Owner) -> tuple[Object, ...]:
    """Return the stored slices of this driver and node whose pools are not, or no longer, served."""
    served = {pool_name(owner, kind) for kind in kinds}
    return tuple(one for one in stored if belongs(one, owner) and _pool_of(one).get("name") not in served)


def belongs(one: Object, owner: Owner) -> bool:
    """Return whether a slice belongs to this driver on this node. No other slice is ever touched."""
    spec = one.get("spec", {})
    mine = is_shared(one) if owner.shared else spec.get("nodeName") == owner.node_name
    return bool(spec.get("driver") == owner.driver and mine)


def same(stored: Object, wanted: Object) -> bool:
    """Return whether two slices are equivalent. Fields added by the server are ignored and quantities are compared by
    value."""
    if _owners(stored) != _owners(wanted):
        return False
    a, b = stored["spec"], wanted["spec"]
    if a == b:
        return True
    # A full comparison is slow, and a different generation differs whatever the rest says.
    return _generation(stored) == _generation(wanted) and bool(_canonical(a) == _canonical(b))


def lost_features(sent: Object, stored: Object) -> Features:
    """Return which features the server kept of a slice: False for a feature of which a field was sent and is missing in
    the response."""
    answered = {one["name"]: one for one in stored["spec"].get("devices", ())}
    pairs = [(one, answered.get(one["name"], one)) for one in sent["spec"].get("devices", ())]
    return Features(
        consumable=not any(_lacks(a, b, "allowMultipleAllocations") or _lacks_policy(a, b) for a, b in pairs),
        counters=not any(_lacks(a, b, "consumesCounters") for a, b in pairs)
        and not _lacks(sent["spec"], stored["spec"], "sharedCounters"),
        taints=not any(_lacks(a, b, "taints") for a, b in pairs),
        allocatable=not any(_lacks(a, b, ALLOCATABLE) for a, b in pairs),
        conditions=not any(_lacks(a, b, CONDITIONS) for a, b in pairs),
        lists=not any(_has_lists(a) and not _has_lists(b) for a, b in pairs),
    )


def seen_features(stored: Iterable[Object]) -> Features:
    """Return which features the server is known to keep: True for a feature of which a stored slice has a field."""
    stored = tuple(stored)
    specs = [one["spec"] for one in stored]
    devices = [one for spec in specs for one in spec.get("devices", ())]
    capacities = (capacity for one in devices for capacity in one.get("capacity", {}).values())
    return Features(
        consumable=any(one.get("allowMultipleAllocations") for one in devices)
        or any(one.get("requestPolicy") for one in capacities),
        counters=any(one.get("consumesCounters") for one in devices) or any(one.get("sharedCounters") for one in specs),
        taints=any(one.get("taints") for one in devices),
        allocatable=any(map(counts, stored)),
        conditions=any(one.get(CONDITIONS) for one in devices),
        lists=any(map(_has_lists, devices)),
    )


def counts(one: Object) -> bool:
    """Return whether a slice has a device that says what it takes of the Node's resources."""
    return any(ALLOCATABLE in device for device in one["spec"].get("devices", ()))


def lists(one: Object) -> bool:
    """Return whether a slice has a device with an attribute of several values."""
    return any(map(_has_lists, one["spec"].get("devices", ())))


def _has_lists(device: Object) -> bool:
    return any(form in one for one in device.get("attributes", {}).values() for form in _LIST_FORM.values())


@functools.lru_cache(maxsize=4096)
def quantity(text: str) -> Fraction | None:
    """Return the value of a Kubernetes quantity (apimachinery resource.Quantity), or None if it is not one."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, exponent, suffix = match.groups()
    return Fraction(number + (exponent or "")) * _SUFFIXES[suffix or ""]


# Writing


def _shared_by(scope: Scope) -> Object:
    """Return the field of a slice that says which nodes share it."""
    if not scope.labels:
        return {"allNodes": True}
    terms = [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(scope.labels.items())]
    return {"nodeSelector": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}


def _slice(name: str, owner: Owner, place: Object, part: Object) -> Object:
    metadata: Object = {"name": name}
    if owner.node_uid:
        node = {"apiVersion": "v1", "kind": "Node", "name": owner.node_name, "uid": owner.node_uid}
        metadata["ownerReferences"] = [{**node, "controller": True}]
    spec = {"driver": owner.driver, **place, **part}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


@functools.lru_cache(maxsize=256)
def _name_head(owner: Owner, kind: str) -> str:
    """Return a readable prefix made unique by a hash: node, driver and kind may themselves contain the separator."""
    triple = (owner.node_name, owner.driver, kind)
    digest = hashlib.sha256("\0".join(triple).encode(errors="surrogateescape")).hexdigest()[:12]
    readable = "-".join(filter(None, (owner.node_name, owner.driver, re.sub(r"[^a-z0-9-]", "-", kind))))
    room = LONGEST_NAME - len(f"-{digest}-counters-0000")
    return f"{readable[:room].rstrip('.-')}-{digest}"


def _chunks(things: Sequence[T], size: int) -> list[Sequence[T]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def _counter_set(one: CounterSet) -> Object:
    return {"name": one.name, "counters": _counters(one.counters)}


def _counters(counters: Mapping[str, int]) -> Object:
    return {name: {"value": str(value)} for name, value in counters.items()}


def _device(device: PoolDevice, pool: Pool) -> Object:
    written: Object = {"name": device.name}
    if device.attributes:
        written["attributes"] = {name: attribute(value) for name, value in device.attributes.items()}
    if device.capacity:
        written["capacity"] = {name: _capacity(one, device.shared) for name, one in device.capacity.items()}
    if device.shared:
        written["allowMultipleAllocations"] = True
    if device.consumes:
        written["consumesCounters"] = [
            {"counterSet": name, "counters": _counters(counters)} for name, counters in device.consumes.items()
        ]
    if device.taints:
        written["taints"] = [_taint(one) for one in device.taints]
    if costs := {name: _cost(one) for name, one in device.costs.items() if name in pool.counted}:
        written[ALLOCATABLE] = costs
    if pool.conditional:
        written |= {CONDITIONS: [READY_CONDITION], "bindingFailureConditions": [REFUSED_CONDITION]}
    return written


def _cost(cost: NodeCost) -> Object:
    """Return a NodeAllocatableResource. The server wants both the capacity and its multiplier, or neither."""
    by_capacity = {"capacityKey": cost.capacity, "capacityMultiplier": "1"} if cost.capacity else {}
    mapping = {"deviceMultiplier": str(cost.amount)} if cost.amount else by_capacity
    overhead = {name: one for name, one in (("perPod", cost.per_pod), ("perContainer", cost.per_container)) if one}
    return {name: one for name, one in (("mapping", mapping), ("overhead", overhead)) if one}


def attribute(value: Value) -> Object:
    """Return a DeviceAttribute."""
    if isinstance(value, tuple):
        return {_LIST_FORM[type(value[0])]: list(value)}
    form = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "string"
    return {form: value}


def _taint(taint: Taint) -> Object:
    value = {"value": taint.value} if taint.value else {}
    return {"key": taint.key, **value, "effect": taint.effect}


def _capacity(capacity: Capacity, shared: bool) -> Object:
    write = _binary if capacity.binary else str
    written: Object = {"value": write(capacity.value)}
    if not shared or capacity.value < capacity.default:
        return written
    least = write(capacity.least)
    if capacity.value >= capacity.least + capacity.step:
        allowed: Object = {"validRange": {"min": least, "step": write(capacity.step)}}
    else:
        # The server rejects a range whose first step exceeds the value.
        allowed = {"validValues": [least]}
    return {**written, "requestPolicy": {"default": write(capacity.default), **allowed}}


def _binary(value: int) -> str:
    """Return the exact value with the largest suffix that divides it."""
    power = 0
    while value and value % 1024 == 0 and power < len(_BINARY) - 1:
        value, power = value // 1024, power + 1
    return f"{value}{_BINARY[power]}"


# Comparing


def _may_keep_generation(found: Mapping[str, Object], wanted: Sequence[Object], newest: int) -> bool:
    live = {name: one for name, one in found.items() if _generation(one) == newest}
    names = {one["metadata"]["name"] for one in wanted}
    missing, surplus = len(names - live.keys()), len(live.keys() - names)
    different = sum(not same(old, one) for old, one in _pairs(live, wanted))
    if not different:
        return not (missing and surplus)
    return different == 1 and not missing and not surplus


def _pairs(found: Mapping[str, Object], wanted: Sequence[Object]) -> list[tuple[Object, Object]]:
    named = [(found.get(one["metadata"]["name"]), one) for one in wanted]
    return [(old, one) for old, one in named if old is not None]


def _replacement(old: Object, new: Object) -> Object:
    """Return the new slice as a replacement of the old one, keeping labels and annotations set by others."""
    kept = {key: value for key, value in old["metadata"].items() if key not in ("managedFields", "ownerReferences")}
    return {**new, "metadata": {**kept, **new["metadata"]}}


def _pool_of(one: Object) -> Object:
    found: Object = one.get("spec", {}).get("pool", {})
    return found


def _generation(one: Object) -> int:
    return int(_pool_of(one).get("generation", 0))


def _owners(one: Object) -> list[tuple[Any, ...]]:
    fields = ("apiVersion", "kind", "name", "uid", "controller")
    return [tuple(owner.get(field) for field in fields) for owner in one["metadata"].get("ownerReferences", ())]


def _canonical(value: Any, field: str = "") -> Any:
    match value:
        case dict():
            inner = {key: _canonical(one, key) for key, one in value.items()}
            return {key: one for key, one in inner.items() if one not in (None, [], {})}
        case list() if field == "taints":
            return [{key: one for key, one in taint.items() if key != "timeAdded"} for taint in value]
        case list():
            return [_canonical(one, field) for one in value]
        case str() if field in _QUANTITY_FIELDS:
            number = quantity(value)
            return value if number is None else number
    return value


def _lacks(sent: Object, stored: Object, field: str) -> bool:
    return bool(sent.get(field)) and not stored.get(field)


def _lacks_policy(sent: Object, stored: Object) -> bool:
    kept = stored.get("capacity", {})
    return any(_lacks(one, kept.get(name, one), "requestPolicy") for name, one in sent.get("capacity", {}).items())
