"""How applications read device metadata: the first object of a stream that they know, checked as upstream checks it.

Facts: k8s.io/dynamic-resource-allocation 0.37.2, devicemetadata and api/metadata: readers skip versions that they do
not know, and any other fault is final; where a file lies in a container; the rules of every field.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from tests.oracles import api_rules

FOLDER = "/var/run/kubernetes.io/dra-device-attributes"
KNOWN = ("metadata.resource.k8s.io/v1beta1", "metadata.resource.k8s.io/v1alpha1")


class ObjectMeta(api_rules.Typed):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    generation: int = 0


class Device(api_rules.Typed):
    driver: str = ""
    pool: str = ""
    name: str = ""
    attributes: dict[str, api_rules.Attribute] | None = None
    network_data: api_rules.NetworkData | None = None


class Request(api_rules.Typed):
    name: str = ""
    devices: list[Device] | None = None


class DeviceMetadata(api_rules.Typed):
    api_version: str
    kind: str
    metadata: ObjectMeta
    pod_claim_name: str | None = None
    requests: list[Request] | None = None


def claim_path(driver: str, claim: str, request: str) -> str:
    return f"{FOLDER}/resourceclaims/{claim}/{request}/{driver}-metadata.json"


def template_path(driver: str, pod_claim: str, request: str) -> str:
    return f"{FOLDER}/resourceclaimtemplates/{pod_claim}/{request}/{driver}-metadata.json"


def objects(stream: bytes) -> list[dict[str, Any]]:
    """Every object of a stream."""
    text, found, at = stream.decode(), [], 0
    while at < len(text.rstrip()):
        one, end = json.JSONDecoder().raw_decode(text[at:])
        found.append(one)
        at += end
        while text[at : at + 1].isspace():
            at += 1
    return found


def read(stream: bytes, known: tuple[str, ...] = KNOWN) -> DeviceMetadata:
    """The first object of a version that this reader knows, without a fault; ValueError."""
    for one in objects(stream):
        if one["apiVersion"] in known:
            found = msgspec.convert(one, DeviceMetadata)
            if wrong := [*_wrong(found)]:
                raise ValueError(wrong)
            return found
    raise ValueError("no compatible metadata version found in stream")


def _wrong(found: DeviceMetadata) -> api_rules.Causes:
    if found.kind != "DeviceMetadata":
        yield "kind", "FieldValueInvalid", found.kind
    if found.pod_claim_name is not None:
        yield from api_rules._label(found.pod_claim_name, "podClaimName")
    for request in found.requests or ():
        if not request.name:
            yield "requests.name", "FieldValueRequired", ""
        for device in request.devices or ():
            yield from _wrong_with_device(device)


def _wrong_with_device(device: Device) -> api_rules.Causes:
    yield from api_rules._driver(device.driver, "driver")
    yield from api_rules._pool_name(device.pool, "pool")
    yield from api_rules._label(device.name, "name")
    if len(device.attributes or {}) > 32:
        yield "attributes", "FieldValueTooMany", str(len(device.attributes or {}))
    for name, attribute in (device.attributes or {}).items():
        yield from api_rules._qualified(name, f"attributes[{name}]")
        yield from api_rules._attribute(attribute, f"attributes[{name}]")
    if device.network_data is not None:
        yield from api_rules._network(device.network_data, "networkData")
