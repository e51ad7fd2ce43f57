"""The whole agent as a real process alongside a runtime that asks, where control groups can only be read: the runtime
does all that is written. What is granted through either API is what containers are made with.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.pb import nri_pb2 as pb
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import CLAIMS
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.runtime import FakeRuntime, PluginRefusedError
from tests.support.dra_node import DRIVER, consumed, dra_node
from tests.support.running import CPU, Running, running

CPUS = {"name": "cpu", "kind": "cpu", "serve": "both"}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs on 2 NUMA nodes, and control groups that are read-only."""
    made = machine(tmp_path / "root", "1s2n4c-smt")
    mount = tmp_path / "root/sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    return DeviceTree(made)


def pinning(runtime: FakeRuntime) -> dict[str, Any]:
    return {"pinning": {"nriSocket": str(runtime.socket)}}


def known(runtime: FakeRuntime, pod: str, uid: str) -> str:
    """The runtime has a pod of kubelet's."""
    runtime.pods[f"sandbox-{pod}"] = pb.PodSandbox(id=f"sandbox-{pod}", uid=uid, name=pod, namespace="default")
    return pod


async def create(runtime: FakeRuntime, pod: str, env: Mapping[str, str] | None = None) -> str:
    """The cpuset that a pod's container "main" is made with."""
    said = [f"{name}={value}" for name, value in (env or {}).items()]
    await runtime.create(pod, pod=pod, called="main", env=said)
    return runtime.cpus(pod)


async def pinned(agent: Running, count: int) -> list[dict[str, Any]]:
    status = await agent.until("/v1/status", lambda status: len(status["pinning"]["pinned"]) == count)
    return list(status["pinning"]["pinned"])


async def test_a_device_plugin_pod_is_made_on_its_cpus_and_the_others_move(folder: Path, tree: DeviceTree) -> None:
    """And stay so when the agent is killed and comes back."""
    async with (
        FakeRuntime(folder) as runtime,
        FakeKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree.root, resources=[{"name": "cpu", "kind": "cpu"}], **pinning(runtime)) as agent,
    ):
        await kubelet.wait_allocatable(CPU, 8)
        await runtime.connected()
        assert await create(runtime, "web") == "0-7"
        pod = await kubelet.admit_pod("default", "db", {"main": {CPU: 2}})
        (grant,) = (await agent.ask("/v1/grants"))[1]
        assert await create(runtime, known(runtime, "db", pod.uid)) == grant["cpus"]
        others = runtime.cpus("web")
        assert set(others) and grant["cpus"] not in others
        (shown,) = await pinned(agent, 1)
        assert (shown["pod"], shown["granted_cpus"]) == ("db", grant["cpus"])
        await agent.stop(signal.SIGKILL)
        await agent.start()
        await runtime.connected(2)
        assert (runtime.cpus("db"), runtime.cpus("web")) == (grant["cpus"], others)
        assert await create(runtime, "late") == others
        await agent.ready()


async def test_claims_are_their_pods_and_nobody_else_s(folder: Path, tree: DeviceTree) -> None:
    """A second pod that shares one is known from the API server; kubelet has nothing prepared for it again."""
    async with FakeRuntime(folder) as runtime, dra_node(folder, tree, [CPUS], more=pinning(runtime)) as node:
        await node.published("cpu")
        await runtime.connected()
        claim = node.claim("c", consumed("cpu", "numa1", cpus="2"), reserved_for=["uid-first"])
        await node.prepare(claim)
        env = node.env(claim)
        assert await create(runtime, known(runtime, "first", "uid-first"), env) == "2,6"
        assert await create(runtime, known(runtime, "thief", "uid-thief"), env) == "0-1,3-5,7"
        status = node.api.find(CLAIMS, "c", "default")["status"]  # type: ignore[index]
        status["reservedFor"].append({"resource": "pods", "name": "second", "uid": "uid-second"})
        node.api.change(CLAIMS, "c", "default", status=status)
        assert await create(runtime, known(runtime, "second", "uid-second"), env) == "2,6"
        shown = {one["pod"]: one["granted_cpus"] for one in await pinned(node.agent, 3)}
        assert shown == {"first": "2,6", "second": "2,6", "thief": ""}
        async with node.api.away():
            with pytest.raises(PluginRefusedError, match="cannot determine for which pods claim default/c is reserved"):
                await create(runtime, known(runtime, "third", "uid-third"), env)


