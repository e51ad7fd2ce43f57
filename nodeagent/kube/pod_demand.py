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
LONGEST_SHOWN = 60


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
    init, apps = _init_containers(spec), spec["containers"]
    return (*(_demand(one, init=True) for one in init), *(_demand(one, init=False) for one in apps))


def _init_containers(spec: Object) -> list[Any]:
    found = spec.get("initContainers") or []
    if not isinstance(found, list):
        raise InputError(f"cannot read initContainers: {_shown(found)}, expected a list")
    return found


def _mapping(parent: Object, key: str, name: str) -> Object:
    """Return an object below another one, empty if there is none. Raise InputError, naming the container."""
    found = parent.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"cannot read container {name}: {key} is {_shown(found)}, expected an object")
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _demand(container: Any, *, init: bool) -> ContainerDemand:
    if not isinstance(container, dict):
        raise InputError(f"cannot read container {_shown(container)}: expected an object")
    name = str(container.get("name", ""))
    sidecar = init and container.get("restartPolicy") == "Always"
    return ContainerDemand(name=name, amounts=dict(_amounts(container, name)), init=init, sidecar=sidecar)


def _amounts(container: Object, name: str) -> Iterator[tuple[str, int]]:
    """Yield the extended resources that a container requests; what the node itself has (cpu, memory) has no domain."""
    resources = _mapping(container, "resources", name)
    requests, limits = (_mapping(resources, key, name) for key in ("requests", "limits"))
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
    """Return what containers request of the node itself and not of a device plugin: cpu, memory, pages.

    Raise InputError as `demands` does."""
    found = set()
    for one in (*_init_containers(spec), *spec["containers"]):
        resources = _mapping(one, "resources", str(one.get("name", "")))
        parts = (_mapping(resources, key, str(one.get("name", ""))) for key in ("requests", "limits"))
        found |= {name for part in parts for name in part if "/" not in name}
    return sorted(found)
