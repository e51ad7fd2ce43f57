"""Device metadata in Kubernetes' own format: one file for each request of a claim, at the place where applications of
every DRA driver look for it.

Source: k8s.io/dynamic-resource-allocation/api/metadata 0.36 to 0.38 (KEP-5304). A file is a stream of JSON objects with
the same content, the newest version first; a reader takes the first one that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from nodeagent.core.dra.attributes import NO_ATTRIBUTES, attributes_of
from nodeagent.core.dra.interfaces import network_data
from nodeagent.core.dra.pool import Value
from nodeagent.core.model.claim import Result
from nodeagent.core.model.device import Mount
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.kube.resourceslice.render import attribute
from nodeagent.kube.resourceslice.validate import LONGEST_TEXT_BYTES, MOST_ATTRIBUTES_AND_CAPACITIES
from nodeagent.resources.catalog import Dra

VERSIONS = ("metadata.resource.k8s.io/v1beta1", "metadata.resource.k8s.io/v1alpha1")
FOLDER = "/var/run/kubernetes.io/dra-device-attributes"
GRANTED_CPUS, GRANTED_BYTES = "grantedCpus", "grantedBytes"
"""Attributes that are not published: what a claim was granted of a device that it shares with others."""


def streams(dra: Dra, inventory: Inventory, grants: Sequence[Grant], pod_claim: str) -> dict[str, list[Any]]:
    """Return the objects of each file of a claim, by base request.

    `pod_claim` is the pod's name of a claim that was made from a template, or "".
    """
    return {
        request: [_document(version, dra, inventory, some, pod_claim) for version in VERSIONS]
        for request, some in by_request(grants).items()
        if request
    }


def by_request(grants: Sequence[Grant]) -> dict[str, list[Grant]]:
    """Return the grants of each request, by the name that containers use: of a subrequest, that of the request it is an
    alternative of. A claim is never allocated two alternatives of one request. Grants that do not record what was
    allocated are under ""."""
    found: dict[str, list[Grant]] = {}
    for grant in grants:
        request = grant.result.request.partition("/")[0] if grant.result is not None else ""
        found.setdefault(request, []).append(grant)
    return found


def mounts(paths: Mapping[str, str], driver: str, claim: str, pod_claim: str) -> dict[str, Mount]:
    """Return the mount of each request's file, given the files' paths on the host: single read-only files, as the
    folders belong to all drivers."""
    parent = f"{FOLDER}/resourceclaimtemplates/{pod_claim}" if pod_claim else f"{FOLDER}/resourceclaims/{claim}"
    return {
        request: Mount(host_path=path, container_path=f"{parent}/{request}/{driver}-metadata.json")
        for request, path in paths.items()
    }


def _document(version: str, dra: Dra, inventory: Inventory, grants: Sequence[Grant], pod_claim: str) -> dict[str, Any]:
    devices = [_device(dra, inventory, grant, grant.result) for grant in grants if grant.result is not None]
    request = grants[0].result.request if grants[0].result is not None else ""
    return {
        "apiVersion": version,
        "kind": "DeviceMetadata",
        "metadata": _object_meta(grants[0].holder),
        **({"podClaimName": pod_claim} if pod_claim else {}),
        "requests": [{"name": request, "devices": devices}],
    }


def _object_meta(holder: Holder) -> dict[str, Any]:
    """Return the claim's names. A container sees one version of its file, so the generation is always the first."""
    return {"name": holder.claim, "namespace": holder.namespace, "uid": holder.uid, "generation": 1}


def _device(dra: Dra, inventory: Inventory, grant: Grant, result: Result) -> dict[str, Any]:
    attributes = {**_granted(grant), **_published(dra, inventory, result)}
    few = islice(attributes.items(), MOST_ATTRIBUTES_AND_CAPACITIES)
    network = network_data(inventory, grant)
    return {
        "driver": result.driver,
        "pool": result.pool,
        "name": result.device,
        "attributes": {name: attribute(value) for name, value in few},
        **({"networkData": network} if network else {}),
    }


def _published(dra: Dra, inventory: Inventory, result: Result) -> Mapping[str, Value]:
    kind = dra.catalog.kinds.get(result.pool.rpartition("/")[2])
    return attributes_of(kind, inventory, result.device) if kind is not None else NO_ATTRIBUTES


def _granted(grant: Grant) -> dict[str, Value]:
    """Return what was granted as attributes, without a list of CPUs that is longer than an attribute may be."""
    size = sum(one.pages * one.page_bytes for one in grant.hugepages) + sum(size for _, size in grant.memory)
    cpus = str(grant.cpus)
    found: dict[str, Value] = {GRANTED_CPUS: cpus} if cpus and len(cpus) <= LONGEST_TEXT_BYTES else {}
    return {**found, GRANTED_BYTES: size} if size else found
