"""Interrupts of held devices on a made-up kernel: where they go, what is said, and what they are given back after any
history of claims, queues, other programs, killed agents and boots."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.cli.agent import status
from nodeagent.config.isolation import PinningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.pinning.device_interrupts import AVOID, FOLLOW, LEAVE, DeviceInterrupts
from nodeagent.errors import HostError
from nodeagent.host.irq import interrupts, intruders
from nodeagent.host.irq.interrupts import NOT_YET, Mover
from nodeagent.host.irq.irqbalance import Bans
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.isolation import manager as isolation
from nodeagent.managers.isolation.manager import SAY_S, IsolationManager
from nodeagent.managers.isolation.report import NO_CPUS, NO_IRQS, DeviceState
from tests.doubles.cpufreq import Dead
from tests.doubles.irq_kernel import FakeIrqs

NIC, DISK = "0000:3b:00.0", "0000:5e:00.0"
ALL = CpuSet(range(8))
LONG_S = 1000.0


class Stand:
    """A machine, and claims that hold devices and CPUs."""

    def __init__(self, root: Path, **machine: Any) -> None:
        self.root = root
        self.kernel = FakeIrqs(root, **machine)
        self.memory = root / "state" / "interrupts.json"
        self.claims: dict[str, DeviceInterrupts] = {}
        self.plain = EMPTY
        """Exclusive CPUs of those who hold no device."""
        self.config = PinningConfig(intruders_seconds=LONG_S)
        self.now = 0.0
        self.begin()

    def begin(self) -> None:
        """Another agent on the same folders."""
        self.manager = IsolationManager(
            SysFs(self.root),
            self.exclusive,
            lambda: ALL - self.exclusive(),
            lambda: self.config,
            Revision().changed,
            self.memory,
            devices=lambda: tuple(self.claims[one] for one in sorted(self.claims)),
            settle_s=0.0,
            clock=lambda: self.now,
        )

    def exclusive(self) -> CpuSet:
        found = self.plain
        for one in self.claims.values():
            found |= one.cpus
        return found

    def moving(self, *, on: bool) -> None:
        self.config = PinningConfig(move_interrupts=on, intruders_seconds=LONG_S)

    def hold(self, device: str, wanted: str, cpus: str) -> None:
        self.claims[device] = DeviceInterrupts(
            device=device,
            addresses=(device,),
            wanted=wanted,
            cpus=CpuSet.parse(cpus),
            holder=f"claim default/{device[5:7]}",
        )

    async def look(self) -> dict[str, Any]:
        await self.manager.look()
        return self.manager.document()

    def device(self, shown: dict[str, Any], device: str = NIC) -> Any:
        return next(one for one in shown["devices"] if one["device"] == device)


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand(tmp_path)
    monkeypatch.setattr(intruders, "put", made.kernel.put)
    return made


# ---------------------------------------------------------------- follow, avoid, leave


async def test_interrupts_follow_their_holder_and_go_back(stand: Stand) -> None:
    """Whether others are moved or not; what follows is no intruder."""
    mine, other = [stand.kernel.add(NIC, f"eth0-rx-{i}") for i in range(2)], stand.kernel.add(DISK, "nvme0q1", "5")
    stand.hold(NIC, FOLLOW, "4-5")
    for moving in (False, True):
        stand.moving(on=moving)
        shown = await stand.look()
        assert [stand.kernel.asked(one) for one in mine] == ["4-5", "4-5"]
        assert stand.kernel.asked(other) == ("0-3,6-7" if moving else "5")
        assert stand.device(shown) == {
            "device": NIC,
            "holder": "claim default/3b",
            "interrupts": "follow",
            "cpus": "4-5",
            "irqs": mine,
            "misplaced": [],
            "why": "",
        }
        assert [one["irq"] for one in shown["irqs"] if not one["moved"]] == ([] if moving else [other])
    assert f"interrupts of {NIC} (claim default/3b): follow CPUs 4-5, 2 of 2" in status._intruders(shown)
    del stand.claims[NIC]
    assert (await stand.look())["devices"] == []
    assert stand.kernel.affinities() == {mine[0]: "0-7", mine[1]: "0-7", other: "5"}
    assert not stand.memory.exists()


async def test_they_avoid_all_exclusive_cpus_although_others_are_not_moved(stand: Stand) -> None:
    mine, other = stand.kernel.add(NIC, "eth0", "4-5"), stand.kernel.add(DISK, "nvme0q1", "4")
    stand.hold(NIC, AVOID, "4-5")
    stand.plain = CpuSet([6])
    await stand.look()
    assert (stand.kernel.asked(mine), stand.kernel.asked(other)) == ("0-3,7", "4")


async def test_they_are_left_on_their_holders_cpus_although_others_are_moved(stand: Stand) -> None:
    """Not on those of another holder."""
    stand.moving(on=True)
    mine, astray, other = (stand.kernel.add(*one) for one in ((NIC, "a", "4-5"), (NIC, "b", "6"), (DISK, "c", "4-5")))
    stand.hold(NIC, LEAVE, "4-5")
    stand.plain = CpuSet([6])
    shown = await stand.look()
    assert stand.kernel.affinities() == {mine: "4-5", astray: "0-3,7", other: "0-3,7"}
    assert {one["irq"] for one in shown["irqs"]} == {astray, other}
    stand.moving(on=False)
    await stand.look()
    shown = await stand.look()
    assert stand.kernel.affinities() == {mine: "4-5", astray: "6", other: "4-5"}
    assert {one["irq"]: one["hits"] for one in shown["irqs"]} == {astray: "6", other: "5"}


async def test_what_has_no_interrupts_or_no_cpus_says_so(stand: Stand) -> None:
    stand.kernel.add(NIC, "eth0", "1")
    stand.hold(NIC, FOLLOW, "")
    stand.hold(DISK, FOLLOW, "4")
    shown = await stand.look()
    assert [one["why"] for one in shown["devices"]] == [NO_CPUS, NO_IRQS]
    assert stand.kernel.affinities() == {24: "1"}


async def test_queues_that_appear_later_follow_at_the_next_look(stand: Stand) -> None:
    """And those that go are forgotten; the CPUs may change meanwhile."""
    first = stand.kernel.add(NIC, "eth0-0", "0")
    stand.hold(NIC, FOLLOW, "4-5")
    await stand.look()
    second = stand.kernel.add(NIC, "eth0-1", "1")
    stand.hold(NIC, FOLLOW, "5-6")
    await stand.look()
    assert stand.kernel.affinities() == {first: "5-6", second: "5-6"}
    stand.kernel.free(first)
    shown = await stand.look()
    assert [one["irq"] for one in json.loads(stand.memory.read_text())["moved"]] == [second]
    assert stand.device(shown)["irqs"] == [second]
    del stand.claims[NIC]
    await stand.look()
    assert stand.kernel.affinities() == {second: "1"}


async def test_an_interface_that_has_another_name_in_its_pod_keeps_its_interrupts(stand: Stand) -> None:
    """The driver requests them under that name; the device tells whose they are."""
    number = stand.kernel.add(NIC, "eth0-rx-0")
    stand.hold(NIC, FOLLOW, "4-5")
    await stand.look()
    stand.kernel.rename(number, "net1-rx-0")
    stand.begin()
    await stand.look()
    del stand.claims[NIC]
    await stand.look()
    assert stand.kernel.asked(number) == "0-7"


# ---------------------------------------------------------------- refusals


async def test_what_the_kernel_manages_is_said_once_and_tried_again_for_other_cpus_only(stand: Stand) -> None:
    """NVMe's queues: the first vector is not managed."""
    admin = stand.kernel.add(DISK, "nvme0q0")
    queues = [stand.kernel.add(DISK, f"nvme0q{i}", str(i), managed=True) for i in (1, 2)]
    stand.hold(DISK, FOLLOW, "4-5")
    with capture_logs() as lines:
        for stand.now in (0.0, 2 * SAY_S, 4 * SAY_S):
            shown = await stand.look()
    (line,) = lines
    assert all("manages this interrupt" in one for one in line["why"]) and len(line["why"]) == 2
    found = stand.device(shown, DISK)
    assert (found["irqs"], found["misplaced"]) == ([admin, *queues], queues)
    assert "the kernel or the device's driver manages this interrupt" in found["why"]
    (said,) = [one for one in status._intruders(shown) if one.startswith("interrupts of")]
    assert "follow CPUs 4-5, 1 of 3; cannot write" in said
    assert [one["irq"] for one in json.loads(stand.memory.read_text())["moved"]] == [admin]


