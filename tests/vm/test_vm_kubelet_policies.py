"""A real kubelet with policies of its own: its protection of memory, its static CPU and memory managers, its topology
manager. Each test starts it again with another configuration, in one guest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.kubeapi import Object, pod_path, until
from tests.vm import vmcluster
from tests.vm.vmcluster import STEP_S, Node
from tests.vm.vmforms import container, created, document, first, gone, held, of_container, of_pod
from tests.vm.vmpods import CPU, cpus
from tests.vm.vmsettings import configure_agent, configure_kubelet, refused

NVME = "nodeagent.dev/nvme"
RESOURCES = [
    *vmcluster.RESOURCES,
    {"name": "nvme", "kind": "nvme"},
    {"name": "hugepages-2Mi", "kind": "hugepages", "pageSize": "2Mi"},
]
MIB, PAGE = 1 << 20, 4096
BURSTABLE = "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice"
TIERED = {
    "featureGates": {"MemoryQoS": True},
    "memoryReservationPolicy": "TieredReservation",
    "memoryThrottlingFactor": 0.9,
}
ROUNDS = 2
"""Of kubelet's periodic writes, one a minute."""
STATIC: dict[str, Any] = {
    "cpuManagerPolicy": "static",
    "cpuManagerPolicyOptions": {"strict-cpu-reservation": "true"},
    "cpuManagerReconcilePeriod": "5s",
}
MEMORY_STATIC: dict[str, Any] = {
    "memoryManagerPolicy": "Static",
    "reservedMemory": [{"numaNode": 0, "limits": {"memory": "50Mi"}}],
}
"""As much as kubelet keeps for itself: what it evicts at (nodefiles.kubelet_settings)."""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with vmcluster.node(resources=RESOURCES, hugepages=[{"pageSize": "2Mi", "node": 1, "pages": 8}]) as made:
        yield made


def drifts(node: Node) -> int:
    found: int = node.status()["pinning"]["drifts"]
    return found


def allocatable(node: Node) -> dict[str, str]:
    found: dict[str, str] = node.api.call("GET", f"/api/v1/nodes/{vmcluster.NODE}")["status"]["allocatable"]
    return found


def unscheduled(node: Node, name: str) -> str:
    """Why the scheduler finds no place for a pod."""

    def look() -> str:
        conditions = node.api.call("GET", pod_path(name))["status"].get("conditions", ())
        return next((one["message"] for one in conditions if one.get("reason") == "Unschedulable"), "")

    return until(f"pod {name} has no place", look, STEP_S)


def rejected(node: Node, wanted: Object) -> str:
    """With which reason kubelet rejects a pod."""
    name = wanted["metadata"]["name"]
    node.api.create(wanted)
    status = until(f"pod {name} is rejected", lambda: _failed(node, name), STEP_S)
    node.delete_pod(name)
    return str(status["reason"])


def _failed(node: Node, name: str) -> Object:
    status: Object = node.api.call("GET", pod_path(name))["status"]
    return status if status["phase"] == "Failed" else {}


# ---------------------------------------------------------------- protection of memory


def test_kubelets_protection_of_memory_and_the_cpusets_leave_each_other_alone(node: Node) -> None:
    """Kubelet writes what it protects of kubepods and its classes once a minute, through systemd, which writes all else
    of these cgroups again."""
    configure_kubelet(node, **TIERED)
    node.ready()
    amounts = {"requests": {"memory": "64Mi"}, "limits": {"memory": "128Mi"}}
    created(node, "protected", main=(container("main", 2, **amounts), container("plain")))
    node.run_pod("shared")
    own, shared = held(node, "protected")["main"], cpus(node.effective("shared"))
    high = (64 * MIB + int(64 * MIB * 0.9)) // PAGE * PAGE
    memory = ["memory.low", "memory.high", "memory.max"]
    assert of_container(node, "protected", *memory) == [str(64 * MIB), str(high), str(128 * MIB)]
    assert of_pod(node, "protected", "memory.low") == [str(64 * MIB)]
    assert first(node, "protected", "main") == cpus(node.effective("protected")) == own
    before = drifts(node)
    for _ in range(ROUNDS):
        node.guest.run(f"echo {PAGE} >{BURSTABLE}/memory.low")
        node.guest.run(f"grep -qx {64 * MIB} {BURSTABLE}/memory.low", until=True)
        assert cpus(node.effective("protected")) == own
        assert cpus(node.effective("shared")) == shared
    assert of_container(node, "protected", *memory) == [str(64 * MIB), str(high), str(128 * MIB)]
    assert drifts(node) == before
    node.delete_pod("shared")
    gone(node, "protected")


