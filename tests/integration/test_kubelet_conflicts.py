"""The whole agent alongside a kubelet whose configuration lies in files, drop-ins and flags."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import AdmissionError, FakeKubelet
from tests.doubles.kubelet_process import ends, kubelet, put
from tests.support.running import CHAR, CPU, Running, running

QUICK: dict[str, Any] = {
    "resources": [{"name": "cpu", "kind": "cpu"}],
    "reservedCpus": None,
    "resyncSeconds": 60,
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1},
}
CONFIG_DIR = "etc/kubelet.d"
SOON_S = 10.0
"""Well before anything is looked at without an event."""


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs; the first core is 0 and 4."""
    return DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))


def started(folder: Path, tree: DeviceTree, *flags: str) -> Path:
    """A kubelet's process, started with a folder of drop-ins."""
    return kubelet(tree.root, folder / "kubelet", f"--config-dir=/{CONFIG_DIR}", *flags)


async def given(agent: Running, pods: int) -> set[int]:
    """All CPUs that are granted, once as many pods are named."""
    grants = await agent.until("/v1/grants", lambda found: len({one["pod"] for one in found if one["pod"]}) == pods)
    return {int(one.removeprefix("cpu")) for grant in grants for one in grant["ids"]}


@pytest.mark.parametrize("first", ["kubelet", "agent"])
async def test_a_cpu_reserved_in_a_drop_in_is_never_granted(first: str, folder: Path, tree: DeviceTree) -> None:
    """Whether kubelet runs when the agent starts, or is started after it as at boot."""
    put(tree.root / CONFIG_DIR / "20-reserve.conf", 'reservedSystemCPUs: "1,6"\n')
    if first == "kubelet":
        started(folder, tree)
    async with running(folder, root=tree.root, **QUICK) as agent:
        if first == "agent":
            status = await agent.until("/v1/status", lambda found: found["resources"])
            assert status["inventory"]["cpus_reserved"] == "0,4", "nothing of a kubelet can be seen yet"
            started(folder, tree)
        async with FakeKubelet(folder / "kubelet") as node:
            await node.wait_allocatable(CPU, 6)
            await node.admit_pod("default", "a", {"main": {CPU: 6}})
            assert await given(agent, 1) == {0, 2, 3, 4, 5, 7}
            with pytest.raises(AdmissionError):
                await node.admit_pod("default", "b", {"main": {CPU: 1}})
            status = await agent.ready()
            assert (status["inventory"]["cpus_reserved"], status["notes"]) == ("1,6", [])
            assert status["kubelet"]["settings"]["reservedSystemCPUs"] == "1,6"


async def test_a_kubelet_that_reserves_other_cpus_is_heard_when_it_starts(folder: Path, tree: DeviceTree) -> None:
    """A flag more, a drop-in more: what counts is what it was started with."""
    put(tree.root / CONFIG_DIR / "20-reserve.conf", "reservedSystemCPUs: '1'\n")
    started(folder, tree)
    async with running(folder, root=tree.root, **QUICK), FakeKubelet(folder / "kubelet") as node:
        await node.wait_allocatable(CPU, 7)
        started(folder, tree, "--reserved-cpus=1,2,3")
        await node.restart()
        await node.wait_allocatable(CPU, 5)
        started(folder, tree)
        put(tree.root / CONFIG_DIR / "30-more.conf", "reservedSystemCPUs: 4-7\n")
        await node.restart()
        await node.wait_allocatable(CPU, 4)


async def test_a_kubelet_that_starts_is_looked_at_where_all_is_served_through_dra(
    folder: Path, tree: DeviceTree
) -> None:
    """Its socket alone says that it has started: nothing is registered there."""
    resources = [{"name": "cpu", "kind": "cpu", "serve": "dra"}]
    dra = {"kubeconfig": "/nowhere", "cdiDir": str(folder / "cdi")}
    async with running(folder, root=tree.root, **{**QUICK, "resources": resources, "dra": dra}) as agent:
        await agent.until("/v1/status", lambda found: found["inventory"]["cpus_reserved"] == "0,4")
        started(folder, tree, "--reserved-cpus=1,6")
        (tree.root / CONFIG_DIR).mkdir(parents=True)
        async with FakeKubelet(folder / "kubelet"), asyncio.timeout(SOON_S):
            await agent.until("/v1/status", lambda found: found["inventory"]["cpus_reserved"] == "1,6")


