"""The whole agent on a node with NVIDIA's driver: what containers get of GPUs and of sets of them, over both APIs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.driver_root import VERSION, DriverRoot
from tests.builders.machines import machine
from tests.support.dra_node import DraNode, dra_node, result

GPU = "nodeagent.dev/gpu"
ADDRESSES = [f"0000:{bus}:00.0" for bus in ("1b", "3b")]
RESOURCES = [{"name": "gpu", "kind": "gpu", "serve": "both", "match": {"parent": ""}}]
LIBCUDA = "/usr/lib64/libcuda.so.1"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """Two GPUs that the kernel's driver shows, with the driver's files."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for minor, address in enumerate(ADDRESSES):
        made.pci(address, pci_class="030200", vendor="10de", device="2330", driver="nvidia", numa_node=minor)
        lines = f"Model: NVIDIA H100\nGPU UUID: GPU-{minor}\nBus Location: {address}\nDevice Minor: {minor}"
        made.write(f"proc/driver/nvidia/gpus/{address}/information", lines)
        made.node(f"/dev/nvidia{minor}")
    made.node("/dev/nvidiactl")
    made.write("sys/module/nvidia/version", VERSION)
    DriverRoot(made.root).install()
    return made


def name_of(node: DraNode, address: str) -> str:
    (name,) = [name for name, one in node.devices("gpu").items() if address in str(one["attributes"]["pciAddress"])]
    return name


def edits_of(node: DraNode, claim: Any) -> dict[str, Any]:
    found: dict[str, Any] = node.spec(claim)["devices"][0]["containerEdits"]
    return found


async def test_a_container_gets_the_files_under_the_device_plugin(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, RESOURCES) as node:
        await node.kubelet.wait_allocatable(GPU, 2)
        pod = await node.kubelet.admit_pod("default", "a", {"main": {GPU: 2}})
        answer = pod.responses["main"][GPU]
        mounts = {one.container_path: one.host_path for one in answer.mounts}
        assert mounts[LIBCUDA] == f"/usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}"
        assert all(one.read_only for one in answer.mounts)
        assert answer.envs["NVIDIA_VISIBLE_DEVICES"] == "void"
        assert {one.host_path for one in answer.devices} == {"/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"}


async def test_a_claim_gets_them_in_its_cdi_file_which_follows_the_driver(folder: Path, tree: DeviceTree) -> None:
    """With the hook where the host has it; an update of the driver renews the file of a claim that is held."""
    DriverRoot(tree.root).write("usr/bin/nvidia-cdi-hook", b"\x7fELF")
    async with dra_node(folder, tree, RESOURCES) as node:
        await node.published("gpu")
        claim = node.claim("c", result("gpu", name_of(node, ADDRESSES[0])))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        edits = edits_of(node, claim)
        assert {"hostPath": f"/usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}", "containerPath": LIBCUDA} in [
            {key: one[key] for key in ("hostPath", "containerPath")} for one in edits["mounts"]
        ]
        assert [one["path"] for one in edits["hooks"]] == ["/usr/bin/nvidia-cdi-hook"]
        shutil.rmtree(tree.root / "usr")
        DriverRoot(tree.root).install("590.10.01")
        tree.write("sys/module/nvidia/version", "590.10.01")
        await node.agent.until(
            "/v1/inventory", lambda found: found.get("nvidia_driver", {}).get("version") == "590.10.01"
        )
        (again,) = await node.prepare(claim)
        assert again.error == ""
        renewed = edits_of(node, claim)
        libraries = [one["hostPath"] for one in renewed["mounts"] if ".so." in one["hostPath"]]
        assert libraries and all(path.endswith("590.10.01") for path in libraries)
        assert "hooks" not in renewed


async def test_a_claim_fails_only_without_libcuda_and_names_the_folders(folder: Path, tree: DeviceTree) -> None:
    """What else is missing is a warning of the inventory."""
    (tree.root / f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{VERSION}").unlink()
    async with dra_node(folder, tree, RESOURCES) as node:
        await node.published("gpu")
        found = (await node.agent.ask("/v1/inventory"))[1]
        assert any(f"cannot find libnvidia-ml.so.{VERSION}" in one for one in found["warnings"])
        claim = node.claim("c", result("gpu", name_of(node, ADDRESSES[0])))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        (tree.root / f"usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}").unlink()
        await node.agent.until(
            "/v1/inventory", lambda found: any("cannot find libcuda" in one for one in found["warnings"])
        )
        other = node.claim("d", result("gpu", name_of(node, ADDRESSES[1])))
        (answer,) = await node.prepare(other)
        assert f"no libcuda.so.{VERSION} of NVIDIA's driver in /usr/lib/x86_64-linux-gnu" in answer.error