# ---------------------------------------------------------------- the static managers


def test_what_kubelets_static_managers_have_is_refused_with_the_reason(node: Node) -> None:
    """Other kinds are served. A pod that wants what is refused waits for a node that has it."""
    configure_kubelet(node, reservedSystemCPUs="0-1", **STATIC, **MEMORY_STATIC)
    why = refused(node, "cpu", "hugepages-2Mi")
    assert why["cpu"].startswith("kubelet's static CPU manager has CPUs 2-15 too")
    assert "cpuManagerPolicy: none" in why["cpu"] and "or reservedCpus so that" in why["cpu"]
    assert why["hugepages-2Mi"].startswith("kubelet's memory manager is Static")
    assert "memoryManagerPolicy: None" in why["hugepages-2Mi"]
    until("the Node has no CPUs of the agent's", lambda: allocatable(node).get(CPU, "0") == "0", STEP_S)
    node.api.create(document("waits", main=(container("main", 2),)))
    assert f"Insufficient {CPU}" in unscheduled(node, "waits")
    created(node, "disk", main=(container("main", limits={NVME: "1"}),))
    node.delete_pod("waits")
    gone(node, "disk")


def test_disjoint_sets_of_cpus_are_exclusive_by_kubelet_and_by_the_agent(node: Node) -> None:
    """Kubelet looks every 5 s whether containers are where it wants them, and moves all that have no CPUs of its own
    when another gets some: not those that the agent has pinned. It moves a pod too that the agent had confined to
    other CPUs before."""
    configure_kubelet(node)
    refused(node)
    node.ready()
    node.run_pod("elder")
    configure_agent(node, reservedCpus="0-7")
    until("the agent has confined it", lambda: cpus(node.effective("elder")) == cpus("8-15"), STEP_S)
    configure_kubelet(node, reservedSystemCPUs="0-1,8-15", **STATIC)
    refused(node)
    node.ready()
    created(node, "ours", main=(container("main", 2),))
    node.run_pod("plain")
    amounts = {"cpu": "2", "memory": "64Mi"}
    of_kubelet = set[int]()
    for name in ("theirs", "more"):
        created(node, name, main=(container("main", limits=amounts, requests=amounts),))
        of_kubelet |= cpus(node.effective(name))
        left = cpus("2-7") - of_kubelet
        for other in ("elder", "plain"):
            until(f"kubelet has moved {other}", lambda: cpus(node.effective(other)) == left, STEP_S)  # noqa: B023
        assert cpus(node.effective("ours")) == first(node, "ours", "main") == held(node, "ours")["main"]
    assert len(of_kubelet) == 4 and of_kubelet < cpus("2-7")
    assert len(held(node, "ours")["main"]) == 2 and held(node, "ours")["main"] < cpus("8-15")
    shown = node.status()
    assert shown["ready"] and not shown["pinning"]["errors"] and not shown["pinning"]["drifts_not_repaired"]
    print(f"vm: drifts alongside kubelet's static manager: {shown['pinning']['drifts']}", flush=True)
    for name in ("elder", "plain", "theirs", "more"):
        node.delete_pod(name)
    gone(node, "ours")
    configure_agent(node)


# ---------------------------------------------------------------- the topology manager


def test_single_numa_node_admits_what_fits_one_node_and_rejects_the_rest(node: Node) -> None:
    """The disk is on the first NUMA node, which has two CPUs that are not reserved; others have four."""
    configure_kubelet(node, topologyManagerPolicy="single-numa-node")
    refused(node)
    node.ready()
    near = cpus(node.guest.topology.cpulist(node.guest.topology.expander_nodes[0]))
    disk = {NVME: "1"}
    far = document("far", main=(container("main", 3, limits=disk),))
    wide = document("wide", main=(container("main", 5),))
    assert [rejected(node, one) for one in (far, wide)] == ["TopologyAffinityError"] * 2
    assert not node.grants()
    created(node, "near", main=(container("main", 2, limits=disk),))
    created(node, "whole", main=(container("main", 4),))
    assert first(node, "near", "main") == cpus(node.effective("near")) < near
    whole = cpus(node.effective("whole"))
    assert len(whole) == 4 and f"{min(whole)}-{max(whole)}" in map(node.guest.topology.cpulist, range(4))
    (address,) = devices_of(node, "near")
    assert node.guest.run(f"cat /sys/bus/pci/devices/{address}/numa_node").strip() == "0"
    node.delete_pod("whole")
    gone(node, "near")


def devices_of(node: Node, pod: str) -> list[str]:
    found = json.loads(node.guest.run("nodeagent grants -o json"))
    return [device for one in found if one["pod"] == pod for device in one["devices"]]
