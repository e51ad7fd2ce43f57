"""Claims, all real but the machine: API server, scheduler, kubelet, containerd, and pods that run."""

from __future__ import annotations

import pytest
import yaml

from nodeagent.core.model.cpuset import CpuSet
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import DRA, KubeApi, Refusal, claim, pod, request, template, until, wanted
from tests.e2e.nodefiles import CPUS_OF_NODE, DRIVER, GPUS, NODE, PORTS, RESOURCES
from tests.e2e.nodeview import (
    DIVIDED_GPU,
    NUMA,
    claim_of,
    delete_pod,
    devices,
    has_nvml,
    metadata,
    need_nvml,
    of_gpu,
    run_pod,
    running,
    said,
    slices,
    unschedulable,
)
from tests.support.running import CHECKOUT

node, started = nodeview.node, nodeview.started

# ---------------------------------------------------------------- what is published


def test_kubelet_takes_each_resource_at_the_first_try(node: Cluster) -> None:
    assert len(node.agent_said("registered")) == 1 + len([one for one in RESOURCES if one["serve"] == "both"])
    assert "Error connecting to device plugin" not in (node.logs / "kubelet.log").read_text()


def test_the_server_keeps_every_slice_whole(node: Cluster) -> None:
    """Every pool is complete, nothing in it was dropped, and it is the Node's own."""
    status = node.status()["dra"]["slices"]
    assert (status["state"], status["lost"], status["broken"]) == ("published", [], [])
    owner = node.api.call("GET", f"/api/v1/nodes/{NODE}")["metadata"]["uid"]
    assert {one["metadata"]["ownerReferences"][0]["uid"] for one in slices(node)} == {owner}
    assert devices(node, "cpu").keys() == {"numa0", "numa1"} == devices(node, "memory").keys()
    assert devices(node, "hugepages").keys() == {"numa0-2mi", "numa1-2mi"}
    assert len(devices(node, "char")) == len(PORTS)
    gpus = devices(node, "gpu").values()
    assert {one["attributes"]["pciAddress"]["string"] for one in gpus} == {*GPUS}
    assert sum(bool(one.get("consumesCounters")) for one in gpus) == (3 if has_nvml(node) else 0)


def test_without_its_gate_lists_are_refused_and_the_pool_is_published_without_them(node: Cluster) -> None:
    """Other pools stay as they are."""
    others = {one["metadata"]["uid"] for one in slices(node) if not one["spec"]["pool"]["name"].endswith("/cpu")}
    node.write_agent_config(listAttributes=True)
    until("it is known", lambda: "lists" in node.status()["dra"]["slices"]["lost"])
    until("all is published", lambda: node.status()["dra"]["slices"]["state"] == "published")
    assert {one["attributes"][NUMA]["int"] for one in devices(node, "cpu").values()} == {0, 1}
    assert others <= {one["metadata"]["uid"] for one in slices(node)}
    node.write_agent_config()


def test_what_is_shipped_for_the_server_is_accepted_as_it_is(node: Cluster) -> None:
    """The rest was created, strictly, when the node started; the classes name what stands for them."""
    for document in yaml.safe_load_all((CHECKOUT / "deploy" / "daemonset.yaml").read_text()):
        node.api.create(document, dry_run=True)
    found = {one["metadata"]["name"]: one["spec"] for one in node.api.items(f"{DRA}/deviceclasses")}
    assert found[f"gpu.{DRIVER}"]["extendedResourceName"] == f"{DRIVER}/gpu"


def test_an_agents_token_writes_no_slice_of_another_node(node: Cluster) -> None:
    agent = KubeApi(node.api.port, node.agent_token(NODE))
    made = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": "foreign"},
        "spec": {
            "driver": DRIVER,
            "nodeName": "other-node",
            "pool": {"name": "other-node/cpu", "generation": 1, "resourceSliceCount": 1},
        },
    }

    def refusal() -> str:
        """Nothing is stored by asking; a policy is in force some seconds after it was made."""
        try:
            agent.create(made, dry_run=True)
        except Refusal as refused:
            return str(refused)
        return ""

    said = until("the policy is in force", refusal)
    assert f"the agent of node {NODE} may write the slices of that node only" in said
    with pytest.raises(Refusal) as refused:
        agent.call("GET", "/api/v1/namespaces/default/pods")
    assert refused.value.status == 403


# ---------------------------------------------------------------- claims


