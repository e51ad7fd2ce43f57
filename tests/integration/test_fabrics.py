"""NVMe targets on the network, by the whole agent as a real process, with kubelet, an API server and a double of the
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
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import LEASES, SLICES
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.fabrics_kernel import FabricsKernel
from tests.support.dra_node import DRIVER, NODE, DraNode, dra_node
from tests.support.fabrics_agent import kernel_of
from tests.support.long_form import share_of
from tests.support.paths import CHECKOUT
from tests.support.until import until

NAMES = ("fast", "slow")
NQNS = {name: f"nqn.2024-01.com.example:{name}" for name in NAMES}
SAN = {
    "name": "san",
    "kind": "nvmeof",
    "serve": "dra",
    "targets": [{"name": name, "nqn": nqn, "traddr": "192.0.2.1"} for name, nqn in NQNS.items()],
}
LIVES = share_of(24, 0.15)
MOST_STEPS = 10
"""More than one call has: before and after each of its changes."""


@dataclass
class Node:
    """A node whose kernel reaches two targets."""

    node: DraNode
    facts: dict[str, Any]

    def claim(self, name: str, target: str) -> ClaimId:
        allocated = {"request": "r", "driver": DRIVER, "pool": f"nvmeof-{target}", "device": f"nvmeof-{target}"}
        return self.node.claim(name, allocated)

    @property
    def kernel(self) -> FabricsKernel:
        return kernel_of(self.facts)

    @property
    def journal(self) -> Path:
        return self.node.folder / "state" / "fabrics.json"

    @property
    def doom(self) -> Path:
        return Path(self.facts["doom"])

    def is_untouched(self) -> bool:
        return not self.kernel.controllers and not self.journal.exists()

    async def killed(self) -> bool:
        """Take the doom back; whether the agent has met it."""
        try:
            self.doom.unlink()
        except FileNotFoundError:
            await self.node.agent.end()
            return True
        return False


@contextlib.asynccontextmanager
async def fabrics_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    tree.node("/dev/nvme-fabrics")
    facts = {"root": str(tree.root), "targets": [*NQNS.values()], "doom": str(folder / "doom")}
    (folder / "fabrics.json").write_text(json.dumps(facts))
    monkeypatch.setenv("FABRICS_NODE", str(folder / "fabrics.json"))
    async with dra_node(folder, tree, [SAN], module="tests.support.fabrics_agent") as node:
        yield Node(node, facts)


async def test_a_target_is_published_for_all_nodes_connected_for_a_claim_and_disconnected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fabrics_node(folder, monkeypatch) as one:
        api = one.node.api
        await api.until(lambda: len(api.objects(SLICES)) == len(NAMES))
        for stored, name in zip(api.objects(SLICES), NAMES, strict=True):
            assert stored["spec"]["allNodes"] is True and stored["spec"]["pool"]["name"] == f"nvmeof-{name}"
        (lease,) = api.objects(LEASES)
        assert lease["spec"]["holderIdentity"] == NODE
        claim = one.claim("c", "fast")
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        assert one.kernel.connected() == {"nvme0": NQNS["fast"]}
        (device,) = one.node.spec(claim)["devices"]
        assert [it["path"] for it in device["containerEdits"]["deviceNodes"]] == ["/dev/nvme0n1"]
        assert one.node.metadata(claim)["devices"][0]["kind"] == "nvmeof"
        status = await one.node.agent.until("/v1/status", lambda said: said["fabrics"].get("leads"))
        assert status["fabrics"]["pools"] == ["nvmeof-fast", "nvmeof-slow"]
        kernel = one.kernel
        kernel.lose(kernel.targets[0])

        def taints() -> list[str]:
            every = (device for it in api.objects(SLICES) for device in it["spec"]["devices"])
            return [taint["key"] for device in every for taint in device.get("taints") or ()]

        await api.until(lambda: taints() == ["nodeagent.dev/path-lost"])
        assert await one.node.unprepare(claim) == [""]
        assert one.is_untouched()
        await api.until(lambda: not taints())


async def test_uninstalling_disconnects_what_a_killed_agent_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fabrics_node(folder, monkeypatch) as one:
        (answer,) = await one.node.prepare(one.claim("c", "slow"))
        assert answer.error == ""
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.fabrics_agent", *words, stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        said, _ = await done.communicate()
        assert f"target {NQNS['slow']} at tcp://192.0.2.1:4420: connected -> disconnected" in said.decode()
        assert "the pools of NVMe targets stay for other nodes" in said.decode()
        assert one.is_untouched()


async def test_kill_9_before_or_after_any_change_leaves_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claims are prepared and unprepared; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(3), 0
    async with fabrics_node(folder, monkeypatch) as one:
        claims = {name: one.claim(f"c-{name}", name) for name in NAMES}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for name in drawn.sample(NAMES, 2):
                await _call(one.node, claims[name], prepare=drawn.random() < 0.6)
            if await one.killed():
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        for claim in claims.values():
            if claim.uid in held:
                (answer,) = await one.node.prepare(claim)
                assert answer.error == ""
        wanted = {NQNS[name] for name, claim in claims.items() if claim.uid in held}
        await until(lambda: {*one.kernel.connected().values()} == wanted, otherwise=lambda: str(wanted))
        for claim in claims.values():
            assert await one.node.unprepare(claim) == [""]
        await until(one.is_untouched)
        assert await one.node.grants() == []
    with capsys.disabled():
        print(f"\ntargets on the network: {deaths} of {LIVES} agents killed at a change")
    assert deaths >= LIVES // 4


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile, or be dead."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(30):
            await (node.prepare(one) if prepare else node.unprepare(one))
