"""Alongside other device plugins at a real kubelet: NVIDIA's names and UUIDs, SR-IOV's names and addresses."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import pod, until
from tests.e2e.nodefiles import GPUS
from tests.e2e.nodeview import HELD, allocatable, delete_pod, devices, need_nvml, run_pod, running, taints
from tests.support.paths import CHECKOUT

node, started = nodeview.node, nodeview.started

THEIRS = "nvidia.com/gpu"
FIRST = min(GPUS)


@contextlib.contextmanager
def other_plugin(node: Cluster, resource: str, *ids: str) -> Iterator[None]:
    folder = node.folder / "kubelet/device-plugins"
    words = [sys.executable, "-m", "tests.doubles.other_plugin", str(folder), resource, *ids]
    process = subprocess.Popen(words, cwd=CHECKOUT)
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(20) == 0


def offered(node: Cluster, resource: str) -> int:
    found = node.api.call("GET", f"/api/v1/nodes/{nodeview.NODE}")["status"].get("allocatable", {})
    return int(found.get(resource, 0))


def uuid_of(node: Cluster, address: str) -> str:
    """A GPU is listed before NVML has answered, which knows its UUID."""

    def known() -> str:
        every = node.ask_agent("/v1/inventory")["devices"]
        return str(next(one["attributes"].get("uuid", "") for one in every if one["id"] == address))

    return str(until("NVML names the GPU", known))


def gpu_refused(node: Cluster) -> str:
    return str(node.status().get("refused", {}).get("gpu through DRA", ""))


def test_gpus_of_nvidias_plugin_are_not_given_again(node: Cluster) -> None:
    """Not while it offers them, and what it gave to a pod not after its end either, until that pod has ended."""
    need_nvml(node)
    until("the GPUs are published", lambda: devices(node, "gpu"))
    with other_plugin(node, THEIRS, uuid_of(node, FIRST)):
        until("kubelet offers its GPU", lambda: offered(node, THEIRS) == 1)
        node.api.create(pod("theirs", limits={THEIRS: "1"}))
        running(node, "theirs")
        node.restart("nodeagent")
        until("the GPUs are refused", lambda: gpu_refused(node))
        wanted = f"another device plugin offers {FIRST} as {THEIRS}; set match so that the two have no device in common"
        until("the GPU is known by its UUID", lambda: gpu_refused(node) == f"{wanted}, or remove that plugin")
        until("no GPU is published", lambda: not devices(node, "gpu"))

        def held() -> list[tuple[str, str, list[str]]]:
            theirs = [one for one in node.grants() if one["api"] == "other-plugin"]
            return [(one["pod"], one["resource"], one["devices"]) for one in theirs]

        until("its pod is known as the holder", lambda: held() == [("theirs", THEIRS, [FIRST])])
    until("kubelet offers its GPU no more", lambda: offered(node, THEIRS) == 0)
    run_pod(node, "next", port="1")  # kubelet writes its checkpoint
    delete_pod(node, "next")
    node.restart("nodeagent")

    def tainted() -> list[str]:
        return [name for name, one in devices(node, "gpu").items() if HELD in taints(one)]

    until("the other GPUs are published", lambda: len(devices(node, "gpu")) > len(tainted()) > 0)
    assert all(FIRST.replace(":", "-").replace(".", "-") in name for name in tainted())
    delete_pod(node, "theirs")
    until("its GPU is free", lambda: devices(node, "gpu") and not tainted())


def test_a_device_that_another_plugin_names_by_its_path_is_not_offered_by_the_agents_device_plugin(
    node: Cluster,
) -> None:
    """The other way round of the API: kubelet is shown no port of the agent's while another plugin has one."""
    until("kubelet shows the ports", lambda: allocatable(node, "port") == 3)
    with other_plugin(node, "example.com/serial", "/dev/ttyE2E1"):
        until("kubelet offers it", lambda: offered(node, "example.com/serial") == 1)
        node.restart("nodeagent")
        until("the ports are refused", lambda: "nodeagent.dev/port" in node.status().get("refused", {}))
        until("kubelet shows none of the agent's", lambda: allocatable(node, "port") == 0)
    run_pod(node, "next", cpu="1")
    delete_pod(node, "next")
    node.restart("nodeagent")
    until("kubelet shows the ports again", lambda: allocatable(node, "port") == 3)


def test_gpus_that_another_driver_publishes_are_not_published_again(node: Cluster) -> None:
    """By the UUID in its slices; until two looks have missed them, or the agent starts again."""
    need_nvml(node)
    until("the GPUs are published", lambda: devices(node, "gpu"))
    theirs = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": "theirs"},
        "spec": {
            "driver": "gpu.example.com",
            "nodeName": nodeview.NODE,
            "pool": {"name": nodeview.NODE, "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "attributes": {"uuid": {"string": uuid_of(node, FIRST)}}}],
        },
    }
    node.api.create(theirs)
    node.restart("nodeagent")
    wanted = f"another DRA driver offers {FIRST} as gpu.example.com; set match so that the two have no device in common"
    until("the GPUs are refused", lambda: gpu_refused(node) == f"{wanted}, or remove that driver")
    until("no GPU is published", lambda: not devices(node, "gpu"))
    node.api.call("DELETE", "/apis/resource.k8s.io/v1/resourceslices/theirs")
    node.restart("nodeagent")
    until("the GPUs are published again", lambda: devices(node, "gpu"))
