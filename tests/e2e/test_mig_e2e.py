"""A real scheduler packs MIG instances that are made on demand: everything that it allocates can be made, and what the
geometry cannot hold is not allocated.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e/test_mig_e2e.py

The folder holds etcd, kube-apiserver and kube-scheduler, or PATH has them. No root is needed and no kubelet runs: its
side is a double, and so is the driver, which decides as a real one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.e2e import apiserver
from tests.e2e.kubeapi import DRA, KubeApi, Object, claim, claim_path, pod, pod_path, request, until
from tests.e2e.nodefiles import write_kubeconfig
from tests.support.mig_driver import MigDriver
from tests.support.mig_node import MIG
from tests.support.paths import CHECKOUT
from tests.support.running import running

LACKING = apiserver.lacking("kube-scheduler") if (CHECKOUT / "deploy").exists() else "the classes lie in the checkout"
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)
NODE, DRIVER = "worker-1", "nodeagent.dev"
STEP_S = 90.0
MERGE = "application/merge-patch+json"
CAPACITY = {"cpu": "64", "memory": "256Gi", "pods": "110"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, KubeApi]]:
    """An API server with one Node, the shipped classes, and a scheduler."""
    folder = tmp_path_factory.mktemp("apiserver")
    with apiserver.api_server(folder) as api, apiserver.scheduler(folder):
        api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        ready = [{"type": "Ready", "status": "True", "reason": "Test", "message": ""}]
        status = {"status": {"capacity": CAPACITY, "allocatable": CAPACITY, "conditions": ready}}
        api.call("PATCH", f"/api/v1/nodes/{NODE}/status", status, MERGE)
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": "default"},
        }
        api.create(account)
        for one in yaml.safe_load_all((CHECKOUT / "deploy" / "deviceclasses.yaml").read_text()):
            api.create(one)
        yield folder, api


class Packing:
    """Pods with a claim each, on a node that is there."""

    def __init__(self, api: KubeApi, side: FakeDraKubelet) -> None:
        self.api, self.side = api, side
        self.names: list[str] = []

    def ask(self, profile: str) -> str:
        """A pod with a claim for one instance; its name."""
        name = f"p{len(self.names)}"
        self.names.append(name)
        selector = f'device.attributes["{DRIVER}"].migProfile == "{profile}"'
        self.api.create(claim(name, request("gpu", "gpu-part", selector=selector)))
        self.api.create(pod(name, claims={"gpu": name}))
        return name

    def allocated(self, name: str) -> Object | None:
        found = self.api.find(claim_path(name)) or {}
        return found if found.get("status", {}).get("reservedFor") else None

    def unschedulable(self, name: str) -> bool:
        status = (self.api.find(pod_path(name)) or {}).get("status", {})
        return any(one.get("reason") == "Unschedulable" for one in status.get("conditions", ()))

    async def prepare(self, name: str) -> str:
        """Why kubelet cannot prepare a claim, once it is allocated."""
        made = await asyncio.to_thread(until, f"{name} is allocated", lambda: self.allocated(name), STEP_S)
        id = ClaimId("default", name, made["metadata"]["uid"])
        return (await self.side.prepare(DRIVER, [id]))[id.uid].error

    async def end(self) -> None:
        """Delete everything, as kubelet and the controllers do it."""
        for name in self.names:
            found = self.api.find(claim_path(name)) or {"metadata": {"uid": ""}}
            await self.side.unprepare(DRIVER, [ClaimId("default", name, found["metadata"]["uid"])])
            self.api.delete(f"{pod_path(name)}?gracePeriodSeconds=0")
            self.api.call("PATCH", claim_path(name), {"metadata": {"finalizers": None}}, MERGE)
            self.api.delete(claim_path(name))
        await asyncio.to_thread(until, "they are gone", lambda: not any(self._there()), STEP_S)

    def _there(self) -> Iterator[Any]:
        return (self.api.find(path) for name in self.names for path in (claim_path(name), pod_path(name)))


@pytest.mark.parametrize(
    ("wants", "too_much"),
    [
        (["1g.10gb"] * 14, "1g.10gb"),
        (["4g.40gb", "3g.40gb", "3g.40gb", "4g.40gb"], "1g.10gb"),
        (["3g.40gb"] * 4, "1g.10gb+me"),
        (["1g.10gb", "2g.20gb", "4g.40gb", "4g.40gb", "2g.20gb", "1g.10gb"], "1g.20gb"),
        (["1g.10gb+me", "3g.40gb", "1g.10gb", "4g.40gb", "1g.20gb", "1g.10gb+me", "1g.10gb"], "1g.10gb+me"),
        (["7g.80gb", "3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"], "1g.10gb"),
    ],
    ids=["14x1g", "4g+3g", "3g+3g", "4g+2g+1g", "mixture", "7g and others"],
)
async def test_two_gpus_are_packed_without_a_failed_prepare(
    folder: Path,
    server: tuple[Path, KubeApi],
    monkeypatch: pytest.MonkeyPatch,
    wants: Sequence[str],
    too_much: str,
) -> None:
    made, api = server
    driver, tree = (
        MigDriver.of(folder / "nvml", "h100-80", "h100-80"),
        DeviceTree(machine(folder / "root", "1s2n4c-smt")),
    )
    driver.machine(tree)
    driver.install(tree.root)
    monkeypatch.setenv("FAKE_NVML_STATE", str(driver.path))
    write_kubeconfig(folder / "kubeconfig", api.port, apiserver.ADMIN, made / "apicert/apiserver.crt")
    access = {"kubeconfig": str(folder / "kubeconfig"), "nodeName": NODE, "cdiDir": str(folder / "cdi")}
    options = {"resources": [MIG], "dra": {**access, "spreadSeconds": 0}, "events": {"enabled": False}}
    async with (
        FakeKubelet(folder / "kubelet"),
        FakeDraKubelet(folder / "kubelet") as side,
        running(folder, root=tree.root, **options),
    ):
        await side.wait_registered(DRIVER)
        await asyncio.to_thread(until, "50 parts", lambda: _parts(api) == 50, STEP_S)
        packing = Packing(api, side)
        names = [packing.ask(profile) for profile in wants]
        assert [await packing.prepare(name) for name in names] == [""] * len(names)
        assert sorted(one.profile for one in driver.instances()) == sorted(wants)
        extra = packing.ask(too_much)
        await asyncio.to_thread(until, "it does not fit", lambda: packing.unschedulable(extra), STEP_S)
        assert packing.allocated(extra) is None
        await packing.end()
        assert driver.instances() == []


def _parts(api: KubeApi) -> int:
    return sum(len(one["spec"].get("devices", ())) for one in api.items(f"{DRA}/resourceslices"))
