"""A claim shares a GPU through MPS on a whole node: from kubelet's call to its end, over kills of the agent and of the
daemon."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config.load import load
from nodeagent.daemon.leftovers.devices import shared_gpus
from nodeagent.daemon.leftovers.leftover import Host
from nodeagent.daemon.paths import paths_of
from nodeagent.host.mps import processes
from nodeagent.host.mps.processes import pipes_below
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.managers.sharing.journal import SharingJournal, SliceRecord
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import EVENTS
from tests.doubles.nvidia import CONTROL, Client, Programs
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.until import until

GPU, NAME, UUID = "0000:1b:00.0", "0000-1b-00-0", "GPU-0"
GPUS = {"name": "gpu", "kind": "gpu", "serve": "dra"}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A GPU as the kernel driver shows it, without NVML."""
    made = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    made.pci(GPU, pci_class="030200", vendor="10de", device="2330", driver="nvidia", numa_node=0)
    facts = f"Model: NVIDIA H100\nGPU UUID: {UUID}\nDevice Minor: 0\nGPU Excluded: No"
    made.write(f"proc/driver/nvidia/gpus/{GPU}/information", facts)
    made.node("/dev/nvidia0")
    return made


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    found = Programs(folder / "bin")
    found.install(gpus={UUID: {"slice": 1}})
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    yield found
    for pipe in pipes_below(folder / "run" / "mps"):
        processes.end(pipe, (0.0, 60.0))


def configured(**config: Any) -> dict[str, Any]:
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "GpuConfig", **config}
    return {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}


def claim(node: DraNode, name: str, **config: Any) -> Any:
    return node.claim(name, result("gpu", NAME), config=[configured(**config)])


def pipe_of(node: DraNode, one: Any) -> Path:
    mounts = node.spec(one)["devices"][0]["containerEdits"]["mounts"]
    (found,) = [mount["hostPath"] for mount in mounts if mount["containerPath"] == "/tmp/nvidia-mps"]
    assert "/dev/shm" in [mount["containerPath"] for mount in mounts]
    return Path(found)


async def daemons(node: DraNode) -> list[dict[str, Any]]:
    sharing = (await node.agent.ask("/v1/status"))[1]["sharing"]
    found: list[dict[str, Any]] = sharing.get("mps", [])
    return found


async def test_programs_of_a_claim_keep_their_daemon_until_it_ends(
    folder: Path, tree: DeviceTree, programs: Programs
) -> None:
    """Whatever becomes of the agent; a daemon that is killed is started again, and everybody is told."""
    async with dra_node(folder, tree, [GPUS]) as node:
        await node.published("gpu")
        one = claim(node, "c", mps={"activeThreadPercentage": 30, "pinnedDeviceMemoryLimit": "10Gi"})
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        client = Client(pipe := pipe_of(node, one))
        assert (client.percent, client.limits) == (30.0, {"0": "10240M"})
        assert node.env(one)["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=10240M"
        (before,) = await daemons(node)
        assert (before["uuids"], before["state"], before["holders"]) == ([UUID], "running", ["claim default/c"])

        await node.agent.stop(signal.SIGKILL)
        assert not client.lost
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 2)
        (answer,) = await node.prepare(one)
        assert (answer.error, client.lost, (await daemons(node))[0]["pid"]) == ("", False, before["pid"])

        os.kill(before["pid"], signal.SIGKILL)
        await node.agent.said("mps-restarted")
        await node.agent.until("/v1/status", lambda status: status["sharing"]["mps"][0]["restarts"] == 1)
        assert Client(pipe).percent == 30.0
        notes = (await node.agent.ask("/v1/status"))[1]["notes"]
        assert any(note.startswith(f"the MPS daemon of {GPU} ended and was started again once") for note in notes)
        await node.api.until(lambda: "MPSRestarted" in [event["reason"] for event in node.api.objects(EVENTS)])

        assert await node.unprepare(one) == [""]
        assert pipes_below(folder / "run" / "mps") == set()
        assert [*(folder / "run" / "mps").iterdir()] == []
        assert await daemons(node) == []


async def test_a_claim_whose_daemon_cannot_start_says_why_and_is_prepared_once_it_can(
    folder: Path, tree: DeviceTree, programs: Programs
) -> None:
    programs.remove(CONTROL)
    async with dra_node(folder, tree, [GPUS]) as node:
        await node.published("gpu")
        one = claim(node, "c", mps={})
        (answer,) = await node.prepare(one)
        assert answer.error.startswith("cannot prepare claim default/c: cannot find nvidia-cuda-mps-control")
        programs.install(CONTROL, gpus={UUID: {}})
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        assert Client(pipe_of(node, one)).percent == 100.0


async def test_a_time_slice_lasts_as_long_as_its_claim(folder: Path, tree: DeviceTree, programs: Programs) -> None:
    """And what the GPU had before is restored by the next agent if the first was killed."""
    async with dra_node(folder, tree, [GPUS]) as node:
        await node.published("gpu")
        one = claim(node, "c", timeSlicing={"interval": "Long"})
        (answer,) = await node.prepare(one)
        assert (answer.error, programs.gpu(UUID)["slice"]) == ("", 3)
        await node.agent.stop(signal.SIGKILL)
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 2)
        assert await node.unprepare(one) == [""]
        assert programs.gpu(UUID)["slice"] == 1


async def test_a_claim_that_is_forgotten_leaves_no_daemon(folder: Path, tree: DeviceTree, programs: Programs) -> None:
    """A grant that an admin releases by hand."""
    async with dra_node(folder, tree, [GPUS]) as node:
        await node.published("gpu")
        await node.prepare(claim(node, "c", mps={}))
        (grant,) = await node.grants()
        await node.agent.ask(f"/v1/grants/{grant['id']}", "DELETE")

        async def look() -> bool:
            return not pipes_below(folder / "run" / "mps") and not [*(folder / "run" / "mps").iterdir()]

        await until(look)


async def test_what_is_left_of_sharing_without_an_agent_is_undone(
    folder: Path, tree: DeviceTree, programs: Programs
) -> None:
    """As `nodeagent uninstall` does: daemons are ended, and the GPU has its own time slice again."""
    async with dra_node(folder, tree, [GPUS]) as node:
        await node.published("gpu")
        one = claim(node, "c", mps={})
        await node.prepare(one)
        pipe = pipe_of(node, one)
        await node.agent.stop(signal.SIGKILL)
        config = load(node.agent.config_file)
        host = Host(config=config, where=paths_of(config, config_file=None, root=str(tree.root), kubelet_dir=None))
        record = SliceRecord(device="d", uuid=UUID, before="Medium", interval="Short")
        SharingJournal(folder / "state", host.where.sysfs.text(BOOT_ID, "")).keep({record.key: record})
        left = shared_gpus(host)
        assert [str(line) for line in left.lines] == [f"{pipe.parent}: removed", "time slice of d: Short -> Medium"]
        assert [*left.undo()] == []
        assert pipes_below(folder / "run" / "mps") == set()
        assert (pipe.parent.exists(), programs.gpu(UUID)["slice"]) == (False, 2)
        assert not shared_gpus(host).lines