def test_one_pod_gets_cpus_pages_and_a_device_of_one_claim(node: Cluster) -> None:
    """And its container sees them: variables, the device node, the metadata."""
    requests = (request("cpus", "cpu", cpus="2"), request("pages", "hugepages", size="8Mi"), request("port", "char"))
    node.api.create(claim("all", *requests))
    run_pod(node, "all", {"all": "all"})
    got, parts = said(node, "all"), {one["request"]: one for one in metadata(node, "all")}
    assert len(CpuSet.parse(got["NODEAGENT_CPUS"])) == 2
    assert got["NODEAGENT_CPUS"] == got["NODEAGENT_CPUS_CPUS"] == parts["cpus"]["cpus"]
    assert got["NODEAGENT_HUGEPAGES_2MI"] == "4" == str(parts["pages"]["hugepages"][0]["pages"])
    (port,) = [word.partition(" ")[2] for word in got if word.startswith("NODE ")]
    assert got[f"NODE {port}"] == f"{port} 4", "the container can open and read the node"
    assert parts["port"]["paths"] == [port]
    assert {one["cpus"] for one in node.grants() if one["cpus"]} == {got["NODEAGENT_CPUS"]}


def test_the_status_of_a_claim_says_what_was_prepared(node: Cluster) -> None:
    node.api.create(claim("told", request("cpus", "cpu", cpus="1")))
    run_pod(node, "told", {"told": "told"})
    (device,) = until("status.devices is written", lambda: claim_of(node, "told")["status"].get("devices"))
    assert (device["driver"], device["pool"]) == (DRIVER, f"{NODE}/cpu")
    (ready,) = device["conditions"]
    assert (ready["type"], ready["status"], ready["reason"]) == ("Ready", "True", "Prepared")
    assert said(node, "told")["NODEAGENT_CPUS"] in ready["message"]


@pytest.mark.parametrize("numa_node", [0, 1])
def test_match_attribute_puts_all_kinds_on_one_numa_node(node: Cluster, numa_node: int) -> None:
    address = next(one for one, at in GPUS.items() if at == numa_node)
    requests = (
        request("gpu", "gpu", selector=of_gpu(address)),
        request("cpus", "cpu", cpus="3"),
        request("pages", "hugepages", size="4Mi"),
        request("memory", "memory", size="64Mi"),
    )
    node.api.create(claim("near", *requests, match=NUMA))
    run_pod(node, "near", {"near": "near"})
    got = said(node, "near")
    assert {*CpuSet.parse(got["NODEAGENT_CPUS"])} <= CPUS_OF_NODE[numa_node]
    assert got["NODEAGENT_HUGEPAGES_2MI_NUMA_NODES"] == got["NODEAGENT_MEMORY_NUMA_NODES"] == str(numa_node)
    assert {tuple(one["numaNodes"]) for one in metadata(node, "near")} == {(numa_node,)}


def test_a_pod_waits_while_the_capacity_is_consumed_and_runs_when_it_is_free(node: Cluster) -> None:
    for number in range(3):
        node.api.create(claim(f"c{number}", request("cpus", "cpu", cpus="4" if number < 2 else "3")))
    for number in range(2):
        run_pod(node, f"p{number}", {"cpus": f"c{number}"})
    node.api.create(pod("p2", claims={"cpus": "c2"}))
    assert "cannot allocate all claims" in unschedulable(node, "p2")
    assert sum(len(CpuSet.parse(one["cpus"])) for one in node.grants()) == 8
    freed = {*CpuSet.parse(said(node, "p0")["NODEAGENT_CPUS"])}
    delete_pod(node, "p0")
    running(node, "p2")
    assert {*CpuSet.parse(said(node, "p2")["NODEAGENT_CPUS"])} <= freed


def test_pods_of_one_claim_share_what_it_was_given(node: Cluster) -> None:
    """The second pod's Prepare is answered as the first's; the claim is unprepared when the last one ends."""
    node.api.create(claim("shared", request("cpus", "cpu", cpus="2")))
    for name in ("first", "second"):
        run_pod(node, name, {"cpus": "shared"})
    assert said(node, "first")["NODEAGENT_CPUS"] == said(node, "second")["NODEAGENT_CPUS"]
    delete_pod(node, "first")
    assert len(node.grants()) == 1
    delete_pod(node, "second")
    until("the claim is unprepared", lambda: not node.grants())


def test_a_pod_that_asks_for_the_extended_resource_is_served_through_dra(node: Cluster) -> None:
    """The class says what it stands for; nothing in the pod speaks of claims."""
    found = run_pod(node, "extended", gpu="1")
    assert found["status"]["extendedResourceClaimStatus"]["resourceClaimName"]
    if has_nvml(node):
        assert said(node, "extended")["NVIDIA_VISIBLE_DEVICES"].startswith(("GPU-", "MIG-"))
    (grant,) = node.grants()
    assert grant["devices"]


def test_a_request_with_alternatives_gets_the_first_that_is_there(node: Cluster) -> None:
    """Its containers find it under the request's name."""
    first, second = wanted("nvme"), wanted("cpu", cpus="2")
    choice = {"name": "any", "firstAvailable": [{"name": "disk", **first}, {"name": "cpus", **second}]}
    node.api.create(claim("choice", choice))
    run_pod(node, "chooser", {"choice": "choice"})
    (part,) = metadata(node, "chooser")
    assert part["request"] == "any/cpus" and part["cpus"] == said(node, "chooser")["NODEAGENT_CPUS"]


