"""What other programs do to accelerators that are, or could be, divided into work queues for claims: it is left as it
is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper
from nodeagent.managers.dsa.wanted import Wanted
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.dsa_keeper_node import AT, QUEUES, Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


ADMINS: dict[str, Callable[[IdxdKernel], None]] = {
    "a size": lambda kernel: kernel.configures("wq0.5", size=8),
    "a type": lambda kernel: kernel.configures("wq0.5", type="user"),
    "a kernel's": lambda kernel: kernel.configures("wq0.0", type="kernel", size=128, name="dma"),
    "a name": lambda kernel: kernel.configures("wq0.5", name="app"),
    "a group": lambda kernel: kernel.configures("wq0.5", group_id=0),
    "an engine": lambda kernel: kernel.configures("engine0.1", group_id=0),
}


@pytest.mark.parametrize("begun", ADMINS)
def test_an_accelerator_that_an_admin_has_begun_to_configure_is_not_taken(node: Node, begun: str) -> None:
    ADMINS[begun](node.kernel)
    assert node.slots() == []
    assert "dsa0" in node.said and "the agent has no record of it" in node.said
    with pytest.raises(HostError, match="the agent has no record of it"):
        node.make(0)
    assert not node.kernel.written and not node.keeper.records()


def test_an_accelerator_that_is_reset_under_claims_is_not_divided_again_before_they_end(node: Node) -> None:
    node.make(0)
    node.kernel.resets("dsa0")
    done = len(node.kernel.written)
    assert node.slots() == ["0"] and "another program" in node.said
    with pytest.raises(HostError, match="dsa0 is disabled, although the agent enabled it"):
        node.make(1, "d")
    with pytest.raises(HostError, match="dsa0 is disabled, although the agent enabled it"):
        node.make(0)
    assert node.keeper.faults() == {(AT, 0): "accelerator dsa0 is disabled"}
    node.kernel.configures("wq0.0", size=32, type="user", name="app")  # the admin's by now
    assert node.down(0) == {}
    assert len(node.kernel.written) == done and node.kernel.get("wq0.0", "name") == "app"
    assert node.keeper.end() == {} and not node.keeper.records()
    assert node.slots() == [] and "wq0.0 of dsa0 is configured" in node.said
    node.kernel.configures("wq0.0", size=0, type="none")
    assert node.slots() == ["0", "1", "2"]


def test_a_queue_of_an_admins_beside_the_agents_is_left_alone_and_keeps_the_accelerator(node: Node) -> None:
    node.make(0)
    node.kernel.configures("wq0.1", type="user", name="app", driver_name="user", mode="dedicated", driver="user")
    assert node.slots() == ["0"] and "wq0.1 of dsa0 was configured by another program" in node.said
    with pytest.raises(HostError, match=r"wq0\.1 of dsa0 was configured by another program"):
        node.make(2, "d")
    assert node.down(0) == {} and not node.kernel.driver("wq0.0")
    assert node.kernel.driver("wq0.1") == "user" and node.kernel.get("dsa0", "state") == "enabled"
    assert node.keeper.end() == {} and not node.keeper.records(), "it is the admin's from now on"
    assert node.kernel.driver("wq0.1") == "user" and node.slots() == [] and node.others == [f"{AT}/wq-1"]
    node.kernel.resets("dsa0")
    assert node.slots() == ["0", "1", "2"]


@pytest.mark.parametrize(
    "change",
    [{"name": "app"}, {"priority": 1}, {"mode": "shared", "threshold": 1}, {"type": "kernel"}],
    ids=lambda change: next(iter(change)),
)
def test_a_queue_that_an_admin_has_made_another_is_not_disabled(node: Node, change: dict[str, object]) -> None:
    node.make(0)
    node.kernel._stop_queue("wq0.0")
    files = {"type": "user", "name": node.label(0), "mode": "dedicated", "priority": 10, **change}
    kind = str(files["type"])
    driver = "user" if kind == "user" else "dmaengine"
    node.kernel.configures("wq0.0", **files, driver_name=driver)
    if kind == "user":
        node.kernel.configures("wq0.0", driver="user")
    done = len(node.kernel.written)
    assert node.down(0) == {} and len(node.kernel.written) == done
    assert (AT in node.keeper.end()) is ("name" not in change) and len(node.kernel.written) == done


def test_an_accelerator_that_is_gone_is_forgotten(node: Node) -> None:
    node.make(0)
    (node.kernel.tree.root / "sys/bus/dsa/devices/dsa0").unlink()
    assert "no longer has" in node.keeper.faults()[AT, 0]
    assert node.slots() == ["0"]
    assert node.down(0) == {}
    assert not node.keeper.records() and node.slots() == []


def test_a_queue_that_an_admin_disabled_is_handed_over_no_longer_and_made_again_for_its_claim(node: Node) -> None:
    node.make(0)
    node.make(1, "d")
    assert not node.keeper.forget_changed()
    node.kernel._stop_queue("wq0.0")
    assert node.keeper.faults() == {(AT, 0): "queue 0 of dsa0 was disabled or changed by another program", (AT, 1): ""}
    assert node.keeper.forget_changed() and not node.keeper.forget_changed()
    assert [one.edits is None for one in node.keeper.records()[AT].held] == [True, False]
    assert node.make(0) and node.is_made(0)
    assert node.down(0, 1) == {} and node.is_untouched()


def test_another_accelerator_at_the_same_address_is_not_touched(node: Node) -> None:
    node.make(2)
    for wq in node.kernel.parts("dsa0")[2:]:
        (node.kernel.folder("dsa0") / wq).rename(node.kernel.tree.root / f"{wq}.gone")
    done = len(node.kernel.written)
    assert "it is another one" in node.keeper.faults()[AT, 2] or node.keeper.faults()[AT, 2]
    assert node.slots() == ["2"] and "it is another one" in node.said
    with pytest.raises(HostError, match="it is another one"):
        node.make(0, "d")
    assert node.down(2) == {} and len(node.kernel.written) == done


# ---------------------------------------------------------------- while a record is being written


def test_what_an_admin_configures_while_the_first_record_is_written_stays(node: Node) -> None:
    files = {"type": "kernel", "size": 100, "name": "dmaengine", "group_id": 1, "mode": "dedicated"}
    node.during_record(0, lambda: node.kernel.configures("wq0.0", **files))
    with pytest.raises(HostError, match=r"wq0\.0 of dsa0 is configured"):
        node.make(0)
    assert not node.kernel.written and not node.keeper.records()
    assert {file: node.kernel.get("wq0.0", file) for file in files} == {file: str(it) for file, it in files.items()}


def test_a_slot_that_an_admin_takes_while_it_is_recorded_for_a_claim_stays_the_admins(node: Node) -> None:
    node.make(0)
    done = len(node.kernel.written)
    node.during_record(0, lambda: node.kernel.configures("wq0.1", type="user"))
    with pytest.raises(HostError, match=r"wq0\.1 of dsa0 was configured by another program"):
        node.make(1, "d")
    assert len(node.kernel.written) == done and node.kernel.get("wq0.1", "type") == "user"
    assert [one.slot for one in node.keeper.records()[AT].held] == [0]


def test_a_queue_that_an_admin_makes_while_it_is_recorded_that_it_ends_is_not_disabled(node: Node) -> None:
    node.make(0)

    def admin() -> None:
        node.kernel._stop_queue("wq0.0")
        node.kernel.configures("wq0.0", type="user", name="app", mode="dedicated", driver_name="user", driver="user")

    node.during_record(0, admin)
    assert node.down(0) == {}
    assert node.kernel.driver("wq0.0") == "user" and node.kernel.get("wq0.0", "name") == "app"


def test_a_queue_that_a_program_opens_while_it_is_recorded_that_it_ends_is_not_disabled(node: Node) -> None:
    node.make(0)
    node.make(1, "d")
    node.during_record(1, lambda: node.kernel.opens("wq0.0", 1))
    assert node.down(0) == {(AT, 0): "cannot disable wq0.0: 1 programs have it open"}
    assert node.is_made(0)
    assert not node.slots(None)[2:] and node.others == []
    node.kernel.opens("wq0.0", 0)
    assert node.down(0, 1) == {} and node.is_untouched()


@pytest.mark.parametrize("moment", [3, 5])
def test_a_queue_that_an_admin_enables_before_the_accelerator_is_disabled_keeps_it_enabled(
    node: Node, moment: int
) -> None:
    node.make(0)
    files = {"type": "user", "name": "app", "driver_name": "user", "mode": "dedicated"}
    node.during_record(moment, lambda: node.kernel.configures("wq0.1", **files, driver="user"))
    node.down(0)
    assert node.keeper.end() == {} and not node.keeper.records()
    assert node.kernel.driver("wq0.1") == "user" and node.kernel.get("dsa0", "state") == "enabled"


def _while_enabling(node: Node, moment: str, number: int = 0, **files: object) -> list[str]:
    """Have an admin configure wq0.5 after a write that ends so. Returns what idxd is bound to from then on."""
    matches = itertools.count()

    def admin(path: str, _text: str) -> None:
        if path.endswith(moment) and next(matches) == number:
            node.kernel.configures("wq0.5", type="user", name="app", mode="dedicated", **files)
            node.kernel.written.clear()

    node.kernel.after = admin
    with pytest.raises(HostError, match="was configured by another program"):
        node.make(0)
    return [text for path, text in node.kernel.written if path.endswith("idxd/bind")]


@pytest.mark.parametrize("moment", ["engine0.3/group_id", "wq0.2/group_id", "wq0.2/mode", "wq0.0/type", "driver_name"])
def test_nothing_is_enabled_of_an_accelerator_that_an_admin_begins_to_configure_while_it_is_laid_out(
    node: Node, moment: str
) -> None:
    assert _while_enabling(node, moment, size=16, group_id=0) == []
    assert node.kernel.get("dsa0", "state") == "disabled" and node.kernel.get("wq0.5", "name") == "app"
    assert [node.kernel.get(f"wq0.{slot}", "size") for slot in range(3)] == ["0"] * 3, "what was laid out is undone"
    assert node.keeper.end() == {} and not node.keeper.records()


def test_a_layout_that_another_program_undoes_is_not_enabled(node: Node) -> None:
    def admin(path: str, _text: str) -> None:
        if path.endswith("driver_name") and not node.kernel.driver("dsa0"):
            node.kernel.configures("wq0.1", size=0)

    node.kernel.after = admin
    with pytest.raises(HostError, match="dsa0 was configured by another program meanwhile"):
        node.make(0)
    node.kernel.after = lambda path, text: None
    assert node.kernel.get("dsa0", "state") == "disabled"
    assert node.down(0) == {} and node.keeper.end() == {} and node.is_untouched()


def test_a_queue_of_the_agents_that_another_program_changes_before_it_is_enabled_is_not_enabled(node: Node) -> None:
    node.make(1, "d")

    def admin(path: str, _text: str) -> None:
        if path.endswith("wq0.0/driver_name") and node.kernel.get("wq0.0", "priority") == "10":
            node.kernel.configures("wq0.0", priority=3)

    node.kernel.after = admin
    with pytest.raises(HostError, match=r"wq0\.0 was configured by another program meanwhile"):
        node.make(0)
    assert not [1 for path, text in node.kernel.written if (path.endswith("user/bind"), text) == (True, "wq0.0")]


def test_an_accelerator_that_was_enabled_and_turns_out_to_be_an_admins_is_disabled_again(node: Node) -> None:
    _while_enabling(node, "idxd/bind")
    assert node.kernel.get("dsa0", "state") == "disabled" and not node.kernel.driver("dsa0")
    assert node.keeper.end() == {} and not node.keeper.records()
    assert [node.kernel.get(f"wq0.{slot}", "size") for slot in range(3)] == ["0"] * 3


def test_an_accelerator_that_was_enabled_and_has_an_enabled_queue_of_an_admins_stays_enabled(node: Node) -> None:
    def admin(path: str, text: str) -> None:
        if path.endswith("idxd/bind"):
            files = {"type": "user", "name": "app", "mode": "dedicated", "driver_name": "user"}
            node.kernel.configures("wq0.1", **files, driver="user")

    node.kernel.after = admin
    with pytest.raises(HostError, match=r"wq0\.1 of dsa0 was configured by another program"):
        node.make(0)
    assert node.kernel.get("dsa0", "state") == "enabled" and node.kernel.driver("wq0.1") == "user"


# ---------------------------------------------------------------- what an admin has begun

BEGUN: dict[str, tuple[str, dict[str, object]]] = {
    "priority": ("wq0.5", {"priority": 3}),
    "mode": ("wq0.5", {"mode": "dedicated"}),
    "driver_name": ("wq0.5", {"driver_name": "dmaengine"}),
    "a reserve": ("group0.1", {"read_buffers_reserved": 8}),
    "a limit": ("group0.1", {"read_buffers_allowed": 8}),
    "a traffic class": ("group0.1", {"traffic_class_a": 3}),
}


@pytest.mark.parametrize("what", BEGUN)
def test_any_file_that_is_not_at_its_reset_value_keeps_an_accelerator_from_being_taken(node: Node, what: str) -> None:
    part, files = BEGUN[what]
    node.kernel.configures(part, **files)
    assert node.slots() == [] and "the agent has no record of it" in node.said
    with pytest.raises(HostError, match="the agent has no record of it"):
        node.make(0)
    assert not node.kernel.written


@pytest.mark.parametrize("file", ["block_on_fault", "max_transfer_size", "max_batch_size"])
def test_a_queue_with_other_limits_than_all_others_was_configured(node: Node, file: str) -> None:
    node.kernel._write(node.kernel.folder("wq0.2"), {file: 1})
    assert node.slots() == [] and "wq0.2 of dsa0 is configured" in node.said


def test_an_accelerator_whose_queues_an_admin_had_and_disabled_is_taken(node: Node) -> None:
    """The kernel keeps the name of the driver."""
    node.kernel.configures("engine0.0", group_id=0)
    node.kernel.configures("wq0.0", size=8, type="user", name="app", mode="dedicated", driver_name="user", group_id=0)
    node.kernel._start("dsa0")
    node.kernel.configures("wq0.0", driver="user")
    node.kernel.resets("dsa0")
    assert node.kernel.get("wq0.0", "driver_name") == "user" and node.slots() == ["0", "1", "2"]
    assert node.make(0) and node.down(0) == {} and node.is_untouched()


def _taken_and_begun(node: Node) -> None:
    """An admin has disabled a claim's queue, and begun to configure one: it has no name yet."""
    node.make(0)
    node.make(1, "d")
    node.kernel._stop_queue("wq0.0")
    node.kernel.configures("wq0.0", type="user", mode="shared", threshold=9, priority=7)


