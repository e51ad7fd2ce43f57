"""Both APIs race for the same CPUs on a real scheduler and kubelet: no pod is left waiting on the node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nodeagent.core.model.cpuset import CpuSet
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import Object, claim, claim_path, pod, pod_path, request, until
from tests.e2e.nodefiles import DRIVER
from tests.e2e.nodeview import delete_pod, devices, running, said

started = nodeview.started
plain_node = nodeview.node
PAIRS = 6
RBAC = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "nodeagent-claims"}


@pytest.fixture
def node(plain_node: Cluster) -> Iterator[Cluster]:
    """With the option and the right that it needs."""
    role: Object = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": RBAC["name"]},
        "rules": [{"apiGroups": ["resource.k8s.io"], "resources": ["resourceclaims"], "verbs": ["list", "watch"]}],
    }
    binding: Object = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": RBAC["name"]},
        "roleRef": RBAC,
        "subjects": [{"kind": "ServiceAccount", "name": "nodeagent", "namespace": "nodeagent"}],
    }
    for one in (role, binding):
        plain_node.api.create(one)
    plain_node.write_agent_config(bindingConditions=True)
    until("pods wait for claims of CPUs", lambda: conditional(plain_node))
    yield plain_node
    plain_node.write_agent_config()
    until("pods no longer wait", lambda: devices(plain_node, "cpu") and not conditional(plain_node))
    for kind in ("clusterroles", "clusterrolebindings"):
        plain_node.api.delete(f"/apis/{RBAC['apiGroup']}/v1/{kind}/{RBAC['name']}")


def conditional(node: Cluster) -> bool:
    every = devices(node, "cpu").values()
    return bool(every) and all(one.get("bindingConditions") == ["Ready"] for one in every)


def cpus_of(node: Cluster, name: str) -> CpuSet:
    return CpuSet.parse(said(node, name)["NODEAGENT_CPUS"])


def conditions(node: Cluster, name: str) -> dict[str, Any]:
    """Status of each condition of a claim's devices."""
    found = node.api.find(claim_path(name)) or {}
    every = (one for device in found.get("status", {}).get("devices", ()) for one in device["conditions"])
    return {one["type"]: one["status"] for one in every}


def test_of_a_container_and_a_claim_that_want_the_same_cpus_both_run(node: Cluster) -> None:
    """Half of the node for each, created in the same moment. Without the option some of the claims' pods wait until
    the other pod ends."""
    for number in range(PAIRS):
        old, new = f"old{number}", f"new{number}"
        node.api.create(claim(new, request("cpus", "cpu", cpus="4")))
        node.api.create(pod(new, claims={"cpus": new}))
        node.api.create(pod(old, limits={f"{DRIVER}/cpu": "4"}))
        for name in (old, new):
            running(node, name)
        assert len(cpus_of(node, old)) == len(cpus_of(node, new)) == 4
        assert not cpus_of(node, old) & cpus_of(node, new)
        assert conditions(node, new)["Ready"] == "True"
        for name in (old, new):
            delete_pod(node, name)
        node.api.delete(claim_path(new))
        until("all is free", lambda: not node.grants())


def test_a_claim_for_what_the_device_plugin_just_gave_waits_in_the_scheduler_not_on_the_node(node: Cluster) -> None:
    """Until it is free; the scheduler takes the allocation back."""
    node.api.create(pod("first", limits={f"{DRIVER}/cpu": "8"}))
    node.api.create(claim("second", request("cpus", "cpu", cpus="4")))
    node.api.create(pod("second", claims={"cpus": "second"}))
    running(node, "first")

    def unbound() -> bool:
        found = node.api.find(pod_path("second")) or {}
        allocated = (node.api.find(claim_path("second")) or {}).get("status", {}).get("allocation")
        return not found["spec"].get("nodeName") and not allocated

    until("the claim is not allocated", unbound, 60)
    delete_pod(node, "first")
    running(node, "second")
    assert len(cpus_of(node, "second")) == 4
