"""Restarts and losses on a real node: what pods hold stays theirs, what is published comes back."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

from nodeagent.core.model.cpuset import CpuSet
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import DRA, claim, pod, pod_path, request, until
from tests.e2e.nodefiles import PORTS
from tests.e2e.nodeview import allocatable, allocated, devices, grants, run_pod, running, said, slices

node, started = nodeview.node, nodeview.started


def hold_some(node: Cluster) -> list[Any]:
    """A pod of each API; what they hold."""
    node.api.create(claim("kept", request("cpus", "cpu", cpus="2"), request("port", "char")))
    run_pod(node, "claimed", {"kept": "kept"})
    run_pod(node, "plugged", port="1")
    said(node, "claimed"), said(node, "plugged")
    return until("three grants", lambda: len(found := grants(node)) == 3 and found)


def containers(node: Cluster) -> Counter[str]:
    pods = (node.api.call("GET", pod_path(name)) for name in ("claimed", "plugged"))
    return Counter(
        f"{one['containerID']} {one['restartCount']}" for p in pods for one in p["status"]["containerStatuses"]
    )


def test_a_restart_of_kubelet_changes_nothing_that_is_held(node: Cluster) -> None:
    """Kubelet wipes the slices and the plugin sockets when it starts; both come back by themselves."""
    before, alive, were = hold_some(node), containers(node), {one["metadata"]["uid"] for one in slices(node)}
    node.restart("kubelet")
    until("kubelet wiped the old slices", lambda: not were & {one["metadata"]["uid"] for one in slices(node)})
    until("new ones are published", lambda: all(devices(node, kind) for kind in ("cpu", "char", "gpu", "hugepages")))
    until("kubelet shows the ports", lambda: allocatable(node, "port") == len(PORTS) - 1)
    node.agent_ready()
    assert (grants(node), containers(node)) == (before, alive)
    node.api.create(claim("later", request("cpus", "cpu", cpus="1")))
    run_pod(node, "later", {"cpus": "later"})


def test_a_kill_of_the_agent_changes_nothing_that_is_held(node: Cluster) -> None:
    """Also where another program removed the CDI files meanwhile; a pod that came meanwhile is served afterwards."""
    before, alive = hold_some(node), containers(node)
    files = {one: one.read_bytes() for one in node.cdi.iterdir()}
    assert node.stop("nodeagent", signal.SIGKILL) == -signal.SIGKILL
    for path in files:
        path.unlink()
    node.api.create(claim("meanwhile", request("cpus", "cpu", cpus="1")))
    node.api.create(pod("meanwhile", claims={"cpus": "meanwhile"}))
    allocated(node, "meanwhile")
    node.start("nodeagent")
    node.agent_ready()
    until("the CDI files are back", lambda: all(path.exists() and path.read_bytes() == files[path] for path in files))
    running(node, "meanwhile")
    after = [one for one in grants(node) if one in before]
    assert (after, containers(node)) == (before, alive)
    others = [CpuSet.parse(one["cpus"]) for one in node.grants() if one["cpus"]]
    assert sum(len(one) for one in others) == len({cpu for one in others for cpu in one}) == 3


def registered(node: Cluster, name: str) -> int:
    """How often kubelet took an agent for its DRA driver."""
    return sum("driver" in one for one in node.agent_said("registered", name))


def test_a_new_agent_takes_over_from_the_old_one_without_a_gap(node: Cluster) -> None:
    """As in a rolling change: both serve claims for a while, nothing that is published is withdrawn."""
    before, were = hold_some(node), {one["metadata"]["uid"] for one in slices(node)}
    node.start("nodeagent-new", POD_UID="c0ffee00-0000-4000-8000-000000000001")
    until("kubelet took the new one", lambda: registered(node, "nodeagent-new"))
    assert node.stop("nodeagent") == 0
    until("the new one leads", lambda: node.status().get("ready"))
    assert {one["metadata"]["uid"] for one in slices(node)} == were
    node.api.create(claim("later", request("cpus", "cpu", cpus="1")))
    run_pod(node, "later", {"cpus": "later"})
    assert [one for one in grants(node) if one in before] == before
    times = registered(node, "nodeagent")
    node.start("nodeagent")
    until("kubelet took the old one again", lambda: registered(node, "nodeagent") > times)
    assert node.stop("nodeagent-new") == 0
    node.agent_ready()
    assert {one["metadata"]["uid"] for one in slices(node)} == were


def test_slices_that_somebody_deleted_come_back(node: Cluster) -> None:
    for one in slices(node):
        node.api.delete(f"{DRA}/resourceslices/{one['metadata']['name']}")
    until("all are back", lambda: all(devices(node, kind) for kind in ("cpu", "char", "gpu", "hugepages", "memory")))


def test_an_agent_that_ends_withdraws_its_slices_and_keeps_what_is_held(node: Cluster) -> None:
    before = hold_some(node)
    assert node.stop("nodeagent") == 0
    assert slices(node) == []
    node.start("nodeagent")
    node.agent_ready()
    until("the slices are back", lambda: all(devices(node, kind) for kind in ("cpu", "char", "gpu", "hugepages")))
    assert grants(node) == before