def test_a_slot_that_an_admin_has_begun_to_configure_is_not_cleared_as_its_claim_ends(node: Node) -> None:
    _taken_and_begun(node)
    assert node.down(0) == {}
    assert node.kernel.get("wq0.0", "priority") == "7" and node.kernel.get("wq0.0", "type") == "user"


def test_a_slot_that_an_admin_has_begun_to_configure_is_not_made_again_for_its_claim(node: Node) -> None:
    _taken_and_begun(node)
    with pytest.raises(HostError, match=r"wq0\.0 of dsa0 was configured by another program"):
        node.make(0)
    assert node.kernel.get("wq0.0", "priority") == "7"


def test_a_queue_that_was_disabled_stays_unhealthy_until_it_is_made_again(node: Node) -> None:
    node.make(0)
    node.make(1, "d")
    node.kernel._stop_queue("wq0.0")
    for _ in range(2):
        assert node.keeper.faults() == {
            (AT, 0): "queue 0 of dsa0 was disabled or changed by another program",
            (AT, 1): "",
        }
        node.keeper.forget_changed()
    node.start()
    assert node.keeper.faults()[AT, 0]
    assert node.make(0) and node.keeper.faults() == {(AT, 0): "", (AT, 1): ""}


# ---------------------------------------------------------------- whose queues are served


