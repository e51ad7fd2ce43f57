"""Work queues of DSA and IAA made for claims: enabled and disabled on a double of the kernel, recorded before, undone
afterwards, whoever else configures accelerators and whenever the agent is killed."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.health import UNHEALTHY
from nodeagent.core.queues.layout import Group, Limits, layout_of, misfit
from nodeagent.core.queues.settings import Queue
from nodeagent.errors import HostError
from nodeagent.host.idxd import Accelerators
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.queues.journal import QueueJournal
from nodeagent.managers.queues.maker import QueueMaker, Wanted
from nodeagent.managers.queues.manager import QueuesManager
from nodeagent.managers.queues.table import QueueTable
from tests.builders.devices import DeviceTree
from tests.doubles.idxd_kernel import BUS, IdxdKernel, accelerator
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import DRIVER, NODE
from tests.support.long_form import share_of

DSA, OTHER, IAX = "0000:6a:01.0", "0000:6f:01.0", "0000:6a:02.0"
LAYOUT = layout_of([Group(engines=2, sizes=(32, 16)), Group(engines=1, sizes=(64,))])
DEDICATED = Queue(mode="dedicated", priority=10, threshold=0, block_on_fault=False)
SHARED = Queue(mode="shared", priority=5, threshold=8, block_on_fault=True)
RESOURCE: dict[str, Any] = {
    "name": "queue",
    "kind": "dsa",
    "serve": "dra",
    "queues": {
        "groups": [{"engines": 2, "sizes": [32, 16]}, {"sizes": [64]}],
        "modes": ["dedicated", "shared"],
        "maxPriority": 12,
        "blockOnFault": True,
    },
}


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


class DirectPut(TimedPut):
    """Writes in the thread of the caller, which is killed with it."""

    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {text.strip() or 'nothing'} to {path}: {error.strerror}") from None


@dataclass
class Doom:
    """Kills at a step; 0: never."""

    left: int = 0

    def step(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                raise Killed


class Machine:
    """Two accelerators of DSA and one of IAA, the second an admin's, with an agent's maker that may be killed and
    started again."""

    def __init__(self, folder: Path) -> None:
        tree = DeviceTree(folder / "root")
        for address, name in ((DSA, "dsa0"), (OTHER, "dsa1"), (IAX, "iax2")):
            accelerator(tree, address, name)
        self.kernel = IdxdKernel(tree.root)
        self.admin_configures("dsa1")
        self.state = folder / "state"
        self.state.mkdir()
        self.boot, self.doom = 0, Doom()
        self.kernel.before = self.kernel.after = self.doom.step
        self.before = self.kernel.everything()
        self.start()

    def admin_configures(self, name: str) -> None:
        """As with accel-config: two queues, of which one is enabled and one waits."""
        kernel, number = self.kernel, name[3:]
        kernel.admin(f"engine{number}.0", group_id=0)
        for queue in (0, 1):
            said = {"size": 16, "group_id": 0, "type": "user", "mode": "dedicated", "priority": 3, "name": "app"}
            kernel.admin(f"wq{number}.{queue}", **said, driver_name="user")
        kernel.bind("idxd", name)
        kernel.bind("user", f"wq{number}.0")

    def start(self) -> None:
        self.doom.left = 0
        self.journal = QueueJournal(self.state, f"boot-{self.boot}")
        keep = self.journal.change

        def change(*args: Any) -> None:
            self.doom.step()
            keep(*args)
            self.doom.step()

        self.journal.change = change  # type: ignore[method-assign]
        accelerators = Accelerators(SysFs(self.kernel.root), DirectPut(self.kernel.put))
        self.maker = QueueMaker(self.journal, accelerators, node_s=0.2)

    def make(self, claim: str, number: int, wanted: Queue = DEDICATED, name: str = "dsa0", **more: Any) -> bool:
        address = {"dsa0": DSA, "dsa1": OTHER, "iax2": IAX}[name]
        said: dict[str, Any] = {"layout": LAYOUT, "grant": f"{claim}-0", **more}
        queue = f"wq{name[3:]}.{number}"
        return self.maker.make(
            Wanted(
                device=f"{address}/wq-{number}",
                claim=claim,
                address=address,
                accelerator=name,
                queue=queue,
                wanted=wanted,
                **said,
            )
        )

    def of(self, claim: str) -> list[str]:
        return [id for id, one in self.maker.records().items() if one.claim == claim]

    def end(self, claim: str) -> dict[str, str]:
        return self.maker.give_back(self.of(claim))

    def is_untouched(self) -> bool:
        return self.kernel.everything() == self.before and not self.maker.records()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---------------------------------------------------------------- layouts


def test_a_layout_gives_each_group_the_next_engines_and_queues() -> None:
    assert LAYOUT.engines == (0, 0, 1)
    assert [(one.number, one.size, one.group) for one in LAYOUT.slots] == [(0, 32, 0), (1, 16, 0), (2, 64, 1)]


def test_what_an_accelerator_lacks_for_a_layout_is_said_with_numbers() -> None:
    assert misfit(LAYOUT, Limits(queues=3, groups=2, engines=3, entries=112)) == ""
    said = misfit(LAYOUT, Limits(queues=2, groups=1, engines=2, entries=111))
    assert said == (
        "3 queues are configured, it has 2; 2 groups are configured, it has 1; "
        "3 engines are configured, it has 2; 112 entries are configured, it has 111"
    )


# ---------------------------------------------------------------- enabled and disabled


def test_the_first_queue_lays_its_accelerator_out_and_the_last_leaves_it_as_it_was(machine: Machine) -> None:
    kernel = machine.kernel
    assert machine.make("a", 0)
    assert kernel.files("dsa0", "state")["state"] == "enabled"
    assert kernel.files("wq0.0", "state", "mode", "size", "group_id", "priority", "name", "type") == {
        **{"state": "enabled", "mode": "dedicated", "size": "32", "group_id": "0", "priority": "10"},
        **{"name": "nodeagent-a", "type": "user"},
    }
    assert [kernel.files(f"engine0.{n}", "group_id")["group_id"] for n in range(4)] == ["0", "0", "1", "-1"]
    assert machine.make("b", 2, SHARED)
    assert kernel.files("wq0.2", "mode", "threshold", "priority", "block_on_fault", "size") == {
        **{"mode": "shared", "threshold": "8", "priority": "5", "block_on_fault": "1", "size": "64"}
    }
    assert (kernel.root / "dev/dsa/wq0.2").exists()
    assert machine.end("a") == {}
    assert kernel.enabled() == {"wq0.2": "nodeagent-b", "wq1.0": "app"}
    assert machine.make("c", 1)
    for claim in ("b", "c"):
        assert machine.end(claim) == {}
    assert machine.is_untouched()


def test_making_twice_writes_nothing_the_second_time(machine: Machine) -> None:
    machine.make("a", 1, SHARED)
    before = list(machine.kernel.written)
    assert not machine.make("a", 1, SHARED)
    assert machine.kernel.written == before


def test_queues_of_iaa_have_their_own_folder_of_nodes(machine: Machine) -> None:
    machine.make("a", 0, name="iax2")
    assert (machine.kernel.root / "dev/iax/wq2.0").exists()
    assert machine.end("a") == {} and machine.is_untouched()


def test_an_accelerator_that_an_admin_has_configured_is_left_alone(machine: Machine) -> None:
    with pytest.raises(HostError, match=r"cannot enable wq1.2: another program has configured wq1.0"):
        machine.make("a", 2, name="dsa1")
    assert machine.is_untouched()


@pytest.mark.parametrize("said", [("wq0.5", "size", 8), ("engine0.3", "group_id", 2), ("wq0.1", "name", "mine")])
def test_an_accelerator_that_an_admin_has_begun_to_configure_is_left_alone(
    machine: Machine, said: tuple[str, str, object]
) -> None:
    what, file, value = said
    machine.kernel.admin(what, **{file: value})
    before = machine.kernel.everything()
    with pytest.raises(HostError, match=r"cannot enable wq0.0: another program has configured (dsa0|wq0.1)"):
        machine.make("a", 0)
    assert machine.kernel.everything() == before and not machine.maker.records()


def test_a_queue_that_waits_hinders_no_other_where_there_are_no_shared_ones(machine: Machine) -> None:
    """The kernel writes the configuration of all queues whenever it enables one, and refuses a shared one."""
    machine.kernel.enqcmd = False
    machine.make("a", 0)
    machine.make("b", 1)
    assert machine.end("a") == {}
    machine.make("c", 0)
    with pytest.raises(HostError, match=r"cannot enable wq0.2: .*; shared queues need an IOMMU in scalable mode"):
        machine.make("d", 2, SHARED)
    machine.make("e", 2)
    for claim in ("b", "c", "e"):
        assert machine.end(claim) == {}
    assert machine.is_untouched()


def test_where_programs_can_use_no_queue_it_says_why_and_leaves_nothing(machine: Machine) -> None:
    (machine.kernel.root / BUS / "dsa0/pasid_enabled").write_text("0\n")
    with pytest.raises(HostError, match=r"cannot enable wq0.0: .*Operation not supported; queues for programs need an"):
        machine.make("a", 0)
    (machine.kernel.root / BUS / "dsa0/pasid_enabled").write_text("1\n")
    assert machine.is_untouched()


def test_an_accelerator_without_a_way_to_wait_for_pages_refuses_that_alone(machine: Machine) -> None:
    machine.kernel.faults = False
    machine.make("a", 0)
    with pytest.raises(HostError, match=r"cannot write 1 to .*/wq0.2/block_on_fault: Operation not supported"):
        machine.make("b", 2, SHARED)
    assert machine.kernel.enabled() == {"wq0.0": "nodeagent-a", "wq1.0": "app"}
    assert machine.end("a") == {} and machine.is_untouched()


def test_a_queue_without_a_node_fails_the_claim_and_is_disabled_again(machine: Machine) -> None:
    machine.kernel.nodes = False
    with pytest.raises(HostError, match=r"cannot use wq0.0: there is no /dev/dsa/wq0.0 after 0.2 s"):
        machine.make("a", 0)
    assert machine.is_untouched()


def test_another_layout_waits_until_no_claim_has_a_queue(machine: Machine) -> None:
    other = layout_of([Group(engines=4, sizes=(8, 8, 8))])
    machine.make("a", 0)
    said = r"cannot enable wq0.1: as long as claims have queues of dsa0, it stays laid out as it is, and wq0.1 has 16"
    with pytest.raises(HostError, match=said):
        machine.make("b", 1, layout=other)
    assert machine.end("a") == {}
    assert machine.make("b", 1, layout=other)
    assert machine.kernel.files("wq0.1", "size") == {"size": "8"}
    assert machine.end("b") == {} and machine.is_untouched()


def test_a_halted_accelerator_refuses_claims_and_is_disabled_with_its_last_queue(machine: Machine) -> None:
    machine.make("a", 0)
    (machine.kernel.root / BUS / "dsa0/state").write_text("halted\n")
    with pytest.raises(HostError, match=r"cannot enable wq0.1: dsa0 is halted"):
        machine.make("b", 1)
    assert machine.end("a") == {} and machine.is_untouched()


def test_an_accelerator_that_has_gone_is_forgotten(machine: Machine) -> None:
    machine.make("a", 0)
    (machine.kernel.root / BUS / "dsa0").unlink()
    assert machine.end("a") == {}
    assert not machine.maker.records()
    with pytest.raises(HostError, match=r"dsa0 is not at 0000:6a:01.0 any longer"):
        machine.make("b", 0)


def test_an_unprepare_that_hangs_has_a_deadline_and_others_go_on(machine: Machine) -> None:
    """The driver waits until everything that was submitted is done."""
    ends = threading.Event()
    machine.make("a", 0)
    machine.kernel.before = lambda path: ends.wait(60) if path.endswith("user/unbind") else None  # type: ignore[assignment, return-value]
    accelerators = Accelerators(SysFs(machine.kernel.root), TimedPut(machine.kernel.put, deadline_s=0.1))
    maker = QueueMaker(machine.journal, accelerators, node_s=0.2)
    (id,) = machine.of("a")
    assert "did not end within" in maker.give_back([id])[id]
    assert maker.give_back([id])[id] == "cannot change wq0.0: an earlier write has not ended"
    ends.set()
    for thread in [one for one in threading.enumerate() if one.name == "vfio"]:
        thread.join(10)
    assert machine.end("a") == {}
    assert machine.is_untouched()


# ---------------------------------------------------------------- others meanwhile


def test_what_an_admin_makes_of_a_disabled_accelerator_stays(machine: Machine) -> None:
    machine.make("a", 0)
    machine.kernel.unbind("idxd", "dsa0")
    machine.admin_configures("dsa0")
    before = machine.kernel.everything()
    assert machine.maker.look() == {f"{DSA}/wq-0": False}
    with pytest.raises(HostError, match=r"another program has configured wq0.0"):
        machine.make("a", 0)
    assert machine.kernel.everything() == before and not machine.maker.records()


def test_a_queue_that_an_admin_enables_beside_ours_keeps_the_accelerator(machine: Machine) -> None:
    machine.make("a", 0)
    machine.kernel.admin("wq0.1", type="user", mode="dedicated", name="mine", driver_name="user")
    machine.kernel.bind("user", "wq0.1")
    with pytest.raises(HostError, match=r"wq0.1: it is enabled already, as 'mine', and not by this agent"):
        machine.make("b", 1)
    assert machine.end("a") == {}
    assert machine.kernel.enabled() == {"wq0.1": "mine", "wq1.0": "app"}
    assert not machine.maker.records()


def test_a_queue_that_was_disabled_is_made_again_when_kubelet_asks(machine: Machine) -> None:
    machine.make("a", 0)
    machine.make("b", 1)
    assert machine.maker.look() == {f"{DSA}/wq-0": True, f"{DSA}/wq-1": True}
    machine.kernel.unbind("idxd", "dsa0")
    assert machine.maker.look() == {f"{DSA}/wq-0": False, f"{DSA}/wq-1": False}
    assert [one.ready for one in machine.maker.records().values()] == [False, False]
    assert machine.make("b", 1)
    assert machine.maker.look() == {f"{DSA}/wq-0": False, f"{DSA}/wq-1": True}
    assert machine.make("a", 0)
    assert machine.kernel.enabled() == {"wq0.0": "nodeagent-a", "wq0.1": "nodeagent-b", "wq1.0": "app"}
    assert machine.end("a") == {} and machine.end("b") == {} and machine.is_untouched()


def test_after_a_reboot_nothing_is_recorded_and_a_claim_is_made_anew(machine: Machine) -> None:
    machine.make("a", 0)
    machine.kernel.reboot()
    machine.boot += 1
    machine.start()
    assert not machine.maker.records()
    assert machine.make("a", 0)
    assert machine.kernel.enabled() == {"wq0.0": "nodeagent-a"}


@pytest.mark.parametrize("seed", range(share_of(2000, 0.1)))
def test_killed_at_any_step_the_queues_are_as_the_ledger_says_and_others_as_they_were(
    tmp_path: Path, seed: int
) -> None:
    """Claims come and go; the agent is killed before and after any write to the kernel and to the journal; now and then
    the machine is rebooted, or an admin disables an accelerator. At the end exactly the queues of claims are enabled,
    each as its claim wants it, and then everything is as the kernel makes it; the admin's queues never change."""
    pick, machine = random.Random(seed), Machine(tmp_path)
    kernel, doom = machine.kernel, machine.doom
    kernel.enqcmd = pick.random() < 0.8
    held: dict[str, tuple[str, int, Queue]] = {}
    modes = (DEDICATED, SHARED) if kernel.enqcmd else (DEDICATED,)

    def others() -> dict[str, dict[str, str]]:
        every = kernel.everything().items()
        return {what: said for what, said in every if what == "dsa1" or what.startswith(("wq1.", "engine1."))}

    theirs = others()
    for step in range(14):
        taken = {(name, n) for name, n, _ in held.values()}
        free = [(name, n) for name in ("dsa0", "iax2") for n in range(3) if (name, n) not in taken]
        doom.left = pick.choice((0, *range(1, 45)))
        try:
            if free and pick.random() < 0.6:
                name, number = pick.choice(free)
                claim = f"c{step}"
                held[claim] = name, number, pick.choice(modes)  # the decision is durable first
                machine.maker.give_back(machine.maker.orphans(_devices(held)))
                machine.make(claim, number, held[claim][2], name)
            elif held:
                claim = pick.choice(sorted(held))
                if not machine.end(claim):
                    del held[claim]
        except Killed:
            machine.start()
        doom.left = 0
        assert others() == theirs
        if pick.random() < 0.1:
            kernel.reboot()
            machine.admin_configures("dsa1")
            machine.boot += 1
            machine.start()
        elif pick.random() < 0.1 and kernel.files("dsa0", "state")["state"] == "enabled":
            kernel.unbind("idxd", "dsa0")
    machine.start()
    assert machine.maker.give_back(machine.maker.orphans(_devices(held))) == {}
    for claim, (name, number, wanted) in held.items():
        machine.make(claim, number, wanted, name)
    assert kernel.enabled() == {"wq1.0": "app"} | {
        f"wq{name[3:]}.{number}": f"nodeagent-{claim}" for claim, (name, number, _) in held.items()
    }
    for name, number, wanted in held.values():
        said = kernel.files(f"wq{name[3:]}.{number}", "mode", "priority", "threshold", "size")
        assert said == {
            "mode": wanted.mode,
            "priority": str(wanted.priority),
            "threshold": str(wanted.threshold),
            "size": str(LAYOUT.slots[number].size),
        }
    for claim in held:
        assert machine.end(claim) == {}
    assert machine.is_untouched()


