"""`nodeagent explain` and its kin against a running agent: what an admin asks, and what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.builders.devices import DeviceTree
from tests.builders.machines import GIB, machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CPU, Running, running

PAGES = "nodeagent.dev/hugepages-1Gi"
RESOURCES = [
    {"name": "cpu", "kind": "cpu"},
    {"name": "hugepages-1Gi", "kind": "hugepages", "pageSize": "1Gi"},
]
QUICK = {"pollSeconds": 0.2, "unconfirmedSeconds": 30, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1}


class Said(NamedTuple):
    code: int
    out: str
    err: str

    def document(self) -> Any:
        assert not self.err, self.err
        return json.loads(self.out)


async def nodeagent(agent: Running, *words: str) -> Said:
    verb = ["-m", "nodeagent", *words, "--socket", str(agent.socket), "--state-dir", str(agent.state)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *verb, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return Said(process.returncode or 0, out.decode(), err.decode())


@contextlib.asynccontextmanager
async def node(folder: Path, tmp_path: Path) -> AsyncIterator[tuple[Running, FakeKubelet]]:
    """Two NUMA nodes of 8 CPUs and 2 pages of 1 GiB; a pod on 6 CPUs of the first, one on 5 of the second."""
    pages = {(0, GIB): (2, 2, 0), (1, GIB): (2, 2, 0)}
    tree = DeviceTree(machine(tmp_path / "root", "2s2n16c", hugepages=pages))
    options = {"resources": RESOURCES, "release": QUICK}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await kubelet.wait_allocatable(CPU, 16)
        await kubelet.wait_allocatable(PAGES, 4)
        await kubelet.admit_pod("shop", "till", {"main": {CPU: 6, PAGES: 1}})
        await agent.until("/v1/grants", lambda grants: sum(bool(one["pod"]) for one in grants) == 2)
        await kubelet.admit_pod("shop", "web", {"nginx": {CPU: 5}})
        await agent.until("/v1/grants", lambda grants: sum(bool(one["pod"]) for one in grants) == 3)
        await agent.ready()
        yield agent, kubelet


async def test_a_request_that_fits_is_explained_part_by_part(folder: Path, tmp_path: Path) -> None:
    """Where it would go, what each part of the cost is now, and what it would be on the empty machine."""
    async with node(folder, tmp_path) as (agent, _):
        found = (await nodeagent(agent, "explain", "--cpus", "3", "-o", "json")).document()
        assert found["fits"] and found["aligned"]
        assert found["placement"]["cpus"] == "13-15"
        assert {one["part"]: (one["value"], one["on_empty"]) for one in found["cost"]}["numa_nodes"] == (1, 1)
        apart = await nodeagent(agent, "explain", "--cpus", "4")
        assert apart.code == 0
        assert "numa_nodes" in apart.out and "2 NUMA nodes" in apart.out and "`nodeagent advise`" in apart.out


async def test_a_refusal_names_the_pods_in_the_way(folder: Path, tmp_path: Path) -> None:
    """Exit code 3, the pods by name, and the smallest set of them whose end would admit the request."""
    async with node(folder, tmp_path) as (agent, _):
        said = await nodeagent(agent, "explain", "--cpus", "7", "--numa", "single")
        assert (said.code, said.err) == (3, "")
        assert "refused: cannot place 7 CPUs: 5 of 16 are free" in said.out
        assert "the end of 1 pod, shop/web, would admit it (no smaller set does)" in said.out
        found = await nodeagent(agent, "explain", "--cpus", "16", "--hugepages", "1Gi=4", "-o", "json")
        assert found.code == 3
        assert [one["pods"] for one in found.document()["in_the_way"]] == [["shop/web"], ["shop/till"]]
        too_much = await nodeagent(agent, "explain", "--cpus", "17")
        assert too_much.code == 3 and "on the empty machine: refused as well" in too_much.out


async def test_a_question_about_nothing_gets_one_clear_line(folder: Path, tmp_path: Path) -> None:
    async with node(folder, tmp_path) as (agent, _):
        for words, why in (
            ((), "cannot explain nothing"),
            (("--cpus", "many"), "cannot use --cpus 'many'"),
            (("--devices", "gpus=1"), "cannot place devices of kind 'gpus'"),
        ):
            said = await nodeagent(agent, "explain", *words)
            assert (said.code, said.out) == (2, "")
            assert said.err.startswith(f"nodeagent: {why}") and said.err.count("\n") == 1


async def test_pods_cpus_and_devices_are_explained_by_name(folder: Path, tmp_path: Path) -> None:
    """What the pod holds and why there; who has the CPU; a name that is not known is one clear line and exit code 2."""
    async with node(folder, tmp_path) as (agent, _):
        pod = await nodeagent(agent, "explain", "pod", "shop/till")
        assert (pod.code, pod.err) == (0, "")
        assert "why: 6 CPUs (0-5) on NUMA node 0, 1 socket" in pod.out and "1x1Gi@node0" in pod.out
        assert "it lies as close together as on the empty machine" in pod.out
        found = (await nodeagent(agent, "explain", "cpu", "9", "-o", "json")).document()
        assert found["holder"] == "shop/web/nginx"
        for words, why in (
            (("pod", "shop/none"), "cannot explain pod shop/none: it holds nothing here, and no refusal names it"),
            (("cpu", "16"), "cannot explain CPU 16: this machine can have CPUs 0-15"),
            (("device", "gpu7"), "cannot explain device 'gpu7': this machine has none"),
            (("tree", "x"), "cannot explain 'tree': expected pod, claim, cpu, device"),
        ):
            said = await nodeagent(agent, "explain", *words)
            assert (said.code, said.out) == (2, "")
            assert said.err.startswith(f"nodeagent: {why}") and said.err.count("\n") == 1


async def test_advice_about_moves_names_pods_and_moves_nothing(folder: Path, tmp_path: Path) -> None:
    """Four CPUs lie on two nodes unless a pod moves; the ledger is the same afterwards, and metrics show the figure."""
    async with node(folder, tmp_path) as (agent, _):
        before = await agent.ask("/v1/grants")
        said = await nodeagent(agent, "advise", "--cpus", "4")
        assert said.code == 3 and "no moves: no set of pods that come back as close together as now" in said.out
        most = (await nodeagent(agent, "advise", "-o", "json")).document()
        assert (most["largest_now"], most["cpus"], most["moves"], most["aligned_now"]) == (3, 3, [], True)
        assert most["fragmentation"]["cpu"] == 1 - 3 / 5
        wrong = await nodeagent(agent, "advise", "--largest", "--cpus", "4")
        assert (wrong.code, wrong.out) == (2, "") and wrong.err.count("\n") == 1
        assert await agent.ask("/v1/grants") == before
        assert f"nodeagent_cpu_fragmentation_ratio {1 - 3 / 5}\n" in (await agent.ask("/metrics"))[1]
