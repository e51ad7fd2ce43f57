"""ResourceClaims of resource.k8s.io/v1 as the API server sends them: strict parsing, and device status for writing.

A claim that cannot be parsed raises InputError naming the field; fields that the agent does not use are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from nodeagent.core.dra.pool import READY_CONDITION, REFUSED_CONDITION
from nodeagent.core.model.claim import Claim, ClaimRef, Opaque, Result
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError

POD_CLAIM_NAME = "resource.kubernetes.io/pod-claim-name"
"""Annotation of claims that the resource claim controller makes from a template: pod.spec.resourceClaims[].name."""
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class _Camel(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of structs with Kubernetes field names (camelCase). Unknown fields are ignored: a newer server sends
    more."""


class _Meta(_Camel, frozen=True):
    name: str
    namespace: str
    uid: str
    annotations: dict[str, Any] | None = None


class _Opaque(_Camel, frozen=True):
    driver: str
    parameters: dict[str, Any] = {}


class _Config(_Camel, frozen=True):
    source: str
    requests: tuple[str, ...] | None = None
    opaque: _Opaque | None = None


class _Result(_Camel, frozen=True):
    request: str
    driver: str
    pool: str
    device: str
    admin_access: bool | None = None
    share_id: str | None = msgspec.field(name="shareID", default=None)
    consumed_capacity: dict[str, str | int | float] | None = None


class _Devices(_Camel, frozen=True):
    results: tuple[_Result, ...] | None = None
    config: tuple[_Config, ...] | None = None


class _Allocation(_Camel, frozen=True):
    devices: _Devices = _Devices()


class _Consumer(_Camel, frozen=True):
    uid: str
    api_group: str = ""
    resource: str = ""
    name: str = ""


class _Status(_Camel, frozen=True):
    allocation: _Allocation | None = None
    reserved_for: tuple[_Consumer, ...] | None = None


class _ResourceClaim(_Camel, frozen=True):
    metadata: _Meta
    status: _Status | None = None


class _Condition(_Camel, frozen=True):
    type: str
    status: str = ""


class _Device(_Camel, frozen=True):
    """A device of an allocation, or of status.devices."""

    driver: str
    pool: str
    device: str
    share_id: str | None = msgspec.field(name="shareID", default=None)
    binding_conditions: tuple[str, ...] | None = None
    conditions: tuple[_Condition, ...] | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.driver, self.pool, self.device, self.share_id or ""

    @property
    def decided(self) -> bool:
        """Return whether its status is final for the scheduler."""
        final = (READY_CONDITION, REFUSED_CONDITION)
        return any(one.type in final and one.status == "True" for one in self.conditions or ())


class _AllocatedDevices(_Camel, frozen=True):
    results: tuple[_Device, ...] | None = None


class _Allocated(_Camel, frozen=True):
    devices: _AllocatedDevices = _AllocatedDevices()


class _AllocationStatus(_Camel, frozen=True):
    allocation: _Allocated | None = None
    devices: tuple[_Device, ...] | None = None


class _AllocatedClaim(_Camel, frozen=True):
    metadata: _Meta
    status: _AllocationStatus | None = None


class Allocated(NamedTuple):
    """Where a claim stands while its pod is being scheduled."""

    ref: ClaimRef
    here: bool
    """Whether a device of this driver on this node is allocated to it."""
    awaited: bool
    """Whether the scheduler waits for a condition of such a device."""


def read_allocated(document: Mapping[str, Any], driver: str, node_name: str) -> Allocated:
    """Return where the claim in a decoded JSON document stands. Raise InputError with the field and what was
    expected."""
    try:
        found = msgspec.convert(document, _AllocatedClaim)
    except msgspec.ValidationError as error:
        raise InputError(f"it cannot be read: {error}") from None
    status = found.status or _AllocationStatus()
    results = status.allocation.devices.results or () if status.allocation is not None else ()
    mine = [one for one in results if one.driver == driver and one.pool.startswith(f"{node_name}/")]
    decided = {one.key for one in status.devices or () if one.decided}
    return Allocated(
        ref=ClaimRef(namespace=found.metadata.namespace, name=found.metadata.name, uid=found.metadata.uid),
        here=bool(mine),
        awaited=any(one.binding_conditions and one.key not in decided for one in mine),
    )


