"""Work queues made for claims, by the whole agent as a real process, with kubelet, an API server and a double of the
kernel; killed at any step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import SLICES
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.idxd_kernel import IdxdKernel, accelerator
from tests.support.dra_node import DRIVER, NODE, DraNode, dra_node
from tests.support.long_form import share_of
from tests.support.paths import CHECKOUT
from tests.support.until import until

RESOURCE = {
    "name": "queue",
    "kind": "dsa",
    "serve": "dra",
    "queues": {"groups": [{"engines": 2, "sizes": [32, 16]}], "modes": ["dedicated", "shared"]},
}
LIVES = share_of(24, 0.15)
MOST_STEPS = 30
"""More than one call has: before and after each of its changes."""


@dataclass
class Node:
    """A node with one accelerator."""

    node: DraNode
    kernel: IdxdKernel
    doom: Path
    blank: dict[str, dict[str, str]]

    def claim(self, name: str, number: int) -> ClaimId:
        allocated = {"request": "r", "driver": DRIVER, "pool": f"{NODE}/dsa", "device": f"0000-6a-01-0-wq-{number}"}
        return self.node.claim(name, allocated)

    def is_untouched(self) -> bool:
        return self.kernel.everything() == self.blank and not (self.node.folder / "state" / "queues.json").exists()

    async def killed(self) -> bool:
        """Take the doom back; whether the agent has met it."""
        try:
            self.doom.unlink()
        except FileNotFoundError:
            await self.node.agent.end()
            return True
        return False


@contextlib.asynccontextmanager
async def queues_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    accelerator(tree, "0000:6a:01.0", "dsa0")
    (folder / "queues.json").write_text(json.dumps({"root": str(tree.root), "doom": str(folder / "doom")}))
    monkeypatch.setenv("QUEUES_NODE", str(folder / "queues.json"))
    kernel = IdxdKernel(tree.root)
    blank = kernel.everything()
    async with dra_node(folder, tree, [RESOURCE], module="tests.support.queues_agent") as node:
        yield Node(node, kernel, folder / "doom", blank)


async def test_queues_are_published_made_for_a_claim_and_ended_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with queues_node(folder, monkeypatch) as one:
        api = one.node.api
        await api.until(lambda: len(api.objects(SLICES)) == 1)
        (slice,) = api.objects(SLICES)
        said = [(it["name"], it["attributes"]["size"]["int"]) for it in slice["spec"]["devices"]]
        assert said == [("0000-6a-01-0-wq-0", 32), ("0000-6a-01-0-wq-1", 16)]
        claim = one.claim("c", 1)
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        assert one.kernel.enabled() == {"wq0.1": f"nodeagent-{claim.uid}"}
        (device,) = one.node.spec(claim)["devices"]
        assert [it["path"] for it in device["containerEdits"]["deviceNodes"]] == ["/dev/dsa/wq0.1"]
        assert one.node.metadata(claim)["devices"][0]["paths"] == ["/dev/dsa/wq0.1"]
        status = await one.node.agent.until("/v1/status", lambda it: it["queues"].get("enabled"))
        assert [it["queue"] for it in status["queues"]["enabled"]] == ["wq0.1"]
        assert await one.node.unprepare(claim) == [""]
        assert one.is_untouched()
        assert api.objects(SLICES)[0]["spec"]["devices"] == slice["spec"]["devices"]


async def test_uninstalling_disables_what_a_killed_agent_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with queues_node(folder, monkeypatch) as one:
        (answer,) = await one.node.prepare(one.claim("c", 0))
        assert answer.error == ""
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.queues_agent", *words, stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        said, _ = await done.communicate()
        assert "work queue wq0.0 of dsa0: enabled -> disabled" in said.decode()
        assert one.is_untouched()


async def test_kill_9_before_or_after_any_change_leaves_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claims are prepared and unprepared; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(5), 0
    async with queues_node(folder, monkeypatch) as one:
        claims = {number: one.claim(f"c-{number}", number) for number in (0, 1)}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for number in drawn.sample((0, 1), 2):
                await _call(one.node, claims[number], prepare=drawn.random() < 0.6)
            if await one.killed():
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        for claim in claims.values():
            if claim.uid in held:
                (answer,) = await one.node.prepare(claim)
                assert answer.error == ""
        wanted = {f"wq0.{n}": f"nodeagent-{claim.uid}" for n, claim in claims.items() if claim.uid in held}
        await until(lambda: one.kernel.enabled() == wanted, otherwise=lambda: str(one.kernel.enabled()))
        for claim in claims.values():
            assert await one.node.unprepare(claim) == [""]
        await until(one.is_untouched)
        assert await one.node.grants() == []
    with capsys.disabled():
        print(f"\nwork queues: {deaths} of {LIVES} agents killed at a change")
    assert deaths >= LIVES // 4


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile, or be dead."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(30):
            await (node.prepare(one) if prepare else node.unprepare(one))