def test_what_is_refused_is_said_before_what_only_waits() -> None:
    wanted = DeviceInterrupts(device=DISK, addresses=(DISK,), wanted=FOLLOW, cpus=CpuSet([4]), holder="a pod")
    waits, refused = {30: NOT_YET}, {31: "cannot write"}
    assert DeviceState(wanted=wanted, irqs=(30, 31), misplaced={**waits, **refused}).why == "cannot write"
    assert DeviceState(wanted=wanted, irqs=(30, 31), misplaced=waits).why == NOT_YET
    assert DeviceState(wanted=wanted, irqs=(30, 31), misplaced={}).why == ""


async def test_too_many_queues_for_their_holders_cpus_are_said(stand: Stand) -> None:
    stand.kernel.vectors = 2
    numbers = [stand.kernel.add(NIC, f"eth0-{i}") for i in range(3)]
    stand.hold(NIC, FOLLOW, "4")
    shown = await stand.look()
    assert sorted(stand.kernel.affinities().values()) == ["0-7", "4", "4"]
    found = stand.device(shown)
    assert found["misplaced"] == numbers[2:] and "these CPUs have no free vectors" in found["why"]


async def test_where_nothing_can_be_written_the_drop_in_is_named(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: str, value: str) -> None:
        raise HostError(f"cannot write {path}: Read-only file system, value {value!r}")

    stand.kernel.add(NIC, "eth0")
    stand.hold(NIC, FOLLOW, "4")
    monkeypatch.setattr(intruders, "put", read_only)
    assert "systemd/nodeagent-interrupts.conf opens it" in stand.device(await stand.look())["why"]


