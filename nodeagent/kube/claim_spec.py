"""ResourceClaims, ResourceClaimTemplates and DeviceClasses as they are applied: what a claim asks for.

resource.k8s.io/v1, v1beta2 and v1beta1 are read. A field that is not known is an error with its path: what it
restricts would otherwise be promised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from nodeagent.core.advice.cel import Selector, parse
from nodeagent.core.advice.claim_spec import ClaimSpec, Constraint, DeviceAsk, Toleration
from nodeagent.core.model.claim import FROM_CLAIM, FROM_CLASS, Opaque
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError

GROUP = "resource.k8s.io"
CLAIM, TEMPLATE, CLASS = "ResourceClaim", "ResourceClaimTemplate", "DeviceClass"
KINDS = (CLAIM, TEMPLATE, CLASS)
Object = Mapping[str, Any]


class _Camel(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Base of structs with Kubernetes field names."""


class _Cel(_Camel, frozen=True):
    expression: str


class _Selector(_Camel, frozen=True):
    cel: _Cel


class _Toleration(_Camel, frozen=True):
    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: str = ""
    toleration_seconds: int | None = None


class _Capacity(_Camel, frozen=True):
    requests: dict[str, str | int] = {}


class _Ask(_Camel, frozen=True):
    device_class_name: str
    name: str = ""
    selectors: list[_Selector] = []
    allocation_mode: Literal["", "ExactCount", "All"] = ""
    count: int = 0
    admin_access: bool = False
    tolerations: list[_Toleration] = []
    capacity: _Capacity = _Capacity()


class _Request(_Camel, frozen=True):
    """A request of v1 and v1beta2, or of v1beta1, which has the fields of `exactly` itself."""

    name: str
    exactly: _Ask | None = None
    first_available: list[_Ask] = []
    device_class_name: str = ""
    selectors: list[_Selector] = []
    allocation_mode: Literal["", "ExactCount", "All"] = ""
    count: int = 0
    admin_access: bool = False
    tolerations: list[_Toleration] = []
    capacity: _Capacity = _Capacity()

    def asks(self) -> list[_Ask]:
        """Return the alternatives."""
        if self.exactly is not None:
            return [self.exactly]
        if self.first_available:
            return self.first_available
        inline = {name: getattr(self, name) for name in _Ask.__struct_fields__ if name != "name"}
        return [_Ask(**inline)]


class _Constraint(_Camel, frozen=True):
    requests: list[str] = []
    match_attribute: str = ""
    distinct_attribute: str = ""


class _Opaque(_Camel, frozen=True):
    driver: str
    parameters: dict[str, Any] = {}


class _Config(_Camel, frozen=True):
    requests: list[str] = []
    opaque: _Opaque | None = None


class _Devices(_Camel, frozen=True):
    requests: list[_Request] = []
    constraints: list[_Constraint] = []
    config: list[_Config] = []


class _Spec(_Camel, frozen=True):
    devices: _Devices = _Devices()


class _Template(_Camel, frozen=True):
    spec: _Spec
    metadata: dict[str, Any] = {}


class _ClassSpec(_Camel, frozen=True):
    selectors: list[_Selector] = []
    config: list[_Config] = []
    extended_resource_name: str = ""


def read_claim(documents: Sequence[Object]) -> ClaimSpec:
    """Return what the one claim or template among some objects asks for; the DeviceClasses among them are those that it
    may name. Raise InputError with the field that is wrong or not known."""
    claims = [one for one in documents if one["kind"] in (CLAIM, TEMPLATE)]
    if len(claims) != 1:
        raise InputError(f"cannot read a claim: {len(claims)} of kind {CLAIM} or {TEMPLATE}, expected one")
    classes = {
        _name(one): _convert(one, "$.spec", one.get("spec") or {}, _ClassSpec)
        for one in documents
        if one["kind"] == CLASS
    }
    found, spec = claims[0], claims[0].get("spec")
    if found["kind"] == TEMPLATE:
        devices = _convert(found, "$.spec", spec, _Template).spec.devices
    else:
        devices = _convert(found, "$.spec", spec, _Spec).devices
    if not devices.requests:
        raise InputError(f"cannot read {_title(found)}: it has no requests")
    return ClaimSpec(
        requests=tuple(tuple(_asks(one, classes)) for one in devices.requests),
        constraints=tuple(_constraint(found, one) for one in devices.constraints),
        configs=tuple(_opaque(one, FROM_CLAIM, tuple(one.requests)) for one in devices.config if one.opaque),
    )


def _convert(of: Object, path: str, value: Any, form: type[Any]) -> Any:
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        said = str(error).replace("`$", f"`{path}")
        raise InputError(f"cannot read {_title(of)}: {said}") from None


def _name(one: Object) -> str:
    metadata = one.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def _title(one: Object) -> str:
    return f"{one['kind']} {_name(one)}".rstrip()


def _asks(request: _Request, classes: Mapping[str, _ClassSpec]) -> Iterator[DeviceAsk]:
    for ask in request.asks():
        name = f"{request.name}/{ask.name}" if request.first_available else request.name
        known = classes.get(ask.device_class_name)
        if known is None:
            there = f"given are {', '.join(classes)}" if classes else "none is given"
            raise InputError(
                f'cannot read request "{name}": DeviceClass {ask.device_class_name!r} is not known, {there}; '
                "add what `kubectl get deviceclasses -o yaml` prints"
            )
        yield DeviceAsk(
            name=name,
            selectors=tuple(_selectors(name, [*known.selectors, *ask.selectors])),
            count=0 if ask.allocation_mode == "All" else ask.count or 1,
            admin=ask.admin_access,
            tolerations=tuple(_toleration(one) for one in ask.tolerations),
            capacity={key: parse_quantity(str(amount)) for key, amount in ask.capacity.requests.items()},
            configs=tuple(_opaque(one, FROM_CLASS, (name,)) for one in known.config if one.opaque),
        )


def _selectors(name: str, written: Iterable[_Selector]) -> Iterator[Selector]:
    for one in written:
        try:
            yield parse(one.cel.expression)
        except InputError as error:
            raise InputError(f'cannot read request "{name}": {error}') from None


def _toleration(one: _Toleration) -> Toleration:
    return Toleration(key=one.key, exists=one.operator == "Exists", value=one.value, effect=one.effect)


def _constraint(of: Object, one: _Constraint) -> Constraint:
    if bool(one.match_attribute) == bool(one.distinct_attribute):
        raise InputError(
            f"cannot read {_title(of)}: a constraint has neither or both of matchAttribute, distinctAttribute"
        )
    return Constraint(
        attribute=one.match_attribute or one.distinct_attribute,
        requests=tuple(one.requests),
        distinct=bool(one.distinct_attribute),
    )


def _opaque(one: _Config, source: str, requests: tuple[str, ...]) -> Opaque:
    assert one.opaque is not None
    return Opaque(source=source, driver=one.opaque.driver, requests=requests, parameters=one.opaque.parameters)
