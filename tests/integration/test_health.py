"""A device falls ill on a whole node: the same cause, in the same words, wherever an admin looks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import EVENTS
from tests.support.dra_node import DRIVER, NODE, DraNode, dra_node, result

NIC, NAME = "0000:3b:00.0", "0000-3b-00-0"
ADAPTERS = {"name": "nic", "kind": "nic", "serve": "both"}
QUICK = {"health": {"pollSeconds": 0.1, "recoverSeconds": 0.3}}
CAUSE = "no carrier on eth1"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    made = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    made.pci(NIC, driver="ice", numa_node=0)
    made.net(NIC, "eth1")
    return made


def plug(tree: DeviceTree, carrier: int) -> None:
    tree.write("sys/class/net/eth1/operstate", "up" if carrier else "down")
    tree.write("sys/class/net/eth1/carrier", carrier)


def taints(node: DraNode) -> list[str]:
    device = node.devices("nic").get(NAME, {})
    return [taint["value"] for taint in device.get("taints", ()) if taint["key"].endswith("/unhealthy")]


async def test_one_cause_is_told_in_the_same_words_everywhere(folder: Path, tree: DeviceTree) -> None:
    """To kubelet over both APIs, in the slice, the status, the metrics, the log and an Event; and so is its end."""
    async with dra_node(folder, tree, [ADAPTERS], more=QUICK) as node:
        await node.published("nic")
        await node.prepare(node.claim("c", result("nic", NAME)))
        assert taints(node) == []
        plug(tree, 0)
        await node.dra.wait_health(DRIVER, f"{NODE}/nic", NAME, "UNHEALTHY")
        assert node.dra.health(DRIVER)[f"{NODE}/nic", NAME] == ("UNHEALTHY", CAUSE)
        await node.api.until(lambda: taints(node) == ["unhealthy"])
        await node.kubelet.until(lambda: node.kubelet.healthy("nodeagent.dev/nic") == [])
        (shown,) = (await node.agent.ask("/v1/devices"))[1]
        assert (shown["id"], shown["state"], shown["reason"]) == (NIC, "unhealthy", CAUSE)
        (known,) = [one for one in (await node.agent.ask("/v1/health"))[1] if one["device"] == NIC]
        assert (known["state"], known["reason"]) == ("unhealthy", CAUSE)
        metrics = (await node.agent.ask("/metrics"))[1]
        assert f'nodeagent_device_ill{{device="{NIC}",reason="{CAUSE}",state="unhealthy"}} 1.0' in str(metrics)
        line = await node.agent.said("health-changed", device=NIC, state="unhealthy")
        assert line["reason"] == CAUSE
        await node.api.until(lambda: len(node.api.objects(EVENTS)) == 1)
        (event,) = node.api.objects(EVENTS)
        assert (event["reason"], event["note"]) == (
            "DeviceUnhealthy",
            f"device {NIC} is unhealthy: {CAUSE}; held by claim default/c",
        )
        plug(tree, 1)
        await node.dra.wait_health(DRIVER, f"{NODE}/nic", NAME, "HEALTHY")
        await node.api.until(lambda: len(node.api.objects(EVENTS)) == 2 and taints(node) == [])
        assert re.search(f'nodeagent_device_ill{{device="{NIC}"', str((await node.agent.ask("/metrics"))[1])) is None
        assert node.api.rejected == []


async def test_an_adapter_without_a_link_is_unhealthy_from_the_start_and_counts_again_when_ignored(
    folder: Path, tree: DeviceTree
) -> None:
    """The switch is live."""
    plug(tree, 0)
    async with dra_node(folder, tree, [ADAPTERS], more=QUICK) as node:
        await node.kubelet.until(lambda: node.kubelet.healthy("nodeagent.dev/nic") == [])
        node.agent.configure(**{**node.options, "health": {**QUICK["health"], "ignore": ["carrier"]}})
        await node.kubelet.until(lambda: node.kubelet.healthy("nodeagent.dev/nic") == [NIC])


async def test_a_missing_device_node_and_the_illness_of_a_whole_are_told_in_the_same_words_everywhere(
    folder: Path, tree: DeviceTree
) -> None:
    """Causes that no source reports: they follow from the inventory. To kubelet, in slices, metrics and pages."""
    gpu, vf, cause = "0000:41:00.0", "0000:3b:02.0", "there is no device node to hand over"
    tree.pci(gpu, pci_class="030200", vendor="1002", driver="amdgpu", numa_node=0)
    tree.vf(NIC, 0, vf)
    plug(tree, 0)
    async with dra_node(folder, tree, [ADAPTERS, {"name": "gpu", "kind": "gpu", "serve": "both"}], more=QUICK) as node:
        await node.published("gpu")
        await node.prepare(node.claim("c", result("gpu", "0000-41-00-0")))
        await node.dra.wait_health(DRIVER, f"{NODE}/gpu", "0000-41-00-0", "UNKNOWN")
        assert node.dra.health(DRIVER)[f"{NODE}/gpu", "0000-41-00-0"] == ("UNKNOWN", cause)
        await node.kubelet.until(lambda: node.kubelet.healthy("nodeagent.dev/gpu") == [])
        await node.kubelet.until(lambda: node.kubelet.healthy("nodeagent.dev/nic") == [])
        shown = {one["id"]: (one["state"], one["reason"]) for one in (await node.agent.ask("/v1/devices"))[1]}
        assert shown == {gpu: ("unknown", cause), NIC: ("unhealthy", CAUSE), vf: ("unhealthy", CAUSE)}
        known = {one["device"]: one for one in (await node.agent.ask("/v1/health"))[1]}
        assert {id: (one["state"], one["reason"]) for id, one in known.items()} == shown
        sources = {id: [one["source"] for one in known[id]["causes"] if one["reason"]] for id in known}
        assert sources == {gpu: ["device-node"], NIC: ["carrier"], vf: ["whole"]}
        metrics = str((await node.agent.ask("/metrics"))[1])
        for id, (state, reason) in shown.items():
            assert f'nodeagent_device_ill{{device="{id}",reason="{reason}",state="{state}"}} 1.0' in metrics
