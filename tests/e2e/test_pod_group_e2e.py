"""Claims of a PodGroup (Kubernetes 1.37, with its gates on): all its pods have what one claim was given, and it stays
theirs until the last of them is gone. The API server names the group, never the pods."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.e2e import nodeview
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.grounds import minor_version
from tests.e2e.kubeapi import Object, claim, claim_path, pod, request, until
from tests.e2e.nodeview import delete_pod, running

GATES = ("GenericWorkload", "DRAWorkloadResourceClaims")
API = "scheduling.k8s.io/v1beta1"
FIRST_MINOR = 37
GROUPS = f"/apis/{API}/namespaces/default/podgroups"
SHARED = [{"name": "shared", "resourceClaimName": "shared"}]

node = nodeview.node


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if (minor := minor_version()) and minor < FIRST_MINOR:
        pytest.skip(f"Kubernetes 1.{minor} has no {API}: it came with 1.{FIRST_MINOR}")
    with cluster(request.module.__name__, gates=GATES, apis=(API,)) as made:
        yield made
        for log in made.logs.glob("nodeagent*.log"):
            assert "Traceback" not in log.read_text(), made.last_words()


@pytest.fixture
def group(node: Cluster) -> Iterator[str]:
    """A PodGroup whose pods share a claim for two CPUs."""
    node.api.create(claim("shared", request("cpus", "cpu", cpus="2")))
    spec = {"schedulingPolicy": {"basic": {}}, "resourceClaims": SHARED}
    document = {"apiVersion": API, "kind": "PodGroup", "metadata": {"name": "group", "namespace": "default"}}
    node.api.call("POST", GROUPS, {**document, "spec": spec})
    yield "group"
    for name in ("first", "second"):
        if nodeview.in_phase(node, name, "Running"):
            delete_pod(node, name)
    node.api.delete(f"{GROUPS}/group")
    until("the group is gone", lambda: not node.api.items(GROUPS))


def member(name: str) -> Object:
    one = pod(name, claims={"shared": "shared"})
    one["spec"]["schedulingGroup"] = {"podGroupName": "group"}
    return one


def held(node: Cluster) -> list[str]:
    """The CPUs of each grant."""
    return [one["cpus"] for one in node.grants()]


def test_all_pods_of_a_group_have_its_claim_until_the_last_is_gone(node: Cluster, group: str) -> None:
    for name in ("first", "second"):
        node.api.create(member(name))
        running(node, name)
    (reserved,) = node.api.call("GET", claim_path("shared"))["status"]["reservedFor"]
    assert (reserved["resource"], reserved["name"]) == ("podgroups", group)
    (cpus,) = held(node)
    delete_pod(node, "first")
    assert held(node) == [cpus]
    delete_pod(node, "second")
    until("the claim is released", lambda: not held(node))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_claim_of_a_group_outlives_the_agent(node: Cluster, group: str, how: signal.Signals) -> None:
    """Neither its start nor its search for claims that are gone takes a group for a pod that is gone."""
    node.api.create(member("first"))
    running(node, "first")
    before = node.grants()
    node.restart("nodeagent", how)
    until("the agent answers", lambda: (node.status() or {}).get("ready"))
    node.api.create(member("second"))
    running(node, "second")
    assert [one["id"] for one in node.grants()] == [one["id"] for one in before]
    assert node.status()["disputed"] == []
