"""What keeps work queues made for the claims of a ledger, on a double of the kernel."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.config.accelerators import AcceleratorsConfig, DsaConfig, DsaQueuesConfig
from nodeagent.config.schema import Config
from nodeagent.core.dsa.division import KIND, device_id
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.managers.dsa.manager import DsaManager
from tests.support.dsa_keeper_node import AT, Direct, Node

OTHER = "0000:e7:01.0"
QUEUES = [DsaQueuesConfig(count=3, size=16)]
CONFIG = Config(accelerators=AcceleratorsConfig(dsa=[DsaConfig(accelerators=["dsa*"], queues=QUEUES)]))


async def _nothing() -> None:
    return None


class Ledger:
    """The agent as the manager needs it."""

    def __init__(self, *grants: Grant) -> None:
        self.settings = SimpleNamespace(boot_id="boot-0")
        self.loss = ""
        self.newest = self.ledger = SimpleNamespace(grants={one.id: one for one in grants})
        devices = [Device(kind=KIND, id=device_id(at, slot)) for at in (AT, OTHER) for slot in range(3)]
        self.inventory = SimpleNamespace(device_by_id={one.id: one for one in devices})
        self.evidence: dict[str, Evidence] = {}

    async def refresh(self) -> None:
        return None

    def observe(self, evidence: list[Evidence], gone: list[tuple[str, str]]) -> None:
        self.evidence |= {one.device: one for one in evidence}
        for device, _ in gone:
            self.evidence.pop(device, None)


def _grant(uid: str, *devices: str) -> Grant:
    return Grant(id=f"g-{uid}", holder=Holder(api=CLAIM, uid=uid), devices=devices)


def _manager(node: Node, ledger: Ledger, hide: Callable[[], Awaitable[None]] = _nothing) -> DsaManager:
    accelerators = Accelerators(node.sysfs, Direct(node.kernel.put))
    agent: Any = ledger
    return DsaManager(agent, accelerators, node.state, lambda: CONFIG, _nothing, hide)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_what_no_claim_holds_is_taken_down_beside_claims_of_other_kinds(node: Node) -> None:
    node.make(0)
    manager = _manager(node, Ledger(_grant("x", "0000:17:00.0/queue-rx0")))
    await manager.recover()
    assert node.is_untouched() and manager.notes() == []
    await manager.close()


async def test_an_accelerator_with_fewer_queues_than_recorded_ends_no_round(node: Node) -> None:
    node.make(2)
    for wq in node.kernel.parts("dsa0")[1:]:
        shutil.rmtree(node.kernel.folder("dsa0") / wq)
    manager = _manager(node, Ledger())
    await manager.recover()
    assert not node.keeper.records()
    await manager.close()


async def test_a_claim_is_not_released_while_the_bus_cannot_be_listed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.make(0)
    manager, listed = _manager(node, Ledger()), os.listdir

    def refused(path: str = ".") -> list[str]:
        if str(path).endswith("sys/bus/dsa/devices"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert "Too many open files" in (await manager.give_back(["c"]))["c"]
    monkeypatch.undo()
    assert node.is_made(0)
    assert await manager.give_back(["c"]) == {} and node.is_untouched()
    await manager.close()


async def test_a_record_of_an_earlier_boot_is_removed(node: Node) -> None:
    node.make(0)
    node.boot += 1
    node.kernel.reboot()
    node.start()
    ledger = Ledger()
    ledger.settings.boot_id = "boot-1"
    manager = _manager(node, ledger)
    await manager.recover()
    assert not node.journal.path.exists()
    await manager.close()


async def test_a_queue_that_is_lost_stays_unhealthy_until_its_claim_is_released(node: Node) -> None:
    held = _grant("c", device_id(AT, 0))
    ledger = Ledger(held)
    manager = _manager(node, ledger)
    assert await manager.bind({"c": [held]}) == {"c": ""}
    assert ledger.evidence[device_id(AT, 0)].state == HEALTHY
    node.kernel._stop_queue("wq0.0")
    for _ in range(3):
        await manager.recover()
        assert ledger.evidence[device_id(AT, 0)].state == UNHEALTHY
    assert await manager.give_back(["c"]) == {} and ledger.evidence == {} and node.is_untouched()
    await manager.close()


async def test_a_queue_that_is_gone_is_hidden_before_the_name_of_its_node_is_used_again(node: Node) -> None:
    first, second = _grant("c", device_id(AT, 0)), _grant("d", device_id(OTHER, 0))
    enabled: list[str] = []

    async def hide() -> None:
        enabled.append(node.kernel.driver("wq0.0"))

    manager = _manager(node, Ledger(first, second), hide)
    assert await manager.bind({"c": [first]}) == {"c": ""} and enabled == []
    kernel, root = node.kernel, node.kernel.tree.root
    folder = kernel.folder("dsa0")
    for one in [*(root / "sys/bus/dsa/devices").iterdir(), *(root / "dev/dsa").iterdir()]:
        one.unlink()
    shutil.rmtree(folder)
    kernel.add("dsa0", OTHER)
    kernel.add("dsa1", AT)
    assert await manager.bind({"d": [second]}) == {"d": ""}
    assert enabled == [""] and node.kernel.driver("wq0.0") == "user"
    await manager.close()


async def test_an_accelerator_that_cannot_be_read_keeps_no_other_from_being_divided(node: Node) -> None:
    first, second = _grant("c", device_id(AT, 0)), _grant("d", device_id(OTHER, 0))
    manager = _manager(node, Ledger(first, second))
    assert await manager.bind({"c": [first]}) == {"c": ""}
    node.kernel.add("dsa1", OTHER)
    (node.kernel.folder("dsa0") / "max_work_queues_size").unlink()
    assert await manager.bind({"d": [second]}) == {"d": ""}
    assert node.kernel.driver("wq1.0") == "user"
    await manager.close()
