"""Accelerators divided into work queues for claims, on a double of the kernel, killed at any step."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.dsa.division import Queue, Rule
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.dsa import divided_accelerators
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.accelerators.accel import Accel
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.accelerators.dsa_queue import DsaQueue
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper, Wanted
from nodeagent.managers.dsa.table import QueueTable
from tests.builders.devices import DeviceTree
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.long_form import LONG, share_of

AT = "0000:6a:01.0"
BIG = Queue(mode="dedicated", size=32, priority=10)
SHARED = Queue(mode="shared", size=16, priority=5, threshold=12)
QUEUES = (BIG, BIG, SHARED)


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


class Mortal(DsaJournal):
    """Calls before and after each write to the file."""

    before: Callable[[str], None] = staticmethod(lambda step: None)

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(state_dir, boot_id)
        self._file._durable = False  # no power cut is tried

    def change(self, *args: Any) -> None:
        self.before("journal")
        super().change(*args)
        self.before("journal")


class Direct(TimedPut):
    """Writes in the caller's thread, so that it dies with it."""

    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {text.strip()} to {path}: {error.strerror}") from None


class Node:
    """An accelerator with its kernel, and an agent's keeper, which may be killed and started again."""

    def __init__(self, folder: Path, **kernel: Any) -> None:
        self.kernel = IdxdKernel(DeviceTree(folder / "root"), **kernel)
        self.kernel.add("dsa0", AT, wqs=6)
        self.state = folder / "state"
        self.state.mkdir()
        self.boot = 0
        self.start()

    def start(self) -> None:
        self.sysfs = SysFs(self.kernel.tree.root)
        self.journal = Mortal(self.state, f"boot-{self.boot}")
        self.keeper = QueueKeeper(self.journal, Accelerators(self.sysfs, Direct(self.kernel.put)))

    def die_at(self, step: Callable[[str], None]) -> None:
        self.journal.before = step  # type: ignore[method-assign]
        self.kernel.before = self.kernel.after = lambda path, text: step("write")

    def make(self, slot: int, claim: str = "c", queues: tuple[Queue, ...] = QUEUES) -> bool:
        wanted = Wanted(address=AT, slot=slot, claim=claim, grant=f"g-{claim}", queues=queues)
        return self.keeper.make(wanted)

    def down(self, *slots: int) -> dict[tuple[str, int], str]:
        return self.keeper.take_down([(AT, slot) for slot in slots])

    def is_made(self, slot: int) -> bool:
        wq, queue = f"wq0.{slot}", QUEUES[slot]
        files = {"type": "user", "name": f"nodeagent-{slot}", "mode": queue.mode, "size": str(queue.size)}
        files |= {"priority": str(queue.priority), "threshold": str(queue.threshold), "state": "enabled"}
        there = {file: self.kernel.get(wq, file) for file in files}
        return there == files and self.kernel.driver(wq) == "user"

    def is_untouched(self) -> bool:
        return self.kernel.is_untouched("dsa0") and not self.keeper.records() and not self.journal.path.exists()

    def slots(self, queues: tuple[Queue, ...] | None = QUEUES) -> list[str]:
        """The slots that a scan offers."""
        rules = () if queues is None else (Rule(accelerators=("dsa*",), queues=queues),)
        selector = all_kinds.DsaSelector(rules=rules, divided=self.keeper.records())
        kinds = Accel(), Dsa(), DsaQueue()
        found = all_kinds.discover(self.sysfs, kinds, all_kinds.read_context(self.sysfs, dsa=selector))
        self.said = next(one.reason or "" for one in found.kinds if one.kind == "dsa-queue")
        self.others = [one.id for one in found.devices if one.kind == "dsa"]
        return [one.id.removeprefix(f"{AT}/queue-") for one in found.devices if one.kind == "dsa-queue"]


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


def test_a_shared_queue_that_ends_does_not_keep_others_from_being_enabled(node: Node) -> None:
    node.make(2)
    node.make(0, "d")
    assert node.down(2) == {}
    assert node.make(1, "e") and node.make(2, "f")
    assert node.is_made(0) and node.is_made(1) and node.is_made(2)


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


# ---------------------------------------------------------------- what is not the agent's

