"""Properties of claims' virtual functions, by the whole agent as a real process, with kubelet, an API server and a
double of the kernel; killed at any step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nodeagent.host.sysfs.sysfs import BOOT_ID
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.vf_kernel import Vf
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.long_form import share_of
from tests.support.paths import CHECKOUT
from tests.support.until import until
from tests.support.vf_agent import kernel_of

PF, VFS = "0000:3b:00.0", ["0000:3b:02.0", "0000:3b:02.1"]
NIC = {"name": "vf", "kind": "nic", "serve": "dra", "match": {"sriov": "vf"}}
ASKED = {"mac": "02:00:00:00:00:0a", "vlan": 100, "maxTxRateMbps": 1000, "spoofCheck": False}
AS_ASKED = Vf(mac="02000000000a", vlan=100, max_rate=1000, spoofchk=0)
ALLOWED = ["mac", "vlan", "txRate", "spoofCheck"]
LIVES = share_of(24, 0.33)
MOST_STEPS = 16
"""More than one call has: before and after each of its changes."""


@dataclass
class Node:
    """A node with an adapter that has two virtual functions."""

    node: DraNode
    facts: dict[str, Any]

    def claim(self, name: str, vf: str, said: Mapping[str, Any] = ASKED) -> ClaimId:
        parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", "vf": said}
        config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
        return self.node.claim(name, result("nic", vf.replace(":", "-").replace(".", "-")), config=[config])

    def has(self) -> list[Vf]:
        kernel = kernel_of(self.facts)
        kernel.load()
        return kernel.pfs["ens1f0"].vfs

    @property
    def journal(self) -> Path:
        return self.node.folder / "state" / "vf-properties.json"

    def is_untouched(self) -> bool:
        return self.has() == [Vf(), Vf()] and not self.journal.exists()

    @property
    def doom(self) -> Path:
        return Path(self.facts["doom"])

    async def killed(self) -> bool:
        """Take the doom back; whether the agent has met it."""
        try:
            self.doom.unlink()
        except FileNotFoundError:
            await self.node.agent.end()
            return True
        return False


@contextlib.asynccontextmanager
async def vf_node(folder: Path, monkeypatch: pytest.MonkeyPatch, *allowed: str) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    tree.pci(PF, driver="ice")
    tree.net(PF, "ens1f0")
    for index, vf in enumerate(VFS):
        tree.vf(PF, index, vf)
    state, doom = folder / "kernel.json", folder / "doom"
    facts = {"pf": PF, "interface": "ens1f0", "count": len(VFS), "state": str(state), "doom": str(doom)}
    (folder / "vf.json").write_text(json.dumps(facts))
    monkeypatch.setenv("VF_NODE", str(folder / "vf.json"))
    more = {"network": {"vfProperties": list(allowed)}}
    async with dra_node(folder, tree, [NIC], more=more, module="tests.support.vf_agent") as node:
        await node.published("nic")
        yield Node(node, facts)


async def test_a_function_is_as_its_claim_wants_it_as_long_as_that_is_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with vf_node(folder, monkeypatch, *ALLOWED) as one:
        claim = one.claim("c", VFS[1])
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        assert one.has() == [Vf(), AS_ASKED]
        (answer,) = await one.node.prepare(one.claim("d", VFS[0], {"trust": True}))
        assert "vf: network.vfProperties of this node does not allow trust" in answer.error
        assert await one.node.unprepare(claim) == [""]
        assert one.is_untouched()
        assert await one.node.grants() == []


async def test_a_claim_keeps_what_was_allowed_although_it_is_no_longer_also_over_a_reboot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with vf_node(folder, monkeypatch, *ALLOWED) as one:
        claim = one.claim("c", VFS[1])
        await one.node.prepare(claim)
        await one.node.agent.stop()
        kernel_of(one.facts).reboot()
        (folder / "root" / BOOT_ID).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / BOOT_ID).write_text("another\n")
        one.journal.unlink()
        one.node.agent.configure(**{**one.node.options, "network": {}})
        await one.node.agent.start()
        await one.node.dra.wait_registered(DRIVER, 2)
        assert one.has() == [Vf(), Vf()]
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        assert one.has() == [Vf(), AS_ASKED]
        (answer,) = await one.node.prepare(one.claim("d", VFS[0]))
        assert "does not allow mac, vlan, txRate, spoofCheck" in answer.error
        assert await one.node.unprepare(claim) == [""]
        assert one.is_untouched()


async def test_uninstalling_sets_back_what_a_killed_agent_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with vf_node(folder, monkeypatch, *ALLOWED) as one:
        await one.node.prepare(one.claim("c", VFS[1]))
        assert one.has() == [Vf(), AS_ASKED]
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.vf_agent", *words, stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        said, _ = await done.communicate()
        assert f"properties of {VFS[1]}: " in said.decode()
        assert one.is_untouched()


async def test_kill_9_before_or_after_any_change_leaves_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claims are prepared and unprepared; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(5), 0
    async with vf_node(folder, monkeypatch, *ALLOWED) as one:
        claims = {vf: one.claim(f"c-{number}", vf) for number, vf in enumerate(VFS)}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for vf in drawn.sample(VFS, 2):
                await _call(one.node, claims[vf], prepare=drawn.random() < 0.6)
            if await one.killed():
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        for claim in claims.values():
            if claim.uid in held:
                (answer,) = await one.node.prepare(claim)
                assert answer.error == ""
        wanted = [AS_ASKED if claims[vf].uid in held else Vf() for vf in VFS]
        await until(lambda: one.has() == wanted, otherwise=lambda: f"{one.has()} != {wanted}")
        for claim in claims.values():
            assert await one.node.unprepare(claim) == [""]
        await until(one.is_untouched)
        assert await one.node.grants() == []
    with capsys.disabled():
        print(f"\nproperties of virtual functions: {deaths} of {LIVES} agents killed at a change")
    assert deaths >= LIVES // 4


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile, or be dead."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(30):
            await (node.prepare(one) if prepare else node.unprepare(one))