async def test_a_drop_in_that_cannot_be_read_keeps_all_cpus_back(folder: Path, tree: DeviceTree) -> None:
    """What it reserves is not known: refused with file and value, served again some time after it is repaired."""
    tree.node("/dev/ttyS0")
    bad = put(tree.root / CONFIG_DIR / "20-reserve.conf", "reservedSystemCPUs: 1-\n")
    started(folder, tree)
    config = {**QUICK, "resources": [*QUICK["resources"], {"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"]}]}
    async with running(folder, root=tree.root, **config) as agent, FakeKubelet(folder / "kubelet") as node:
        status = await agent.until("/v1/status", lambda found: found["refused"])
        assert status["refused"][CPU].startswith(
            "cannot determine whether kubelet manages CPUs itself: cannot read CPU list '1-' of reservedSystemCPUs of "
            f"{bad}: "
        )
        status = await agent.until("/v1/status", lambda found: len(found["not_ready"]) == 1)
        assert status["not_ready"] == [f"cpu: {status['refused'][CPU]}"] and not status["ready"]
        put(bad, "reservedSystemCPUs: '1'\n")
        await node.wait_allocatable(CHAR, 1)
        await node.admit_pod("default", "a", {"main": {CHAR: 1}})
        await node.wait_allocatable(CPU, 7)
        assert (await agent.ready())["refused"] == {}


async def test_what_kubelet_and_the_agent_disagree_about_is_a_note(folder: Path, tree: DeviceTree) -> None:
    """In the status, its table and the log; gone when they agree."""
    started(folder, tree, "--reserved-cpus=1,6")
    (tree.root / CONFIG_DIR).mkdir(parents=True)
    config = {**QUICK, "reservedCpus": "1"}
    async with running(folder, root=tree.root, **config) as agent, FakeKubelet(folder / "kubelet"):
        (note,) = (await agent.ready())["notes"]
        assert "kubelet reserves CPUs 1,6 (--reserved-cpus of kubelet (process 812)), reservedCpus says 1: " in note
        assert (await agent.said("kubelet-contradiction"))["note"] == note
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(agent.socket)]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()  # noqa: ASYNC221
        assert f"note: {note}" in shown
        assert (
            "kubelet: process 812, CPU manager none, memory manager None, reserves CPUs 1,6, configured by "
            "--reserved-cpus"
        ) in shown
        agent.configure(**{**QUICK, "reservedCpus": "1,6"})
        await agent.until("/v1/status", lambda found: found["notes"] == [])


async def test_pods_whose_cpus_kubelets_static_manager_gives_to_all_are_a_reason_not_to_be_ready(
    folder: Path, tree: DeviceTree
) -> None:
    """Turned on later, it confines every container to its own pool, theirs included."""
    process = started(folder, tree)
    (tree.root / CONFIG_DIR).mkdir(parents=True)
    async with running(folder, root=tree.root, **QUICK) as agent, FakeKubelet(folder / "kubelet") as node:
        await node.wait_allocatable(CPU, 6)
        await node.admit_pod("default", "a", {"main": {CPU: 2}})
        held = await given(agent, 1)
        await agent.ready()
        ends(process)
        started(folder, tree, "--cpu-manager-policy=static", "--reserved-cpus=0")
        await node.restart()
        status = await agent.until("/v1/status", lambda found: not found["ready"] and found["refused"])
        cpus = ",".join(str(one) for one in sorted(held))
        assert any(
            f"CPUs {cpus} of default/a/main are not exclusive: kubelet's CPU manager is static" in one
            for one in status["not_ready"]
        ), status["not_ready"]
        code, text = await agent.ask("/readyz")
        assert code == 503 and "default/a/main" in text
        assert "default/a/main" in (await agent.said("cpus-not-exclusive"))["reason"]
        started(folder, tree)
        await node.restart()
        await agent.ready()