ADMINS: dict[str, Callable[[IdxdKernel], None]] = {
    "a size": lambda kernel: kernel.configures("wq0.5", size=8),
    "a type": lambda kernel: kernel.configures("wq0.5", type="user"),
    "a kernel's": lambda kernel: kernel.configures("wq0.0", type="kernel", size=128, name="dma"),
    "a name": lambda kernel: kernel.configures("wq0.5", name="app"),
    "a group": lambda kernel: kernel.configures("wq0.5", group_id=0),
    "the agent's name": lambda kernel: kernel.configures("wq0.0", type="user", name="nodeagent-0"),
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
    left = node.keeper.end()
    assert f"{AT} stays divided" in left[AT] and node.slots() == []
    node.kernel.configures("wq0.0", size=0, type="none")
    assert node.keeper.end() == {} and not node.keeper.records() and node.slots() == ["0", "1", "2"]


def test_a_queue_of_an_admins_beside_the_agents_is_left_alone_and_keeps_the_accelerator(node: Node) -> None:
    node.make(0)
    node.kernel.configures("wq0.1", type="user", name="app", driver_name="user", mode="dedicated", driver="user")
    assert node.slots() == ["0"] and "wq0.1 of dsa0 was configured by another program" in node.said
    with pytest.raises(HostError, match=r"wq0\.1 of dsa0 was configured by another program"):
        node.make(2, "d")
    assert node.down(0) == {} and not node.kernel.driver("wq0.0")
    assert node.kernel.driver("wq0.1") == "user" and node.kernel.get("dsa0", "state") == "enabled"
    assert "wq0.1" in node.keeper.end()[AT]
    node.kernel._stop_queue("wq0.1")
    node.kernel.configures("wq0.1", driver_name="\n")
    assert node.keeper.end() == {} and node.is_untouched()


@pytest.mark.parametrize(
    "change",
    [{"name": "app"}, {"priority": 1}, {"mode": "shared", "threshold": 1}, {"type": "kernel"}],
    ids=lambda change: next(iter(change)),
)
def test_a_queue_that_an_admin_has_made_another_is_not_disabled(node: Node, change: dict[str, object]) -> None:
    node.make(0)
    node.kernel._stop_queue("wq0.0")
    files = {"type": "user", "name": "nodeagent-0", "mode": "dedicated", "priority": 10, **change}
    kind = str(files["type"])
    driver = "user" if kind == "user" else "dmaengine"
    node.kernel.configures("wq0.0", **files, driver_name=driver)
    if kind == "user":
        node.kernel.configures("wq0.0", driver="user")
    done = len(node.kernel.written)
    assert node.down(0) == {} and len(node.kernel.written) == done
    assert node.keeper.end() and len(node.kernel.written) == done


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


def test_without_enqcmd_no_shared_queue_is_offered(tmp_path: Path) -> None:
    node = Node(tmp_path, enqcmd=False)
    assert node.slots() == [] and "ENQCMD" in node.said
    with pytest.raises(HostError, match="ENQCMD"):
        node.make(0)
    assert node.slots(QUEUES[:2]) == ["0", "1"] and node.make(0, queues=QUEUES[:2])


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
    assert node.keeper.faults() == {} and node.slots() == ["0"] and "Too many open files" in node.said
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
    other = (SHARED,)
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
    device = Device(kind="dsa-queue", id=f"{AT}/queue-0")
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


# ---------------------------------------------------------------- killed


class Countdown:
    """Kills at one step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, _step: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def _killed_at(node: Node, at: int, act: Callable[[], object]) -> bool:
    """Whether it was killed before it was done."""
    node.die_at(Countdown(at))
    try:
        act()
    except Killed:
        return True
    finally:
        node.die_at(lambda step: None)
        node.start()
    return False


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_step_of_the_first_queue_the_next_agent_makes_it_or_takes_it_down(
    tmp_path: Path, older: bool
) -> None:
    for at in itertools.count(0, 1 if LONG else 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        node = Node(folder, older=older)
        was_killed = _killed_at(node, at, functools.partial(node.make, 2))
        again, _ = node.make(2), node.make(0, "d")
        assert node.is_made(0) and node.is_made(2) and (again or not was_killed or at > 20)
        assert node.down(0, 2) == {} and node.is_untouched()
        _killed_at(node, at, functools.partial(node.make, 2))
        assert node.down(2) == {} and node.keeper.end() == {}
        assert node.is_untouched(), (at, node.kernel.written)
        if not was_killed:
            break
    assert at > 35


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_step_of_taking_down_the_next_agent_completes_it(tmp_path: Path, older: bool) -> None:
    for at in itertools.count(0, 1 if LONG else 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        node = Node(folder, older=older)
        node.make(2), node.make(0, "d")
        was_killed = _killed_at(node, at, functools.partial(node.down, 2))
        assert node.is_made(0)
        assert node.down(2) == {} and node.is_made(0)
        was_killed |= _killed_at(node, at, functools.partial(node.down, 0))
        assert node.down(0) == {} and node.keeper.end() == {}
        assert node.is_untouched()
        if not was_killed:
            break
    assert at > 4


@pytest.mark.parametrize("seed", range(share_of(300, 0.1)))
def test_whatever_happens_in_whatever_order_claims_have_theirs_and_nothing_is_left(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    node = Node(tmp_path, older=seed % 3 == 0)
    held: dict[int, str] = {}
    for step in range(random_.randrange(3, 14)):
        node.die_at(Countdown(random_.randrange(60)) if random_.random() < 0.6 else (lambda _step: None))
        slot = random_.randrange(3)
        try:
            if slot in held and random_.random() < 0.6:
                assert node.down(slot) == {}
                del held[slot]
            elif str(slot) in node.slots():
                node.make(slot, held.setdefault(slot, f"c{step}"))
        except Killed:
            pass
        node.die_at(lambda _step: None)
        node.start()
        if random_.random() < 0.05:
            node.boot += 1
            node.kernel.reboot()
            node.start()
        for slot, claim in held.items():  # kubelet asks again
            if str(slot) in node.slots() or random_.random() < 0.5:
                try:
                    node.make(slot, claim)
                except HostError as error:
                    assert node.kernel.older and "released first" in str(error)
                else:
                    assert node.is_made(slot)
    assert node.down(*held) == {} and node.keeper.end() == {}
    assert node.is_untouched()
