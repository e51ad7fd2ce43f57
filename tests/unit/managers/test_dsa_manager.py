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
from nodeagent.core.dsa.division import KIND, Queue, device_id
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.daemon.dsa import divided_accelerators
from nodeagent.daemon.leftovers import devices, folders
from nodeagent.daemon.leftovers.leftover import Host
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError
from nodeagent.host import vfio
from nodeagent.managers.dsa.manager import DsaManager
from tests.support.dsa_keeper_node import AT, Node

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
        devices = [Device(kind=KIND, id=_id(at, slot)) for at in (AT, OTHER) for slot in range(3)]
        self.inventory = SimpleNamespace(device_by_id={one.id: one for one in devices})
        self.evidence: dict[str, Evidence] = {}

    async def refresh(self) -> None:
        return None

    def observe(self, evidence: list[Evidence], gone: list[tuple[str, str]]) -> None:
        self.evidence |= {one.device: one for one in evidence}
        for device, _ in gone:
            self.evidence.pop(device, None)


def _id(address: str, slot: int) -> str:
    return device_id(address, slot, Queue(size=16, priority=10))


def _grant(uid: str, *devices: str) -> Grant:
    return Grant(id=f"g-{uid}", holder=Holder(api=CLAIM, uid=uid), devices=devices)


def _manager(
    node: Node,
    ledger: Ledger,
    hide: Callable[[], Awaitable[None]] = _nothing,
    config: Callable[[], Config] = lambda: CONFIG,
) -> DsaManager:
    agent: Any = ledger
    return DsaManager(agent, node.accelerators(), node.state, config, _nothing, hide)


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
    held = _grant("c", _id(AT, 0))
    ledger = Ledger(held)
    manager = _manager(node, ledger)
    assert await manager.bind({"c": [held]}) == {"c": ""}
    assert ledger.evidence[_id(AT, 0)].state == HEALTHY
    node.kernel._stop_queue("wq0.0")
    for _ in range(3):
        await manager.recover()
        assert ledger.evidence[_id(AT, 0)].state == UNHEALTHY
    assert await manager.give_back(["c"]) == {} and ledger.evidence == {} and node.is_untouched()
    await manager.close()


async def test_a_queue_that_is_gone_is_hidden_before_the_name_of_its_node_is_used_again(node: Node) -> None:
    first, second = _grant("c", _id(AT, 0)), _grant("d", _id(OTHER, 0))
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
    first, second = _grant("c", _id(AT, 0)), _grant("d", _id(OTHER, 0))
    manager = _manager(node, Ledger(first, second))
    assert await manager.bind({"c": [first]}) == {"c": ""}
    node.kernel.add("dsa1", OTHER)
    (node.kernel.folder("dsa0") / "max_work_queues_size").unlink()
    assert await manager.bind({"d": [second]}) == {"d": ""}
    assert node.kernel.driver("wq1.0") == "user"
    await manager.close()


async def test_what_is_said_of_a_queue_stays_while_its_accelerator_cannot_be_read(node: Node) -> None:
    first, second = _grant("c", _id(AT, 0)), _grant("d", _id(AT, 1))
    ledger = Ledger(first, second)
    manager = _manager(node, ledger)
    assert await manager.bind({"c": [first], "d": [second]}) == {"c": "", "d": ""}
    node.kernel._stop_queue("wq0.0")
    await manager.recover()
    said = dict(ledger.evidence)
    assert [said[one].state for one in (_id(AT, 0), _id(AT, 1))] == [UNHEALTHY, HEALTHY]
    (node.kernel.folder("dsa0") / "max_work_queues_size").rename(node.kernel.folder("dsa0") / "gone")
    for _ in range(2):
        await manager.recover()
        assert ledger.evidence == said
    await manager.close()


def _configured(**queue: Any) -> Config:
    rule = DsaConfig(accelerators=["dsa*"], queues=[DsaQueuesConfig(**queue)])
    return Config(accelerators=AcceleratorsConfig(dsa=[rule]))


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_claim_never_gets_another_queue_than_the_one_that_was_allocated_to_it(
    node: Node, is_known: bool
) -> None:
    """The configuration was changed meanwhile, perhaps under an earlier agent or before a reboot."""
    held = _grant("c", _id(AT, 0))
    for queue in ({"size": 4}, {"size": 16, "priority": 3}):
        ledger = Ledger(held)
        if not is_known:
            ledger.inventory.device_by_id.clear()
        manager = _manager(node, ledger, config=lambda queue=queue: _configured(**queue))  # type: ignore[misc]
        said = (await manager.bind({"c": [held]}))["c"]
        assert f"cannot make {_id(AT, 0)}: accelerators.dsa was changed since it was allocated" in said
        assert node.is_untouched()
        await manager.close()


async def test_a_claim_has_its_queue_again_although_the_configuration_was_changed_since_it_was_made(node: Node) -> None:
    held = _grant("c", _id(AT, 0))
    manager = _manager(node, Ledger(held))
    assert await manager.bind({"c": [held]}) == {"c": ""}
    await manager.close()
    node.kernel._stop_queue("wq0.0")
    manager = _manager(node, Ledger(held), config=lambda: _configured(size=4))
    assert await manager.bind({"c": [held]}) == {"c": ""}
    assert (node.kernel.get("wq0.0", "size"), node.kernel.driver("wq0.0")) == ("16", "user")
    await manager.close()


async def test_records_that_can_be_read_no_longer_at_the_end_of_a_round_are_its_error(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.make(0)
    manager = _manager(node, Ledger())
    look = manager._look

    async def then_unreadable() -> None:
        await look()
        monkeypatch.setattr(manager._keeper, "records", refused)

    def refused() -> Any:
        raise HostError("Input/output error")

    monkeypatch.setattr(manager, "_look", then_unreadable)
    await manager.recover()
    assert manager.notes() == ["DSA queues: Input/output error"]
    await manager.close()


def test_a_damaged_record_is_logged_once_however_often_the_machine_is_read(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Paths(
        state_dir=node.state, runtime_dir=node.state, kubelet_dir=node.state, sysfs=node.sysfs, config_file=None
    )
    node.journal.path.write_text("{")
    divided = divided_accelerators(where, "boot-0")
    assert [divided() for _ in range(3)] == [{}] * 3
    assert capsys.readouterr().out.count("dsa-queues-records-unreadable") == 1


def test_what_a_purge_cannot_take_down_it_keeps_a_record_of(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = node.kernel.put, vfio.DEADLINE_S
    monkeypatch.setattr(vfio.TimedPut.__init__, "__defaults__", defaults)
    node.kernel.tree.write("proc/sys/kernel/random/boot_id", "boot-0")
    where = Paths(
        state_dir=node.state, runtime_dir=node.state, kubelet_dir=node.state, sysfs=node.sysfs, config_file=None
    )
    host = Host(config=Config(), where=where)
    (node.state / "ledger.json").write_text("{}")
    node.make(0)
    node.kernel.opens("wq0.0", 1)
    assert list(devices.dsa_queues(host).undo()) == ["cannot disable wq0.0: 1 programs have it open"]
    purge = folders.state_folder(host)
    assert list(purge.undo()) == [] and "dsa-queues.json stays as long as it records" in purge.notes[0]
    assert node.keeper.records()[AT].held and not (node.state / "ledger.json").exists()
    node.kernel.opens("wq0.0", 0)
    assert list(devices.dsa_queues(host).undo()) == [] and node.is_untouched()
    purge = folders.state_folder(host)
    assert list(purge.undo()) == [] and not purge.notes and not node.state.exists()
