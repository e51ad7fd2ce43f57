"""Events, node labels and the NodeResourceTopology on a real API server, with the rights that the chart gives.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e/test_events_e2e.py

The folder holds etcd, kube-apiserver and helm, or PATH has them. No root is needed and no kubelet runs: its side is a
double.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.e2e import apiserver
from tests.e2e.kubeapi import KubeApi, Object, Refusal, claim, claim_path, collection, pod, request, until
from tests.e2e.nodefiles import write_kubeconfig
from tests.support.dra_node import CPUS, SERIAL
from tests.support.paths import CHECKOUT
from tests.support.running import Running, running

LACKING = apiserver.lacking("helm") if (CHECKOUT / "deploy").exists() else "the chart lies in the checkout"
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)
if not LACKING:
    from tests.e2e.test_chart_e2e import rendered

NODE, OTHER, DRIVER, SPACE = "worker-1", "worker-2", "nodeagent.dev", "nodeagent"
PUBLISH = {"nodeLabels": True, "nodeResourceTopology": True}
TOPOLOGY, TOPOLOGIES = "topology.node.k8s.io", "/apis/topology.node.k8s.io/v1alpha2/noderesourcetopologies"
BINDING = f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{SPACE}"
ACCOUNT = f"/api/v1/namespaces/{SPACE}/serviceaccounts/{SPACE}/token"
MERGE = "application/merge-patch+json"


# ---------------------------------------------------------------- the cluster


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    """An API server with what the chart makes, two Nodes, and the pods of their agents."""
    folder = tmp_path_factory.mktemp("apiserver")
    with apiserver.api_server(folder) as api:
        values = {"config": {"publish": PUBLISH}, "namespace": {"create": True}}
        for one in rendered(folder, values):
            if one["kind"] not in ("Pod", "DaemonSet"):
                api.create(one)
        for name in (NODE, OTHER):
            api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
            api.create(_pod(f"agent-{name}", SPACE, name, serviceAccountName=SPACE))
        api.create(_account("default"))
        yield api


def _account(namespace: str) -> Object:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}}


def _pod(name: str, namespace: str, node: str, **spec: Any) -> Object:
    made = pod(name)
    made["metadata"]["namespace"] = namespace
    made["spec"] |= {"nodeName": node, **spec}
    return made


def token(api: KubeApi, node: str) -> str:
    """What kubelet mounts into the agent's pod on a node."""
    bound = api.find(f"{collection('v1', 'Pod', SPACE)}/agent-{node}")
    assert bound is not None
    ref = {"apiVersion": "v1", "kind": "Pod", "name": bound["metadata"]["name"], "uid": bound["metadata"]["uid"]}
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": ref}}
    return str(api.call("POST", ACCOUNT, asked)["status"]["token"])


def topology_crd() -> Object:
    """As much of the kind as a server needs to keep what is sent and to refuse what it does not know."""

    def of(**properties: Any) -> Object:
        return {"type": "object", "properties": properties}

    def several(item: Object) -> Object:
        return {"type": "array", "items": item}

    text, amount = {"type": "string"}, {"type": "string", "pattern": "^[0-9]+$"}
    pairs = several(of(name=text, value=text))
    resource = of(name=text, capacity=amount, allocatable=amount, available=amount)
    costs = several(of(name=text, value={"type": "integer"}))
    zone = of(name=text, type=text, parent=text, costs=costs, attributes=pairs, resources=several(resource))
    schema = {**of(topologyPolicies=several(text), attributes=pairs, zones=several(zone)), "required": ["zones"]}
    version = {"name": "v1alpha2", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": "noderesourcetopologies", "singular": "noderesourcetopology", "kind": "NodeResourceTopology"}
    approved = {"api-approved.kubernetes.io": "unapproved, for a test"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"noderesourcetopologies.{TOPOLOGY}", "annotations": approved},
        "spec": {"group": TOPOLOGY, "scope": "Cluster", "names": names, "versions": [version]},
    }


# ---------------------------------------------------------------- the node


