"""Linked GPUs and ready-made sets of them, allocated by a real scheduler, and prepared the first time.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e/test_gpu_links_e2e.py

The folder holds etcd, kube-apiserver and kube-scheduler (1.36 or later), or PATH has them. No root is needed and no
kubelet runs: its side is a double. The GPUs are AMD's, eight in two hives that alternate in order of address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.e2e import apiserver, grounds, programs
from tests.e2e.cluster import ADMIN
from tests.e2e.kubeapi import DRA, KubeApi, Object, claim, claim_path, pod, pod_path, request, until
from tests.e2e.nodefiles import write_kubeconfig
from tests.support.paths import CHECKOUT
from tests.support.running import Running, running

LACKING = apiserver.lacking("kube-scheduler") if (CHECKOUT / "deploy").exists() else "the classes lie in the checkout"
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)

NODE, DRIVER, HIVE = "worker-1", "nodeagent.dev", "nodeagent.dev/xgmiHive"
GPUS = [f"0000:{bus:02x}:00.0" for bus in range(1, 9)]
HIVES = {*GPUS[0::2]}, {*GPUS[1::2]}
RESOURCES = [
    {"name": "gpu", "kind": "gpu", "serve": "both", "match": {"parent": ""}},
    {"name": "gpu-2", "kind": "gpu", "serve": "both", "match": {"group": "2"}},
    {"name": "gpu-4", "kind": "gpu", "serve": "both", "match": {"group": "4"}},
]
MERGE = "application/merge-patch+json"
ALLOCATABLE = {"pods": "110", "cpu": "8", "memory": "16Gi"}


def tree_of(root: Path) -> DeviceTree:
    tree = DeviceTree(machine(root, "1s2n4c-smt"))
    for number, address in enumerate(GPUS):
        tree.pci(address, pci_class="120000", vendor="1002", device="74a1", driver="amdgpu", numa_node=number % 2)
        tree.drm(address, number)
        tree.node(f"/dev/dri/card{number}")
        tree.node(f"/dev/dri/renderD{128 + number}")
        peers = [other + 1 for other in range(8) if other != number and other % 2 == number % 2]
        tree.kfd(number + 1, address, peers, unique_id=number + 1)
    tree.node("/dev/kfd")
    return tree


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    """An API server, a scheduler, the shipped classes and a Node."""
    folder = tmp_path_factory.mktemp("scheduler")
    with apiserver.api_server(folder) as api, (folder / "kube-scheduler.log").open("wb") as log:
        for one in yaml.safe_load_all((CHECKOUT / "deploy/deviceclasses.yaml").read_text()):
            api.create(one)
        account = {"name": "default", "namespace": "default"}
        api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
        status = {"allocatable": ALLOCATABLE, "capacity": ALLOCATABLE, "conditions": [ready]}
        api.call("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": status}, MERGE)
        env = {**os.environ, "PATH": grounds.path()}
        words = programs.command("kube-scheduler", folder, {})
        process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
        try:
            yield api
        finally:
            process.kill()
            process.wait()


@dataclass
class Node:
    """An agent, kubelet's side and the API server."""

    agent: Running
    kubelet: FakeDraKubelet
    api: KubeApi

    def run(self, name: str, *requests: Object, match: str = "") -> None:
        """Create a pod with a claim of its own."""
        self.api.create(claim(name, *requests, match=match))
        self.api.create(pod(name, claims={"c": name}))

    async def allocated(self, name: str) -> list[str]:
        """The names of the devices that the scheduler has allocated to the pod that it has bound."""
        await asyncio.to_thread(until, f"{name} is bound", lambda: self._pod(name)["spec"].get("nodeName"))
        results = self._claim(name)["status"]["allocation"]["devices"]["results"]
        return sorted(one["device"] for one in results)

    async def refused(self, name: str) -> str:
        """What the scheduler says of a pod that it cannot place."""

        def look() -> str:
            conditions = self._pod(name).get("status", {}).get("conditions", [])
            found = [one for one in conditions if one["type"] == "PodScheduled" and one["status"] == "False"]
            return str(found[0]["message"]) if found else ""

        return str(await asyncio.to_thread(until, f"{name} is refused", look))

    async def prepare(self, name: str) -> str:
        uid = self._claim(name)["metadata"]["uid"]
        answers = await self.kubelet.prepare(DRIVER, [ClaimId("default", name, uid)])
        return answers[uid].error

    async def gpus(self, name: str) -> set[str]:
        """The PCI addresses of the GPUs that a claim holds, by the ledger."""
        grants = (await self.agent.ask("/v1/grants"))[1]
        devices = [device for one in grants if one["claim"] == name for device in one["devices"]]
        inventory = (await self.agent.ask("/v1/inventory"))[1]
        members = {one["id"]: str(one["attributes"].get("members", one["id"])) for one in inventory["devices"]}
        return {address for one in devices for address in members[one].split(",")}

    async def forget(self, *names: str) -> None:
        """What kubelet and the controllers do at a pod's end."""
        for name in names:
            uid = self._claim(name)["metadata"]["uid"]
            await self.kubelet.unprepare(DRIVER, [ClaimId("default", name, uid)])
            self.api.call(
                "DELETE", pod_path(name), {"gracePeriodSeconds": 0, "kind": "DeleteOptions", "apiVersion": "v1"}
            )
            gone = {"status": {"reservedFor": None, "allocation": None}}
            self.api.call("PATCH", f"{claim_path(name)}/status", gone, MERGE)
            self.api.call("PATCH", claim_path(name), {"metadata": {"finalizers": None}}, MERGE)
            self.api.delete(claim_path(name))

    def _pod(self, name: str) -> Any:
        return self.api.call("GET", pod_path(name))

    def _claim(self, name: str) -> Any:
        return self.api.call("GET", claim_path(name))


