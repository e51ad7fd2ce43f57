"""Kubelet restarts, and what runs keeps what it holds: the agent as a real process, kubelet's sockets and checkpoint,
pods' cgroups.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.pod_cgroups import PodCgroupTree
from tests.doubles.kubelet import AdmissionError, FakeKubelet, Pod
from tests.support.running import CPU, Running, running

CPUS = 8
PATIENT = {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.5}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs on 2 NUMA nodes."""
    return DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))


@contextlib.asynccontextmanager
async def node(folder: Path, tree: DeviceTree, **config: Any) -> AsyncIterator[tuple[Running, FakeKubelet]]:
    options = {"resources": [{"name": "cpu", "kind": "cpu"}], "pinning": {"mode": "off"}, "release": PATIENT, **config}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await kubelet.wait_allocatable(CPU, CPUS)
        yield agent, kubelet


async def listed(agent: Running, times: int = 5) -> None:
    """The agent has taken so many more lists of kubelet's, apart by more than every patience."""
    for _ in range(times):
        await agent.until("/v1/status", functools.partial(_listed_since, time.time() + 0.15))


def _listed_since(since: float, status: dict[str, Any]) -> bool:
    return (status["listed_at"] or 0) > since


async def holders(agent: Running) -> dict[str, str]:
    """Pods by the CPUs that they hold."""
    return {one["cpus"]: one["pod"] for one in (await agent.ask("/v1/grants"))[1]}


async def book_runs(agent: Running, kubelet: FakeKubelet, tmp_path: Path) -> tuple[Pod, PodCgroupTree]:
    """Start the pod "book" with 3 CPUs. Return it, once the agent knows its name, and the cgroups that it runs in."""
    cgroups = PodCgroupTree(tmp_path / "root")
    pod = await kubelet.admit_pod("default", "book", {"main": {CPU: 3}})
    cgroups.run(pod.uid)
    await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["book"])
    return pod, cgroups


async def test_running_pods_keep_their_cpus_while_a_restarted_kubelet_lists_nothing(
    folder: Path, tree: DeviceTree, tmp_path: Path
) -> None:
    """Its API server is silent for longer than any patience; then it lists them again, and nothing has changed."""
    async with node(folder, tree) as (agent, kubelet):
        await book_runs(agent, kubelet, tmp_path)
        before = await holders(agent)
        kubelet.knows_pods = False
        await kubelet.restart()
        await kubelet.wait_allocatable(CPU, CPUS)
        await listed(agent)
        assert await holders(agent) == before
        (held,) = (await agent.ask("/v1/grants"))[1]
        assert "processes run in" in held["held_back"] and not held["disputed"]
        kubelet.knows_pods = True
        await agent.until("/v1/grants", lambda grants: not grants[0]["held_back"])
        assert await holders(agent) == before


async def test_running_pods_keep_their_cpus_while_kubelet_and_agent_both_start_again(
    folder: Path, tree: DeviceTree, tmp_path: Path
) -> None:
    """The agent remembers nothing of what was listed before."""
    async with node(folder, tree) as (agent, kubelet):
        await book_runs(agent, kubelet, tmp_path)
        before = await holders(agent)
        await agent.stop(signal.SIGKILL)
        kubelet.knows_pods = False
        await kubelet.restart()
        await agent.start()
        await kubelet.wait_allocatable(CPU, CPUS)
        await listed(agent)
        assert await holders(agent) == before


async def test_pods_that_nobody_can_see_keep_their_cpus_while_kubelet_knows_none(
    folder: Path, tree: DeviceTree
) -> None:
    """No cgroups, no runtime: kubelet's checkpoint still has them."""
    async with node(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "book", {"main": {CPU: 3}})
        await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["book"])
        before = await holders(agent)
        kubelet.knows_pods = False
        await kubelet.restart()
        await kubelet.wait_allocatable(CPU, CPUS)
        await listed(agent)
        assert await holders(agent) == before
        (held,) = (await agent.ask("/v1/grants"))[1]
        assert held["held_back"] == "kubelet has listed no pod of the API server since it started"


async def test_a_deleted_pod_gives_its_cpus_back_at_once(folder: Path, tree: DeviceTree, tmp_path: Path) -> None:
    """Kubelet has removed its cgroup and lists it no longer: no patience is needed."""
    patient = {**PATIENT, "confirmedSeconds": 3600, "unobservedSeconds": 3600}
    async with node(folder, tree, release=patient) as (agent, kubelet):
        pod, cgroups = await book_runs(agent, kubelet, tmp_path)
        await listed(agent, 1)
        cgroups.remove(pod.uid)
        await kubelet.delete_pod("default", "book")
        await agent.until("/v1/grants", lambda grants: grants == [])


async def test_a_pod_that_kubelet_forgets_while_it_runs_is_disputed_and_keeps_its_cpus(
    folder: Path, tree: DeviceTree, tmp_path: Path
) -> None:
    """Status, metric and the list for kubelet say so; another pod gets other CPUs, or none."""
    async with node(folder, tree) as (agent, kubelet):
        cgroups = PodCgroupTree(tmp_path / "root")
        pod = await kubelet.admit_pod("default", "book", {"main": {CPU: 5}})
        cgroups.run(pod.uid)
        await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["book"])
        await kubelet.delete_pod("default", "book")
        await kubelet.wait_allocatable(CPU, CPUS - 5)
        _, status = await agent.ask("/v1/status")
        assert status["disputed"] == [
            f"default/book/main: kubelet no longer lists it, and processes run in {cgroups.top}/burstable/pod{pod.uid}"
        ]
        assert "nodeagent_grants_disputed 1.0" in (await agent.ask("/metrics"))[1]
        with pytest.raises(AdmissionError):
            await kubelet.admit_pod("default", "greedy", {"main": {CPU: 4}})
        await kubelet.admit_pod("default", "other", {"main": {CPU: 3}})
        cgroups.remove(pod.uid)
        await kubelet.wait_allocatable(CPU, CPUS)
        await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["other"])