class Node:
    """An agent, what kubelet asks of it, and what the API server has."""

    def __init__(self, agent: Running, kubelet: FakeDraKubelet, api: KubeApi) -> None:
        self.agent, self.kubelet, self.api = agent, kubelet, api

    async def seen(self, what: str, look: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(until, what, look)

    async def event(self, reason: str, namespace: str = "default", holds: Callable[[Object], Any] = bool) -> Object:
        """The one Event with a reason."""
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"

        def look() -> list[Object]:
            return [one for one in self.api.items(path) if one["reason"] == reason and holds(one)]

        (found,) = await self.seen(f"an Event {reason}", look)
        return dict(found)

    async def notes(self, holds: Callable[[str], bool]) -> None:
        await self.agent.until("/v1/status", lambda status: holds(" ".join(status["notes"])))

    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.api.call("GET", f"/api/v1/nodes/{NODE}")["metadata"].get("labels") or {}
        return {name: value for name, value in found.items() if name.startswith("nodeagent.dev/")}


@contextlib.asynccontextmanager
async def node(folder: Path, api: KubeApi, **more: Any) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    tree.node("/dev/ttyS0")
    kubeconfig = folder / "kubeconfig"
    write_kubeconfig(kubeconfig, api.port, token(api, NODE))
    dra = {"kubeconfig": str(kubeconfig), "nodeName": NODE, "cdiDir": str(folder / "cdi"), "spreadSeconds": 0}
    serial = {**SERIAL, "serve": "both"}
    async with (
        FakeKubelet(folder / "kubelet"),
        FakeDraKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree.root, resources=[CPUS, serial], dra=dra, **more) as agent,
    ):
        await kubelet.wait_registered(DRIVER)
        yield Node(agent, kubelet, api)


def refused_claim(api: KubeApi, name: str) -> ClaimId:
    """A claim of the pod of that name, allocated a device that does not exist."""
    owner = api.create(_pod(name, "default", NODE))
    api.create(claim(name, request("r", "char")))
    result = {"request": "r", "driver": DRIVER, "pool": f"{NODE}/char", "device": "nowhere"}
    reserved = {"resource": "pods", "name": name, "uid": owner["metadata"]["uid"]}
    status = {"allocation": {"devices": {"results": [result]}}, "reservedFor": [reserved]}
    made = api.call("PATCH", f"{claim_path(name)}/status", {"status": status}, MERGE)
    return ClaimId("default", name, made["metadata"]["uid"])


# ---------------------------------------------------------------- Events


async def test_a_refused_claim_is_one_event_on_its_pod_over_a_restart_of_the_agent(folder: Path, api: KubeApi) -> None:
    """With the rights of the chart: create and patch. It is counted, although kubelet asks again and the agent was
    killed."""
    refused = refused_claim(api, "refused")
    async with node(folder, api) as one:
        answers = await one.kubelet.prepare(DRIVER, [refused])
        event = await one.event("ClaimRefused")
        assert event["note"] == answers[refused.uid].error
        assert (event["type"], event["action"]) == ("Warning", "PrepareClaim")
        assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Pod", "refused")
        assert "series" not in event
        await one.agent.stop()
        await one.agent.start()
        await one.kubelet.wait_registered(DRIVER, 2)
        await one.kubelet.prepare(DRIVER, [refused])
        event = await one.event("ClaimRefused", holds=lambda event: event.get("series"))
        assert event["series"]["count"] == 2


async def test_a_refused_configuration_and_the_next_one_are_events_on_the_node(folder: Path, api: KubeApi) -> None:
    async with node(folder, api) as one:
        before = one.agent.config_file.read_text()
        one.agent.write_config("resources: [{name: x")
        event = await one.event("ConfigurationRefused")
        assert event["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": NODE}
        one.agent.write_config(before)
        assert (await one.event("ConfigurationApplied"))["type"] == "Normal"


