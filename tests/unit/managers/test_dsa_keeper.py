"""Accelerators divided into work queues for claims, on a double of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.dsa.division import Rule
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.dsa import divided_accelerators
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.table import QueueTable
from nodeagent.managers.dsa.wanted import Wanted
from tests.support.dsa_keeper_node import AT, BIG, IDS, QUEUES, SMALL, Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_queue_is_made_for_a_claim_and_the_accelerator_is_as_before_after_the_last(node: Node) -> None:
    assert node.make(0) and node.make(2, "d")
    assert node.is_made(0) and node.is_made(2) and not node.kernel.driver("wq0.1")
    assert [node.kernel.get(f"wq0.{one}", "size") for one in range(4)] == ["32", "32", "16", "0"]
    assert node.kernel.node("wq0.0").exists() and node.kernel.node("wq0.2").exists()
    assert node.down(0) == {}
    assert node.is_made(2) and not node.kernel.driver("wq0.0")
    assert node.down(2) == {}
    assert node.is_untouched()


def test_every_queue_is_dedicated_in_the_hardware_too_whatever_was_made_before(node: Node) -> None:
    """There the kernel sets the bit of a dedicated queue and never clears it; the double does so too."""
    node.make(2)
    node.make(0, "d")
    assert node.down(2) == {}
    assert node.make(1, "e") and node.make(2, "f")
    assert all(node.kernel.in_hardware[f"wq0.{slot}"] == "dedicated" for slot in range(3))
    assert node.down(0, 1, 2) == {} and not node.kernel.in_hardware


def test_making_twice_changes_nothing_the_second_time(node: Node) -> None:
    node.make(0)
    done = len(node.kernel.written)
    assert not node.make(0)
    assert len(node.kernel.written) == done


def test_a_container_gets_the_node(node: Node) -> None:
    node.make(1)
    held = node.keeper.records()[AT].held[0]
    assert held.edits is not None and [one.host_path for one in held.edits.device_nodes] == ["/dev/dsa/wq0.1"]


def test_another_claim_has_to_wait_until_it_is_taken_down(node: Node) -> None:
    node.make(0)
    with pytest.raises(HostError, match="what was made for claim c is not taken down yet"):
        node.make(0, "d")
    assert node.is_made(0)


def test_a_queue_that_a_program_has_open_is_not_disabled(node: Node) -> None:
    node.make(0)
    node.kernel.opens("wq0.0", 2)
    assert node.down(0) == {(AT, 0): "cannot disable wq0.0: 2 programs have it open"}
    assert node.is_made(0)
    node.kernel.opens("wq0.0", 0)
    assert node.down(0) == {}
    assert node.is_untouched()


def test_a_dedicated_queue_that_is_just_being_opened_stays_the_agents(node: Node) -> None:
    """It shows itself disabled for a moment."""
    node.make(0)
    node.kernel.blinks("wq0.0")
    assert not node.make(0) and node.make(1, "d")
    assert node.slots() == ["0", "1", "2"] and not node.said
    assert not any(node.keeper.faults().values())
    assert node.down(0, 1) == {}
    assert node.is_untouched()


# ---------------------------------------------------------------- what cannot be

UNFIT = {
    "has 128 entries": (replace(BIG, size=129),),
    "129 are configured": (replace(BIG, size=64), replace(BIG, size=65)),
    "has 6 work queues, 7 are configured": (replace(BIG, size=1),) * 7,
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_does_not_fit_is_not_offered(node: Node, why: str) -> None:
    assert node.slots(UNFIT[why]) == [] and why in node.said
    with pytest.raises(HostError, match=why):
        node.make(0, queues=UNFIT[why])
    assert node.is_untouched()


@pytest.mark.parametrize(("file", "why"), [("pasid_enabled", "no PASID"), ("configurable", "cannot be configured")])
def test_without_a_capability_nothing_is_offered(node: Node, file: str, why: str) -> None:
    node.kernel._write(node.kernel.folder("dsa0"), {file: 0})
    assert node.slots() == [] and why in node.said
    with pytest.raises(HostError, match=why):
        node.make(0)


def test_where_the_agent_may_not_write_nothing_is_offered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: "drivers" not in str(path))
    assert node.slots() == [] and "nodeagent-dsa.conf allows it" in node.said
    monkeypatch.undo()
    (node.kernel.tree.root / "sys/bus/dsa/drivers/user/bind").unlink()
    assert node.slots() == [] and node.said == "the kernel has no driver `user` on the bus dsa"


def test_queues_of_iaa_are_made_too(node: Node) -> None:
    node.kernel.add("iax1", "0000:6a:02.0", wqs=4)
    wanted = Wanted(address="0000:6a:02.0", slot=1, claim="c", grant="g", queues=QUEUES)
    assert node.keeper.make(wanted)
    (held,) = node.keeper.records()["0000:6a:02.0"].held
    assert held.edits is not None and [one.host_path for one in held.edits.device_nodes] == ["/dev/iax/wq1.1"]
    assert node.kernel.driver("wq1.1") == "user" and node.kernel.is_untouched("dsa0")
    assert node.keeper.take_down([("0000:6a:02.0", 1)]) == {} and node.kernel.is_untouched("iax1")


def test_a_bus_that_cannot_be_listed_is_not_an_empty_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the record of a queue that exists would be lost."""
    node.make(0)
    listed = os.listdir

    def refused(path: str) -> list[str]:
        if str(path).endswith("sys/bus/dsa/devices"):
            raise OSError(24, "Too many open files")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert "Too many open files" in node.down(0)[AT, 0]
    assert "Too many open files" in str(node.keeper.faults()[AT, 0])
    assert node.slots() == ["0"] and "Too many open files" in node.said
    with pytest.raises(HostError, match="Too many open files"):
        node.keeper.forget_changed()
    monkeypatch.undo()
    assert node.keeper.records()[AT].held and node.is_made(0)
    assert node.down(0) == {} and node.is_untouched()