def read(document: Mapping[str, Any], driver: str) -> Claim:
    """Return the claim in a decoded JSON document.

    `driver` is this driver's name: its domain prefix is removed from the names of consumed capacities. Raise InputError
    with the field and what was expected.
    """
    try:
        found = msgspec.convert(document, _ResourceClaim)
    except msgspec.ValidationError as error:
        raise InputError(f"it cannot be read: {error}") from None
    status = found.status or _Status()
    devices = status.allocation.devices if status.allocation is not None else _Devices()
    return Claim(
        ref=ClaimRef(namespace=found.metadata.namespace, name=found.metadata.name, uid=found.metadata.uid),
        allocated=status.allocation is not None,
        results=tuple(_result(i, one, driver) for i, one in enumerate(devices.results or ())),
        configs=tuple(_opaque(one) for one in devices.config or () if one.opaque is not None),
        reserved_for=tuple(one.uid for one in status.reserved_for or ()),
        groups=tuple(one.uid for one in status.reserved_for or () if one.api_group or one.resource != "pods"),
        pods=tuple(one.name for one in status.reserved_for or () if one.resource == "pods"),
        pod_claim=_pod_claim(found.metadata.annotations or {}),
    )


def _pod_claim(annotations: Mapping[str, Any]) -> str:
    """Return the pod's name of a claim that was made from a template, or "". Anyone may annotate a claim; what no pod
    can call a claim counts for nothing."""
    name = annotations.get(POD_CLAIM_NAME, "")
    return name if isinstance(name, str) and _LABEL.fullmatch(name) else ""


def _result(index: int, found: _Result, driver: str) -> Result:
    consumed = {}
    for name, amount in (found.consumed_capacity or {}).items() if found.driver == driver else ():
        try:
            consumed[name.removeprefix(f"{driver}/")] = parse_quantity(str(amount))
        except InputError as error:
            where = f"$.status.allocation.devices.results[{index}].consumedCapacity.{name}"
            raise InputError(f"{where}: {error}") from None
    return Result(
        request=found.request,
        driver=found.driver,
        pool=found.pool,
        device=found.device,
        share_id=found.share_id or "",
        admin=bool(found.admin_access),
        consumed=consumed,
    )


def _opaque(found: _Config) -> Opaque:
    assert found.opaque is not None
    return Opaque(
        source=found.source,
        driver=found.opaque.driver,
        requests=found.requests or (),
        parameters=found.opaque.parameters,
    )


# ---------------------------------------------------------------- status.devices


def device_status(ref: ClaimRef, devices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the body for a server-side apply of status.devices."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"namespace": ref.namespace, "name": ref.name, "uid": ref.uid},
        "status": {"devices": list(devices)},
    }


def one_status(
    result: Result,
    *,
    ready: bool,
    reason: str,
    message: str,
    at: str,
    data: Mapping[str, Any] = MappingProxyType({}),
    refused: bool = False,
) -> Any:
    """Return the AllocatedDeviceStatus of one device, with `at` in RFC 3339 as the conditions' transition time.

    refused: have the scheduler, which waits for the condition Ready, allocate another device.
    """
    shared = {"reason": reason, "message": message[:32768], "lastTransitionTime": at}
    conditions = [{"type": READY_CONDITION, "status": "True" if ready else "False", **shared}]
    if refused:
        conditions.append({"type": REFUSED_CONDITION, "status": "True", **shared})
    found: dict[str, Any] = {
        "driver": result.driver,
        "pool": result.pool,
        "device": result.device,
        "conditions": conditions,
        **data,
    }
    return {**found, "shareID": result.share_id} if result.share_id else found