def _devices(held: dict[str, tuple[str, int, Queue]]) -> dict[str, list[str]]:
    addresses = {"dsa0": DSA, "iax2": IAX}
    return {f"{claim}-0": [f"{addresses[name]}/wq-{number}"] for claim, (name, number, _) in held.items()}


# ---------------------------------------------------------------- claims


@dataclass
class Node:
    """A node with accelerators, and the agent's part that prepares claims."""

    room: Room
    kernel: IdxdKernel
    boot: str = "boot"
    manager: QueuesManager = field(init=False)
    blank: dict[str, dict[str, str]] = field(init=False)

    def claim(self, name: str, *numbers: int, said: dict[str, Any] | None = None) -> ClaimRef:
        every = [
            {"request": f"r{n}", "driver": DRIVER, "pool": f"{NODE}/dsa", "device": f"0000-6a-01-0-wq-{n}"}
            for n in numbers
        ]
        ref = self.room.claim(name, *every)
        if said is not None:
            parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "QueueConfig", **said}
            config = {"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": parameters}}
            self.room.objects["default", name]["status"]["allocation"]["devices"]["config"] = [config]
        return ref

    async def prepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.prepare(ref)
        return answer.error

    async def unprepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.unprepare(ref)
        return answer

    def nodes(self, ref: ClaimRef, device: int = 0) -> list[str]:
        edits = json.loads(self.room.spec_file(ref).read_text())["devices"][device]["containerEdits"]
        return [one["path"] for one in edits.get("deviceNodes", ())]

    @property
    def journal(self) -> QueueJournal:
        return QueueJournal(self.room.folder / "state", self.boot)

    def is_untouched(self) -> bool:
        return self.kernel.everything() == self.blank and not self.journal.path.exists()

    def open(self) -> None:
        """Start what prepares claims, as after kill -9."""
        room = self.room
        accelerators = Accelerators(SysFs(str(room.tree.root)), DirectPut(self.kernel.put))

        async def rescan() -> None:
            room.rescan()

        state = room.folder / "state"
        self.manager = QueuesManager(room.agent, accelerators, state, lambda: room.config, rescan, node_s=0.3)
        old, view = room.rendering, QueueTable(self.journal).view
        room.rendering = ClaimRenderer(
            room.agent, lambda: room.dra, old._cdi, old._readable, room.folder / "run" / "mps", view
        )
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, passthrough=self.manager
        )
        room.rescan()

    async def restart(self, boot: str = "") -> None:
        await self.manager.close()
        self.boot = boot or self.boot
        await self.room.restart(self.boot)
        self.open()


