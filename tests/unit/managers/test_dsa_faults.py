"""Accelerators divided into work queues for claims, where the kernel refuses, names are used again, or records are
old."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.errors import HostError
from nodeagent.host.dsa.accelerators import OLD_NAMES, numbers_of
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dsa.wanted import Wanted
from tests.support.dsa_keeper_node import AT, BIG, QUEUES, SMALL, Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_after_a_refused_enable_the_accelerator_is_given_back(node: Node) -> None:
    """The kernel clears the type then, and keeps the name."""
    node.kernel.refuses = frozenset({"wq0.0"})
    with pytest.raises(HostError, match="No such device or address"):
        node.make(0)
    assert node.keeper.end() == {} and node.is_untouched() and node.slots() == ["0", "1", "2"]


def test_after_a_refused_enable_the_slot_can_be_made_beside_other_claims(node: Node) -> None:
    node.make(1, "d")
    node.kernel.refuses = frozenset({"wq0.0"})
    with pytest.raises(HostError, match="No such device or address"):
        node.make(0)
    assert node.slots() == ["0", "1", "2"] and not node.said
    node.kernel.refuses = frozenset()
    assert node.make(0) and node.is_made(0) and node.is_made(1)
    assert node.down(0, 1) == {} and node.is_untouched()


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


def test_a_configuration_with_the_same_sizes_is_another_one_too(node: Node) -> None:
    node.make(0)
    assert node.slots((BIG, BIG, replace(SMALL, priority=3))) == ["0"]
    assert not node.make(0)


def test_what_is_known_of_a_slot_is_said_while_its_accelerator_cannot_be_read(node: Node) -> None:
    node.make(0)
    node.make(1, "d")
    node.make(2, "e")
    node.kernel._stop_queue("wq0.0")
    assert node.keeper.forget_changed()
    node.kernel.opens("wq0.1", 1)
    stuck = node.down(1)
    (node.kernel.folder("dsa0") / "max_work_queues_size").unlink()
    lost = "queue 0 of dsa0 was disabled or changed by another program"
    assert node.keeper.faults() == {(AT, 0): lost, **stuck, (AT, 2): None}


def test_a_queue_that_was_changed_is_not_disabled_under_a_program_to_be_made_again(node: Node) -> None:
    node.make(0)
    node.kernel.opens("wq0.0", 1)
    node.kernel.breaks("wq0.0")
    assert node.keeper.forget_changed()
    node.kernel.written.clear()
    with pytest.raises(HostError, match=r"wq0\.0 was disabled or changed, and 1 programs have it open"):
        node.make(0)
    held = node.keeper.records()[AT].of(0)
    assert not node.kernel.written and held is not None and held.why, "it stays lost, and unhealthy"
    node.kernel.opens("wq0.0", 0)
    assert node.make(0) and node.is_made(0)


@pytest.mark.parametrize("there", ["of an admin's", "1:3\n"], ids=["a file", "another device"])
def test_a_node_that_is_not_the_queues_is_not_handed_over(
    node: Node, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of earlier queues may stay where udev does not run."""
    monkeypatch.setattr("nodeagent.host.dsa.accelerators.NODE_S", 0.05)
    node.kernel.after = lambda path, text: path.endswith("user/bind") and node.kernel.node("wq0.0").write_text(there)
    with pytest.raises(HostError, match=r"there is no character device 241:0 at /dev/dsa/wq0\.0 after 0\.05 s"):
        node.make(0)
    assert node.is_untouched()


def test_a_node_is_a_character_device_by_its_numbers(tmp_path: Path) -> None:
    null, file = Path("/dev/null").stat().st_rdev, tmp_path / "file"
    file.write_text("241:0\n")
    assert numbers_of("/dev/null") == (os.major(null), os.minor(null)) == (1, 3)
    assert numbers_of(str(file)) is None and numbers_of(str(tmp_path / "none")) is None


def test_an_accelerator_that_the_kernel_has_reset_is_named_with_what_is_to_be_done(node: Node) -> None:
    """idxd_device_reinit after a halt: all is cleared, and everything stays bound to its driver."""
    node.make(0)
    node.kernel.was_reset("dsa0")
    unbind = "still bound, as after a reset by the kernel; to have it served, write each name to `unbind` of its driver"
    assert unbind in str(node.keeper.faults()[AT, 0]) and node.slots() == ["0"] and unbind in node.said
    done = len(node.kernel.written)
    assert node.down(0) == {} and node.keeper.end() == {} and len(node.kernel.written) == done
    assert node.slots() == [] and node.said.endswith("wq0.0 to user, dsa0 to idxd")
    for name, driver in (("wq0.0", "user"), ("dsa0", "idxd")):
        node.kernel.put(str(node.kernel.tree.root / f"sys/bus/dsa/drivers/{driver}/unbind"), name)
    assert node.slots() == ["0", "1", "2"]


def test_no_file_is_read_under_its_old_name_where_it_has_a_new_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel logs that."""
    read: list[str] = []
    text = SysFs.text

    def seen(self: SysFs, path: str, *default: Any) -> Any:
        read.append(path.rpartition("/")[2])
        return text(self, path, *default)

    monkeypatch.setattr(SysFs, "text", seen)
    assert node.slots() == ["0", "1", "2"]
    assert "read_buffers_allowed" in read and not [one for one in read if "token" in one]


def test_a_kernel_with_old_names_only_is_read_by_these(node: Node) -> None:
    for group in node.kernel.parts("dsa0", "group"):
        folder = node.kernel.folder(group)
        for new, old in OLD_NAMES.items():
            if (folder / new).exists():
                (folder / new).rename(folder / old)
    assert node.slots() == ["0", "1", "2"]
    (node.kernel.folder("group0.1") / "tokens_reserved").write_text("8\n")
    assert node.slots() == [] and "a group of dsa0 is configured" in node.said
