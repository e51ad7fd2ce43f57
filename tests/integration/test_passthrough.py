"""Devices of virtual machines, by the whole agent as a real process, with kubelet, an API server and a kernel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.pci_drivers import PciKernel
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.long_form import share_of
from tests.support.until import until

GPU, AUDIO, OTHER = "0000:41:00.0", "0000:41:00.1", "0000:43:00.0"
OWN = {GPU: "nvidia", AUDIO: "snd_hda_intel", OTHER: "nvidia"}
GPUS = {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {"parent": ""}}
LIVES = share_of(100, 0.08)
MOST_STEPS = 24
"""More than one call has: before and after each of its writes to the kernel and to the journal."""


@dataclass
class Node:
    """A node with two GPUs, one with an audio function in its IOMMU group."""

    node: DraNode
    kernel: PciKernel
    doom: Path

    def claim(self, name: str, address: str) -> ClaimId:
        parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "GpuConfig", "driver": "vfio-pci"}
        config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
        device = address.replace(":", "-").replace(".", "-")
        return self.node.claim(name, result("gpu", device), config=[config])

    def drivers(self) -> dict[str, str]:
        return {address: self.kernel.driver(address) for address in OWN}

    @property
    def journal(self) -> Path:
        return self.node.folder / "state" / "passthrough.json"

    def is_untouched(self) -> bool:
        reserved = [address for address in self.kernel.functions() if self.kernel.override(address)]
        return self.drivers() == OWN and not reserved and not self.journal.exists()

    async def killed(self) -> bool:
        """Take the doom back; whether the agent has met it."""
        try:
            self.doom.unlink()
        except FileNotFoundError:
            await self.node.agent.end()
            return True
        return False


@contextlib.asynccontextmanager
async def passthrough_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    facts = {GPU: ("030200", 7), AUDIO: ("040300", 7), OTHER: ("030200", 9)}
    for minor, (address, (pci_class, group)) in enumerate(facts.items()):
        made = tree.pci(address, pci_class=pci_class, vendor="10de", driver=OWN[address], group=group)
        tree.link(f"sys/kernel/iommu_groups/{group}/devices/{address}", made)
        if pci_class.startswith("03"):
            tree.node(f"/dev/nvidia{minor}")
            lines = f"Model: NVIDIA L40\nGPU UUID: GPU-{minor}\nDevice Minor: {minor}"
            tree.write(f"proc/driver/nvidia/gpus/{address}/information", lines)
    tables = {driver: sorted(one for one in OWN if OWN[one] == driver) for driver in set(OWN.values())}
    kernel = PciKernel(tree.root, {driver: frozenset(functions) for driver, functions in tables.items()})
    facts_file, doom = folder / "vfio.json", folder / "doom"
    facts_file.write_text(json.dumps({"root": str(tree.root), "tables": tables, "doom": str(doom)}))
    monkeypatch.setenv("VFIO_NODE", str(facts_file))
    allowed: dict[str, Any] = {"passthroughDrivers": ["vfio-pci"]}
    async with dra_node(folder, tree, [GPUS], dra=allowed, module="tests.support.vfio_agent") as node:
        await node.published("gpu")
        yield Node(node, kernel, doom)


async def test_a_device_is_bound_as_long_as_its_claim_is_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its audio function; the container of the virtual machine gets the group's node, nothing of NVIDIA's."""
    async with passthrough_node(folder, monkeypatch) as one:
        claim = one.claim("guest", GPU)
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        assert one.drivers() == {**OWN, GPU: "vfio-pci", AUDIO: "vfio-pci"}
        edits = one.node.spec(claim)["devices"][0]["containerEdits"]
        assert [it["path"] for it in edits["deviceNodes"]] == ["/dev/vfio/vfio", "/dev/vfio/7"]
        assert [it for it in edits.get("env", ()) if it.startswith("NVIDIA")] == []
        assert await one.node.unprepare(claim) == [""]
        assert one.is_untouched()
        assert await one.node.grants() == []


async def test_kill_9_before_or_after_any_write_leaves_what_the_ledger_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claims are prepared and unprepared; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(11), 0
    async with passthrough_node(folder, monkeypatch) as one:
        claims = {address: one.claim(f"guest-{n}", address) for n, address in enumerate((GPU, OTHER))}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for address in drawn.sample(list(claims), 2):
                await _call(one.node, claims[address], prepare=drawn.random() < 0.6)
            if await one.killed():
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        bound = {address for address, claim in claims.items() if claim.uid in held}
        for address in bound:
            (answer,) = await one.node.prepare(claims[address])
            assert answer.error == ""
        bound |= {AUDIO} & ({AUDIO} if GPU in bound else set())
        wanted = {address: "vfio-pci" if address in bound else own for address, own in OWN.items()}
        await until(lambda: one.drivers() == wanted, otherwise=lambda: f"{one.drivers()} != {wanted}")
        for claim in claims.values():
            assert await one.node.unprepare(claim) == [""]
        await until(one.is_untouched)
        assert await one.node.grants() == []
    with capsys.disabled():
        print(f"\npassthrough: {deaths} of {LIVES} agents killed at a write")
    assert deaths >= LIVES // 4


async def _call(node: DraNode, one: ClaimId, *, prepare: bool) -> None:
    """A call of kubelet, whose peer may die meanwhile, or be dead."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(30):
            await (node.prepare(one) if prepare else node.unprepare(one))