@contextlib.asynccontextmanager
async def node(folder: Path, resource: dict[str, Any] = RESOURCE) -> AsyncIterator[Node]:
    async with claim_room(folder, resource) as room:
        accelerator(room.tree, DSA, "dsa0")
        made = Node(room, IdxdKernel(room.tree.root))
        made.blank = made.kernel.everything()
        made.open()
        try:
            yield made
        finally:
            await made.manager.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the last process of a pod to end."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)


async def test_a_claim_has_its_queues_made_and_its_container_gets_their_nodes(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 0, 2)
        assert await one.prepare(ref) == ""
        assert one.kernel.enabled() == {"wq0.0": f"nodeagent-{ref.uid}", "wq0.2": f"nodeagent-{ref.uid}"}
        assert (one.nodes(ref, 0), one.nodes(ref, 1)) == (["/dev/dsa/wq0.0"], ["/dev/dsa/wq0.2"])
        assert one.room.env(ref)["NODEAGENT_DSA_QUEUES"] == "/dev/dsa/wq0.0"
        assert [it["queue"] for it in one.manager.document()["enabled"]] == ["wq0.0", "wq0.2"]
        assert await one.prepare(ref) == ""
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()
        assert await one.unprepare(ref) == ""


async def test_a_claim_says_what_its_queue_is_set_to(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1, said={"mode": "shared", "priority": 12, "threshold": 4, "blockOnFault": True})
        assert await one.prepare(ref) == ""
        assert one.kernel.files("wq0.1", "mode", "priority", "threshold", "block_on_fault") == {
            **{"mode": "shared", "priority": "12", "threshold": "4", "block_on_fault": "1"}
        }
        assert await one.unprepare(ref) == "" and one.is_untouched()
        usual = one.claim("d", 1)
        assert await one.prepare(usual) == ""
        assert one.kernel.files("wq0.1", "mode", "priority", "threshold", "block_on_fault") == {
            **{"mode": "dedicated", "priority": "10", "threshold": "0", "block_on_fault": "0"}
        }


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"mode": "shared"}, "mode: queues.modes of this node allows dedicated, and not shared"),
        ({"priority": 13}, "priority: queues.maxPriority of this node is 12, less than 13"),
        ({"blockOnFault": True}, "blockOnFault: queues.blockOnFault of this node does not allow it"),
        ({"threshold": 4}, "threshold: only a shared queue has one, and 0000:6a:01.0/wq-1 is to be dedicated"),
    ],
)
async def test_beyond_the_nodes_limits_a_claim_is_refused(folder: Path, said: dict[str, Any], why: str) -> None:
    strict = {**RESOURCE, "queues": {**RESOURCE["queues"], "modes": ["dedicated"], "blockOnFault": False}}
    async with node(folder, strict) as one:
        ref = one.claim("c", 1, said=said)
        assert (await one.prepare(ref)).endswith(why)
        assert one.is_untouched() and not one.room.agent.ledger.grants