def test_a_configuration_of_the_claim_is_in_force(node: Cluster) -> None:
    made = claim("own", request("cpus", "cpu", cpus="2"))
    parameters = {"apiVersion": f"{DRIVER}/v1alpha1", "kind": "CpuConfig", "options": ["full-pcpus-only"]}
    opaque = {"driver": DRIVER, "parameters": parameters}
    made["spec"]["devices"]["config"] = [{"requests": ["cpus"], "opaque": opaque}]
    node.api.create(made)
    run_pod(node, "own", {"own": "own"})
    assert said(node, "own")["NODEAGENT_CPUS"] in ("0,4", "1,5", "2,6", "3,7"), "one whole core"
    until("status.devices is written", lambda: claim_of(node, "own")["status"].get("devices"))


def test_an_agents_token_writes_nothing_else_into_a_claim(node: Cluster) -> None:
    """Its own part it may write, as it has; neither the reservation nor what others say of their devices. Which of the
    server's checks refuses depends on its version."""
    node.api.create(claim("kept", request("cpus", "cpu", cpus="2")))
    run_pod(node, "kept", {"kept": "kept"})
    until("status.devices is written", lambda: claim_of(node, "kept")["status"].get("devices"))
    agent, path = KubeApi(node.api.port, node.agent_token(NODE)), f"{DRA}/namespaces/default/resourceclaims/kept/status"

    def write(**status: object) -> None:
        """Nothing is stored by asking."""
        found = claim_of(node, "kept")
        agent.call("PUT", f"{path}?dryRun=All", {**found, "status": {**found["status"], **status}})

    (mine,) = claim_of(node, "kept")["status"]["devices"]
    write(devices=[{**mine, "conditions": []}])
    for wrong in (
        {"reservedFor": []},
        {"devices": [{**mine, "driver": "other.example"}]},
        {"devices": [{**mine, "pool": "other-node/cpu"}]},
    ):
        with pytest.raises(Refusal):
            write(**wrong)


def test_a_wrong_configuration_fails_its_own_pod_alone_and_says_why(node: Cluster) -> None:
    made = claim("wrong", request("cpus", "cpu", cpus="1"))
    parameters = {"apiVersion": f"{DRIVER}/v1alpha1", "kind": "NicConfig"}
    made["spec"]["devices"]["config"] = [{"requests": ["cpus"], "opaque": {"driver": DRIVER, "parameters": parameters}}]
    node.api.create(made)
    node.api.create(pod("wrong", claims={"wrong": "wrong"}))

    def events() -> list[str]:
        found = node.api.items("/api/v1/namespaces/default/events")
        return [one["message"] for one in found if one["reason"] == "FailedPrepareDynamicResources"]

    # Up to 1.36 the scheduler's copy of the configuration names the request, later ones name none where all are meant.
    told = "NicConfig fits no device", "NicConfig is for request"
    messages = until("kubelet says why", lambda: [one for one in events() if any(why in one for why in told)])
    assert "cannot prepare claim default/wrong" in messages[0]
    node.api.create(claim("right", request("cpus", "cpu", cpus="1")))
    run_pod(node, "right", {"right": "right"})
    assert len(node.grants()) == 1


def test_a_part_of_a_device_keeps_the_whole_from_being_given(node: Cluster) -> None:
    """The divided GPU and its instances consume one set of counters."""
    need_nvml(node)
    parts = [one for one in devices(node, "gpu").values() if "parent" in one["attributes"]]
    assert len(parts) == 2
    node.api.create(claim("part", request("gpu", "gpu-part")))
    node.api.create(claim("whole", request("gpu", "gpu", selector=of_gpu(DIVIDED_GPU))))
    run_pod(node, "part", {"gpu": "part"})
    node.api.create(pod("whole", claims={"gpu": "whole"}))
    unschedulable(node, "whole")
    delete_pod(node, "part")
    running(node, "whole")


def test_the_life_of_a_claim_writes_no_slice(node: Cluster) -> None:
    """What claims hold, the scheduler counts itself."""
    before = {one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in slices(node)}
    node.api.create(claim("quiet", request("cpus", "cpu", cpus="2"), request("port", "char"), request("gpu", "gpu")))
    run_pod(node, "quiet", {"quiet": "quiet"})
    delete_pod(node, "quiet")
    until("nothing is granted", lambda: not node.grants())
    assert {one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in slices(node)} == before


def test_the_end_of_a_pod_frees_everything(node: Cluster) -> None:
    """Ledger, CDI file, metadata: as if it had never been."""
    node.api.create(template("made", request("cpus", "cpu", cpus="1"), request("port", "char")))
    run_pod(node, "ended", {"mine": "@made"})
    assert len(node.grants()) == 2 and len([*node.cdi.iterdir()]) == 1
    delete_pod(node, "ended")
    until("nothing is granted", lambda: not node.grants())
    until("no CDI file is left", lambda: not [*node.cdi.iterdir()])
    assert not [*(node.folder / "agent/run/claims").iterdir()]