async def test_what_cannot_be_recorded_is_not_moved(stand: Stand) -> None:
    number = stand.kernel.add(NIC, "eth0")
    stand.hold(NIC, FOLLOW, "4")
    stand.memory.parent.write_text("in the way")
    shown = await stand.look()
    assert stand.kernel.asked(number) == "0-7"
    assert str(stand.memory) in stand.device(shown)["why"] and str(stand.memory) in shown["warnings"][0]


# ---------------------------------------------------------------- irqbalance


@pytest.mark.parametrize(
    ("banned", "missing", "notes"),
    [
        (Bans(cpus=CpuSet([4, 5, 6]), irqs=frozenset({24})), ("", []), []),
        (
            Bans(cpus=EMPTY, irqs=frozenset()),
            ("6", [24]),
            ["IRQBALANCE_BANNED_CPULIST=6)", "may move interrupts 24 away: ban them (--banirq=24)"],
        ),
        (None, ("", []), []),
    ],
)
async def test_whether_irqbalance_has_banned_what_was_moved_is_said(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, banned: Bans | None, missing: Any, notes: list[str]
) -> None:
    monkeypatch.setattr(isolation, "bans", lambda _: banned)
    stand.kernel.add(NIC, "eth0")
    stand.moving(on=True)
    stand.plain = CpuSet([6])
    stand.hold(NIC, FOLLOW, "4-5")
    shown = await stand.look()
    found = shown["irqbalance"]
    assert found["running"] is (banned is not None)
    assert (found["missing_cpus"], found["missing_irqs"]) == (missing[0] and "4-6", missing[1])
    for note in notes:
        assert any(note.replace("=6)", "=4-6)") in one for one in shown["warnings"])
    assert len(shown["warnings"]) == len(notes)


async def test_that_irqbalance_does_not_answer_is_said(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: SysFs) -> None:
        raise HostError("cannot ask irqbalance at x: timed out")

    monkeypatch.setattr(isolation, "bans", silent)
    stand.kernel.add(NIC, "eth0")
    stand.hold(NIC, FOLLOW, "4-5")
    shown = await stand.look()
    assert shown["irqbalance"]["banned_cpus"] is None and shown["irqbalance"]["running"] is True
    assert shown["warnings"] == ["whether irqbalance undoes it is not known: cannot ask irqbalance at x: timed out"]


async def test_what_another_program_moves_away_is_moved_again_and_what_to_ban_is_said(stand: Stand) -> None:
    """What that program asked for is what is given back."""
    number = stand.kernel.add(NIC, "eth0")
    stand.hold(NIC, FOLLOW, "4-5")
    await stand.look()
    for warned in (False, True):
        stand.kernel.other(number, "1")
        shown = await stand.look()
        assert stand.kernel.asked(number) == "4-5"
        assert (
            any(f"have irqbalance leave them alone (irqbalance --banirq={number})" in one for one in shown["warnings"])
            is warned
        )
    del stand.claims[NIC]
    await stand.look()
    assert stand.kernel.asked(number) == "1"


# ---------------------------------------------------------------- any history