async def test_a_threshold_is_no_larger_than_the_queue(folder: Path) -> None:
    async with node(folder) as one:
        error = await one.prepare(one.claim("c", 1, said={"mode": "shared", "threshold": 17}))
        assert error.endswith("threshold: 0000:6a:01.0/wq-1 has 16 entries, fewer than 17")


async def test_a_kernel_that_refuses_fails_the_claim_and_leaves_nothing(folder: Path) -> None:
    async with node(folder) as one:
        one.kernel.enqcmd = False
        ref = one.claim("c", 1, said={"mode": "shared"})
        error = await one.prepare(ref)
        assert error.startswith(f"cannot prepare claim default/c of {NODE}") or "cannot enable wq0.1:" in error
        assert "cannot enable wq0.1: cannot write wq0.1 to" in error
        assert one.kernel.everything() == one.blank
        assert await one.unprepare(ref) == "" and one.is_untouched()


async def test_after_kill_9_the_same_claim_has_the_same_queue(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        before = one.kernel.everything()
        await one.restart()
        assert one.kernel.everything() == before
        assert await one.prepare(ref) == "" and one.nodes(ref) == ["/dev/dsa/wq0.1"]
        assert one.kernel.everything() == before
        assert await one.unprepare(ref) == "" and one.is_untouched()


async def test_a_queue_of_a_claim_that_an_admin_released_is_disabled(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        await one.room.agent.unprepare([ref.uid], "an admin released it", "op")
        await one.manager.recover()
        assert one.is_untouched() and one.manager.notes() == []


async def test_a_queue_that_cannot_be_disabled_keeps_its_claim_and_is_noted(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""

        def refuse(path: str) -> None:
            if path.endswith("unbind"):
                raise OSError(5, "Input/output error")

        one.kernel.before = refuse
        assert "cannot write wq0.1 to" in await one.unprepare(ref)
        assert one.room.agent.ledger.grants
        await one.room.agent.unprepare([ref.uid], "an admin released it", "op")
        await one.manager.recover()
        (note,) = one.manager.notes()
        assert note.startswith("work queues: cannot write wq0.1 to")
        one.kernel.before = lambda path: None
        await one.manager.recover()
        assert one.is_untouched() and one.manager.notes() == []


async def test_a_queue_that_an_admin_disables_is_bad_health_and_not_handed_over(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        one.kernel.unbind("idxd", "dsa0")
        await one.manager.look()
        state = one.room.agent.health[f"{DSA}/wq-1"]
        assert state.state == UNHEALTHY and "another program has disabled the queue" in state.reason
        await one.room.rendering.restore(afresh=False)
        assert not one.room.spec_file(ref).exists()
        assert await one.prepare(ref) == "" and one.nodes(ref) == ["/dev/dsa/wq0.1"]
        assert one.room.agent.health[f"{DSA}/wq-1"].seen["queue"].state != UNHEALTHY
        assert await one.unprepare(ref) == "" and one.is_untouched()


async def test_a_claim_keeps_its_queue_whatever_is_configured_meanwhile(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        before = one.kernel.everything()
        one.room.serve({**RESOURCE, "queues": {"groups": [{"sizes": [8, 8, 8, 8]}]}})
        one.room.rescan()
        assert one.room.agent.inventory.device_by_id[f"{DSA}/wq-1"].attributes["size"] == 16
        assert await one.prepare(ref) == "" and one.nodes(ref) == ["/dev/dsa/wq0.1"]
        assert one.kernel.everything() == before
        assert await one.unprepare(ref) == "" and one.is_untouched()
        assert one.room.agent.inventory.device_by_id[f"{DSA}/wq-1"].attributes["size"] == 8


async def test_after_a_reboot_a_claim_is_made_again(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        one.kernel.reboot()
        await one.restart("boot-2")
        assert await one.prepare(ref) == ""
        assert one.kernel.enabled() == {"wq0.1": f"nodeagent-{ref.uid}"}
        assert await one.unprepare(ref) == "" and one.is_untouched()


async def test_without_a_resource_that_makes_them_what_a_claim_had_is_still_disabled(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", 1)
        assert await one.prepare(ref) == ""
        one.room.serve({"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"], "serve": "dra"})
        one.room.rescan()
        assert not [it for it in one.room.agent.inventory.devices if it.kind == "dsa"], "it is nobody else's"
        assert await one.unprepare(ref) == "" and one.is_untouched()