def test_a_function_that_is_bound_to_vfio_is_not_offered(node: Node) -> None:
    for one in ("sys/bus/dsa/devices/dsa0", f"sys/bus/pci/devices/{AT}/driver"):
        (node.kernel.tree.root / one).unlink()
    node.kernel.tree.link(f"sys/bus/pci/devices/{AT}/driver", node.kernel.tree.root / "sys/bus/pci/drivers/vfio-pci")
    rule = Rule(accelerators=(AT,), queues=QUEUES)
    context = all_kinds.read_context(node.sysfs, dsa=all_kinds.DsaSelector(rules=(rule,)))
    (state,) = [
        one
        for one in all_kinds.discover(node.sysfs, all_kinds.builtin_kinds(), context).kinds
        if one.kind == "dsa-queue"
    ]
    assert state.reason == f"{AT} is bound to vfio-pci, expected idxd"


def test_an_older_kernel_that_clears_sizes_offers_a_queue_again_once_all_have_ended(tmp_path: Path) -> None:
    node = Node(tmp_path, older=True)
    node.make(0)
    node.make(1, "d")
    assert node.down(0) == {}
    assert node.slots() == ["1", "2"] and node.make(2, "e")
    with pytest.raises(HostError, match="all queues of dsa0 have to be released first"):
        node.make(0, "f")
    assert node.down(1, 2) == {}
    assert node.is_untouched() and node.slots() == ["0", "1", "2"]


def test_another_division_waits_until_all_queues_have_ended(node: Node) -> None:
    node.make(1)
    other = (SMALL,)
    assert node.slots(other) == ["1"] and "once its queues are released" in node.said
    with pytest.raises(HostError, match="still divided as it was configured before"):
        node.make(0, "d", queues=other)
    assert node.slots(None) == ["1"]
    assert node.down(1) == {}
    assert node.slots(other) == ["0"] and node.make(0, "d", queues=other)


def test_the_queues_are_no_devices_of_the_kind_of_those_that_admins_make(node: Node) -> None:
    node.make(0)
    assert node.slots() == ["0", "1", "2"] and node.others == []
    assert node.slots(None) == ["0"] and node.others == []


@pytest.mark.parametrize("part", ["wq0.0", "wq0.1", "dsa0", "engine0.0"])
def test_a_kernel_that_refuses_leaves_nothing(node: Node, part: str) -> None:
    def refuse(path: str, text: str) -> None:
        if part in (text, path.split("/")[-2]):
            raise OSError(22, "Invalid argument")

    node.kernel.before = refuse
    with pytest.raises(HostError, match="Invalid argument"):
        node.make(1)
    node.kernel.before = lambda path, text: None
    assert node.down(1) == {} and node.keeper.end() == {}
    assert node.is_untouched()


def test_records_that_cannot_be_read_for_the_moment_are_not_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.make(0)
    done = len(node.kernel.written)
    monkeypatch.setattr(Path, "open", _refused)
    for act in (lambda: node.make(1, "d"), node.keeper.records, node.keeper.end, lambda: node.make(0)):
        with pytest.raises(HostError, match="Too many open files"):
            act()
    assert "Too many open files" in node.down(0)[AT, 0]
    assert len(node.kernel.written) == done
    monkeypatch.undo()
    assert node.is_made(0) and node.down(0) == {} and node.is_untouched()


def test_a_scan_and_containers_have_what_was_read_last_while_records_cannot_be_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Paths(
        state_dir=node.state, runtime_dir=node.state, kubelet_dir=node.state, sysfs=node.sysfs, config_file=None
    )
    divided, table = divided_accelerators(where, "boot-0"), QueueTable(DsaJournal(node.state, "boot-0"))
    assert divided() == {}
    node.make(0)
    device = Device(kind="dsa-queue", id=IDS[0])
    inventory = Inventory(devices=(device,))
    before, shown = divided(), table.view(inventory)
    assert before[AT].held and shown.devices[0].prepared is not None
    monkeypatch.setattr(Path, "open", _refused)
    assert divided() == before and table.view(inventory) == shown
    monkeypatch.undo()
    node.down(0)
    assert divided() == {} and table.view(inventory) is inventory


def _refused(*_args: object, **_more: object) -> None:
    raise OSError(24, "Too many open files")


def test_an_older_kernel_that_leaves_sizes_of_queues_that_were_not_enabled_has_them_cleared(tmp_path: Path) -> None:
    node = Node(tmp_path, older=True)
    node.make(2)
    node.kernel.after = lambda path, text: text == "dsa0" and path.endswith("unbind") and sizes.append(_sizes(node))
    sizes: list[list[str]] = []
    assert node.down(2) == {}
    assert sizes == [["32", "32", "0"]] and node.is_untouched()


def _sizes(node: Node) -> list[str]:
    return [node.kernel.get(f"wq0.{slot}", "size") for slot in range(3)]
