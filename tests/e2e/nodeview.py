"""The node as tests use it: started once for a file, clean after each test; what can be asked of it, in a few words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, cluster
from tests.e2e.kubeapi import DRA, Object, claim_path, pod, pod_path, until
from tests.e2e.nodefiles import DRIVER, NODE

NUMA = "resource.kubernetes.io/numaNode"
HELD, UNHEALTHY = f"{DRIVER}/held-by-device-plugin", f"{DRIVER}/unhealthy"
XID_GPU, DIVIDED_GPU = "0000:3b:00.0", "0000:bb:00.0"
"""Those that the double of libnvidia-ml reports an Xid of, and divides into two instances."""


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Started once. Whatever the tests did, the agent never met anything unexpected."""
    with cluster(request.module.__name__) as made:
        yield made
        for log in made.logs.glob("nodeagent*.log"):
            assert "Traceback" not in log.read_text(), made.last_words()


@pytest.fixture
def node(started: Cluster) -> Iterator[Cluster]:
    """The node; after the test its pods and claims are gone, and the agent has everything back."""
    yield started
    for kind in ("pods", "resourceclaims", "resourceclaimtemplates"):
        path = "/api/v1/namespaces/default/pods" if kind == "pods" else f"{DRA}/namespaces/default/{kind}"
        for one in started.api.items(path):
            started.api.delete(f"{path}/{one['metadata']['name']}")
        until(f"no {kind} are left", lambda path=path: not started.api.items(path))
    if started.status():
        until("nothing is granted", lambda: not started.grants())


# ---------------------------------------------------------------- what tests look at


def slices(node: Cluster) -> list[Object]:
    return [one for one in node.api.items(f"{DRA}/resourceslices") if one["spec"].get("nodeName") == NODE]


def devices(node: Cluster, kind: str) -> dict[str, Object]:
    """The devices of a pool by name; none while the pool is not complete."""
    mine = [one["spec"] for one in slices(node) if one["spec"]["pool"]["name"] == f"{NODE}/{kind}"]
    whole = {(one["pool"]["generation"], one["pool"]["resourceSliceCount"]) for one in mine}
    if len(whole) != 1 or whole.pop()[1] != len(mine):
        return {}
    return {device["name"]: device for one in mine for device in one.get("devices", ())}


def taints(device: Object) -> list[str]:
    return [one["key"] for one in device.get("taints", ())]


def run_pod(node: Cluster, name: str, claims: Mapping[str, str] | None = None, **limits: str) -> Object:
    """Create a pod and wait until it runs."""
    node.api.create(pod(name, claims=claims, limits={f"{DRIVER}/{one}": value for one, value in limits.items()}))
    return running(node, name)


def running(node: Cluster, name: str) -> Object:
    return until(f"pod {name} runs", lambda: in_phase(node, name, "Running"))


def in_phase(node: Cluster, name: str, phase: str) -> Object | None:
    found = node.api.find(pod_path(name))
    return found if found and found["status"].get("phase") == phase else None


def unschedulable(node: Cluster, name: str) -> str:
    """Why the scheduler has no place for a pod; waits for its verdict."""

    def verdict() -> str:
        conditions = (node.api.find(pod_path(name)) or {})["status"].get("conditions", ())
        return next((one["message"] for one in conditions if one.get("reason") == "Unschedulable"), "")

    return until(f"pod {name} is found unschedulable", verdict)


def delete_pod(node: Cluster, name: str) -> None:
    node.api.delete(pod_path(name))
    until(f"pod {name} is gone", lambda: node.api.find(pod_path(name)) is None)


def said(node: Cluster, name: str) -> dict[str, str]:
    """What a pod's container saw: its variables, NODE PATH, METADATA; waits until it has said all."""

    def log() -> list[str]:
        files = sorted((node.folder / "pods").glob(f"default_{name}_*/main/*.log"))
        lines = [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]
        return lines if "READY" in lines else []

    found = {}
    for line in until(f"pod {name} has said what it got", log):
        word, _, rest = line.partition("=" if "=" in line.partition(" ")[0] else " ")
        found[f"NODE {rest.split()[0]}" if word == "NODE" else word] = rest
    return found


def metadata(node: Cluster, name: str) -> list[dict[str, Any]]:
    """The devices that the container can read that it has."""
    found: list[dict[str, Any]] = json.loads(said(node, name)["METADATA"])["devices"]
    return found


def allocated(node: Cluster, name: str) -> list[str]:
    """The devices of a claim."""
    found = until(f"claim {name} is allocated", lambda: claim_of(node, name)["status"].get("allocation"))
    return [one["device"] for one in found["devices"]["results"]]


def claim_of(node: Cluster, name: str) -> Object:
    return node.api.find(claim_path(name)) or {"status": {}}


def health_of(node: Cluster, name: str) -> list[str]:
    """Of the devices of a pod's container, as its status has it."""
    status = node.api.call("GET", pod_path(name))["status"]["containerStatuses"][0]
    return sorted(one["health"] for each in status.get("allocatedResourcesStatus", ()) for one in each["resources"])


def allocatable(node: Cluster, resource: str) -> int:
    found = node.api.call("GET", f"/api/v1/nodes/{NODE}")["status"]["allocatable"]
    return int(found.get(f"{DRIVER}/{resource}", 0))


def grants(node: Cluster) -> list[Any]:
    """What is held, without what may differ between two looks at the same."""
    return sorted((one["id"], one["cpus"], json.dumps(one["hugepages"]), str(one["devices"])) for one in node.grants())


def has_nvml(node: Cluster) -> bool:
    return (node.folder / "nvml/libnvidia-ml.so.1").exists()


def need_nvml(node: Cluster) -> None:
    if not has_nvml(node):
        pytest.skip("no C compiler for the double of libnvidia-ml.so.1")


def of_gpu(address: str) -> str:
    return f'device.attributes["{DRIVER}"].pciAddress == "{address}"'
