"""The interrupts of a claim's adapter, by the whole agent as a real process, with kubelet and an API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodeagent.host.sysfs.sysfs import BOOT_ID
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.support.dra_node import CPUS, DRIVER, DraNode, consumed, dra_node, result
from tests.support.paths import CHECKOUT
from tests.support.until import until
from tests.unit.host.test_intruders import KTHREAD, irq, sysfs_irq

NIC = "0000:3b:00.0"
ADAPTERS = {"name": "nic", "kind": "nic", "serve": "dra"}
MORE = {"reservedCpus": "", "pinning": {"mode": "cgroup", "intrudersSeconds": 0.1}}


@dataclass
class Node:
    """A node of 8 CPUs with an adapter that has two queues."""

    node: DraNode
    tree: DeviceTree

    def add(self, number: int, name: str = "eth0-0") -> None:
        """The driver requests another interrupt."""
        irq(self.tree.root, number, smp_affinity_list="0-7")
        sysfs_irq(self.tree.root, number, actions=name)
        self.tree.write(f"sys/bus/pci/devices/{NIC}/msi_irqs/{number}", "msix")

    def asked(self, number: int) -> str:
        return (self.tree.root / f"proc/irq/{number}/smp_affinity_list").read_text().strip()

    def claim(self, name: str, said: str) -> ClaimId:
        """A claim for two CPUs and the adapter."""
        parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", "interrupts": said}
        config = {"source": "FromClaim", "requests": ["nic"], "opaque": {"driver": DRIVER, "parameters": parameters}}
        every = (
            consumed("cpu", "numa1", "cpus", cpus="2"),
            result("nic", NIC.replace(":", "-").replace(".", "-"), "nic"),
        )
        return self.node.claim(name, *every, config=[config])

    async def has(self, claim: ClaimId) -> str:
        """The CPUs of a claim."""
        return next(one["cpus"] for one in await self.node.grants() if one["uid"] == claim.uid and one["cpus"])

    async def are(self, cpus: str, *numbers: int) -> None:
        """Return once all of these interrupts are so."""
        await until(lambda: all(self.asked(one) == cpus for one in numbers))


@contextlib.asynccontextmanager
async def nic_node(folder: Path) -> AsyncIterator[Node]:
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    tree.pci(NIC, driver="ice")
    tree.net(NIC, "eth0")
    for path, text in ((BOOT_ID, "boot-1"), ("proc/2/stat", f"2 (kthreadd) S 0 0 0 0 -1 {KTHREAD} 0 0 0 0")):
        tree.write(path, text)
    async with dra_node(folder, tree, [CPUS, ADAPTERS], more=MORE) as node:
        made = Node(node, tree)
        for number in (24, 25):
            made.add(number)
        await node.published("nic", "cpu")
        yield made


async def test_interrupts_follow_a_claim_until_it_is_released(folder: Path) -> None:
    """Those of a later queue too, and over kill -9; the status names them."""
    async with nic_node(folder) as one:
        claim = one.claim("c", "follow")
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        cpus = await one.has(claim)
        await one.are(cpus, 24, 25)
        one.add(26)
        await one.are(cpus, 24, 25, 26)
        shown: Any = await one.node.agent.until(
            "/v1/status", lambda page: page["pinning"]["intruders"]["devices"][:1] and page["pinning"]["intruders"]
        )
        assert shown["pinning"]["intruders"]["devices"] == [
            {
                "device": NIC,
                "holder": "claim default/c",
                "interrupts": "follow",
                "cpus": cpus,
                "irqs": [24, 25, 26],
                "misplaced": [],
                "why": "",
            }
        ]
        await one.node.agent.stop(signal.SIGKILL)
        await one.node.agent.start()
        await one.node.dra.wait_registered(DRIVER, 2)
        assert await one.node.unprepare(claim) == [""]
        await one.are("0-7", 24, 25, 26)
        await until(lambda: not (folder / "state/interrupts.json").exists())


async def test_uninstalling_gives_back_what_a_killed_agent_has_moved(folder: Path) -> None:
    async with nic_node(folder) as one:
        claim = one.claim("c", "follow")
        await one.node.prepare(claim)
        await one.are(await one.has(claim), 24, 25)
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "nodeagent", *words, cwd=CHECKOUT)
        assert await process.wait() == 0
        assert (one.asked(24), one.asked(25)) == ("0-7", "0-7")


async def test_a_claim_that_cannot_have_it_is_refused(folder: Path) -> None:
    """A configuration of another word; and what it says is durable with the grant."""
    async with nic_node(folder) as one:
        (answer,) = await one.node.prepare(one.claim("wrong", "closest"))
        assert "NicConfig: Invalid enum value 'closest'" in answer.error
        claim = one.claim("c", "avoid")
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        settings = [one["settings"] for one in await one.node.grants() if one["settings"]]
        assert json.loads(settings[0])["interrupts"] == "avoid"
