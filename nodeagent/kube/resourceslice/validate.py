"""The rules for ResourceSlices, checked before anything is sent. Breaking one is our own bug and is reported.

The rules are those of resource.k8s.io/v1 up to Kubernetes 1.37 (types and validation of the API, and what the scheduler
requires of a whole pool), slightly stricter where the server is lax: names in lower case, steps above zero.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from nodeagent.kube.resourceslice.render import ALLOCATABLE, COUNTER_SETS_A_SLICE, LONGEST_NAME, Object, quantity

MOST_DEVICES, MOST_ADVANCED_DEVICES = 128, 64
MOST_COUNTERS, MOST_CONSUMPTIONS, MOST_TAINTS = 32, 2, 16
MOST_ATTRIBUTES_AND_CAPACITIES, MOST_ATTRIBUTE_VALUES, MOST_VALID_VALUES = 32, 48, 10
LONGEST_TEXT_BYTES, LONGEST_LABEL, LONGEST_DOMAIN, LONGEST_IDENTIFIER = 64, 63, 63, 32
LARGEST = 2**63 - 1
EFFECTS = ("NoSchedule", "NoExecute", "None")

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NUMBER = r"(0|[1-9][0-9]*)"
_BEFORE, _BUILD = r"(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", r"[0-9A-Za-z-]+"
_SEMVER = re.compile(
    rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_BEFORE}(\.{_BEFORE})*)?(\+{_BUILD}(\.{_BUILD})*)?"
)  # https://semver.org/spec/v2.0.0.html
_NODE_RESOURCE = re.compile(r"cpu|memory|hugepages-.+")
_LISTS = ("ints", "bools", "strings", "versions")
_SCOPES = ("nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection")


class Broken(NamedTuple):
    """One rule broken by one object. `device` is "" if the pool itself breaks it."""

    pool: str
    device: str
    why: str
    """The field, its value and the rule."""

    def __str__(self) -> str:
        device = f" device {self.device!r}:" if self.device else ""
        return f"pool {self.pool!r}:{device} {self.why}"


def check(slices: Sequence[Object], sound: Container[str] = frozenset()) -> list[Broken]:
    """Return every rule that the slices break. They are taken to be complete pools.

    `sound` names devices already known to break no rule with these counters; they are skipped.
    """
    pools: dict[str, list[Object]] = {}
    for one in slices:
        pools.setdefault(one["spec"]["pool"]["name"], []).append(one)
    return [broken for name, parts in pools.items() for broken in _pool(name, parts, sound)]


def _pool(name: str, parts: Sequence[Object], sound: Container[str]) -> Iterator[Broken]:
    sets = {one["name"]: one.get("counters", {}) for part in parts for one in part["spec"].get("sharedCounters", ())}
    for why in [*_pool_wide(name, parts), *(why for part in parts for why in _slice(part))]:
        yield Broken(name, "", why)
    times = Counter(one["name"] for part in parts for one in part["spec"].get("devices", ()))
    for device in (one for one, count in times.items() if count > 1):
        yield Broken(name, device, f"name: {device!r}: the pool has {times[device]} devices of this name")
    for part in parts:
        for device in (one for one in part["spec"].get("devices", ()) if one["name"] not in sound):
            for why in _device(device, sets):
                yield Broken(name, device["name"], why)


def _pool_wide(name: str, parts: Sequence[Object]) -> Iterator[str]:
    yield from _matches(
        "pool.name", name, _is_pool_name, f"DNS names between slashes, {LONGEST_NAME} characters at most"
    )
    places = [part["spec"]["pool"] for part in parts]
    generations = sorted({one["generation"] for one in places})
    if len(generations) > 1:
        yield f"pool.generation: {generations}: all slices of a pool share one"
    for place in places:
        if place["resourceSliceCount"] != len(parts):
            yield f"pool.resourceSliceCount: {place['resourceSliceCount']}: the pool has {len(parts)} slices"
        if not 0 <= place["generation"] <= LARGEST:
            yield f"pool.generation: {place['generation']}: it must be 0 or more"
    yield from _unique("metadata.name", (part["metadata"]["name"] for part in parts))
    yield from _unique(
        "sharedCounters", (it["name"] for part in parts for it in part["spec"].get("sharedCounters", ()))
    )


def _slice(part: Object) -> Iterator[str]:
    spec, devices = part["spec"], part["spec"].get("devices", ())
    yield from _matches("metadata.name", part["metadata"]["name"], _is_subdomain, "a DNS subdomain")
    yield from _matches("driver", spec["driver"], _is_driver, f"a DNS subdomain of at most {LONGEST_DOMAIN} characters")
    scopes = [field for field in _SCOPES if spec.get(field)]
    if len(scopes) != 1:
        yield f"{' and '.join(scopes) or 'nodeName'}: exactly one of {', '.join(_SCOPES)} must be set"
    if "nodeName" in scopes:
        yield from _matches("nodeName", spec["nodeName"], _is_subdomain, "a DNS subdomain")
    if devices and spec.get("sharedCounters"):
        yield "devices and sharedCounters: a slice holds one of them"
    advanced = any(map(_is_advanced, devices))
    yield from _at_most("devices", devices, MOST_ADVANCED_DEVICES if advanced else MOST_DEVICES)
    yield from _at_most("sharedCounters", spec.get("sharedCounters", ()), COUNTER_SETS_A_SLICE)
    for one in spec.get("sharedCounters", ()):
        yield from _counter_set(f"sharedCounters[{one['name']}]", one["name"], one.get("counters", {}))


def _counter_set(field: str, name: str, counters: Mapping[str, Any]) -> Iterator[str]:
    yield from _matches(field, name, _is_label, "a DNS label")
    if not counters:
        yield f"{field}.counters: there is none, one at least is needed"
    yield from _at_most(f"{field}.counters", counters, MOST_COUNTERS)
    for counter, value in counters.items():
        yield from _matches(f"{field}.counters", counter, _is_label, "a DNS label")
        yield from _amount(f"{field}.counters[{counter}].value", value["value"])


def _device(device: Object, sets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    attributes, capacity = device.get("attributes", {}), device.get("capacity", {})
    yield from _matches("name", device["name"], _is_label, "a DNS label")
    if len(attributes) + len(capacity) > MOST_ATTRIBUTES_AND_CAPACITIES:
        both = f"{len(attributes)} attributes and {len(capacity)} capacities"
        yield f"attributes: {both}, the limit is {MOST_ATTRIBUTES_AND_CAPACITIES} together"
    values = sum(sum(len(one.get(form, ())) for form in _LISTS) or 1 for one in attributes.values())
    if values > MOST_ATTRIBUTE_VALUES:
        yield f"attributes: {values} values in all, the limit is {MOST_ATTRIBUTE_VALUES}"
    for name, one in attributes.items():
        yield from _qualified("attributes", name)
        yield from _attribute(f"attributes[{name}]", one)
    for name, one in capacity.items():
        yield from _qualified("capacity", name)
        yield from _capacity(f"capacity[{name}]", one, shared=bool(device.get("allowMultipleAllocations")))
    yield from _at_most("taints", device.get("taints", ()), MOST_TAINTS)
    for taint in device.get("taints", ()):
        yield from _taint(taint)
    yield from _consumptions(device.get("consumesCounters", ()), sets)
    for resource, one in device.get(ALLOCATABLE, {}).items():
        yield from _node_cost(f"{ALLOCATABLE}[{resource}]", resource, one, capacity)


def _node_cost(field: str, resource: str, cost: Object, capacity: Mapping[str, Any]) -> Iterator[str]:
    yield from _matches(
        ALLOCATABLE, resource, lambda it: _NODE_RESOURCE.fullmatch(it) is not None, "cpu, memory or hugepages-SIZE"
    )
    if not cost.get("mapping") and not cost.get("overhead"):
        yield f"{field}: {cost}: a mapping or an overhead must be given"
    if "mapping" in cost:
        yield from _mapping(f"{field}.mapping", cost["mapping"], capacity)
    for name, value in cost.get("overhead", {}).items():
        yield from _amount(f"{field}.overhead.{name}", value)


def _mapping(field: str, mapping: Object, capacity: Mapping[str, Any]) -> Iterator[str]:
    if mapping.keys() not in ({"capacityKey", "capacityMultiplier"}, {"deviceMultiplier"}):
        yield f"{field}: {sorted(mapping)}: it must be a capacityKey with capacityMultiplier, or deviceMultiplier"
    if "capacityKey" in mapping and mapping["capacityKey"] not in capacity:
        yield f"{field}.capacityKey: {mapping['capacityKey']!r}: the device has no capacity of exactly this name"
    for name in mapping.keys() - {"capacityKey"}:
        yield from _amount(f"{field}.{name}", mapping[name])
        if not quantity(mapping[name]):
            yield f"{field}.{name}: {mapping[name]}: it must be above 0"


def _consumptions(consumed: Sequence[Object], sets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from _at_most("consumesCounters", consumed, MOST_CONSUMPTIONS)
    yield from _unique("consumesCounters", (one["counterSet"] for one in consumed))
    for one in consumed:
        name, counters = one["counterSet"], one.get("counters", {})
        yield from _counter_set(f"consumesCounters[{name}]", name, counters)
        if name not in sets:
            yield f"consumesCounters: {name!r}: the pool has no such counter set"
        for counter in counters.keys() - sets.get(name, counters).keys():
            yield f"consumesCounters[{name}].counters: {counter!r}: the set has no such counter"


def _attribute(field: str, attribute: Object) -> Iterator[str]:
    if len(attribute) != 1:
        yield f"{field}: {sorted(attribute)}: exactly one value must be given"
    for form, given in attribute.items():
        if form in _LISTS and not given:
            yield f"{field}.{form}: the list is empty"
        for value in given if form in _LISTS else (given,):
            yield from _attribute_value(f"{field}.{form}", form.removesuffix("s") if form in _LISTS else form, value)


def _attribute_value(field: str, form: str, value: Any) -> Iterator[str]:
    match form:
        case "int":
            if not -LARGEST - 1 <= value <= LARGEST:
                yield f"{field}: {value}: it does not fit into 64 bits"
        case "string" | "version":
            yield from _text(field, value)
            if form == "version":
                yield from _matches(field, value, _is_version, "a version by semver.org 2.0.0")
        case "bool":
            pass
        case _:
            yield f"{field}: {value!r}: there is no such form of a value"


def _text(field: str, value: str) -> Iterator[str]:
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        yield f"{field}: {value!r}: it is not text"
        return
    if length > LONGEST_TEXT_BYTES:
        yield f"{field}: {value!r}: it has {length} bytes, the limit is {LONGEST_TEXT_BYTES}"


def _capacity(field: str, capacity: Object, *, shared: bool) -> Iterator[str]:
    yield from _amount(f"{field}.value", capacity["value"])
    policy = capacity.get("requestPolicy")
    if policy is None:
        return
    if not shared:
        yield f"{field}.requestPolicy: only a device with allowMultipleAllocations may have one"
    if policy.get("validValues") and policy.get("validRange"):
        yield f"{field}.requestPolicy: validValues and validRange: only one may be given"
    limited = policy.get("validValues") or policy.get("validRange")
    if limited and policy.get("default") is None:
        yield f"{field}.requestPolicy.default: it must be given"
        return
    whole = quantity(capacity["value"])
    if limited and whole is not None:
        yield from _policy(f"{field}.requestPolicy", policy, whole)


def _policy(field: str, policy: Object, whole: Fraction) -> Iterator[str]:
    given = policy.get("validRange") or {}
    texts = [policy["default"], *policy.get("validValues", ()), *given.values()]
    wrong = [why for text in texts for why in _amount(field, text)]
    if wrong:
        yield from wrong
    elif given:
        yield from _range(f"{field}.validRange", given, quantity(policy["default"]) or Fraction(), whole)
    else:
        yield from _choices(f"{field}.validValues", policy["validValues"], policy["default"], whole)


def _choices(field: str, texts: Sequence[str], default: str, whole: Fraction) -> Iterator[str]:
    values = [quantity(text) or Fraction() for text in texts]
    yield from _at_most(field, values, MOST_VALID_VALUES)
    if any(a >= b for a, b in itertools.pairwise(values)):
        yield f"{field}: {texts}: they must rise"
    if max(values) > whole:
        yield f"{field}: {texts}: one is above the capacity"
    if quantity(default) not in values:
        yield f"{field}: {texts}: the default {default} is not among them"


def _range(field: str, given: Object, default: Fraction, whole: Fraction) -> Iterator[str]:
    low, high, step = (quantity(given[one]) if one in given else None for one in ("min", "max", "step"))
    if low is None:
        yield f"{field}.min: it must be given"
        return
    top = whole if high is None else high
    if not low <= default <= top or top > whole:
        yield f"{field}: {given}: min, default {float(default):g}, max and value {float(whole):g} must rise"
    if step is None:
        return
    if step <= 0:
        yield f"{field}.step: {given['step']}: it must be above 0"
    elif low + step > whole:
        yield f"{field}.step: {given['step']}: one step above min is beyond the value {float(whole):g}"
    elif (default - low) % step or (high is not None and (high - low) % step):
        yield f"{field}.step: {given['step']}: default and max must lie whole steps above min"


def _taint(taint: Object) -> Iterator[str]:
    key, value, effect = taint["key"], taint.get("value", ""), taint.get("effect", "")
    yield from _matches("taints.key", key, _is_label_key, "a label's name")
    yield from _matches("taints.value", value, lambda it: not it or _is_label_value(it), "a label's value")
    if effect not in EFFECTS:
        yield f"taints[{key}].effect: {effect!r}: it must be one of {', '.join(EFFECTS)}"


def _amount(field: str, text: str) -> Iterator[str]:
    value = quantity(text)
    if value is None:
        yield f"{field}: {text!r}: it is no quantity"
    elif not 0 <= value <= LARGEST:
        yield f"{field}: {text}: it must lie between 0 and {LARGEST}"


def _qualified(field: str, name: str) -> Iterator[str]:
    what = f"at most {LONGEST_IDENTIFIER} letters, digits and underscores, after a domain and a slash or alone"
    yield from _matches(field, name, _is_qualified, what)


def _matches(field: str, value: str, rule: Callable[[str], bool], what: str) -> Iterator[str]:
    if not rule(value):
        yield f"{field}: {value!r}: it must be {what}"


def _at_most(field: str, things: Sequence[Any] | Mapping[str, Any], most: int) -> Iterator[str]:
    if len(things) > most:
        yield f"{field}: {len(things)} entries, the limit is {most}"


def _unique(field: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{field}: {name!r}: it stands there {times} times"


def _is_label(text: str) -> bool:
    return len(text) <= LONGEST_LABEL and _LABEL.fullmatch(text) is not None


def _is_subdomain(text: str) -> bool:
    return len(text) <= LONGEST_NAME and _SUBDOMAIN.fullmatch(text) is not None


def _is_pool_name(text: str) -> bool:
    return len(text) <= LONGEST_NAME and all(map(_is_subdomain, text.split("/")))


def _is_driver(text: str) -> bool:
    return len(text) <= LONGEST_DOMAIN and _is_subdomain(text)


def _is_version(text: str) -> bool:
    return _SEMVER.fullmatch(text) is not None


def _is_label_value(text: str) -> bool:
    return len(text) <= LONGEST_LABEL and _LABEL_VALUE.fullmatch(text) is not None


def _is_label_key(text: str) -> bool:
    *prefix, name = text.split("/")
    return len(prefix) <= 1 and all(map(_is_subdomain, prefix)) and _is_label_value(name)


@functools.lru_cache(maxsize=1024)
def _is_qualified(text: str) -> bool:
    *domain, name = text.split("/")
    fits = len(name) <= LONGEST_IDENTIFIER and _IDENTIFIER.fullmatch(name) is not None
    return fits and len(domain) <= 1 and all(map(_is_driver, domain))


def _is_advanced(device: Object) -> bool:
    lists = any(form in one for one in device.get("attributes", {}).values() for form in _LISTS)
    return lists or bool(device.get("taints") or device.get("consumesCounters"))
