"""GPUs that are divided on demand, by the whole agent as a real process, with NVML's, kubelet and an API server."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.long_form import share_of
from tests.support.mig_driver import MigDriver, address
from tests.support.mig_node import MIG
from tests.support.until import until

GPU = "0000-1b-00-0"
LIVES = share_of(60, 0.1)
NVML_S = {"health": {"nvmlSeconds": 0.3}}


@contextlib.asynccontextmanager
async def mig_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *cards: str, mig: bool = True, gpus: Sequence[str] = ()
) -> AsyncIterator[tuple[DraNode, MigDriver]]:
    driver = MigDriver.of(folder / "nvml", *cards, mig=mig)
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    driver.machine(tree)
    driver.install(tree.root)
    monkeypatch.setenv("FAKE_NVML_STATE", str(driver.path))
    resource = {**MIG, "mig": {"mode": "dynamic", "gpus": list(gpus)}}
    whole = {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {"parent": ""}}
    async with dra_node(folder, tree, [resource, whole], more=NVML_S) as node:
        yield node, driver


def claim(node: DraNode, name: str, *devices: str) -> ClaimId:
    return node.claim(name, *(result("gpu", one, f"r{number}") for number, one in enumerate(devices)))


async def test_an_instance_lives_as_long_as_its_claim(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through kubelet's calls, with what the container gets; what is published stays as it is."""
    async with mig_node(folder, monkeypatch, "h100-80") as (node, driver):
        await node.published("gpu")
        before = node.devices("gpu")
        assert len(before) == 25
        one = claim(node, "c", f"{GPU}-mig-3g-40gb-4")
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        (made,) = driver.instances()
        assert (made.profile, made.start, made.complete) == ("3g.40gb", 4, True)
        uuid = node.env(one)["NVIDIA_VISIBLE_DEVICES"]
        assert uuid.startswith("MIG-")
        (shown,) = (await node.agent.ask("/v1/status"))[1]["mig"]["instances"]
        assert shown == {
            "device": f"{address(0)}/mig-3g.40gb-4",
            "gpu": address(0),
            "profile": "3g.40gb",
            "start": 4,
            "size": 4,
            "uuid": uuid,
            "state": "made",
            "claim": "default/c",
            "why": "",
        }
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(node.agent.socket)]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert "GPU MIG SLICES STATE CLAIM UUID WHY" in lines
        assert f"{address(0)} 3g.40gb 4-7 made default/c {uuid} -" in lines
        assert await node.unprepare(one) == [""]
        assert driver.instances() == []
        assert await node.grants() == []
        assert node.devices("gpu") == before
        assert (await node.agent.ask("/v1/status"))[1]["mig"] == {}


async def test_what_the_driver_refuses_reaches_kubelet_with_its_cause(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mig_node(folder, monkeypatch, "h100-80") as (node, driver):
        await node.published("gpu")
        driver.fault("nvmlDeviceCreateGpuInstanceWithPlacement", "23")
        (answer,) = await node.prepare(claim(node, "c", f"{GPU}-mig-3g-40gb-4"))
        assert f"cannot create MIG instance 3g.40gb at slice 4 of GPU {address(0)}: Insuff" in answer.error
        assert (await node.grants(), driver.instances()) == ([], [])


async def test_kill_9_at_any_moment_leaves_exactly_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of kubelet go on while agents die and begin; one instance of another program stays where it is."""
    drawn = random.Random(7)
    async with mig_node(folder, monkeypatch, "h100-80", "a30") as (node, driver):
        driver.make(0, "1g.10gb", 6, id=14)
        await node.published("gpu")
        names = [f"{GPU}-mig-1g-10gb-{start}" for start in range(6)] + [
            f"0000-3b-00-0-mig-1g-6gb-{n}" for n in range(4)
        ]
        claims = {name: claim(node, f"c{number}", name) for number, name in enumerate(names)}
        for life in range(LIVES):
            calls = [
                asyncio.create_task(_call(node, claims[name], prepare=drawn.random() < 0.6))
                for name in drawn.sample(names, 4)
            ]
            await asyncio.sleep(drawn.random() * 0.3)
            await node.agent.stop(signal.SIGKILL)
            await asyncio.gather(*calls)
            await node.agent.start()
            await node.dra.wait_registered(DRIVER, life + 2)
        grants = await node.agent.until("/v1/grants", lambda grants: isinstance(grants, list))
        held = {grant["result"]["device"] for grant in grants}
        for name in held:
            (answer,) = await node.prepare(claims[name])
            assert answer.error == ""
        wanted = {(0, "1g.10gb", 6)} | {
            (0 if name.startswith(GPU) else 1, "1g.10gb" if name.startswith(GPU) else "1g.6gb", int(name[-1]))
            for name in held
        }
        await until(lambda: driver.there() == wanted, otherwise=lambda: f"{driver.there()} != {wanted}")
        for name in held:
            assert await node.unprepare(claims[name]) == [""]
        assert driver.there() == {(0, "1g.10gb", 6)}


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile."""
    with contextlib.suppress(Exception):
        await (node.prepare(one) if prepare else node.unprepare(one))


async def test_a_gpu_enters_mig_mode_as_configured_and_leaves_it_when_no_resource_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while a process uses it, and never one that the configuration does not name."""
    async with mig_node(folder, monkeypatch, "h100-80", "h100-80", mig=False, gpus=["0000:1b:*"]) as (node, driver):
        driver.compute(0, 1)
        await node.agent.until("/v1/status", lambda status: "1 processes use it" in str(status["notes"]))
        assert f"{GPU}" in node.devices("gpu")
        driver.compute(0, 0)
        await until(lambda: f"{GPU}-mig-7g-80gb-0" in node.devices("gpu"))
        assert GPU not in node.devices("gpu")
        assert "0000-3b-00-0" in node.devices("gpu")
        one = claim(node, "c", f"{GPU}-mig-7g-80gb-0")
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        options = {**node.options, "resources": [MIG, *node.options["resources"][1:]]}
        node.agent.configure(**options)
        await node.agent.until("/v1/status", lambda status: "it has MIG instances" in str(status["notes"]))
        assert await node.unprepare(one) == [""]
        await until(lambda: GPU in node.devices("gpu"))