@contextlib.asynccontextmanager
async def node(folder: Path, api: KubeApi, config: Path) -> AsyncIterator[Node]:
    tree = tree_of(folder / "root")
    dra = {"kubeconfig": str(config), "nodeName": NODE, "cdiDir": str(folder / "cdi"), "spreadSeconds": 0}
    async with (
        FakeKubelet(folder / "kubelet"),
        FakeDraKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree.root, resources=RESOURCES, dra=dra) as agent,
    ):
        await kubelet.wait_registered(DRIVER)
        await asyncio.to_thread(until, "the GPUs are published", lambda: _published(api))
        yield Node(agent, kubelet, api)


def _published(api: KubeApi) -> bool:
    slices = api.items(f"{DRA}/resourceslices")
    names = [device["name"] for one in slices for device in one["spec"].get("devices", ())]
    return len(names) == 8 + 4 + 2


@pytest.fixture
def config(api: KubeApi, tmp_path: Path) -> Path:
    write_kubeconfig(tmp_path / "kubeconfig", api.port, ADMIN)
    return tmp_path / "kubeconfig"


async def test_a_claim_for_four_linked_gpus_gets_one_hive_the_first_time(
    folder: Path, api: KubeApi, config: Path
) -> None:
    """The hives alternate: the first four GPUs in order are not linked. A third claim is refused."""
    async with node(folder, api, config) as one:
        four = request("gpus", "gpu", count=4)
        one.run("first", four, match=HIVE)
        assert len(await one.allocated("first")) == 4
        assert await one.prepare("first") == ""
        one.run("second", four, match=HIVE)
        await one.allocated("second")
        assert await one.prepare("second") == ""
        held = [await one.gpus("first"), await one.gpus("second")]
        assert sorted(held, key=min) == sorted(HIVES, key=min)
        one.run("third", four, match=HIVE)
        assert "cannot allocate all claims" in await one.refused("third")
        await one.forget("first", "second", "third")


async def test_sets_and_single_gpus_are_never_allocated_together(folder: Path, api: KubeApi, config: Path) -> None:
    """One GPU is gone: one set of four and three pairs are left, and every claim that is allocated can be prepared."""
    quad = 'device.attributes["nodeagent.dev"].group == 4'
    pair = 'device.attributes["nodeagent.dev"].group == 2'
    async with node(folder, api, config) as one:
        one.run("single", request("gpu", "gpu"))
        (single,) = await one.allocated("single")
        assert not single.startswith("gpus-")
        one.run("quad", request("set", "gpu-group", selector=quad))
        (name,) = await one.allocated("quad")
        assert name.startswith("gpus-4-")
        one.run("another", request("set", "gpu-group", selector=quad))
        assert "cannot allocate all claims" in await one.refused("another")
        one.run("pair", request("set", "gpu-group", selector=pair))
        await one.allocated("pair")
        assert [await one.prepare(claim) for claim in ("single", "quad", "pair")] == ["", "", ""]
        held = [await one.gpus(claim) for claim in ("single", "quad", "pair")]
        assert [len(some) for some in held] == [1, 4, 2]
        assert len(set().union(*held)) == 7
        await one.forget("single", "quad", "another", "pair")
