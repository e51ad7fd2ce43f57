"""Accelerators divided into work queues for claims, where the kernel refuses, names are used again, or records are
old."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.errors import HostError
from nodeagent.managers.dsa.keeper import Wanted
from tests.support.dsa_keeper_node import AT, BIG, QUEUES, SHARED, Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("slot", [0, 2], ids=["dedicated", "shared"])
def test_after_a_refused_enable_the_accelerator_is_given_back(node: Node, slot: int) -> None:
    """The kernel clears the type then, and keeps the name."""
    node.kernel.refuses = frozenset({f"wq0.{slot}"})
    with pytest.raises(HostError, match="No such device or address"):
        node.make(slot)
    assert node.keeper.end() == {} and node.is_untouched() and node.slots() == ["0", "1", "2"]


@pytest.mark.parametrize("slot", [0, 2], ids=["dedicated", "shared"])
def test_after_a_refused_enable_the_slot_can_be_made_beside_other_claims(node: Node, slot: int) -> None:
    node.make(1, "d")
    node.kernel.refuses = frozenset({f"wq0.{slot}"})
    with pytest.raises(HostError, match="No such device or address"):
        node.make(slot)
    assert node.slots() == ["0", "1", "2"] and not node.said
    node.kernel.refuses = frozenset()
    assert node.make(slot) and node.is_made(slot) and node.is_made(1)
    assert node.down(slot, 1) == {} and node.is_untouched()


def test_a_queue_whose_enable_was_refused_is_cleared_although_an_admin_has_taken_another(node: Node) -> None:
    node.make(1, "d")
    node.kernel.refuses = frozenset({"wq0.0"})
    node.kernel.after = lambda path, text: text == "wq0.0" and node.kernel.configures("wq0.5", name="app")
    node.kernel.before = lambda path, text: text == "wq0.0" and node.kernel.configures("wq0.5", name="app")
    with pytest.raises(HostError):
        node.make(0)
    assert node.kernel.get("wq0.0", "name") == "" and node.kernel.get("wq0.5", "name") == "app"
    assert [one.slot for one in node.keeper.records()[AT].held] == [1]


def test_a_queue_that_stays_disabled_is_lost_and_made_again(node: Node) -> None:
    node.make(0)
    node.make(1, "d")
    node.kernel.breaks("wq0.0")
    assert "was disabled" in node.keeper.faults()[AT, 0] and node.keeper.forget_changed()
    held = node.keeper.records()[AT].of(0)
    assert held is not None and held.edits is None
    assert node.make(0) and node.is_made(0)
    assert node.down(0, 1) == {} and node.is_untouched()


def test_a_queue_that_stays_disabled_is_taken_down(node: Node) -> None:
    """Unbinding one that is disabled already clears nothing but its type."""
    node.make(0)
    node.make(2, "d")
    node.kernel.breaks("wq0.0")
    assert node.down(0) == {} and node.slots() == ["0", "1", "2"] and not node.said
    assert node.make(1, "e") and node.down(1, 2) == {} and node.is_untouched()


def _renamed(node: Node, other: str) -> None:
    """The functions are bound again, and the accelerators have each other's names."""
    kernel, root = node.kernel, node.kernel.tree.root
    folder = kernel.folder("dsa0")
    for one in [*(root / "sys/bus/dsa/devices").iterdir(), *(root / "dev/dsa").iterdir()]:
        one.unlink()
    shutil.rmtree(folder)
    kernel.add("dsa0", other)
    kernel.add("dsa1", AT)


def test_no_claim_has_the_node_of_another_claims_queue_after_accelerators_change_their_names(node: Node) -> None:
    other = "0000:e7:01.0"
    node.make(0)
    _renamed(node, other)
    assert node.keeper.make(Wanted(address=other, slot=0, claim="d", grant="g-d", queues=QUEUES))
    assert node.keeper.is_to_hide
    held = {at: record.held[0] for at, record in node.keeper.records().items()}
    assert held[AT].edits is None and held[AT].why and held[other].edits is not None


def test_a_node_that_another_claim_may_have_is_not_handed_over_while_that_cannot_be_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "0000:e7:01.0"
    node.make(0)
    _renamed(node, other)
    find = node.keeper._accelerators.find

    def refused(address: str) -> Any:
        if address == AT:
            raise HostError("Input/output error")
        return find(address)

    monkeypatch.setattr(node.keeper._accelerators, "find", refused)
    with pytest.raises(HostError, match=f"/dev/dsa/wq0.0 is still recorded as queue 0 of {AT}, for claim c"):
        node.keeper.make(Wanted(address=other, slot=0, claim="d", grant="g-d", queues=QUEUES))
    assert not node.kernel.driver("wq0.0") and other not in node.keeper.records()


def test_a_slot_that_is_released_by_force_while_a_program_has_it_open_is_unhealthy_until_it_is_taken_down(
    node: Node,
) -> None:
    node.make(0)
    node.kernel.opens("wq0.0", 1)
    assert node.down(0)
    assert node.keeper.faults() == {(AT, 0): "cannot disable wq0.0: 1 programs have it open"}
    node.kernel.opens("wq0.0", 0)
    assert node.down(0) == {} and node.keeper.faults() == {}


def test_a_record_of_an_earlier_boot_is_removed(node: Node) -> None:
    node.make(0)
    node.boot += 1
    node.kernel.reboot()
    node.start()
    assert node.keeper.has_any() and not node.keeper.records()
    assert node.keeper.end() == {} and not node.journal.path.exists() and not node.keeper.has_any()


def test_an_accelerator_that_is_halted_is_blamed_on_no_other_program(node: Node) -> None:
    node.make(0)
    node.kernel._write(node.kernel.folder("dsa0"), {"state": "halted"})
    assert node.keeper.faults() == {(AT, 0): "accelerator dsa0 is halted"}
    assert node.slots() == ["0"] and node.said == "dsa0 is halted"


def test_fewer_queues_than_recorded_are_none_that_are_the_agents(node: Node) -> None:
    node.make(2)
    for wq in node.kernel.parts("dsa0")[1:]:
        shutil.rmtree(node.kernel.folder("dsa0") / wq)
    done = len(node.kernel.written)
    assert node.keeper.faults()[AT, 2] and node.keeper.forget_changed()
    assert node.down(2) == {} and len(node.kernel.written) == done


@pytest.mark.parametrize("most", range(6))
def test_a_disk_that_is_full_after_some_records_leaves_nothing_once_it_has_space(
    node: Node, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    kind = type(node.journal)
    change: Callable[..., None] = kind.change
    left = most

    def full(self: Any, *args: Any) -> None:
        nonlocal left
        if left == 0:
            raise HostError("No space left on device")
        left -= 1
        change(self, *args)

    monkeypatch.setattr(kind, "change", full)
    if most < 3:
        with pytest.raises(HostError, match="No space left on device"):
            node.make(0)
    else:
        assert node.make(0)
    node.down(0)
    monkeypatch.undo()
    node.start()
    assert node.down(0) == {} and node.keeper.end() == {} and node.is_untouched()


@pytest.mark.parametrize("change", [{"priority": 3}, {"threshold": 3}], ids=lambda change: next(iter(change)))
def test_a_configuration_with_the_same_sizes_is_another_one_too(node: Node, change: dict[str, int]) -> None:
    node.make(0)
    assert node.slots((BIG, BIG, replace(SHARED, **change))) == ["0"]
    assert not node.make(0)
