"""Pods, and what has a pod's template, as they are applied: what their containers request of device plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nodeagent.core.advice.pod_forecast import ContainerDemand
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError

WITH_TEMPLATE = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "ReplicationController", "PodTemplate")
CRON_JOB = "CronJob"
KINDS = ("Pod", *WITH_TEMPLATE, CRON_JOB)
Object = Mapping[str, Any]


def pod_spec(one: Object) -> Object:
    """Return the spec of a pod, or of the pods of a workload. Raise InputError if there is none."""
    path = {
        CRON_JOB: ("spec", "jobTemplate", "spec", "template", "spec"),
        "Pod": ("spec",),
        "PodTemplate": ("template", "spec"),
    }
    found: Any = one
    for key in path.get(one["kind"], ("spec", "template", "spec")):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("containers"), list):
        raise InputError(f"cannot read {one['kind']}: it has no containers")
    return found


def demands(spec: Object) -> tuple[ContainerDemand, ...]:
    """Return what containers request, in kubelet's order: init containers first. Raise InputError with the container
    and the resource that are wrong."""
    init, apps = spec.get("initContainers") or [], spec["containers"]
    return (*(_demand(one, init=True) for one in init), *(_demand(one, init=False) for one in apps))


def _demand(container: Any, *, init: bool) -> ContainerDemand:
    if not isinstance(container, dict):
        raise InputError(f"cannot read container {container!r}: expected an object")
    name = str(container.get("name", ""))
    sidecar = init and container.get("restartPolicy") == "Always"
    return ContainerDemand(name=name, amounts=dict(_amounts(container, name)), init=init, sidecar=sidecar)


def _amounts(container: Object, name: str) -> Iterator[tuple[str, int]]:
    """Yield the extended resources that a container requests; what the node itself has (cpu, memory) has no domain."""
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for resource in sorted(name for name in {**requests, **limits} if "/" in name):
        want = {str(some[resource]) for some in (requests, limits) if resource in some}
        if len(want) > 1 or resource not in limits:
            raise InputError(
                f"cannot read container {name}: {resource} is requested with {' and '.join(sorted(want))}; "
                "the API server takes an extended resource only as a limit, with an equal request or none"
            )
        try:
            yield resource, parse_quantity(want.pop())
        except InputError as error:
            raise InputError(f"cannot read container {name}: {resource}: {error}") from None


def of_the_node(spec: Object) -> list[str]:
    """Return what containers request of the node itself and not of a device plugin: cpu, memory, pages."""
    found = set()
    for one in (*(spec.get("initContainers") or ()), *spec["containers"]):
        resources = one.get("resources") or {}
        found |= {name for part in ("requests", "limits") for name in resources.get(part) or {} if "/" not in name}
    return sorted(found)
