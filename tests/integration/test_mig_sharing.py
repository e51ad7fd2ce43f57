"""A claim shares a MIG instance that is made for it through MPS: the whole agent as a real process, with NVML's,
NVIDIA's programs, kubelet and an API server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nodeagent.host.mps import processes
from nodeagent.host.mps.processes import pipes_below
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.nvidia import Client, Programs
from tests.integration.test_mig import GPU, mig_node
from tests.integration.test_sharing import configured, daemons, pipe_of
from tests.support.dra_node import DRIVER, DraNode, result
from tests.support.long_form import share_of
from tests.support.mig_driver import MigDriver, uuid
from tests.support.until import until

MOMENTS: tuple[Callable[[Path, MigDriver], object], ...] = (
    lambda folder, driver: (folder / "state" / "partitions.json").exists(),
    lambda folder, driver: driver.instances(),
    lambda folder, driver: (folder / "state" / "sharing.json").exists(),
    lambda folder, driver: pipes_below(folder / "run" / "mps"),
    lambda folder, driver: any((folder / "cdi").glob("*.json")),
)
"""What is there when an agent is killed, or shortly before."""
LIVES = share_of(50, len(MOMENTS) / 50)
MPS = {"activeThreadPercentage": 30, "pinnedDeviceMemoryLimit": "10Gi"}


@contextlib.asynccontextmanager
async def node_with_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[DraNode, MigDriver]]:
    programs = Programs(folder / "bin")
    programs.install(gpus={uuid(0): {"mig": True}})
    monkeypatch.setenv("PATH", f"{programs.folder}:{os.environ['PATH']}")
    try:
        async with mig_node(folder, monkeypatch, "h100-80") as (node, driver):
            await node.published("gpu")
            yield node, driver
    finally:
        for pipe in pipes_below(folder / "run" / "mps"):
            processes.end(pipe, (0.0, 60.0))


def claim(node: DraNode, name: str, device: str) -> ClaimId:
    found: ClaimId = node.claim(name, result("gpu", device), config=[configured(mps=MPS)])
    return found


def environment(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def left(folder: Path, driver: MigDriver) -> dict[str, Any]:
    """What is there of a claim that has ended; nothing of it may be."""
    state = folder / "state"
    found = {
        "instances": driver.instances(),
        "daemons": sorted(pipes_below(folder / "run" / "mps")),
        "folders": [one.name for one in (folder / "run" / "mps").glob("*")],
        "records": [name for name in ("partitions.json", "sharing.json") if (state / name).exists()],
        "specs": [one.name for one in (folder / "cdi").glob("*.json")],
    }
    return {what: every for what, every in found.items() if every}


async def test_the_daemon_serves_the_instance_over_kill_9_and_ends_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the instance's UUID and the claim's limits; the next agent finds both and leaves nothing of either."""
    async with node_with_programs(folder, monkeypatch) as (node, driver):
        one = claim(node, "c", f"{GPU}-mig-3g-40gb-4")
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        (made,) = driver.instances()
        env, pipe = node.env(one), pipe_of(node, one)
        assert (made.profile, made.start) == ("3g.40gb", 4)
        assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
        assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=10240M"
        nodes = [it["path"] for it in node.spec(one)["devices"][0]["containerEdits"]["deviceNodes"]]
        assert len([path for path in nodes if path.startswith("/dev/nvidia-caps/")]) == 2
        (shown,) = await daemons(node)
        assert (shown["uuids"], shown["state"]) == ([env["NVIDIA_VISIBLE_DEVICES"]], "running")
        its = environment(shown["pid"])
        assert its["CUDA_VISIBLE_DEVICES"] == env["NVIDIA_VISIBLE_DEVICES"]
        assert its["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
        client = Client(pipe)
        assert (client.percent, client.limits) == (30.0, {"0": "10240M"})

        await node.agent.stop(signal.SIGKILL)
        assert not client.lost
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 2)
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        assert driver.instances() == [made]
        assert ((await daemons(node))[0]["pid"], client.lost) == (shown["pid"], False)

        driver.use(0, made.id)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_let_go(driver, made.id, shown["pid"]))
            assert await node.unprepare(one) == [""]
        await until(lambda: left(folder, driver) == {}, otherwise=lambda: str(left(folder, driver)))
        assert await node.grants() == []
        events = [line["event"] for line in node.agent.log]
        assert events.index("mps-stopped") < events.index("mig-destroyed")
        assert "mig-not-destroyed" not in events


async def _let_go(driver: MigDriver, instance: int, pid: int) -> None:
    """The driver takes the instance for used as long as its daemon runs."""
    await until(lambda: not is_alive(pid))
    driver.use(0, instance, busy=False)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_kill_9_at_any_moment_leaves_no_daemon_without_its_instance(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents die while calls of kubelet are under way: when something of it is recorded, made, started or written."""
    drawn, met = random.Random(5), 0
    async with node_with_programs(folder, monkeypatch) as (node, driver):
        claims = [claim(node, f"c{start}", f"{GPU}-mig-1g-10gb-{start}") for start in range(3)]
        for life in range(LIVES):
            calls = [asyncio.create_task(_call(node, one, prepare=drawn.random() < 0.7)) for one in claims]
            is_there = functools.partial(MOMENTS[life % len(MOMENTS)], folder, driver)
            await until(functools.partial(_reached, is_there, calls))
            met += bool(is_there())
            await asyncio.sleep(drawn.random() * 0.05)
            await node.agent.stop(signal.SIGKILL)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await node.agent.start()
            await node.dra.wait_registered(DRIVER, life + 2)
        held = {grant["uid"] for grant in await node.grants()}
        for one in claims:
            if one.uid in held:
                (answer,) = await node.prepare(one)
                assert answer.error == ""
                assert Client(pipe_of(node, one)).percent == 30.0

        async def is_settled() -> bool:
            served = {one for shown in await daemons(node) for one in shown["uuids"]}
            there = {node.env(one)["NVIDIA_VISIBLE_DEVICES"] for one in claims if one.uid in held}
            return served == there and len(driver.instances()) == len(held)

        await until(is_settled)
        for one in claims:
            assert await node.unprepare(one) == [""]
        await until(lambda: left(folder, driver) == {}, otherwise=lambda: str(left(folder, driver)))
        assert await node.grants() == []
    assert met >= LIVES // 2


def _reached(is_there: Callable[[], object], calls: Sequence[asyncio.Task[None]]) -> bool:
    return bool(is_there()) or all(one.done() for one in calls)


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile."""
    with contextlib.suppress(Exception):
        await (node.prepare(one) if prepare else node.unprepare(one))