async def test_events_that_are_not_allowed_wait_until_they_are(folder: Path, api: KubeApi) -> None:
    """Kubelet is answered meanwhile, and the status says it."""
    role = api.call("GET", f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{SPACE}")
    path = f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{SPACE}"
    rules = [rule for rule in role["rules"] if "events" not in rule["resources"]]
    api.call("PATCH", path, {"rules": rules}, MERGE)
    refused = refused_claim(api, "forbidden")
    async with node(folder, api) as one:
        answers = await one.kubelet.prepare(DRIVER, [refused])
        assert answers[refused.uid].error
        await one.notes(lambda notes: "Events cannot be written at present" in notes and "forbidden" in notes)
    api.call("PATCH", path, {"rules": role["rules"]}, MERGE)


# ---------------------------------------------------------------- what is published


async def test_labels_and_topology_are_published_and_removed_with_the_rights_of_the_chart(
    folder: Path, api: KubeApi
) -> None:
    """The kind may come later; the labels of others stay."""
    api.call("PATCH", f"/api/v1/nodes/{NODE}", {"metadata": {"labels": {"others.example.com/a": "b"}}}, MERGE)
    until("the policies are in force", lambda: _refused(api, {"metadata": {"annotations": {"a": "b"}}}))
    async with node(folder, api, publish=PUBLISH) as one:
        labels = await one.seen("the labels", one.labels)
        assert (labels["nodeagent.dev/cpu.count"], labels["nodeagent.dev/numa.count"]) == ("8", "2")
        await one.notes(lambda notes: "publish.nodeResourceTopology is not in force" in notes and "404" in notes)
        api.create(topology_crd())
        await one.seen("the kind is served", lambda: _served(api))
        before = one.agent.config_file.read_text()
        one.agent.write_config(before.replace('"nodeLabels": true', '"nodeLabels": false'))
        found = await one.seen("the topology", lambda: api.find(f"{TOPOLOGIES}/{NODE}"))
        assert [zone["name"] for zone in found["zones"]] == ["node-0", "node-1"]
        cpu = next(one for one in found["zones"][0]["resources"] if one["name"] == "cpu")
        assert cpu == {"name": "cpu", "capacity": "4", "allocatable": "4", "available": "4"}
        await one.seen("no labels", lambda: not one.labels())
        one.agent.write_config(before.replace('"nodeResourceTopology": true', '"nodeResourceTopology": false'))
        await one.seen("no topology", lambda: api.find(f"{TOPOLOGIES}/{NODE}") is None)
        await one.seen("the labels", one.labels)
    assert api.call("GET", f"/api/v1/nodes/{NODE}")["metadata"]["labels"]["others.example.com/a"] == "b"


def _served(api: KubeApi) -> Any:
    """Whether the server has taken the new kind up: it says 429 while it does."""
    try:
        return api.find(TOPOLOGIES)
    except Refusal as refused:
        if refused.status != 429:
            raise
        return None


@pytest.mark.parametrize(
    "patch",
    [
        {"metadata": {"labels": {"others.example.com/a": "c"}}},
        {"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}},
        {"metadata": {"annotations": {"a": "b"}}},
        {"metadata": {"finalizers": ["example.com/a"]}},
        {"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}},
        {"spec": {"unschedulable": True}},
    ],
    ids=str,
)
def test_an_agent_may_change_nothing_of_its_node_but_its_labels(api: KubeApi, patch: Object) -> None:
    until("the policies are in force", lambda: _refused(api, {"metadata": {"annotations": {"a": "b"}}}))
    assert "nodes.nodeagent.dev" in _refused(api, patch)
    assert _refused(api, {"metadata": {"labels": {"nodeagent.dev/x": "y"}}}) == ""


def test_an_agent_may_change_no_other_node(api: KubeApi) -> None:
    until("the policies are in force", lambda: _refused(api, {"metadata": {"annotations": {"a": "b"}}}))
    assert "may change that Node only" in _refused(api, {"metadata": {"labels": {"nodeagent.dev/x": "y"}}}, OTHER)


def _refused(api: KubeApi, patch: Object, name: str = NODE) -> str:
    """Why the agent of NODE may not patch a Node so, or "" if it may; nothing is stored."""
    agent = KubeApi(api.port, token(api, NODE))
    try:
        agent.call("PATCH", f"/api/v1/nodes/{name}?dryRun=All", patch, MERGE)
    except Refusal as refused:
        return str(refused)
    return ""
