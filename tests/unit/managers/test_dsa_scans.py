"""What a scan finds of accelerators that are divided into work queues for claims, whatever is made or taken down
meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.dsa.division import Division, Rule, device_id
from nodeagent.core.model.device import Device
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.accelerators.accel import Accel
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.accelerators.dsa_queue import DsaQueue
from nodeagent.host.dsa.accelerators import Accelerators
from tests.support.dsa_keeper_node import AT, BIG, IDS, QUEUES, Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def _found(node: Node, divided: Callable[[], Mapping[str, Division]]) -> tuple[dict[str, list[Device]], str]:
    """The devices by kind, and why slots are not offered."""
    selector = all_kinds.DsaSelector(rules=(Rule(accelerators=("dsa*",), queues=QUEUES),), divided=divided)
    context = all_kinds.read_context(node.sysfs, dsa=selector)
    found = all_kinds.discover(node.sysfs, (Accel(), Dsa(), DsaQueue()), context)
    by_kind = {kind: [one for one in found.devices if one.kind == kind] for kind in ("accel", "dsa", "dsa-queue")}
    return by_kind, next(one.reason or "" for one in found.kinds if one.kind == "dsa-queue")


def _during(node: Node, monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
    """Have something done after each of the next reads of the accelerator."""
    left, read = list(acts), Accelerators.read

    def then(self: Accelerators, address: str, name: str) -> Any:
        seen = read(self, address, name)
        if left:
            monkeypatch.setattr(Accelerators, "read", read)
            left.pop(0)()
            monkeypatch.setattr(Accelerators, "read", then)
        return seen

    monkeypatch.setattr(Accelerators, "read", then)


@pytest.mark.parametrize("what", ["made", "released"])
def test_a_queue_that_is_made_or_released_while_the_machine_is_read_takes_no_slot_away(
    node: Node, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "released":
        node.make(0)
    act = (lambda: node.make(0)) if what == "made" else (lambda: node.down(0))
    _during(node, monkeypatch, act)
    found, why = _found(node, node.keeper.records)
    assert [one.id for one in found["dsa-queue"]] == IDS and not why


def test_an_accelerator_that_the_agent_changes_all_the_time_is_offered_as_configured(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, down = (lambda: node.make(0)), (lambda: node.down(0))
    _during(node, monkeypatch, make, down, make, down, make, down)
    found, why = _found(node, node.keeper.records)
    assert [one.id for one in found["dsa-queue"]] == IDS and not why


@pytest.mark.parametrize("step", range(30))
def test_a_scan_between_any_two_writes_finds_every_slot_and_no_queue_of_an_admins(node: Node, step: int) -> None:
    """What is recorded is read before and after the machine."""
    seen: list[tuple[dict[str, list[Device]], str]] = []
    before, writes = dict(node.keeper.records()), 0

    def scan(_path: str, _text: str) -> None:
        nonlocal writes, before
        writes += 1
        if writes == step:
            answers = iter([before])
            seen.append(_found(node, lambda: next(answers, node.keeper.records())))
        before = dict(node.keeper.records())

    node.kernel.after = scan
    node.make(0)
    node.down(0)
    for found, why in seen:
        assert [one.id for one in found["dsa-queue"]] == IDS and not why
        assert found["dsa"] == [] and [one.attributes.get("in_use", False) for one in found["accel"]] == [False]


@pytest.mark.parametrize("recorded", [(True, False), (False, True), (False, False)])
def test_a_queue_without_a_name_is_the_agents_if_it_was_recorded_before_or_after_it_was_read(
    node: Node, recorded: tuple[bool, bool]
) -> None:
    """It is just being made, or taken down."""
    node.make(0)
    records = node.keeper.records()
    answers = iter([records if one else {} for one in recorded])
    node.kernel._stop_queue("wq0.0")
    node.kernel.configures("wq0.0", type="user")
    selector = all_kinds.DsaSelector(divided=lambda: next(answers))
    found = all_kinds.discover(node.sysfs, (Dsa(),), all_kinds.read_context(node.sysfs, dsa=selector))
    assert [one.id for one in found.devices] == ([] if any(recorded) else [f"{AT}/wq-0"])


@pytest.mark.parametrize("loss", ["damaged", "deleted"])
def test_an_accelerator_is_not_had_whole_beside_a_queue_of_a_claim_whose_record_is_lost(node: Node, loss: str) -> None:
    """A pod that has it whole gets the nodes of all of its queues."""
    node.make(0)
    if loss == "damaged":
        node.journal.path.write_text("{")
    else:
        node.journal.path.unlink()
    node.start()
    found, why = _found(node, node.keeper.records)
    (whole,) = found["accel"]
    assert whole.paths == () and whole.withheld_for == ("in_use",)
    assert found["dsa"] == [] and found["dsa-queue"] == [] and "of an agent whose records are not here" in why


def test_an_accelerator_with_a_queue_of_a_claim_is_a_whole_one_of_which_it_is_a_part(node: Node) -> None:
    node.make(0)
    found, _ = _found(node, node.keeper.records)
    (whole,) = found["accel"]
    assert whole.paths == ("/dev/dsa/wq0.0",) and not whole.withheld_for
    assert {one.parent for one in found["dsa-queue"]} == {whole.id}


@pytest.mark.parametrize("name", ["nodeagent-fast", "nodeagent-", "nodeagent-0-fast", "nodeagent-0-0123abcde"])
def test_a_queue_of_an_admins_is_served_although_its_name_begins_like_those_of_agents(node: Node, name: str) -> None:
    files = {"size": 16, "group_id": 0, "mode": "dedicated", "type": "user", "name": name, "driver_name": "user"}
    node.kernel.configures("engine0.0", group_id=0)
    node.kernel.configures("wq0.0", **files)
    node.kernel._start("dsa0")
    node.kernel._start_queue("wq0.0", "user")
    assert node.slots(None) == [] and node.others == [f"{AT}/wq-0"]
    found, _ = _found(node, node.keeper.records)
    assert found["accel"][0].paths == ("/dev/dsa/wq0.0",) and not found["accel"][0].withheld_for


def test_a_slot_that_is_configured_otherwise_is_another_device(node: Node) -> None:
    """The scheduler has allocated one by what its attributes said."""
    every = {device_id(AT, 0, one) for one in (BIG, replace(BIG, size=4), replace(BIG, priority=3))}
    assert len(every) == 3
