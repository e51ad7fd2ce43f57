"""The watch over exclusive CPUs: intruders shown and said, interrupts moved away, remembered and given back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.cli.agent import status
from nodeagent.config.isolation import PinningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.irq import interrupts, intruders
from nodeagent.host.irq.interrupts import NOT_YET, NOWHERE, Mover
from nodeagent.host.irq.intruders import irqs
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.isolation.manager import SAY_S, UNSEEN, IsolationManager
from nodeagent.managers.isolation.report import MOST_SHOWN
from nodeagent.telemetry import metrics
from tests.support.until import until
from tests.unit.host.test_intruders import KTHREAD, irq, thread

LONG_S = 1000.0
ALL = CpuSet(range(8))


@dataclass
class Stand:
    """A machine of 8 CPUs whose interrupts go where they are asked to, and what the agent says of its CPUs."""

    root: Path
    exclusive: CpuSet = EMPTY
    others: CpuSet = ALL
    config: PinningConfig = field(default_factory=lambda: PinningConfig(move_interrupts=True, intruders_seconds=LONG_S))
    revision: Revision = field(default_factory=Revision)
    now: float = 0.0
    waits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path, text in (
            ("sys/devices/system/cpu/online", "0-7"),
            ("proc/sys/kernel/random/boot_id", "boot-1"),
            ("proc/interrupts", ""),
            ("proc/2/stat", f"2 (kthreadd) S 0 0 0 0 -1 {KTHREAD} 0 0 0 0"),
        ):
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        self.intruding = self.begin()

    @property
    def memory(self) -> Path:
        return self.root / "state" / "interrupts.json"

    def begin(self) -> IsolationManager:
        """The agent as it starts."""
        self.intruding = IsolationManager(
            SysFs(self.root),
            lambda: self.exclusive,
            lambda: self.others,
            lambda: self.config,
            self.changed,
            self.memory,
            settle_s=0.0,
            clock=lambda: self.now,
        )
        return self.intruding

    async def changed(self, seen: int) -> int:
        self.waits.append(seen)
        return await self.revision.changed(seen)

    def hold(self, cpus: str) -> None:
        self.exclusive = CpuSet.parse(cpus)
        self.others = ALL - self.exclusive
        self.revision.bump()

    def irq(self, number: int, asked: str, **files: str) -> None:
        irq(self.root, number, smp_affinity_list=asked, **files)

    def asked(self, number: int) -> str:
        return (self.root / f"proc/irq/{number}/smp_affinity_list").read_text().strip()

    def ask(self, number: int, cpus: str) -> None:
        (self.root / f"proc/irq/{number}/smp_affinity_list").write_text(f"{cpus}\n")

    async def look(self) -> dict[str, Any]:
        await self.intruding.look()
        return self.intruding.document()


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def gauge(kind: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("nodeagent_intruders", {"kind": kind})


@contextlib.asynccontextmanager
async def following(stand: Stand) -> AsyncIterator[None]:
    task = asyncio.create_task(stand.intruding.lead())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# ---------------------------------------------------------------- who is there


async def test_intruders_are_shown_and_counted(stand: Stand) -> None:
    stand.config = PinningConfig()
    thread(stand.root, 10, "0-7", name="sshd")
    thread(stand.root, 11, "0-2", name="elsewhere")
    thread(stand.root, 12, "3", name="bound")
    thread(stand.root, 13, "0-7", name="kswapd0", flags=KTHREAD)
    stand.irq(27, "3")
    stand.hold("3")
    shown = await stand.look()
    assert shown["looked_at"] > 0
    assert [(one["pid"], one["comm"], one["kernel"]) for one in shown["threads"]] == [
        (12, "bound", False),
        (10, "sshd", False),
        (13, "kswapd0", True),
    ]
    assert shown["threads"][0] == {
        "pid": 12,
        "tid": 12,
        "comm": "bound",
        "cpus": "3",
        "cgroup": "/system.slice/ssh.service",
        "kernel": False,
        "movable": True,
    }
    moved = {"moved": False, "before": "", "why": ""}
    assert shown["irqs"] == [{"irq": 27, "name": "", "cpus": "3", "hits": "3", **moved}]
    assert (gauge("thread"), gauge("irq"), shown["threads_total"], shown["warnings"]) == (3, 1, 3, [])
    assert stand.asked(27) == "3", "no grant required it to be moved"
    json.dumps(shown)


@pytest.mark.parametrize("stat", [None, "2 (pause) S 1 2 2 0 -1 4194560 0 0 0 0", "garbage"])
async def test_threads_of_the_host_are_unknown_where_only_the_containers_own_are_seen(
    stand: Stand, stat: str | None
) -> None:
    """Without hostPID no thread is seen: that is no proof that there is none."""
    (stand.root / "proc/2/stat").unlink()
    if stat is not None:
        (stand.root / "proc/2/stat").write_text(f"{stat}\n")
    stand.hold("3")
    shown = await stand.look()
    assert (shown["threads_total"], shown["warnings"]) == (None, [UNSEEN])
    assert math.isnan(gauge("thread") or 0.0)
    (line,) = status._intruders(shown)
    assert line.startswith("an unknown number of threads of the host and 0 interrupts may run on exclusive CPUs")


async def test_many_threads_are_counted_and_the_first_are_shown(stand: Stand) -> None:
    for pid in range(1, MOST_SHOWN + 6):
        thread(stand.root, pid, "0-7")
    stand.hold("3")
    shown = await stand.look()
    assert (len(shown["threads"]), shown["threads_total"]) == (MOST_SHOWN, MOST_SHOWN + 5)


async def test_nothing_is_looked_at_while_no_cpu_is_exclusive(stand: Stand) -> None:
    """Not even whether the machine can be read; and what was found before is gone."""
    thread(stand.root, 10, "0-7")
    stand.hold("3")
    await stand.look()
    stand.hold("")
    (stand.root / "proc/10/cgroup").unlink()
    (stand.root / "proc/10/cgroup").symlink_to("cgroup")
    shown = await stand.look()
    balance = shown.pop("irqbalance")
    nothing: dict[str, Any] = {"threads": [], "threads_total": 0, "irqs": [], "devices": [], "warnings": []}
    assert shown == {"looked_at": None, **nothing}
    assert balance["running"] is False
    assert gauge("thread") == 0


async def test_what_cannot_be_read_is_a_warning(stand: Stand) -> None:
    """One bad file costs one thread; a folder that cannot be listed costs the look, and nothing else."""
    (thread(stand.root, 10, "0-7") / "status").write_text("nonsense\n")
    thread(stand.root, 11, "0-7")
    stand.hold("3")
    shown = await stand.look()
    assert [one["pid"] for one in shown["threads"]] == [11]
    assert "proc/10/task/10/status" in shown["warnings"][0]
    (stand.root / "proc/irq").symlink_to("irq")
    shown = await stand.look()
    assert f"cannot list {stand.root}/proc/irq" in shown["warnings"][-1]


async def test_one_looks_soon_after_other_cpus_became_exclusive(stand: Stand) -> None:
    """Other news are none; what the configuration says now counts, too."""
    thread(stand.root, 10, "3", name="three")
    thread(stand.root, 11, "4", name="four")
    stand.hold("3")
    async with following(stand):
        await shown(stand, lambda shown: [one["comm"] for one in shown["threads"]] == ["three"])
        stand.revision.bump()
        await shown(stand, lambda _: stand.waits[-1] == stand.revision.value)
        assert stand.waits.count(0) == 1, "no task began to wait again, after another look"
        stand.hold("3-4")
        await shown(stand, lambda shown: shown["threads_total"] == 2)
        stand.irq(27, "3")
        stand.config = PinningConfig(intruders_seconds=LONG_S, verify_seconds=LONG_S)
        stand.revision.bump()
        await shown(stand, lambda shown: [one["irq"] for one in shown["irqs"]] == [27])


async def test_one_looks_every_now_and_then_without_any_news(stand: Stand) -> None:
    stand.config = PinningConfig(intruders_seconds=0.1)
    stand.hold("3")
    async with following(stand):
        await shown(stand, lambda shown: shown["looked_at"])
        thread(stand.root, 10, "3")
        await shown(stand, lambda shown: shown["threads_total"] == 1)


async def shown(stand: Stand, holds: Any) -> None:
    """Return once the document is so."""
    await until(lambda: holds(stand.intruding.document()), otherwise=stand.intruding.document)


# ---------------------------------------------------------------- said


async def test_intruders_are_said_by_name_when_they_change_and_once_a_minute_at_most(stand: Stand) -> None:
    """Workers of the kernel come and go under one name."""
    thread(stand.root, 10, "0-7")
    thread(stand.root, 20, "0-7", name="kworker/u16:0-events", flags=KTHREAD)
    stand.irq(27, "2")
    stand.config = PinningConfig()
    stand.hold("3")
    with capture_logs() as lines:
        await stand.look()
        thread(stand.root, 11, "0-7")
        thread(stand.root, 21, "0-7", name="kworker/u16:1", flags=KTHREAD)
        for stand.now in (SAY_S, 2 * SAY_S):
            await stand.look()
        thread(stand.root, 12, "3", name="dd")
        stand.irq(28, "3")
        for stand.now in (2 * SAY_S + 1, 3 * SAY_S):
            await stand.look()
        thread(stand.root, 13, "3", name="later")
        await stand.look()
    said = [(one["event"], one["log_level"], one.get("threads"), one.get("interrupts")) for one in lines]
    assert said == [
        ("intruders", "info", ["kworker", "sshd"], None),
        ("intruders", "info", ["dd", "kworker", "sshd"], ["28 "]),
    ]


async def test_an_end_of_all_intruders_is_said_and_their_absence_is_not(stand: Stand) -> None:
    stand.hold("3")
    with capture_logs() as lines:
        await stand.look()
        assert lines == []
        thread(stand.root, 10, "0-7")
        await stand.look()
        stand.hold("")
        stand.now = SAY_S
        await stand.look()
    assert [one.get("threads") for one in lines] == [["sshd"], None]


# ---------------------------------------------------------------- interrupts moved away


async def test_interrupts_are_moved_away_and_given_back(stand: Stand) -> None:
    """To those of their CPUs that are left, or to the others; one that keeps away is left alone."""
    before = {27: "0-7", 28: "3", 29: "0-2", 30: "2-3"}
    for number, cpus in before.items():
        stand.irq(number, cpus)
    counted = moved_so_far()
    stand.hold("3")
    shown = await stand.look()
    assert {number: stand.asked(number) for number in before} == {27: "0-2,4-7", 28: "0-2,4-7", 29: "0-2", 30: "2"}
    assert [(one["irq"], one["moved"], one["before"], one["hits"], one["why"]) for one in shown["irqs"]] == [
        (27, True, "0-7", "", ""),
        (28, True, "3", "", ""),
        (30, True, "2-3", "", ""),
    ]
    assert (gauge("irq"), moved_so_far() - counted) == (0, 3)
    stand.hold("2-3")
    await stand.look()
    assert {number: stand.asked(number) for number in before} == {
        27: "0-1,4-7",
        28: "0-1,4-7",
        29: "0-1",
        30: "0-1,4-7",
    }
    stand.hold("2")
    await stand.look()
    assert {number: stand.asked(number) for number in before} == {27: "0-1,3-7", 28: "3", 29: "0-1", 30: "3"}
    stand.hold("")
    assert (await stand.look())["irqs"] == []
    assert {number: stand.asked(number) for number in before} == before
    assert not stand.memory.exists()


def moved_so_far() -> float:
    return metrics.REGISTRY.get_sample_value("nodeagent_interrupts_moved_total") or 0


async def test_a_restarted_agent_gives_back_what_the_one_before_moved(stand: Stand) -> None:
    """Also when no CPU is exclusive by then; but nothing after a reboot, which has put everything back."""
    stand.irq(27, "0-7")
    stand.hold("3")
    await stand.look()
    stand.begin()
    await stand.look()
    assert stand.asked(27) == "0-2,4-7"
    stand.hold("")
    stand.begin()
    await stand.look()
    assert stand.asked(27) == "0-7"
    stand.hold("3")
    await stand.look()
    (stand.root / "proc/sys/kernel/random/boot_id").write_text("boot-2\n")
    stand.hold("")
    stand.begin()
    await stand.look()
    assert stand.asked(27) == "0-2,4-7"
    assert not stand.memory.exists()


async def test_interrupts_are_given_back_when_moving_is_switched_off(stand: Stand) -> None:
    stand.irq(27, "0-7")
    stand.hold("3")
    await stand.look()
    stand.config = PinningConfig(move_interrupts=False)
    await stand.look()
    assert stand.asked(27) == "0-7"
    shown = await stand.look()
    assert [(one["irq"], one["moved"], one["hits"]) for one in shown["irqs"]] == [(27, False, "3")]
    assert stand.asked(27) == "0-7"


@pytest.mark.parametrize("theirs", ["0-1", "5"])
async def test_what_somebody_else_has_changed_since_stays(stand: Stand, theirs: str) -> None:
    stand.irq(27, "0-7")
    stand.hold("3")
    await stand.look()
    stand.ask(27, theirs)
    await stand.look()
    stand.hold("")
    await stand.look()
    assert stand.asked(27) == theirs


@pytest.mark.parametrize("change", ["gone", "another"])
async def test_an_interrupt_that_is_gone_or_another_devices_is_not_given_back(stand: Stand, change: str) -> None:
    stand.irq(27, "0-7")
    (stand.root / "proc/interrupts").write_text(" 27:  0  0   PCI-MSIX-0000:00:01.0   0-edge      nvme0q1\n")
    stand.hold("3")
    await stand.look()
    if change == "gone":
        (stand.root / "proc/irq/27/smp_affinity_list").unlink()
    else:
        (stand.root / "proc/interrupts").write_text(" 27:  0  0   PCI-MSIX-0000:00:01.0   0-edge      eth0\n")
    stand.hold("")
    assert (await stand.look())["warnings"] == []
    assert not stand.memory.exists()
    if change == "another":
        assert stand.asked(27) == "0-2,4-7"


async def test_an_interrupt_that_comes_back_twice_is_moved_again_and_irqbalance_suspected(stand: Stand) -> None:
    """It is moved away each time; from then on what the other one asked for is what it is given back to."""
    stand.irq(27, "0-7")
    stand.hold("3")
    await stand.look()
    for warned in (False, True):
        stand.ask(27, "3")
        shown = await stand.look()
        assert stand.asked(27) == "0-2,4-7"
        assert any("IRQBALANCE_BANNED_CPULIST=3)" in one for one in shown["warnings"]) is warned
    stand.hold("")
    assert (await stand.look())["warnings"] == []
    assert stand.asked(27) == "3"


async def test_a_refusal_of_the_kernel_is_said_once_and_tried_again_with_other_cpus(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt that the kernel manages costs no other one anything."""
    tried, write = list[str](), os.write

    def managed(handle: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not path.endswith("irq/27/smp_affinity_list"):
            return write(handle, data)
        tried.append(data.decode().strip())
        write(handle, b"3-4\n")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stand.irq(27, "3-4")
    stand.irq(28, "3")
    monkeypatch.setattr(cgroupset.os, "write", managed)
    stand.hold("3")
    with capture_logs() as lines:
        for stand.now in (0.0, SAY_S, 2 * SAY_S):
            shown = await stand.look()
    assert [(one["irq"], one["moved"], bool(one["why"])) for one in shown["irqs"]] == [
        (27, False, True),
        (28, True, False),
    ]
    assert shown["irqs"][0]["why"].endswith("value '4'; the kernel or the device's driver manages this interrupt")
    assert (tried, gauge("irq")) == (["4"], 1)
    assert [(one["log_level"], one["why"]) for one in lines] == [("warning", [shown["irqs"][0]["why"]])]
    assert "27" not in [str(one["irq"]) for one in json.loads(stand.memory.read_text())["moved"]]
    stand.hold("3-4")
    await stand.look()
    assert tried == ["4", "0-2,5-7"]
    stand.hold("5")
    assert [one["irq"] for one in (await stand.look())["irqs"]] == []


async def test_what_cannot_be_given_back_stays_remembered(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.irq(27, "3")
    stand.hold("3")
    await stand.look()
    stand.hold("4")
    with monkeypatch.context() as patch:
        patch.setattr(intruders, "put", _refusing)
        shown = await stand.look()
    assert [(one["irq"], one["moved"]) for one in shown["irqs"]] == [(27, True)]
    assert "Invalid argument" in shown["irqs"][0]["why"]
    stand.hold("")
    stand.begin()
    await stand.look()
    assert stand.asked(27) == "3"


def _refusing(path: str, value: str) -> None:
    raise HostError(f"cannot write {path}: Invalid argument, value {value!r}")


async def test_an_interrupt_without_anywhere_to_go_says_so(stand: Stand) -> None:
    """Also where only CPUs that are offline are left of its own."""
    (stand.root / "sys/devices/system/cpu/online").write_text("0-3\n")
    stand.irq(27, "3")
    stand.irq(28, "3-7")
    stand.hold("0-3")
    stand.others = EMPTY
    shown = await stand.look()
    assert [(one["irq"], one["moved"], one["why"]) for one in shown["irqs"]] == [
        (27, False, NOWHERE),
        (28, False, NOWHERE),
    ]


async def test_an_interrupt_that_moves_only_when_it_next_occurs_says_so(stand: Stand) -> None:
    """It was asked; it is neither asked again nor taken for one that came back."""
    stand.irq(27, "0-7", effective_affinity_list="3")
    stand.irq(28, "0-2", effective_affinity_list="3")
    stand.hold("3")
    counted = moved_so_far()
    for _ in range(4):
        shown = await stand.look()
        assert [(one["irq"], one["moved"], one["why"]) for one in shown["irqs"]] == [
            (27, True, NOT_YET),
            (28, False, NOT_YET),
        ]
    assert (moved_so_far() - counted, shown["warnings"], gauge("irq")) == (1, [], 2)


# ---------------------------------------------------------------- what is remembered


def test_where_it_was_is_on_disk_before_an_interrupt_is_moved(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an agent killed in between neither loses it nor gives back what it never moved."""

    def killed(path: str, value: str) -> None:
        assert json.loads(stand.memory.read_text())["moved"][0]["before"] == "0-7"
        raise KeyboardInterrupt

    stand.irq(27, "0-7")
    sysfs, own = SysFs(stand.root), CpuSet([3])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(intruders, "put", killed)
        Mover(sysfs, stand.memory).move(own, ALL - own, irqs(sysfs, own, []))
    stand.ask(27, "5")
    assert Mover(sysfs, stand.memory).move(EMPTY, ALL, ()).moved == ()
    assert stand.asked(27) == "5"


@pytest.mark.parametrize("held", ["3", "3-4", ""])
@pytest.mark.parametrize("step", range(5))
def test_an_agent_killed_between_any_two_steps_ends_as_if_it_had_not_been(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, held: str, step: int
) -> None:
    """Killed on the way from CPU 3 to other exclusive CPUs: the next one finishes it, and gives everything back."""
    for number in (27, 28):
        stand.irq(number, "2-4")
    mover = Mover(SysFs(stand.root), stand.memory)
    turn(stand, mover, "3")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        left = iter(range(step))
        patch.setattr(intruders, "put", until_killed(left, intruders.put))
        patch.setattr(interrupts, "save", until_killed(left, interrupts.save))
        turn(stand, mover, held)
    again = Mover(SysFs(stand.root), stand.memory)
    turn(stand, again, held)
    assert [CpuSet.parse(stand.asked(number)) for number in (27, 28)] == [CpuSet([2, 3, 4]) - CpuSet.parse(held)] * 2
    turn(stand, again, "")
    assert [stand.asked(number) for number in (27, 28)] == ["2-4"] * 2
    assert not stand.memory.exists()


def turn(stand: Stand, mover: Mover, held: str) -> None:
    own = CpuSet.parse(held)
    mover.move(own, ALL - own, irqs(SysFs(stand.root), own, []))


def until_killed(left: Iterator[int], step: Callable[..., None]) -> Callable[..., None]:
    """The step, for as long as there are any left."""

    def counted(*args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(*args)

    return counted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "truncated"),
        (
            '{"version":1,"boot_id":"boot-1","moved":[{"irq":1,"name":"","before":"x","wanted":"0","seen":"0"}]}',
            "cannot read CPU list 'x'",
        ),
    ],
)
async def test_a_damaged_memory_is_said_and_replaced(stand: Stand, text: str, why: str) -> None:
    stand.memory.parent.mkdir()
    stand.memory.write_text(text)
    stand.irq(27, "3")
    stand.hold("3")
    (warning,) = (await stand.look())["warnings"]
    assert warning.startswith(f"cannot load {stand.memory}: ") and why in warning
    assert [one["irq"] for one in json.loads(stand.memory.read_text())["moved"]] == [27]


async def test_what_cannot_be_remembered_is_not_moved(stand: Stand) -> None:
    """The folder may be deleted; a file in its place is in the way."""
    stand.memory.parent.write_text("in the way")
    stand.irq(27, "3")
    thread(stand.root, 10, "0-7")
    stand.hold("3")
    shown = await stand.look()
    assert stand.asked(27) == "3"
    assert f"{stand.memory}: " in shown["warnings"][0]
    assert (shown["threads_total"], [one["irq"] for one in shown["irqs"]]) == (1, [27])
    stand.memory.parent.unlink()
    await stand.look()
    assert stand.asked(27) == "0-2,4-7"


def test_the_metrics_are_rendered() -> None:
    text = generate_latest(metrics.REGISTRY).decode()
    assert "# TYPE nodeagent_intruders gauge" in text
    assert "# TYPE nodeagent_interrupts_moved_total counter" in text
