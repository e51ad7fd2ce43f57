"""The real agent and utilization clamps: in force before a container begins, repaired, the same after kill -9, and
given back, also in the cgroups above; and what is reported on a kernel that has none."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from nodeagent.pb import nri_pb2 as pb
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.uclamp_files import INITIAL, MAX, MIN
from tests.doubles.runtime import FakeRuntime
from tests.support.dra_node import CPUS, DRIVER, consumed, dra_node
from tests.support.until import until

UID = "3f0c2f0e-7d0b-4a56-9f3e-0a7c1d2b9e11"
POD = f"kubepods/burstable/pod{UID}"
MAIN = f"{POD}/{'a' * 64}"
ABOVE = ("kubepods", "kubepods/burstable", POD)
CLASSES: dict[str, Any] = {"classes": [{"name": "fast", "min": 80, "max": "99.9"}]}
WHY = "this kernel has no cpu.uclamp.min (CONFIG_UCLAMP_TASK_GROUP)"


def asking(**config: Any) -> dict[str, Any]:
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "CpuConfig", **config}
    return {"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": parameters}}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs on 2 NUMA nodes, and cpusets that the runtime alone writes (there is no cgroup.procs)."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    mount = made.root / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    return made


def make(tree: DeviceTree, *paths: str, uclamp: bool = True) -> None:
    """Cgroups appear, as kubelet and the runtime make them."""
    for path in paths:
        folder = tree.root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True)
        (folder / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
        (folder / "cgroup.subtree_control").write_text("cpuset cpu hugetlb\n")
        for file, text in INITIAL.items() if uclamp else ():
            (folder / file).write_text(f"{text}\n")


def value(tree: DeviceTree, path: str, file: str = MIN) -> str:
    return (tree.root / "sys/fs/cgroup" / path / file).read_text().strip()


def all_at(tree: DeviceTree, minimum: str) -> bool:
    return {value(tree, path) for path in (*ABOVE, MAIN)} == {minimum}


async def create(runtime: FakeRuntime, env: dict[str, str]) -> None:
    """The runtime makes the container of the pod, which does not run yet."""
    runtime.pods["sandbox-db"] = pb.PodSandbox(id="sandbox-db", uid=UID, name="db", namespace="default")
    said = [f"{name}={text}" for name, text in env.items()]
    await runtime.create("a" * 64, pod="db", called="main", env=said, cgroup=f"/{MAIN}")


@pytest.mark.parametrize("config", [{"uclampMin": 80, "uclampMax": "99.9"}, {"uclampClass": "fast"}])
async def test_a_clamp_is_in_force_before_the_container_begins_and_outlives_a_kill(
    folder: Path, tree: DeviceTree, config: dict[str, Any]
) -> None:
    make(tree, *ABOVE[:2])
    async with FakeRuntime(folder) as runtime:
        pinning = {"pinning": {"nriSocket": str(runtime.socket), "uclamp": CLASSES}}
        async with dra_node(folder, tree, [CPUS], more=pinning) as node:
            await node.published("cpu")
            await runtime.connected()
            claim = node.claim("c", consumed("cpu", "numa1", cpus="2"), config=[asking(**config)], reserved_for=[UID])
            (answer,) = await node.prepare(claim)
            assert not answer.error
            make(tree, POD, MAIN)
            await create(runtime, node.env(claim))
            await runtime.start_container("a" * 64)
            assert all_at(tree, "80.00") and value(tree, MAIN, MAX) == "99.90"
            assert {value(tree, path, MAX) for path in ABOVE} == {"max"}

            def in_force(status: Any) -> bool:
                cgroups = {one["path"]: one for one in status["pinning"]["uclamp"].get("cgroups", ())}
                return cgroups.get(MAIN, {}).get("files") == {MIN: "80.00", MAX: "99.90"}

            await node.agent.until("/v1/status", in_force)
            (tree.root / "sys/fs/cgroup/kubepods/cpu.uclamp.min").write_text("0.00\n")
            await until(lambda: all_at(tree, "80.00"))
            await node.agent.stop(signal.SIGKILL)
            (tree.root / "sys/fs/cgroup" / POD / MIN).write_text("0.00\n")
            await node.agent.start()
            await runtime.connected(2)
            await until(lambda: all_at(tree, "80.00"))
            await node.dra.wait_registered(DRIVER, 2)
            await runtime.stop_container("a" * 64)
            await until(lambda: all_at(tree, "0.00") and value(tree, MAIN, MAX) == "max")
            await until(lambda: not (folder / "state/uclamp.json").exists())


async def test_what_a_claim_alone_asks_for_is_known_to_the_next_agent(folder: Path, tree: DeviceTree) -> None:
    """Killed before the container is made; kubelet does not have the claim prepared again."""
    make(tree, *ABOVE[:2])
    async with FakeRuntime(folder) as runtime:
        pinning = {"pinning": {"nriSocket": str(runtime.socket)}}
        async with dra_node(folder, tree, [CPUS], more=pinning) as node:
            await node.published("cpu")
            await runtime.connected()
            asked = [asking(uclampMin=50)]
            claim = node.claim("c", consumed("cpu", "numa1", cpus="2"), config=asked, reserved_for=[UID])
            (answer,) = await node.prepare(claim)
            assert not answer.error
            await node.agent.stop(signal.SIGKILL)
            await node.agent.start()
            await runtime.connected(2)
            make(tree, POD, MAIN)
            await create(runtime, node.env(claim))
            await runtime.start_container("a" * 64)
            assert all_at(tree, "50.00")


async def test_a_kernel_without_clamps_is_named_and_the_claim_is_prepared(folder: Path, tree: DeviceTree) -> None:
    make(tree, "kubepods", uclamp=False)
    async with dra_node(folder, tree, [CPUS], more={"pinning": {"mode": "cgroup", "uclamp": CLASSES}}) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa1", cpus="2"), config=[asking(uclampMin=80)])
        (answer,) = await node.prepare(claim)
        assert not answer.error
        await node.agent.said("utilization-not-clamped", claim="claim default/c", error=WHY)
        note = f"pinning.uclamp: cannot clamp utilization: {WHY}: no class has an effect"
        await node.agent.until("/v1/status", lambda status: note in status["notes"])
        unknown = node.claim("d", consumed("cpu", "numa1", cpus="1"), config=[asking(uclampClass="gold")])
        (refused,) = await node.prepare(unknown)
        assert "there is no uclamp class 'gold' on this node" in refused.error
