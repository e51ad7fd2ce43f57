"""Both APIs of a real kubelet over one ledger, and the health of what they gave."""

from __future__ import annotations

import time

from nodeagent.core.model.cpuset import CpuSet
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import claim, pod, pod_path, request, until
from tests.e2e.nodefiles import PORTS
from tests.e2e.nodeview import (
    HELD,
    UNHEALTHY,
    XID_GPU,
    allocatable,
    allocated,
    delete_pod,
    devices,
    health_of,
    metadata,
    need_nvml,
    of_gpu,
    run_pod,
    running,
    said,
    taints,
    unschedulable,
)

node, started = nodeview.node, nodeview.started

STEADY_S = 10.0
"""Several polls of NVML, and longer than devices take to recover here."""

# ---------------------------------------------------------------- both APIs, one ledger


def test_what_the_device_plugin_gave_cannot_be_claimed(node: Cluster) -> None:
    run_pod(node, "old", port="1")
    (path,) = [word.partition(" ")[2] for word in said(node, "old") if word.startswith("NODE ")]

    def tainted() -> list[str]:
        return [name for name, one in devices(node, "char").items() if HELD in taints(one)]

    (held,) = until("the device is tainted", tainted)
    assert devices(node, "char")[held]["attributes"]["resource"]["string"] == "port"
    node.api.create(claim("every", request("ports", "char", count=len(PORTS))))
    node.api.create(pod("new", claims={"ports": "every"}))
    unschedulable(node, "new")
    delete_pod(node, "old")
    until("the taint is gone", lambda: devices(node, "char") and not tainted())
    running(node, "new")
    assert {one["paths"][0] for one in metadata(node, "new")} == {*PORTS} and path in PORTS


def test_what_a_claim_holds_the_device_plugin_does_not_offer(node: Cluster) -> None:
    assert until("kubelet shows all ports", lambda: allocatable(node, "port") == len(PORTS))
    node.api.create(claim("two", request("ports", "char", count=2)))
    run_pod(node, "new", {"ports": "two"})
    until("kubelet shows one port less for each", lambda: allocatable(node, "port") == len(PORTS) - 2)
    run_pod(node, "old", port="1")
    (path,) = [word.partition(" ")[2] for word in said(node, "old") if word.startswith("NODE ")]
    assert path not in {one["paths"][0] for one in metadata(node, "new")}
    delete_pod(node, "new")
    until("kubelet shows all ports again", lambda: allocatable(node, "port") == len(PORTS))


def test_cpus_that_the_device_plugin_gave_are_missing_from_the_capacity(node: Cluster) -> None:
    def capacity() -> int:
        return sum(int(one["capacity"]["cpus"]["value"]) for one in devices(node, "cpu").values())

    run_pod(node, "old", cpu="3")
    until("the capacity shrank", lambda: capacity() == 5)
    node.api.create(claim("rest", request("cpus", "cpu", cpus=str(4))))
    run_pod(node, "new", {"cpus": "rest"})
    old, new = (CpuSet.parse(said(node, name)["NODEAGENT_CPUS"]) for name in ("old", "new"))
    assert (len(old), len(new)) == (3, 4) and not old & new
    delete_pod(node, "old")
    until("the capacity is whole again", lambda: capacity() == 8)


# ---------------------------------------------------------------- health


def test_an_unhealthy_device_is_seen_in_the_pods_status_and_no_longer_given(node: Cluster) -> None:
    """Until the admin clears the error, which outlasts several polls of NVML."""
    need_nvml(node)
    node.api.create(claim("gpu", request("gpu", "gpu", selector=of_gpu(XID_GPU))))
    run_pod(node, "sick", {"gpu": "gpu"})
    (name,) = allocated(node, "gpu")

    until("the pod's device is healthy", lambda: health_of(node, "sick") == ["Healthy"])
    node.xid_file.touch()
    until("the pod's device is unhealthy", lambda: health_of(node, "sick") == ["Unhealthy"])
    assert UNHEALTHY in taints(devices(node, "gpu")[name])
    time.sleep(STEADY_S)
    assert health_of(node, "sick") == ["Unhealthy"], "a fatal error does not end because NVML shows the GPU again"
    node.clear_health(XID_GPU)
    until("it is healthy again", lambda: health_of(node, "sick") == ["Healthy"], 60)
    until("the taint is gone", lambda: not taints(devices(node, "gpu").get(name, {"taints": [{"key": ""}]})))


def test_an_unhealthy_device_evicts_its_pod_where_that_is_configured(node: Cluster) -> None:
    """unhealthyEffect is taken over by the running agent."""
    need_nvml(node)
    node.write_agent_config(unhealthyEffect="NoExecute")
    node.api.create(claim("gpu", request("gpu", "gpu", selector=of_gpu(XID_GPU))))
    run_pod(node, "sick", {"gpu": "gpu"})
    node.xid_file.touch()
    until("the pod is evicted", lambda: node.api.find(pod_path("sick")) is None)
    node.clear_health(XID_GPU)
    node.write_agent_config()
    until("the device is well again", lambda: not [one for one in devices(node, "gpu").values() if taints(one)])


def test_a_device_that_comes_and_goes_is_published_and_withdrawn(node: Cluster) -> None:
    path = "/dev/ttyE2E9"
    node.plug(path)
    until("the device is published", lambda: len(devices(node, "char")) == len(PORTS) + 1)
    node.unplug(path)
    until("the device is withdrawn", lambda: len(devices(node, "char")) == len(PORTS))


def test_a_device_that_is_lost_while_it_is_held_is_unhealthy_in_the_pods_status(node: Cluster) -> None:
    """And keeps neither its pod from ending nor the rest from being given again."""
    path = "/dev/ttyE2E8"
    node.plug(path)
    until("the device is published", lambda: len(devices(node, "char")) == len(PORTS) + 1)
    node.api.create(claim("every", request("ports", "char", count=len(PORTS) + 1)))
    run_pod(node, "bereft", {"ports": "every"})
    assert path in {one["paths"][0] for one in metadata(node, "bereft")}
    until("all are healthy", lambda: health_of(node, "bereft") == ["Healthy"] * (len(PORTS) + 1))
    node.unplug(path)
    expected = ["Healthy"] * len(PORTS) + ["Unhealthy"]
    until("the lost one is unhealthy", lambda: health_of(node, "bereft") == expected)
    delete_pod(node, "bereft")
    until("nothing is granted", lambda: not node.grants())
