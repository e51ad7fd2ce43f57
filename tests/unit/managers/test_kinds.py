"""Hooks of kinds: called for claims, recorded before, undone afterwards, whatever a hook does and whenever the agent is
killed. With a real ledger and real files."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.device import ContainerEdits, Device, DeviceNode
from nodeagent.core.model.inventory import PRESENT, KindState
from nodeagent.core.opaque.decode import API_VERSION
from nodeagent.errors import ConfigError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.base import Context, Found
from nodeagent.host.devices.hooks import fault
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.kinds import calls
from nodeagent.managers.kinds.journal import KindsJournal
from nodeagent.managers.kinds.manager import KindsManager
from nodeagent.managers.kinds.table import PreparedTable
from nodeagent.resources.catalog import dra_of
from nodeagent.resources.offer import offers
from tests.support import npu
from tests.support.claim_node import Room, claim_room, config_of
from tests.support.dra_node import DRIVER, NODE, result
from tests.support.long_form import share_of
from tests.support.unreadable import unreadable
from tests.support.until import until

TOYS = {"name": "toy", "kind": "toy", "serve": "dra"}
DEVICES = ("toy-a", "toy-b", "toy-c")
LIVES = share_of(120, 0.25)
MOST_STEPS = 16
"""More than one call has: before and after each hook and each write of the journal."""


class ToyConfig(msgspec.Struct, frozen=True):
    color: str = "red"


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


@dataclass
class Toy:
    """A kind whose devices are painted. `painted` is the machine's, and outlives an agent."""

    painted: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = DEVICES
    calls: list[tuple[str, str]] = field(default_factory=list)
    does: Callable[[str, str], object] = lambda hook, device: None
    """What a hook does after its work, by its name and the device; what it returns is returned."""
    name = "toy"
    config = ToyConfig

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        devices = tuple(Device(kind="toy", id=one) for one in self.devices)
        return Found(state=KindState(kind="toy", state=PRESENT), devices=devices)

    def edits(self, device: Device, devices: Any) -> ContainerEdits:
        return ContainerEdits(env={"TOY": device.id})

    def prepare(self, device: Device, config: ToyConfig) -> Any:
        self.calls.append(("prepare", device.id))
        self.painted[device.id] = config.color
        said = self.does("prepare", device.id)
        if said is not None:
            return said
        node = DeviceNode(host_path=f"/dev/{device.id}", container_path="/dev/toy")
        return ContainerEdits(env={"TOY_COLOR": config.color}, device_nodes=(node,))

    def unprepare(self, device: Device, config: ToyConfig | None) -> None:
        self.calls.append(("unprepare", device.id))
        self.does("unprepare", device.id)
        self.painted.pop(device.id, None)


@dataclass
class Node:
    """A node with toys, and the agent's part that prepares claims."""

    room: Room
    toy: Any
    kinds: KindsManager
    boot: str = "boot"

    def claim(self, name: str, *devices: str, **said: Any) -> ClaimRef:
        every = [result("toy", one, f"r{n}") for n, one in enumerate(devices)]
        ref = self.room.claim(name, *every)
        if said:
            parameters = {"apiVersion": API_VERSION, "kind": "ToyConfig", **said}
            config = {"source": "FromClaim", "opaque": {"driver": DRIVER, "parameters": parameters}}
            self.room.objects["default", name]["status"]["allocation"]["devices"]["config"] = [config]
        return ref

    async def prepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.prepare(ref)
        return answer.error

    @property
    def journal(self) -> KindsJournal:
        return KindsJournal(self.room.folder / "state", self.boot)

    def open(self, *families: Any) -> None:
        """Start what prepares claims, as after kill -9. families: the kinds that are installed, or the toys."""
        room, kinds = self.room, (*(families or (self.toy,)), *all_kinds.builtin_kinds())
        room.dra = dra_of(room.config, kinds, NODE) if any(one.name == "toy" for one in kinds) else room.dra

        async def rescan() -> None:
            room.agent.see(scan(SysFs(str(room.tree.root)), kinds))

        self.kinds = KindsManager(room.agent, self.journal, kinds, room.folder / "state", rescan)
        rendering = room.rendering
        rendering = ClaimRenderer(
            room.agent,
            lambda: room.dra,
            rendering._cdi,
            rendering._readable,
            room.folder / "run" / "mps",
            PreparedTable(self.journal).view,
        )
        room.rendering = rendering
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, rendering, room.tell, passthrough=self.kinds
        )
        room.agent.see(scan(SysFs(str(room.tree.root)), kinds))


