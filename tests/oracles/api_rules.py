"""What the real API server checks of a ResourceSlice and of a claim's device status (resource.k8s.io/v1, 1.36).

Types first: a wrong type or an unknown field is refused, as with strict field validation. Then the rules. Quantities
come back in canonical form, as the real server stores them: 1024Mi is 1Gi, 4000 is 4k.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import msgspec

LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{LABEL}(\.{LABEL})*")
_LABEL = re.compile(LABEL)
_DRIVER = re.compile(_SUBDOMAIN.pattern, re.IGNORECASE)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_PRERELEASE = r"(0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
_SEMVER = re.compile(
    r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)"
    rf"(-{_PRERELEASE}(\.{_PRERELEASE})*)?(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?"
)
_QUANTITY = re.compile(r"(?P<number>[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))(?P<suffix>Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]?)")
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
EFFECTS = ("None", "NoSchedule", "NoExecute")

Causes = Iterator[tuple[str, str, str]]
"""(field, reason, message) of each thing that is wrong."""


class Typed(msgspec.Struct, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    pass


class Pool(Typed, omit_defaults=False):
    name: str = ""
    generation: int = 0
    resource_slice_count: int = 0


class Attribute(Typed):
    int_: int | None = msgspec.field(name="int", default=None)
    bool_: bool | None = msgspec.field(name="bool", default=None)
    string: str | None = None
    version: str | None = None
    ints: list[int] | None = None
    bools: list[bool] | None = None
    strings: list[str] | None = None
    versions: list[str] | None = None


class Range(Typed):
    min: str | int | None = None
    max: str | int | None = None
    step: str | int | None = None


class Policy(Typed):
    default: str | int | None = None
    valid_values: list[str | int] | None = None
    valid_range: Range | None = None


class DeviceCapacity(Typed):
    value: str | int
    request_policy: Policy | None = None


class Counter(Typed):
    value: str | int


class CounterSet(Typed):
    name: str = ""
    counters: dict[str, Counter] = {}


class Consumption(Typed):
    counter_set: str = ""
    counters: dict[str, Counter] = {}


class Taint(Typed):
    key: str = ""
    value: str = ""
    effect: str = ""
    time_added: str | None = None


class Mapping_(Typed):  # noqa: N801
    capacity_key: str | None = None
    capacity_multiplier: str | int | None = None
    device_multiplier: str | int | None = None


class Overhead(Typed):
    per_pod: str | int | None = None
    per_container: str | int | None = None


class NodeResource(Typed):
    mapping: Mapping_ | None = None
    overhead: Overhead | None = None


class Device(Typed):
    name: str = ""
    attributes: dict[str, Attribute] | None = None
    capacity: dict[str, DeviceCapacity] | None = None
    consumes_counters: list[Consumption] | None = None
    node_name: str | None = None
    node_selector: dict[str, Any] | None = None
    all_nodes: bool | None = None
    taints: list[Taint] | None = None
    binds_to_node: bool | None = None
    binding_conditions: list[str] | None = None
    binding_failure_conditions: list[str] | None = None
    allow_multiple_allocations: bool | None = None
    node_allocatable_resources: dict[str, NodeResource] | None = None


class SliceSpec(Typed):
    driver: str = ""
    pool: Pool = msgspec.field(default_factory=Pool)
    node_name: str | None = None
    node_selector: dict[str, Any] | None = None
    all_nodes: bool | None = None
    devices: list[Device] | None = None
    per_device_node_selection: bool | None = None
    shared_counters: list[CounterSet] | None = None


class Condition(Typed):
    type: str = ""
    status: str = ""
    observed_generation: int | None = None
    last_transition_time: str | None = None
    reason: str = ""
    message: str = ""


class NetworkData(Typed):
    interface_name: str = ""
    ips: list[str] | None = None
    hardware_address: str = ""


class DeviceStatus(Typed):
    driver: str = ""
    pool: str = ""
    device: str = ""
    share_id: str | None = msgspec.field(name="shareID", default=None)
    conditions: list[Condition] | None = None
    data: dict[str, Any] | None = None
    network_data: NetworkData | None = None


# Quantities


def quantity(text: str | int) -> Fraction:
    """The amount; ValueError where it is none (apimachinery, resource.Quantity)."""
    found = _QUANTITY.fullmatch(str(text))
    if found is None:
        raise ValueError(f"quantities must match the regular expression, got {text!r}")
    suffix = found["suffix"]
    scale = Fraction(1024) ** _BINARY[suffix] if suffix in _BINARY else Fraction(1000) ** _DECIMAL[suffix]
    return Fraction(found["number"]) * scale


def canonical(text: str | int) -> str:
    """As the server writes it: the largest unit of the same family that leaves a whole number."""
    amount = quantity(text)
    if str(text)[-1:] == "i" and abs(amount) >= 1024:
        return _largest(amount, Fraction(1024), _BINARY)
    return _largest(amount, Fraction(1000), _DECIMAL)


def _largest(amount: Fraction, base: Fraction, units: Mapping[str, int]) -> str:
    if not amount:
        return "0"
    ordered = sorted({"": 0, **units}.items(), key=lambda item: -item[1])
    for unit, power in ordered:
        if (scaled := amount / base**power).denominator == 1:
            return f"{scaled.numerator}{unit}"
    return f"{-(-amount // base ** ordered[-1][1])}{ordered[-1][0]}"


# A ResourceSlice


def read_slice(spec: Any) -> SliceSpec:
    """The typed spec with canonical quantities; ValueError with the path where it cannot be decoded."""
    found = msgspec.convert(spec, SliceSpec)
    for device in found.devices or ():
        for capacity in (device.capacity or {}).values():
            capacity.value = canonical(capacity.value)
            if policy := capacity.request_policy:
                _canonical_policy(policy)
        for consumption in device.consumes_counters or ():
            _canonical_counters(consumption.counters)
        for cost in (device.node_allocatable_resources or {}).values():
            _canonical_fields(cost.mapping, "capacity_multiplier", "device_multiplier")
            _canonical_fields(cost.overhead, "per_pod", "per_container")
    for one in found.shared_counters or ():
        _canonical_counters(one.counters)
    return found


def _canonical_policy(policy: Policy) -> None:
    if policy.default is not None:
        policy.default = canonical(policy.default)
    if policy.valid_values is not None:
        policy.valid_values = [canonical(one) for one in policy.valid_values]
    _canonical_fields(policy.valid_range, "min", "max", "step")


def _canonical_fields(part: Typed | None, *names: str) -> None:
    for name in names if part is not None else ():
        if (value := getattr(part, name)) is not None:
            setattr(part, name, canonical(value))


def _canonical_counters(counters: dict[str, Counter]) -> None:
    for one in counters.values():
        one.value = canonical(one.value)


def wrong_with_slice(spec: SliceSpec, before: SliceSpec | None) -> Causes:
    yield from _driver(spec.driver, "spec.driver")
    yield from _pool(spec.pool)
    if before is not None:
        pairs = (
            ("spec.pool.name", spec.pool.name, before.pool.name),
            ("spec.driver", spec.driver, before.driver),
            ("spec.nodeName", spec.node_name, before.node_name),
        )
        yield from (_invalid(path, new, "field is immutable") for path, new, old in pairs if new != old)
    yield from _selection(spec)
    if spec.shared_counters is not None and spec.devices is not None:
        yield _invalid("spec", "", "only one of `sharedCounters` or `devices` is allowed")
    yield from _devices(spec)
    yield from _counter_sets(spec.shared_counters or [])


def _selection(spec: SliceSpec) -> Causes:
    if spec.node_name is not None:
        yield from _subdomain(spec.node_name, "spec.nodeName")
    for path, flag in (("allNodes", spec.all_nodes), ("perDeviceNodeSelection", spec.per_device_node_selection)):
        if flag is False:
            yield _invalid(f"spec.{path}", flag, "must be either unset or set to true")
    chosen = [spec.node_name, spec.node_selector, spec.all_nodes, spec.per_device_node_selection]
    if sum(1 for one in chosen if one) != 1:
        text = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required"
        yield ("spec", "FieldValueRequired", text)


def _pool(pool: Pool) -> Causes:
    yield from _pool_name(pool.name, "spec.pool.name")
    if pool.resource_slice_count <= 0:
        yield _invalid("spec.pool.resourceSliceCount", pool.resource_slice_count, "must be greater than zero")
    if pool.generation < 0:
        yield _invalid("spec.pool.generation", pool.generation, "must be greater than or equal to zero")


def _pool_name(name: str, path: str) -> Causes:
    if not name:
        yield (path, "FieldValueRequired", "Required value")
        return
    if len(name) > 253:
        yield (path, "FieldValueTooLong", "Too long: may not be more than 253 bytes")
    for part in name.split("/"):
        yield from _subdomain(part, path)


def _devices(spec: SliceSpec) -> Causes:
    devices = spec.devices or []
    lists = any(a.ints or a.bools or a.strings or a.versions for d in devices for a in (d.attributes or {}).values())
    advanced = lists or any(one.taints or one.consumes_counters for one in devices)
    most = 64 if advanced else 128
    if len(devices) > most:
        yield _too_many("spec.devices", len(devices), most)
        return
    for index, device in enumerate(devices):
        yield from _device(device, f"spec.devices[{index}]", bool(spec.per_device_node_selection))
    yield from _duplicates([one.name for one in devices], "spec.devices")


def _device(device: Device, path: str, selects: bool) -> Causes:
    yield from _label(device.name, f"{path}.name")
    attributes, capacity = device.attributes or {}, device.capacity or {}
    if (total := len(attributes) + len(capacity)) > 32:
        yield _invalid(path, total, "the total number of attributes and capacities must not exceed 32")
    if (values := sum(_count(one) for one in attributes.values())) > 48:
        yield _invalid(path, values, "the total number of attribute values must not exceed 48")
    for name, attribute in attributes.items():
        yield from _qualified(name, f"{path}.attributes")
        yield from _attribute(attribute, f"{path}.attributes[{name}]")
    for name, amount in capacity.items():
        yield from _qualified(name, f"{path}.capacity")
        yield from _capacity(amount, bool(device.allow_multiple_allocations), f"{path}.capacity[{name}]")
    yield from _taints(device.taints or [], f"{path}.taints")
    yield from _consumptions(device.consumes_counters or [], f"{path}.consumesCounters")
    if not selects and not (device.node_name is device.node_selector is device.all_nodes is None):
        yield _invalid(path, "", "`nodeName`, `nodeSelector` and `allNodes` need `perDeviceNodeSelection`")
    yield from _bindings(device, path)
    for resource, cost in (device.node_allocatable_resources or {}).items():
        yield from _node_resource(resource, cost, capacity, f"{path}.nodeAllocatableResources[{resource}]")


def _node_resource(resource: str, cost: NodeResource, capacity: Mapping[str, Any], path: str) -> Causes:
    """pkg/apis/resource/validation, and the declared union of the two forms of a mapping (Kubernetes 1.37.2)."""
    if not (resource in ("cpu", "memory") or resource.startswith("hugepages-")):
        yield _invalid(path, resource, "must be a node allocatable resource name")
    if cost.mapping is None and cost.overhead is None:
        yield (path, "FieldValueRequired", "Required value: at least one of mapping or overhead must be set")
    if cost.mapping is not None:
        yield from _node_mapping(cost.mapping, capacity, f"{path}.mapping")
    if (overhead := cost.overhead) is not None:
        if overhead.per_pod is None and overhead.per_container is None:
            yield _invalid(f"{path}.overhead", "", "at least one of perPod or perContainer must be set")
        for one in (overhead.per_pod, overhead.per_container):
            if one is not None and quantity(one) < 0:
                yield _invalid(f"{path}.overhead", one, "must be non-negative")


def _node_mapping(mapping: Mapping_, capacity: Mapping[str, Any], path: str) -> Causes:
    key, per_unit, per_device = mapping.capacity_key, mapping.capacity_multiplier, mapping.device_multiplier
    if (key is None) == (per_device is None):
        yield _invalid(path, mapping, "must specify one of: `capacityKey`, `deviceMultiplier`")
    if key is not None and key not in capacity:
        yield (f"{path}.capacityKey", "FieldValueNotFound", f"Not found: {key!r}")
    if (key is None) != (per_unit is None):
        missing = "capacityKey" if key is None else "capacityMultiplier"
        yield (f"{path}.{missing}", "FieldValueRequired", f"Required value: {missing} is required")
    for one in (per_unit, per_device):
        if one is not None and quantity(one) <= 0:
            yield _invalid(path, one, "must be positive")


def _count(attribute: Attribute) -> int:
    lists = (attribute.ints, attribute.bools, attribute.strings, attribute.versions)
    return sum(len(one) for one in lists if one) or 1


def _attribute(attribute: Attribute, path: str) -> Causes:
    given = [value for name in attribute.__struct_fields__ if (value := getattr(attribute, name)) is not None]
    if len(given) != 1:
        yield _invalid(path, "", "exactly one value must be specified")
    if any(one == [] for one in given):
        yield _invalid(path, "[]", "must not be empty if specified")
    for text in (attribute.string, attribute.version, *(attribute.strings or ()), *(attribute.versions or ())):
        if text is not None and len(text.encode()) > 64:
            yield (path, "FieldValueTooLong", "Too long: may not be more than 64 bytes")
    for version in (attribute.version, *(attribute.versions or ())):
        if version is not None and not _SEMVER.fullmatch(version):
            yield _invalid(path, version, "must be a string compatible with semver.org spec 2.0.0")


def _capacity(capacity: DeviceCapacity, shared: bool, path: str) -> Causes:
    policy, path = capacity.request_policy, f"{path}.requestPolicy"
    if policy is None:
        return
    if not shared:
        yield (path, "FieldValueForbidden", "Forbidden: allowMultipleAllocations must be true")
    elif policy.valid_values and policy.valid_range:
        yield (path, "FieldValueForbidden", "Forbidden: exactly one policy can be specified")
    elif (policy.valid_values or policy.valid_range) and policy.default is None:
        yield (f"{path}.default", "FieldValueRequired", "Required value")
    elif policy.valid_values and policy.default is not None:
        values = [quantity(one) for one in policy.valid_values]
        yield from _values(quantity(capacity.value), quantity(policy.default), values, f"{path}.validValues")
    elif policy.valid_range and policy.default is not None:
        yield from _range(quantity(capacity.value), quantity(policy.default), policy.valid_range, f"{path}.validRange")


def _values(value: Fraction, default: Fraction, options: list[Fraction], path: str) -> Causes:
    if len(options) > 10:
        yield _too_many(path, len(options), 10)
    if options != sorted(options):
        yield _invalid(path, options, "values must be sorted in ascending order")
    if any(one > value for one in options):
        yield _invalid(path, options, "option is larger than capacity value")
    if default not in options:
        yield _invalid(path, default, "default value is not valid according to the requestPolicy")
    yield from _duplicates([str(one) for one in options], path)


def _range(value: Fraction, default: Fraction, limits: Range, path: str) -> Causes:
    if limits.min is None:
        yield (f"{path}.min", "FieldValueRequired", "Required value")
        return
    least = quantity(limits.min)
    if least > value:
        yield _invalid(f"{path}.min", least, "min is larger than capacity value")
    if default < least:
        yield _invalid(f"{path}.min", default, "default is less than min")
    most = quantity(limits.max) if limits.max is not None else None
    if most is not None:
        checks = ((least > most, "min is larger than max"), (most > value, "max is larger than capacity value"))
        yield from (_invalid(f"{path}.max", most, text) for wrong, text in checks if wrong)
        if default > most:
            yield _invalid(f"{path}.max", default, "default is more than max")
    if limits.step is not None:
        yield from _step(value, [default] if most is None else [default, most], least, quantity(limits.step), path)


def _step(value: Fraction, aligned: list[Fraction], least: Fraction, step: Fraction, path: str) -> Causes:
    if step <= 0:
        yield _invalid(f"{path}.step", step, "the real server divides by this")
        return
    if least + step > value:
        yield _invalid(f"{path}.step", step, "one step is larger than capacity value")
    for one in aligned:
        if (one - least) % step:
            yield _invalid(f"{path}.step", one, "value is not a multiple of a given step")


def _taints(taints: list[Taint], path: str) -> Causes:
    if len(taints) > 16:
        yield _too_many(path, len(taints), 16)
        return
    for index, taint in enumerate(taints):
        yield from _label_name(taint.key, f"{path}[{index}].key")
        if taint.value and not _NAME.fullmatch(taint.value):
            yield _invalid(f"{path}[{index}].value", taint.value, "a valid label must be an empty string or …")
        if taint.effect not in EFFECTS:
            reason = "FieldValueNotSupported" if taint.effect else "FieldValueRequired"
            yield (f"{path}[{index}].effect", reason, f"Unsupported value: {taint.effect!r}")


def _consumptions(consumptions: list[Consumption], path: str) -> Causes:
    if len(consumptions) > 2:
        yield _too_many(path, len(consumptions), 2)
        return
    for index, one in enumerate(consumptions):
        yield from _label(one.counter_set, f"{path}[{index}].counterSet")
        yield from _counters(one.counters, f"{path}[{index}].counters")
    yield from _duplicates([one.counter_set for one in consumptions], path)


def _counter_sets(sets: list[CounterSet]) -> Causes:
    if len(sets) > 8:
        yield _too_many("spec.sharedCounters", len(sets), 8)
        return
    for index, one in enumerate(sets):
        yield from _label(one.name, f"spec.sharedCounters[{index}].name")
        yield from _counters(one.counters, f"spec.sharedCounters[{index}].counters")
    yield from _duplicates([one.name for one in sets], "spec.sharedCounters")


def _counters(counters: Mapping[str, Counter], path: str) -> Causes:
    if not counters:
        yield (path, "FieldValueRequired", "Required value")
    if len(counters) > 32:
        yield _too_many(path, len(counters), 32)
        return
    for name in counters:
        yield from _label(name, path)


def _bindings(device: Device, path: str) -> Causes:
    conditions, failures = device.binding_conditions or [], device.binding_failure_conditions or []
    for name, given in (("bindingConditions", conditions), ("bindingFailureConditions", failures)):
        if len(given) > 4:
            yield _too_many(f"{path}.{name}", len(given), 4)
        for one in given:
            yield from _label_name(one, f"{path}.{name}")
    if bool(conditions) != bool(failures):
        yield _invalid(path, "", "bindingConditions and bindingFailureConditions need each other")
    yield from _duplicates([*conditions, *failures], path)


# A claim's status.devices


def wrong_with_statuses(devices: Iterable[DeviceStatus], allocated: set[tuple[str, ...]]) -> Causes:
    """`allocated`: (driver, pool, device, share id) of each device of the claim."""
    seen = []
    for index, device in enumerate(devices):
        path = f"status.devices[{index}]"
        key = (device.driver, device.pool, device.device, device.share_id or "")
        seen.append("/".join(key))
        yield from _driver(device.driver, f"{path}.driver")
        yield from _pool_name(device.pool, f"{path}.pool")
        yield from _label(device.device, f"{path}.device")
        if device.share_id is not None and not _is_uid(device.share_id):
            yield _invalid(f"{path}.shareID", device.share_id, "uid must be in RFC 4122 normalized form")
        if key not in allocated:
            yield _invalid(path, "/".join(key), "must be an allocated device in the claim")
        yield from _conditions(device.conditions or [], f"{path}.conditions")
        if len(msgspec.json.encode(device.data)) > 10240:
            yield (f"{path}.data", "FieldValueTooLong", "Too long: may not be more than 10240 bytes")
        if device.network_data is not None:
            yield from _network(device.network_data, f"{path}.networkData")
    yield from _duplicates(seen, "status.devices")


def _conditions(conditions: list[Condition], path: str) -> Causes:
    if len(conditions) > 8:
        yield _too_many(path, len(conditions), 8)
    for index, one in enumerate(conditions):
        yield from _label_name(one.type, f"{path}[{index}].type")
        if one.status not in ("True", "False", "Unknown"):
            yield (f"{path}[{index}].status", "FieldValueNotSupported", f"Unsupported value: {one.status!r}")
        if not one.last_transition_time:
            yield (f"{path}[{index}].lastTransitionTime", "FieldValueRequired", "Required value: must be set")
        if not _REASON.fullmatch(one.reason):
            yield _invalid(f"{path}[{index}].reason", one.reason, "a condition reason must start with alphabetic …")
    yield from _duplicates([one.type for one in conditions], path)


def _network(data: NetworkData, path: str) -> Causes:
    limits = (("interfaceName", data.interface_name, 256), ("hardwareAddress", data.hardware_address, 128))
    for name, text, most in limits:
        if len(text) > most:
            yield (f"{path}.{name}", "FieldValueTooLong", f"Too long: may not be more than {most} bytes")
    if len(data.ips or ()) > 16:
        yield _too_many(f"{path}.ips", len(data.ips or ()), 16)
    for ip in data.ips or ():
        try:
            assert "/" in ip
            ipaddress.ip_interface(ip)
        except (ValueError, AssertionError):
            yield _invalid(f"{path}.ips", ip, "must be a valid address in CIDR form")
    yield from _duplicates(list(data.ips or ()), f"{path}.ips")


# Names


def _invalid(path: str, value: Any, why: str) -> tuple[str, str, str]:
    return path, "FieldValueInvalid", f"Invalid value: {str(value)!r}: {why}"


def _too_many(path: str, count: int, most: int) -> tuple[str, str, str]:
    return path, "FieldValueTooMany", f"Too many: {count}: must have at most {most} items"


def _duplicates(names: list[str], path: str) -> Causes:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"{path}[{index}]", "FieldValueDuplicate", f"Duplicate value: {name!r}"


def _subdomain(name: str, path: str) -> Causes:
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        yield _invalid(path, name, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters")


def _label(name: str, path: str) -> Causes:
    if not name:
        yield (path, "FieldValueRequired", "Required value")
    elif len(name) > 63 or not _LABEL.fullmatch(name):
        yield _invalid(path, name, "a lowercase RFC 1123 label must consist of lower case alphanumeric characters")


def _driver(name: str, path: str) -> Causes:
    if not name:
        yield (path, "FieldValueRequired", "Required value")
    elif len(name) > 63:
        yield (path, "FieldValueTooLong", "Too long: may not be more than 63 bytes")
    elif not _DRIVER.fullmatch(name):
        yield _invalid(path, name, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters")


def _qualified(name: str, path: str) -> Causes:
    domain, slash, identifier = name.rpartition("/")
    if slash:
        yield from _driver(domain, path)
    if len(identifier) > 32:
        yield (path, "FieldValueTooLong", "Too long: may not be more than 32 bytes")
    if not _IDENTIFIER.fullmatch(identifier):
        yield _invalid(path, identifier, "a valid C identifier must start with alphabetic character or '_'")


def _label_name(name: str, path: str) -> Causes:
    domain, slash, rest = name.rpartition("/")
    if slash:
        yield from _subdomain(domain, path)
    if not _NAME.fullmatch(rest):
        yield _invalid(path, name, "name part must consist of alphanumeric characters, '-', '_' or '.'")


def _is_uid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


# ---------------------------------------------------------------- Events

_EVENT_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_QUALIFIED = re.compile(rf"({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?")
_EVENT_PARTS = {
    "apiVersion",
    "kind",
    "metadata",
    "eventTime",
    "reportingInstance",
    "action",
    "reason",
    "related",
    "series",
    "type",
}


def wrong_with_event(event: Mapping[str, Any], *, core: bool = False) -> Causes:
    """What a new Event must have; that of an object without a namespace lies in `default`. core: of the core group."""
    regarding, note = ("involvedObject", "message") if core else ("regarding", "note")
    controller = "reportingComponent" if core else "reportingController"
    for part in event.keys() - _EVENT_PARTS - {regarding, note, controller}:
        yield part, "FieldValueForbidden", "Forbidden: deprecated or unknown"
    if not _EVENT_TIME.fullmatch(event.get("eventTime", "")):
        yield "eventTime", "FieldValueRequired", "Required value"
    if not _QUALIFIED.fullmatch(event.get(controller, "")):
        yield controller, "FieldValueInvalid", "name part must consist of alphanumeric characters"
    for part in ("reportingInstance", "action", "reason"):
        if not 0 < len(event.get(part, "").encode()) <= 128:
            yield part, "FieldValueInvalid", "can have at most 128 characters, and must have some"
    if len(event.get(note, "").encode()) > 1024:
        yield note, "FieldValueInvalid", "can have at most 1024 characters"
    series = event.get("series")
    if series is not None and series.get("count", 0) < 2:
        yield "series.count", "FieldValueInvalid", "Invalid value: should be at least 2"
    if series is not None and not _EVENT_TIME.fullmatch(series.get("lastObservedTime", "")):
        yield "series.lastObservedTime", "FieldValueRequired", "Required value"
    if event.get("type") not in ("Normal", "Warning"):
        yield "type", "FieldValueInvalid", "Invalid value"
    namespace = event.get(regarding, {}).get("namespace", "")
    if event["metadata"].get("namespace", "") not in ((namespace,) if namespace else ("default", "kube-system")):
        yield "involvedObject.namespace", "FieldValueInvalid", "does not match event.namespace"