def _admins(node: Node) -> None:
    node.kernel.configures("engine0.0", group_id=0)
    node.kernel.configures("wq0.0", size=64, type="user", name="app", mode="dedicated", driver_name="user", group_id=0)
    node.kernel._start("dsa0")
    node.kernel.configures("wq0.0", driver="user")


def test_queues_of_an_admin_who_took_an_accelerator_back_are_served(node: Node) -> None:
    node.make(0)
    node.kernel.resets("dsa0")
    _admins(node)
    assert node.slots(None) == ["0"] and node.others == [f"{AT}/wq-0"]
    assert node.keeper.forget_changed() and node.keeper.is_to_hide, "the claim had a node of that name"
    assert node.down(0) == {} and node.keeper.end() == {} and not node.keeper.records()
    assert node.slots(None) == [] and node.others == [f"{AT}/wq-0"]


def test_queues_of_an_admin_are_served_although_the_accelerator_is_given_to_the_agent(node: Node) -> None:
    _admins(node)
    assert node.slots() == [] and node.others == [f"{AT}/wq-0"]


def test_a_queue_of_the_agents_is_never_one_of_an_admins(node: Node) -> None:
    node.make(2)
    node.journal.path.write_text("{")
    node.start()
    assert node.slots(None) == [] and node.others == []
    assert node.slots() == [] and "of an agent whose records are not here" in node.said


def test_a_queue_that_is_as_it_was_made_is_handed_over_whatever_is_beside_it(node: Node) -> None:
    node.make(0)
    node.kernel.configures("wq0.5", type="user", name="app")
    assert not node.make(0) and node.is_made(0)


def test_a_queue_of_another_agent_is_not_disabled(node: Node, tmp_path: Path) -> None:
    node.make(0)
    node.kernel.resets("dsa0")
    other = tmp_path / "other"
    other.mkdir()
    second = QueueKeeper(DsaJournal(other, "boot-0"), node.accelerators())
    second.make(Wanted(address=AT, slot=0, claim="d", grant="g-d", queues=QUEUES))
    assert node.down(0) == {} and node.keeper.end() == {}
    assert node.kernel.driver("wq0.0") == "user"
    assert second.take_down([(AT, 0)]) == {} and node.kernel.is_untouched("dsa0")