@contextlib.asynccontextmanager
async def node(folder: Path, toy: Any = None) -> AsyncIterator[Node]:
    async with claim_room(folder) as room:
        room.config = config_of(TOYS)
        made = Node(room, toy or Toy(), None)  # type: ignore[arg-type]
        made.open()
        try:
            yield made
        finally:
            await made.kinds.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the last process of a pod to end, or long for a hook."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)
    monkeypatch.setattr(calls.HookCalls.__init__, "__defaults__", (0.1,))


# ---------------------------------------------------------------- what hooks are called for


async def test_a_record_that_cannot_be_read_for_the_moment_keeps_the_claim(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.room.prepare(ref)
        with unreadable("kinds.json"):
            (error,) = await one.room.unprepare(ref)
        assert "cannot unprepare claim" in error and "Input/output error" in error
        assert one.toy.calls == [("prepare", "toy-a")] and one.room.agent.ledger.grants
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.calls[-1] == ("unprepare", "toy-a") and one.room.agent.ledger.grants == {}


async def test_what_may_be_prepared_for_another_claim_is_handed_to_nobody_while_the_record_cannot_be_read(
    folder: Path,
) -> None:
    """Also where no kind prepares the device any longer."""
    async with node(folder) as one:
        ref = one.claim("c", "toy-a", color="blue")
        assert await one.prepare(ref) == ""
        await one.room.agent.unprepare([ref.uid], "an admin", "op")
        with unreadable("kinds.json"):
            assert "Input/output error" in await one.prepare(other := one.claim("d", "toy-a"))
        assert await one.prepare(other) == ""
        assert one.toy.painted == {"toy-a": "red"}


async def test_a_claims_device_is_prepared_with_its_configuration_and_unprepared(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a", color="blue")
        assert await one.prepare(ref) == ""
        assert one.toy.painted == {"toy-a": "blue"}
        env = one.room.env(ref)
        assert (env["TOY"], env["TOY_COLOR"]) == ("toy-a", "blue")
        assert '"path": "/dev/toy"' in one.room.spec_file(ref).read_text().replace('":"', '": "')
        assert await one.room.unprepare(ref) == [""]
        assert (one.toy.painted, one.journal.path.exists()) == ({}, False)
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.calls == [("prepare", "toy-a"), ("unprepare", "toy-a")]


async def test_without_configuration_a_hook_gets_its_defaults(folder: Path) -> None:
    async with node(folder) as one:
        assert await one.prepare(one.claim("c", "toy-a")) == ""
        assert one.toy.painted == {"toy-a": "red"}


async def test_a_second_prepare_on_the_same_boot_calls_nothing_and_after_a_reboot_it_does(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        for _ in range(2):
            assert await one.prepare(ref) == ""
        assert one.toy.calls == [("prepare", "toy-a")]
        one.toy.painted.clear()
        one.boot = "another"
        one.open()
        await one.room.rendering.restore()
        assert await one.prepare(ref) == ""
        assert one.toy.painted == {"toy-a": "red"}


async def test_a_device_of_a_living_pod_stays_prepared(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        one.room.alive.add("pod-uid")
        (said,) = await one.room.unprepare(ref)
        assert "in use" in said
        assert one.toy.painted == {"toy-a": "red"}
        one.room.alive.clear()
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.painted == {}


async def test_a_configuration_of_another_shape_is_refused_by_its_key_and_nothing_is_called(folder: Path) -> None:
    async with node(folder) as one:
        assert "ToyConfig has no key $.colour; did you mean color?" in await one.prepare(
            one.claim("c", "toy-a", colour="blue")
        )
        assert "Expected `str`, got `int` - at `$.color`" in await one.prepare(one.claim("d", "toy-b", color=3))
        assert one.toy.calls == []
        assert not one.room.agent.ledger.grants


# ---------------------------------------------------------------- hooks that do not do what they should


def _raises(hook: str, device: str) -> object:
    raise RuntimeError("no paint left")


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (_raises, "cannot prepare toy-a: the kind toy raised RuntimeError: no paint left"),
        (lambda hook, device: "done", "the kind toy returned str, expected ContainerEdits or None"),
        (lambda hook, device: ContainerEdits(env={"A": 3}), "returned ContainerEdits that are none: Expected `str`"),  # type: ignore[dict-item]
        (lambda hook, device: ContainerEdits(env={"A": object()}), "returned ContainerEdits that are none"),  # type: ignore[dict-item]
        (lambda hook, device: sys.exit(3), "the kind toy raised SystemExit: 3"),
    ],
)
async def test_what_a_hook_does_wrong_is_its_claims_error_and_nothing_is_half_prepared(
    folder: Path, does: Callable[[str, str], object], why: str
) -> None:
    """The device that was prepared before it in the same claim is unprepared; another claim is served."""
    async with node(folder) as one:
        one.toy.does = lambda hook, device: does(hook, device) if (hook, device) == ("prepare", "toy-a") else None
        ref = one.claim("c", "toy-b", "toy-a")
        assert why in await one.prepare(ref)
        assert (one.toy.painted, one.journal.path.exists()) == ({}, False)
        assert await one.prepare(one.claim("d", "toy-c")) == ""
        one.toy.does = lambda hook, device: None
        assert await one.prepare(ref) == ""
        assert one.toy.painted.keys() == {"toy-a", "toy-b", "toy-c"}


async def test_a_hook_that_hangs_delays_its_own_claim_alone(folder: Path) -> None:
    """Until it has returned, nothing is called for its device: neither hook may run twice at once."""
    goes_on = threading.Event()
    async with node(folder) as one:
        one.toy.does = lambda hook, device: goes_on.wait(60) and None if device == "toy-a" else None
        ref = one.claim("c", "toy-a")
        late = "cannot prepare toy-a: the kind toy has not returned for 0.1 s"
        assert late in await one.prepare(ref)
        assert late in await one.prepare(ref)
        assert "cannot unprepare toy-a: the kind toy has not returned" in (await one.room.unprepare(ref))[0]
        assert await one.prepare(one.claim("d", "toy-b")) == ""
        assert one.toy.calls == [("prepare", "toy-a"), ("prepare", "toy-b")]
        goes_on.set()

        async def prepared() -> bool:
            return await one.prepare(ref) == ""

        await until(prepared)
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.painted == {"toy-b": "red"}


async def test_while_unprepare_fails_the_device_stays_with_its_claim(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        one.toy.does = _raises
        (said,) = await one.room.unprepare(ref)
        assert said == (
            f"cannot unprepare claim {ref.uid}: cannot unprepare toy-a: the kind toy raised RuntimeError: no paint left"
        )
        assert "toy-a" in await one.prepare(one.claim("d", "toy-a"))
        one.toy.does = lambda hook, device: None
        assert await one.room.unprepare(ref) == [""]
        assert await one.prepare(one.claim("d", "toy-a")) == ""


async def test_a_kind_that_is_gone_keeps_no_claim_and_is_asked_when_it_is_back(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a", color="blue")
        assert await one.prepare(ref) == ""
        await one.kinds.close()
        one.open(Other())
        assert await one.room.unprepare(ref) == [""]
        await one.kinds.recover()
        (note,) = one.kinds.notes()
        assert note == (
            "kinds: cannot unprepare toy-a: the kind toy that prepared it is not installed, or cannot be used"
        )
        await one.kinds.close()
        one.open()
        await one.kinds.recover()
        assert (one.toy.painted, one.kinds.notes(), one.journal.path.exists()) == ({}, [], False)


class Other:
    """Another kind that prepares."""

    name = "other"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        return Found(state=KindState(kind="other", state=PRESENT))

    def edits(self, device: Device, devices: Any) -> ContainerEdits:
        return ContainerEdits()

    def prepare(self, device: Device, config: Any) -> None: ...
    def unprepare(self, device: Device, config: Any) -> None: ...


async def test_a_device_that_is_no_longer_found_is_unprepared_as_it_was(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        one.toy.devices = ("toy-b",)
        one.open()
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.painted == {}


async def test_a_configuration_that_a_newer_kind_does_not_read_does_not_keep_a_claim(folder: Path) -> None:
    class Other(msgspec.Struct):
        color: int

    async with node(folder) as one:
        ref = one.claim("c", "toy-a", color="blue")
        assert await one.prepare(ref) == ""
        one.toy.config = Other
        await one.kinds.close()
        one.open()
        assert await one.room.unprepare(ref) == [""]
        assert one.toy.painted == {}


async def test_an_unreadable_record_leaves_devices_as_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        one.journal.path.write_text("{")
        await one.kinds.recover()
        assert one.toy.painted == {"toy-a": "red"}
        assert await one.prepare(ref) == ""


# ---------------------------------------------------------------- killed at any step


async def test_what_no_grant_holds_is_unprepared(folder: Path) -> None:
    """Its claim was released by an admin, or the ledger is another."""
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        await one.room.agent.unprepare([ref.uid], "an admin released it", "op")
        await one.kinds.recover()
        assert (one.toy.painted, one.journal.path.exists()) == ({}, False)


async def test_a_device_that_its_claim_no_longer_has_is_unprepared(folder: Path) -> None:
    """The claim was allocated another one under the same name."""
    async with node(folder) as one:
        ref = one.claim("c", "toy-a")
        assert await one.prepare(ref) == ""
        one.room.claim("c", result("toy", "toy-b", "r0"), uid=ref.uid)
        assert await one.prepare(ref) == ""
        await one.kinds.recover()
        assert one.toy.painted == {"toy-b": "red"}


class Doom:
    """Kills at a step: from then on nothing of the agent has an effect."""

    def __init__(self) -> None:
        self.left, self.dead = 0, False

    def step(self) -> None:
        self.left -= 1
        if self.dead or self.left == 0:
            self.dead = True
            raise Killed

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            self.step()
            said = work(*args)
            self.step()
            return said

        return stepped


async def test_killed_before_or_after_any_step_what_is_held_is_prepared_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims come and go; agents die at random steps, begin again, and complete or undo what the ledger says."""
    drawn, doom, deaths = random.Random(7), Doom(), 0
    change, caught = KindsJournal.change, calls._caught
    monkeypatch.setattr(KindsJournal, "change", doom.around(change))
    monkeypatch.setattr(calls, "_caught", lambda work: caught(doom.around(work)))
    async with node(folder) as one:
        refs = [one.claim(f"c{n}", *devices) for n, devices in enumerate((("toy-a", "toy-b"), ("toy-b",), ("toy-c",)))]
        for _ in range(LIVES):
            doom.left, doom.dead = drawn.randint(1, MOST_STEPS), False
            with contextlib.suppress(Killed):
                for ref in drawn.sample(refs, len(refs)):
                    await (one.prepare(ref) if drawn.random() < 0.6 else one.room.unprepare(ref))
            if doom.dead:
                deaths += 1
                await one.kinds.close()
                await one.room.restart(one.boot)
                one.open()
            doom.left, doom.dead = 0, False
            await one.kinds.recover()
            held = {grant.holder.uid: grant for grant in one.room.agent.ledger.grants.values()}
            for ref in refs:
                if ref.uid in held:
                    assert await one.prepare(ref) == ""
            held_now = {device for grant in one.room.agent.ledger.grants.values() for device in grant.devices}
            assert one.toy.painted.keys() == held_now
        for ref in refs:
            assert await one.room.unprepare(ref) == [""]
        assert (one.toy.painted, one.journal.path.exists()) == ({}, False)
    assert deaths >= LIVES // 4


# ---------------------------------------------------------------- what is no hook


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"prepare": lambda self, device, config: None}, "it has prepare and lacks unprepare"),
        ({"unprepare": lambda self, device, config: None}, "it has unprepare and lacks prepare"),
        ({"health": "good"}, "its health is str, expected a method"),
        ({"config": dict}, "its config is <class 'dict'>, expected a subclass of msgspec.Struct"),
        (
            {"config": type("CpuConfig", (msgspec.Struct,), {})},
            "its configuration CpuConfig has the name of a built-in",
        ),
        ({}, ""),
    ],
)
def test_a_hook_that_cannot_be_used_says_why(members: dict[str, Any], why: str) -> None:
    kind = type("Half", (), {"name": "half", **members})
    assert fault(kind()).startswith(why)
    assert bool(fault(kind())) == bool(why)


@pytest.mark.parametrize(
    ("said", "key", "why"),
    [
        ({"serve": "both"}, "$.resources[0].serve", "the kind toy prepares its devices for claims, expected dra"),
        ({"serve": "device-plugin"}, "$.resources[0].serve", "the kind toy prepares its devices for claims"),
        ({"serve": "dra", "replicas": 2}, "$.resources[0].replicas", "the kind toy prepares a device for one claim"),
    ],
)
def test_devices_that_are_prepared_are_served_whole_and_to_claims_alone(
    said: dict[str, Any], key: str, why: str
) -> None:
    with pytest.raises(ConfigError) as error:
        offers(config_of({**TOYS, **said}), [Toy()])
    assert (error.value.key, why in str(error.value)) == (key, True)


def test_a_second_kind_with_a_configuration_of_the_same_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from tests.unit.managers.test_kinds import Toy\nclass Two(Toy):\n    name = 'two'\n"
    npu.install(tmp_path / "site", "toys_package", source, one="Toy", two="Two")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    found = {one.name: one.discover(SysFs(tmp_path), Context()).state for one in all_kinds.load_kinds()[:2]}
    assert found["toy"].state == PRESENT
    assert found["two"].reason == ("cannot use toys_package:Two: another kind has a configuration called ToyConfig")
