"""What `nodeagent forecast` says is what the scheduler and kubelet then admit, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.grounds import minor_version
from tests.e2e.kubeapi import DRA, Object, claim, pod, request, until
from tests.e2e.nodefiles import DRIVER, PORTS
from tests.e2e.nodeview import NUMA, allocatable, devices, run_pod, running, unschedulable
from tests.support.running import CHECKOUT

node, started = nodeview.node, nodeview.started


def forecast(node: Cluster, kind: str, *objects: Object) -> dict[str, Any]:
    """The answer for `--claim` or `--pod`."""
    manifest = node.folder / f"{kind}.yaml"
    manifest.write_text(yaml.safe_dump_all(objects))
    words = ["forecast", f"--{kind}", str(manifest), "--socket", str(node.folder / "agent/run/status.sock")]
    command = [sys.executable, "-m", "nodeagent", *words, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def classes(node: Cluster) -> Object:
    """What kubectl prints of them."""
    items = node.api.items(f"{DRA}/deviceclasses")
    kinded = [{"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", **one} for one in items]
    return {"apiVersion": "v1", "kind": "List", "items": kinded}


COUNTERS_GIVEN_BACK = 37
"""From this minor version on the scheduler tries a device with counters again alongside other CPUs."""
CLAIMS: dict[str, tuple[Object, ...]] = {
    "cpus": (request("r", "cpu", cpus="3"),),
    "near-gpus": (request("cpus", "cpu", cpus="1"), request("gpu", "gpu")),
    "ports": (request("r", "char", count=2),),
}


@pytest.mark.parametrize("busy", [False, True], ids=["empty", "busy"])
@pytest.mark.parametrize("name", CLAIMS)
def test_as_many_claims_run_as_were_forecast(node: Cluster, name: str, busy: bool) -> None:
    """On a node that holds something already too: CPUs and a port through the device plugin."""
    requests, match = CLAIMS[name], NUMA if name == "near-gpus" else ""
    if match and (minor := minor_version()) and minor < COUNTERS_GIVEN_BACK:
        pytest.skip(f"the scheduler of Kubernetes 1.{minor} loses the counters of a device that does not match")
    until("the pools are there", lambda: devices(node, "cpu") and devices(node, "char"))
    if busy:
        until("kubelet shows everything", lambda: allocatable(node, "port") == len(PORTS))
        run_pod(node, "old", cpu="3", port="1")
    one = claim("c", *requests, match=match)
    found = forecast(node, "claim", {**one, "metadata": {"name": "c"}}, classes(node))
    assert 0 <= found["now"] <= found["on_empty"] and (busy or found["now"] == found["on_empty"])
    for number in range(found["now"] + 1):
        node.api.create(claim(f"c{number}", *requests, match=match))
        node.api.create(pod(f"p{number}", claims={"mine": f"c{number}"}))
        if number < found["now"]:
            running(node, f"p{number}")
    unschedulable(node, f"p{found['now']}")


LIMITS: dict[str, Mapping[str, str]] = {"cpus": {"cpu": "3"}, "both": {"cpu": "1", "port": "1"}}


@pytest.mark.parametrize("name", LIMITS)
def test_as_many_pods_run_as_were_forecast(node: Cluster, name: str) -> None:
    """Through the device plugin, alongside a claim that holds CPUs."""
    node.api.create(claim("held", request("r", "cpu", cpus="2")))
    run_pod(node, "old", {"mine": "held"})
    limits = {f"{DRIVER}/{one}": count for one, count in LIMITS[name].items()}
    until("kubelet shows what is left", lambda: allocatable(node, "cpu") == 6 and allocatable(node, "port") == 3)
    found = forecast(node, "pod", pod("p", limits=limits))
    for number in range(found["now"] + 1):
        node.api.create(pod(f"p{number}", limits=limits))
        if number < found["now"]:
            running(node, f"p{number}")
    unschedulable(node, f"p{found['now']}")