async def test_a_named_pool_makes_way_for_exclusive_cpus_and_outlives_a_kill(folder: Path, tree: DeviceTree) -> None:
    """Siblings are CPUs 2 and 6, and 3 and 7. A claim for three CPUs would leave the pool less than it was promised."""
    pool = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "CpuConfig", "namedPool": "web"}
    config = [{"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": pool}}]
    async with FakeRuntime(folder) as runtime, dra_node(folder, tree, [CPUS], more=pinning(runtime)) as node:
        await node.published("cpu")
        await runtime.connected()
        member = node.claim("m", consumed("cpu", "numa1", cpus="2"), config=config, reserved_for=["uid-member"])
        await node.prepare(member)
        held = node.env(member)["NODEAGENT_CPUS"]
        assert held == "2,6"
        assert await create(runtime, known(runtime, "member", "uid-member"), node.env(member)) == "2-3,6-7"
        alone = node.claim("x", consumed("cpu", "numa1", cpus="1"), reserved_for=["uid-alone"])
        more = node.claim("y", consumed("cpu", "numa1", cpus="3"), reserved_for=["uid-more"])
        granted, refused = await node.prepare(alone, more)
        assert not granted.error and "held there by claim default/m, claim default/x" in refused.error
        assert await create(runtime, known(runtime, "alone", "uid-alone"), node.env(alone)) == "3"
        assert runtime.cpus("member") == held, "CPU 7 is idle, and the sibling of an exclusive one"
        await node.agent.stop(signal.SIGKILL)
        await node.agent.start()
        await runtime.connected(2)
        await node.dra.wait_registered(DRIVER, 2)
        (again,) = await node.prepare(member)
        assert not again.error and node.env(member)["NODEAGENT_CPUS"] == held
        assert (runtime.cpus("member"), runtime.cpus("alone")) == (held, "3")
        await runtime.stop_container("alone")
        await node.unprepare(alone)
        await create(runtime, "late")
        (shown,) = await pinned(node.agent, 1)
        assert (shown["pod"], shown["pools"], shown["pool_cpus"]) == ("member", ["web"], "2-3,6-7")
        assert runtime.cpus("member") == "2-3,6-7" and runtime.cpus("late") == "0-1,3-5,7"


async def test_the_table_of_status_shows_what_was_granted_and_what_is_wrong(folder: Path, tree: DeviceTree) -> None:
    async with FakeRuntime(folder) as runtime, dra_node(folder, tree, [CPUS], more=pinning(runtime)) as node:
        await node.published("cpu")
        await runtime.connected()
        claim = node.claim("c", consumed("cpu", "numa1", cpus="2"), reserved_for=["uid-first"])
        await node.prepare(claim)
        await create(runtime, known(runtime, "first", "uid-first"), node.env(claim))
        await create(runtime, known(runtime, "thief", "uid-thief"), node.env(claim))
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(node.agent.socket)]
        asked = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        text = (await asked.communicate())[0].decode()
        assert "pinning: containerd" in text and "2 containers, shared CPUs 0-1,3-5,7" in text
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("default/")}
        assert rows["default/first"][1:4] == ["main", "2,6", "-"]
        assert " ".join(rows["default/thief"][6:]) == f"names {claim.uid}-0 of another pod"


async def test_an_agent_whose_runtime_never_asks_is_not_ready_and_says_why(folder: Path, tree: DeviceTree) -> None:
    """Until the runtime synchronizes."""
    async with (
        FakeRuntime(folder) as runtime,
        FakeKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree.root, resources=[{"name": "cpu", "kind": "cpu"}], **pinning(runtime)) as agent,
    ):
        runtime.synchronize_after = asyncio.Event()
        await kubelet.wait_allocatable(CPU, 8)
        why = "pinning: the container runtime does not ask: configured, waiting to be synchronized"
        await agent.until("/v1/status", lambda status: status["not_ready"] == [why])
        assert (await agent.ask("/readyz")) == (503, f"{why}\n")
        runtime.synchronize_after.set()
        await agent.ready()


async def test_without_version_2_of_control_groups_nothing_is_pinned_and_all_else_works(
    folder: Path, tmp_path: Path
) -> None:
    tree = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    (tmp_path / "root/sys/fs/cgroup/cpuset").mkdir(parents=True)
    async with (
        FakeRuntime(folder) as runtime,
        FakeKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree.root, resources=[{"name": "cpu", "kind": "cpu"}], **pinning(runtime)) as agent,
    ):
        await kubelet.wait_allocatable(CPU, 8)
        await kubelet.admit_pod("default", "db", {"main": {CPU: 2}})
        await agent.said("nothing-is-pinned")
        shown = (await agent.ready())["pinning"]
        assert shown["mode"] == "off" and "is cgroup v1" in shown["unsupported"]
        assert runtime.connections == 0
