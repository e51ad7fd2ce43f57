"""Claims in the scheduler's books, with the gate DRANodeAllocatableResources on at the API server, the scheduler and
kubelet (Kubernetes 1.37): the node is not over-committed, and its pools outlive a kubelet without the gate.

Kubelet sees the real machine here, the agent a made-up one with 8 CPUs: what the scheduler has to compare with is read
from the Node.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.core.model.quantity import parse_quantity
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.kubeapi import Object, claim, pod, pod_path, request, until
from tests.e2e.nodefiles import GPUS, NODE, PAGES, RESOURCES
from tests.e2e.nodeview import claim_of, delete_pod, devices, of_gpu, run_pod, running, slices, unschedulable
from tests.support.long_form import LONG

GATE = "DRANodeAllocatableResources"
POOLS = ("cpu", "hugepages", "memory", "char", "gpu")
GPU_MEMORY = 96 << 20
"""Overhead of a GPU, for a pod of one container: perPod and perContainer."""
SERVED = [
    {**one, "overhead": {"memory": {"perPod": "64Mi", "perContainer": "32Mi"}}} if one["kind"] == "gpu" else one
    for one in RESOURCES
]

node = nodeview.node


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(request.module.__name__, gates=(GATE,), resources=SERVED) as made:
        if not declares(made):
            pytest.skip("this kubelet does not have the gate in the form of Kubernetes 1.37")
        until("claims are counted", lambda: counted(made))
        yield made
        for log in made.logs.glob("nodeagent*.log"):
            assert "Traceback" not in log.read_text(), made.last_words()


# ---------------------------------------------------------------- what tests look at


def node_object(node: Cluster) -> Object:
    found: Object = node.api.call("GET", f"/api/v1/nodes/{NODE}")
    return found


def declares(node: Cluster) -> bool:
    return GATE in node_object(node)["status"].get("declaredFeatures", ())


def counted(node: Cluster) -> set[str]:
    """What any published device says to take of the Node."""
    found = (one for part in slices(node) for one in part["spec"].get("devices", ()))
    return {name for device in found for name in device.get("nodeAllocatableResources", ())}


def all_published(node: Cluster) -> bool:
    """Every pool is complete, as the scheduler sees it, and the agent says so."""
    return all(devices(node, kind) for kind in POOLS) and node.status()["dra"]["slices"]["state"] == "published"


def whole_cpus(node: Cluster) -> int:
    """How many whole CPUs kubelet has allocatable. The agent has 4 on each of 2 NUMA nodes."""
    return int(parse_quantity(node_object(node)["status"]["allocatable"]["cpu"]))


def claim_of_cpus(name: str, count: int) -> Object:
    """As many CPUs, from both NUMA nodes if there are more than one has."""
    first = min(count, 4)
    parts = [request("cpus", "cpu", cpus=str(first))]
    return claim(name, *parts, *([request("more", "cpu", cpus=str(count - first))] if count > first else []))


def taken(node: Cluster, name: str) -> dict[str, str]:
    """What the scheduler has counted for the claims of a pod."""
    status = node.api.call("GET", pod_path(name))["status"]
    every = status.get("nodeAllocatableResourceClaimStatuses", ())
    return {one["name"]: one["quantity"] for each in every for one in each.get("mapping", ())}


def no_cpu_requests(node: Cluster) -> dict[str, str]:
    """What the agent has told the pods of this test that request no CPU, by their names."""
    names = {one["metadata"]["name"] for one in node.api.items("/api/v1/namespaces/default/pods")}
    events = node.api.items("/apis/events.k8s.io/v1/namespaces/default/events")
    mine = [one for one in events if one["reason"] == "NoCPURequest" and one["regarding"]["name"] in names]
    return {one["regarding"]["name"]: one["note"] for one in mine}


def cgroup(node: Cluster, name: str) -> Path:
    """The cgroup of the container of a pod, in the hierarchy of the cpu controller."""
    status = node.api.call("GET", pod_path(name))
    uid, container = status["metadata"]["uid"], status["status"]["containerStatuses"][0]["containerID"]
    (found,) = {
        one
        for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"))
        for one in root.glob(f"kubepods/**/pod{uid}/{container.rpartition('/')[2]}")
        if (one / "cpu.max").exists() or (one / "cpu.cfs_quota_us").exists()
    }
    return found


def quota(folder: Path) -> str:
    """As cpu.max has it: quota and period, in microseconds."""
    if (folder / "cpu.max").exists():
        return (folder / "cpu.max").read_text().strip()
    return f"{(folder / 'cpu.cfs_quota_us').read_text().strip()} {(folder / 'cpu.cfs_period_us').read_text().strip()}"


# ---------------------------------------------------------------- the node is not over-committed


def test_the_server_keeps_what_every_pool_says(node: Cluster) -> None:
    """Nothing was dropped or refused, and the status names what is counted. Kubelet has seen none of the pages, which
    is noted."""
    status = node.status()
    assert (status["dra"]["slices"]["state"], status["dra"]["slices"]["lost"]) == ("published", [])
    assert status["dra"]["slices"]["withheld"] == ""
    assert set(status["dra"]["counted"]) == {"cpu", "memory"} == counted(node)
    (pages,) = [one for one in status["notes"] if "hugepages-2Mi" in one]
    assert str(2 * PAGES * (2 << 20)) in pages


def test_a_second_pod_waits_instead_of_over_committing_the_node(node: Cluster) -> None:
    """The agent has CPUs for both, the node has not; the second runs when the first has ended."""
    most = whole_cpus(node)
    node.api.create(claim_of_cpus("first", most))
    node.api.create(claim_of_cpus("second", 1))
    run_pod(node, "first", {"cpus": "first"})
    assert taken(node, "first") == {"cpu": str(most)}
    node.api.create(pod("second", claims={"cpus": "second"}))
    assert "Insufficient cpu" in unschedulable(node, "second")
    delete_pod(node, "first")
    running(node, "second")
    assert sum(len(one["cpus"]) > 0 for one in node.grants()) == 1


def test_a_pod_without_claims_waits_for_what_a_claim_has_taken(node: Cluster) -> None:
    """The books are one: what a claim has, no request has."""
    most = whole_cpus(node)
    node.api.create(claim_of_cpus("all", most))
    run_pod(node, "all", {"cpus": "all"})
    node.api.create(pod("plain", requests={"cpu": "1"}))
    assert "Insufficient cpu" in unschedulable(node, "plain")
    delete_pod(node, "all")
    running(node, "plain")


def test_memory_and_the_overhead_of_a_gpu_are_counted(node: Cluster) -> None:
    address = next(iter(GPUS))
    parts = (request("gpu", "gpu", selector=of_gpu(address)), request("memory", "memory", size="64Mi"))
    node.api.create(claim("both", *parts))
    run_pod(node, "both", {"both": "both"})
    (status,) = node.api.call("GET", pod_path("both"))["status"]["nodeAllocatableResourceClaimStatuses"]
    assert taken(node, "both") == {"memory": "64Mi"}
    (overhead,) = status["overhead"]
    each = parse_quantity(overhead["perPod"]) + parse_quantity(overhead["perContainer"])
    assert (overhead["name"], each, status["containers"]) == ("memory", GPU_MEMORY, ["main"])


def test_pages_that_kubelet_has_not_seen_can_be_claimed_all_the_same(node: Cluster) -> None:
    node.api.create(claim("pages", request("pages", "hugepages", size="4Mi")))
    run_pod(node, "pages", {"pages": "pages"})
    assert taken(node, "pages") == {}


def test_a_counted_claim_is_for_one_pod_alone(node: Cluster) -> None:
    node.api.create(claim_of_cpus("shared", 1))
    run_pod(node, "one", {"cpus": "shared"})
    node.api.create(pod("two", claims={"cpus": "shared"}))
    assert "cannot be shared across pods" in unschedulable(node, "two")


# ---------------------------------------------------------------- what kubelet makes of it


def test_a_limit_rises_by_the_claim_and_without_a_limit_there_is_none(node: Cluster) -> None:
    """cpu.max of the container, as docs/dra.md says."""
    node.api.create(claim_of_cpus("limited", 1))
    node.api.create(pod("limited", claims={"cpus": "limited"}, limits={"cpu": "500m"}))
    running(node, "limited")
    assert quota(cgroup(node, "limited")) == "150000 100000"
    delete_pod(node, "limited")
    node.api.create(claim_of_cpus("open", 1))
    run_pod(node, "open", {"cpus": "open"})
    assert quota(cgroup(node, "open")).split() in (["max", "100000"], ["-1", "100000"])
    assert node.api.call("GET", pod_path("open"))["status"]["qosClass"] == "BestEffort"
    told = until("the pod is told", lambda: no_cpu_requests(node))
    assert [*told] == ["open"] and "claim default/open gives it the exclusive CPUs" in told["open"]
    assert any("default/open" in note for note in node.status()["notes"])


# ---------------------------------------------------------------- kubelet without the gate


def test_a_kubelet_that_loses_the_gate_takes_no_pool_away(node: Cluster) -> None:
    """The server refuses every slice that says it by then. Claims are allocated and prepared, uncounted; with the gate
    they are counted again."""
    for _ in range(3 if LONG else 1):
        node.gates["kubelet"] = ()
        node.restart("kubelet")
        until("kubelet has lost the gate", lambda: not declares(node))
        until("nothing is counted", lambda: all_published(node) and not counted(node))
        node.api.create(claim_of_cpus("free", 4))
        run_pod(node, "free", {"cpus": "free"})
        assert claim_of(node, "free")["status"]["allocation"]
        delete_pod(node, "free")
        node.api.delete("/apis/resource.k8s.io/v1/namespaces/default/resourceclaims/free")
        node.gates["kubelet"] = (GATE,)
        node.restart("kubelet")
        until("kubelet has the gate again", lambda: declares(node))
        until("claims are counted", lambda: all_published(node) and counted(node) == {"cpu", "memory"})


def test_counting_is_turned_off_and_on_without_a_restart(node: Cluster) -> None:
    node.write_agent_config(nodeAllocatable="off")
    until("nothing is counted", lambda: all_published(node) and not counted(node))
    node.write_agent_config()
    until("claims are counted", lambda: all_published(node) and counted(node) == {"cpu", "memory"})
