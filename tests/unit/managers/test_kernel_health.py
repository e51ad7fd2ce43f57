"""Looking at devices through the kernel: when, for how long, and what becomes of evidence."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.config.schema import schema
from nodeagent.core.dsa.division import SOURCE as QUEUE
from nodeagent.core.fabrics.pool import PATH
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence
from nodeagent.host.health.source import Sight, Silence, looked
from nodeagent.host.health.sources import sources
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.gpu_health import OF_NVML
from nodeagent.managers.inventory.gpu_sources import IGNORABLE
from tests.builders.devices import DeviceTree
from tests.support import npu
from tests.support.health_node import health_node
from tests.support.paths import CHECKOUT

A, B = "0000:3b:00.0", "0000:5e:00.0"
WAIT_S = 30.0


class Told:
    """A source that answers what the test says, and counts."""

    name = "carrier"

    def __init__(self, answer: Callable[[str], Sight | Silence], period_s: float = 0.0) -> None:
        self.answer, self.period_s = answer, period_s
        self.asked: list[str] = []

    def concerns(self, device: Device) -> bool:
        return device.kind == "nic"

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        self.asked.append(device.id)
        return self.answer(device.id)


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    tree = DeviceTree(tmp_path)
    for address in (A, B):
        tree.pci(address)
    return tree


async def test_a_device_that_hangs_is_unknown_and_hides_no_other(tree: DeviceTree) -> None:
    """What is good of the others is still seen, look for look; it recovers when it answers again."""
    goes_on, threads = threading.Event(), list[threading.Thread]()
    answers = [Sight(HEALTHY), Sight(UNHEALTHY, "broken")]

    def answer(device: str) -> Sight:
        if device == A:
            threads.append(threading.current_thread())
            assert goes_on.wait(WAIT_S)
            return Sight(HEALTHY)
        return answers.pop(0)

    async with health_node(tree, every=[Told(answer)], deadline_s=0.05) as node:
        await node.look()
        assert node.known(A) == (UNKNOWN, "the kernel did not answer within 0.05 s")
        assert node.known(B) == (HEALTHY, "")
        await node.look()
        assert (node.known(A)[0], node.known(B)) == (UNKNOWN, (UNHEALTHY, "broken"))
        goes_on.set()
        await asyncio.to_thread(threads[0].join, WAIT_S)
        answers += [Sight(HEALTHY)] * 2
        await node.look()
        await node.look(30)
        assert (node.known(A), node.known(B)) == ((HEALTHY, ""), (HEALTHY, ""))


async def test_silence_keeps_what_was_said_unless_there_is_nothing_to_see(tree: DeviceTree) -> None:
    answers: dict[str, Sight | Silence] = {A: Sight(UNHEALTHY, "a"), B: Sight(UNHEALTHY, "b")}
    async with health_node(tree, every=[Told(answers.__getitem__)]) as node:
        await node.look()
        answers |= {A: Silence.NO_ANSWER, B: Silence.NOTHING_TO_SEE}
        await node.look(100)
        await node.look(100)
        assert (node.known(A), node.known(B)) == ((UNHEALTHY, "a"), (HEALTHY, ""))


async def test_a_source_that_is_ignored_no_longer_counts(tree: DeviceTree) -> None:
    source = Told(lambda _: Sight(UNHEALTHY, "broken"))
    async with health_node(tree, every=[source]) as node:
        await node.look()
        node.configure(ignore=["carrier"])
        await node.look()
        await node.look(30)
        assert (node.known(A), len(source.asked)) == ((HEALTHY, ""), 2)


async def test_a_source_with_a_period_is_not_asked_at_each_look_but_asked_of_a_new_device(tree: DeviceTree) -> None:
    """What it said stays in the meantime."""
    source = Told(lambda device: Sight(UNHEALTHY, device), period_s=3600)
    async with health_node(tree, every=[source]) as node:
        await node.look()
        tree.pci("0000:81:00.0")
        await node.look(100)
        assert source.asked == [A, B, "0000:81:00.0"]
        assert [node.known(one)[0] for one in source.asked] == [UNHEALTHY] * 3


async def test_nothing_stays_of_a_device_that_has_left(tree: DeviceTree) -> None:
    """Not even if it leaves while it is looked at."""
    node_of: list[object] = []

    def answer(device: str) -> Sight:
        if device == B and len(node_of) == 1:
            (tree.root / f"sys/bus/pci/devices/{B}").unlink()
            node_of.append(None)
        return Sight(UNHEALTHY, "broken", {"errors": 7})

    async with health_node(tree, every=[Told(answer)]) as node:
        await node.look()
        assert set(node.agent.health) == {A, B}
        assert node.health.readings()[B, "carrier"] == {"errors": 7}
        node_of.append(node)
        await node.health.look()
        node.rescan()
        assert set(node.agent.health) == {A}
        assert (B, "carrier") not in node.health.readings()
        node.agent.observe([Evidence(device=B, source="carrier", state=UNHEALTHY)])
        assert set(node.agent.health) == {A}


async def test_a_new_device_is_looked_at_at_once(tree: DeviceTree) -> None:
    """Not only after health.pollSeconds."""
    async with health_node(tree, every=[Told(lambda device: Sight(UNHEALTHY, device))]) as node:
        node.configure(pollSeconds=3600)
        following = asyncio.create_task(node.health.follow())
        try:
            async with asyncio.timeout(WAIT_S):
                seen = 0
                while A not in node.agent.health:
                    seen = await node.agent.revisions.health.changed(seen)
                tree.pci("0000:81:00.0")
                node.rescan()
                while "0000:81:00.0" not in node.agent.health:
                    seen = await node.agent.revisions.health.changed(seen)
        finally:
            following.cancel()


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit("odd")])
def test_a_source_that_fails_is_unknown_with_the_cause(tree: DeviceTree, error: BaseException) -> None:
    """Also if it would end the program: the thread that it runs in has others to look at."""

    def answer(_: str) -> Sight:
        raise error

    device = Device(kind="nic", id=A)
    assert looked(Told(answer), SysFs(tree.root), device) == Sight(UNKNOWN, f"cannot look at carrier of {A}: odd")


def test_every_source_has_a_name_of_its_own_that_the_configuration_and_the_documentation_know() -> None:
    """Those of NVML that the driver alone can tell about are never ignored, nor is what the configuration says, nor
    the path to a target on the network, nor a queue that was made for a claim."""
    names = [one.name for one in sources([npu.kind()])]
    assert len(set(names)) == len(names)
    ignorable = set(schema()["$defs"]["HealthConfig"]["properties"]["ignore"]["items"]["enum"])
    assert ignorable == {*names, *IGNORABLE}
    page = CHECKOUT / "docs" / "health.md"
    if not page.exists():
        pytest.skip("the documentation lies in the checkout")
    table = re.findall(r"^\| `([a-z]+)` \|", page.read_text(), re.MULTILINE)
    assert sorted(table) == sorted({*ignorable, *OF_NVML, "quarantine", PATH, QUEUE})
