"""Pods of any form for a node in the guest, and what the kernel shows of their control groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.e2e.kubeapi import IMAGE, Object, pod, until
from tests.vm.vmcluster import FIRST_LINE, STEP_S, Node
from tests.vm.vmpods import CPU, cpus

MERGE = "application/strategic-merge-patch+json"


def container(
    name: str,
    cpus: int = 0,
    *,
    ends: bool = False,
    limits: Mapping[str, str] | None = None,
    requests: Mapping[str, str] | None = None,
    **more: Any,
) -> Object:
    """A container that says on which CPUs it may run. cpus: exclusive ones, besides its limits and requests."""
    command = FIRST_LINE.partition(";")[0] if ends else FIRST_LINE
    every = {**({CPU: str(cpus)} if cpus else {}), **(limits or {})}
    resources: Object = {"limits": every} if every else {}
    if requests:
        resources["requests"] = dict(requests)
    found = {"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", command]}
    return {**found, "resources": resources, **more}


def document(name: str, *, init: tuple[Object, ...] = (), main: tuple[Object, ...], **spec: Any) -> Object:
    found = pod(name)
    found["spec"] |= {"initContainers": list(init), "containers": list(main), **spec}
    return found


def created(node: Node, name: str, *, init: tuple[Object, ...] = (), main: tuple[Object, ...], **spec: Any) -> None:
    """Create a pod and wait until it runs."""
    node.api.create(document(name, init=init, main=main, **spec))
    node.runs(name)


def first(node: Node, pod: str, container: str) -> set[int]:
    """On which CPUs a container may run when it begins."""
    said = node.guest.run(f"grep -h -m 1 Cpus_allowed_list /var/log/pods/*_{pod}*_*/{container}/*.log", until=True)
    return cpus(said.split()[-1])


def held(node: Node, pod: str) -> dict[str, set[int]]:
    """CPUs by the container that holds them."""
    found: dict[str, set[int]] = {}
    for one in json.loads(node.guest.run("nodeagent grants -o json")):
        if one["pod"] == pod:
            found.setdefault(one["container"], set()).update(cpus(one["cpus"]))
    return found


def of_claims(node: Node) -> dict[str, set[int]]:
    found = json.loads(node.guest.run("nodeagent grants -o json"))
    return {one["claim"]: cpus(one["cpus"]) for one in found if one["api"] == "claim"}


def gone(node: Node, *pods: str) -> None:
    for name in pods:
        node.delete_pod(name)
    until("nothing is held", lambda: not node.grants(), STEP_S)


def patched(node: Node, path: str, change: Mapping[str, Any]) -> None:
    node.api.call("PATCH", path, change, MERGE)


def of_container(node: Node, pod: str, *files: str) -> list[str]:
    """What is in files of the control group of a pod's container, each of one line."""
    return _read(node, f"$({node.scope(pod)})", files)


def of_pod(node: Node, pod: str, *files: str) -> list[str]:
    """What is in files of a pod's own control group."""
    return _read(node, f"$(dirname $({node.scope(pod)}))", files)


def _read(node: Node, folder: str, files: tuple[str, ...]) -> list[str]:
    return node.guest.run(f"cd {folder} && cat {' '.join(files)}").splitlines()