class History:
    """What happens to a machine, and what each interrupt has to be given back: where it was before the agent, or where
    another program has moved it since."""

    def __init__(self, root: Path, *, renames: bool) -> None:
        """renames: whether interrupts get other names, and then none is moved but those of claims' devices: only of
        these it is recorded whose they are."""
        self.stand = Stand(root)
        self.renames = renames
        self.boot = 1
        self.theirs: dict[int, str] = {}
        for device in (NIC, NIC, DISK, DISK):
            self.add(device, managed=False)
        self.add(DISK, managed=True)

    def add(self, device: str, *, managed: bool) -> None:
        kernel = self.stand.kernel
        number = kernel.add(device, f"q{len(self.theirs)}", managed=managed)
        self.theirs[number] = kernel.asked(number)

    def act(self, what: str, device: str, wanted: str, cpus: str, which: int) -> None:
        """Do one thing."""
        stand, kernel = self.stand, self.stand.kernel
        number = sorted(kernel.lines)[which % len(kernel.lines)]
        match what:
            case "hold":
                taken = {cpu for one in stand.claims.values() if one.device != device for cpu in one.cpus} | {
                    *stand.plain
                }
                stand.hold(device, wanted, str(CpuSet.parse(cpus) - CpuSet(taken)))
            case "release":
                stand.claims.pop(device, None)
            case "plain":
                held = CpuSet(cpu for one in stand.claims.values() for cpu in one.cpus)
                stand.plain = CpuSet.parse(cpus) - held
            case "moving" if not self.renames:
                stand.moving(on=bool(which % 2))
            case "add":
                self.add(device, managed=which % 4 == 0)
            case "free" if len(kernel.lines) > 2:
                kernel.free(number)
                del self.theirs[number]
            case "rename" if self.renames:
                kernel.rename(number, f"{kernel.lines[number].name}'")
            case "other" if not kernel.lines[number].managed and kernel.asked(number) != cpus:
                kernel.other(number, cpus)
                self.theirs[number] = cpus
            case "boot":
                self.boot += 1
                kernel.boots(f"boot-{self.boot}")
                self.theirs = kernel.affinities()
                stand.begin()
            case _:
                pass

    def look(self, dies_after: int | None = None) -> bool:
        """Have the agent look. Return whether it has survived that."""
        kernel = self.stand.kernel
        kernel.dies_after = dies_after
        try:
            asyncio.run(self.stand.look())
        except Dead:
            self.stand.begin()
            return False
        finally:
            kernel.dies_after = None
        return True

    def check(self) -> None:
        """Everything is where it belongs now."""
        stand, exclusive = self.stand, self.stand.exclusive()
        for number, line in stand.kernel.lines.items():
            claim = stand.claims.get(line.device) if exclusive else None
            if line.managed:
                assert str(line.asked) == self.theirs[number]
            elif claim is not None and claim.wanted == FOLLOW and claim.cpus:
                assert line.asked == claim.cpus, (number, line)
            elif stand.config.move_interrupts or (claim is not None and claim.wanted == AVOID):
                mine = claim.cpus if claim is not None and claim.wanted != AVOID else EMPTY
                assert line.delivered not in exclusive - mine, (number, line)
            else:
                assert str(line.asked) == self.theirs[number], (number, line)


@contextlib.contextmanager
def history(record: list[int], *, renames: bool = False) -> Iterator[History]:
    """A history whose agents are killed before or after they have recorded something, too. record: how many more
    records an agent makes before it is killed, as its only item if there is one."""
    saved = interrupts.save

    def save(*args: Any) -> None:
        if record and record[0] <= 0:
            raise Dead
        saved(*args)
        record[:] = [one - 1 for one in record]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        made = History(Path(folder), renames=renames)
        patch.setattr(intruders, "put", made.stand.kernel.put)
        patch.setattr(interrupts, "save", save)
        yield made


STEPS = st.tuples(
    st.sampled_from(
        ["hold", "hold", "release", "plain", "moving", "add", "free", "rename", "other", "boot", "look", "look"]
    ),
    st.sampled_from([NIC, DISK]),
    st.sampled_from([FOLLOW, FOLLOW, AVOID, LEAVE]),
    st.sampled_from(["1", "2-3", "4-5", "3-6", "7"]),
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(0, 6)),
    st.one_of(st.none(), st.integers(0, 2)),
)


@given(st.lists(STEPS, max_size=14), st.booleans())
@settings(max_examples=60, deadline=None)
def test_after_any_history_everything_is_given_back(steps: list[Any], renames: bool) -> None:
    """After a look that an agent survives everything is where it belongs, whatever killed those before it; and once
    nothing is held any longer, everything is as if there had been no agent."""
    record: list[int] = []
    with history(record, renames=renames) as made:
        for what, device, wanted, cpus, which, dies_after, records in steps:
            if what != "look":
                made.act(what, device, wanted, cpus, which)
                continue
            record[:] = [] if records is None else [records]
            survived = made.look(dies_after)
            record.clear()
            if survived:
                made.check()
        made.stand.claims.clear()
        made.stand.plain = EMPTY
        assert made.look()
        assert made.stand.kernel.affinities() == made.theirs
        assert not made.stand.memory.exists()


@pytest.mark.parametrize("step", range(8))
def test_an_uninstall_gives_back_what_a_killed_agent_has_moved(tmp_path: Path, step: int) -> None:
    """At any step of a look."""
    with history([]) as made:
        made.stand.hold(NIC, FOLLOW, "4-5")
        made.stand.hold(DISK, AVOID, "1")
        made.look(dies_after=step)
        Mover(SysFs(made.stand.root), made.stand.memory).move(EMPTY, EMPTY, ())
        assert made.stand.kernel.affinities() == made.theirs
        assert not made.stand.memory.exists()
