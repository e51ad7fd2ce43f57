"""Work queues of DSA made for claims, by the whole agent as a real process, with kubelet, an API server and a double of
the kernel; killed at any step."""

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
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.dsa_keeper_node import AT, IDS
from tests.support.idxd_agent import kernel_of
from tests.support.long_form import share_of
from tests.support.paths import CHECKOUT
from tests.support.until import until

SLOTS = [0, 1, 2]
QUEUES = [{"count": 2, "size": 32}, {"mode": "dedicated", "size": 16, "priority": 5}]
GIVEN = {"accelerators": {"dsa": [{"accelerators": ["dsa*"], "queues": QUEUES}]}}
RESOURCES = [
    {"name": "queue", "kind": "dsa-queue", "serve": "dra"},
    {"name": "dsa", "kind": "dsa", "serve": "dra"},
]
LIVES = share_of(24, 0.25)
MOST_STEPS = 60
"""More than one call has: before and after each of its changes."""


@dataclass
class Node:
    """A node with an accelerator that is given to the agent."""

    node: DraNode
    facts: dict[str, Any]

    def claim(self, name: str, *slots: int) -> ClaimId:
        return self.node.claim(name, *(result("dsa-queue", _name(slot), f"r{slot}") for slot in slots))

    @property
    def kernel(self) -> IdxdKernel:
        return kernel_of(self.facts)

    @property
    def journal(self) -> Path:
        return self.node.folder / "state" / "dsa-queues.json"

    @property
    def doom(self) -> Path:
        return Path(self.facts["doom"])

    def made(self) -> set[int]:
        """The slots whose queues are enabled."""
        kernel = self.kernel
        return {slot for slot in range(8) if kernel.driver(f"wq0.{slot}") == "user"}

    def is_untouched(self) -> bool:
        return self.kernel.is_untouched("dsa0") and not self.journal.exists()

    async def killed(self) -> bool:
        """Take the doom back; whether the agent has met it."""
        try:
            self.doom.unlink()
        except FileNotFoundError:
            await self.node.agent.end()
            return True
        return False


def _name(slot: int) -> str:
    return IDS[slot].replace(":", "-").replace(".", "-").replace("/", "-")


@contextlib.asynccontextmanager
async def dsa_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    IdxdKernel(tree).add("dsa0", AT)
    facts = {"root": str(tree.root), "doom": str(folder / "doom")}
    (folder / "idxd.json").write_text(json.dumps(facts))
    monkeypatch.setenv("IDXD_NODE", str(folder / "idxd.json"))
    async with dra_node(folder, tree, RESOURCES, more=GIVEN, module="tests.support.idxd_agent") as node:
        yield Node(node, facts)


async def test_slots_are_published_made_for_claims_and_taken_down(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dsa_node(folder, monkeypatch) as one:
        await one.node.published("dsa-queue")
        assert sorted(one.node.devices("dsa-queue")) == [_name(slot) for slot in SLOTS]
        attributes = one.node.devices("dsa-queue")[_name(2)]["attributes"]
        assert attributes["mode"] == {"string": "dedicated"} and attributes["priority"] == {"int": 5}
        claim, other = one.claim("c", 0, 2), one.claim("d", 1)
        for answer in [*await one.node.prepare(claim), *await one.node.prepare(other)]:
            assert answer.error == ""
        assert one.made() == {0, 1, 2}
        nodes = [device["containerEdits"]["deviceNodes"] for device in one.node.spec(claim)["devices"]]
        assert [[it["path"] for it in some] for some in nodes] == [["/dev/dsa/wq0.0"], ["/dev/dsa/wq0.2"]]
        assert one.node.env(claim)["NODEAGENT_DSA_QUEUES"] == "/dev/dsa/wq0.0"
        assert one.node.devices("dsa") == {}, "they are no queues of the admin's"
        assert await one.node.unprepare(claim) == [""]
        assert one.made() == {1}
        assert await one.node.unprepare(other) == [""]
        assert one.is_untouched()
        assert sorted(one.node.devices("dsa-queue")) == [_name(slot) for slot in SLOTS]


async def test_an_accelerator_that_an_admin_takes_is_no_longer_offered_and_status_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dsa_node(folder, monkeypatch) as one:
        await one.node.published("dsa-queue")
        one.kernel.configures("wq0.3", size=8, type="user", name="app")
        await until(lambda: one.node.devices("dsa-queue") == {})
        status = await one.node.agent.until(
            "/v1/status", lambda said: "wq0.3 of dsa0 is configured" in json.dumps(said)
        )
        assert status
        (answer,) = await one.node.prepare(one.claim("c", 0))
        assert answer.error and one.made() == set() and one.kernel.get("wq0.3", "name") == "app"


async def test_a_queue_that_an_admin_has_taken_is_handed_over_to_no_container_any_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dsa_node(folder, monkeypatch) as one:
        claim, other = one.claim("c", 0), one.claim("d", 1)
        for answer in [*await one.node.prepare(claim), *await one.node.prepare(other)]:
            assert answer.error == ""
        kernel = one.kernel
        kernel.resets("dsa0")
        kernel.configures("wq0.0", size=32, type="user", name="app")
        assert await one.node.unprepare(other) == [""]  # another call has it seen
        await until(lambda: not [path for path in one.node.cdi.glob("*.json") if claim.uid in path.name])
        (answer,) = await one.node.prepare(claim)
        assert "although the agent enabled it: another program did that" in answer.error
        assert await one.node.unprepare(claim) == [""]
        assert kernel.get("wq0.0", "name") == "app" and kernel.get("wq0.0", "size") == "32"


async def test_uninstalling_takes_down_what_a_killed_agent_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with dsa_node(folder, monkeypatch) as one:
        (answer,) = await one.node.prepare(one.claim("c", 0, 2))
        assert answer.error == ""
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.idxd_agent", *words, stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        said, _ = await done.communicate()
        assert f"accelerator {AT}: divided into queues -> as before" in said.decode()
        assert one.is_untouched()


async def test_kill_9_before_or_after_any_change_leaves_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claims are prepared and unprepared; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(5), 0
    async with dsa_node(folder, monkeypatch) as one:
        claims = {slot: one.claim(f"c-{slot}", slot) for slot in SLOTS}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for slot in drawn.sample(SLOTS, 2):
                await _call(one.node, claims[slot], prepare=drawn.random() < 0.6)
            if await one.killed():
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        for claim in claims.values():
            if claim.uid in held:
                (answer,) = await one.node.prepare(claim)
                assert answer.error == ""
        wanted = {slot for slot, claim in claims.items() if claim.uid in held}
        await until(lambda: one.made() == wanted, otherwise=lambda: str(wanted))
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
