"""Virtual functions from the configuration, on a double of the kernel: made, never taken from a holder, and never those
of others."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import HostError
from nodeagent.host.sriov import VirtualFunctions
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.network.vfs import VfsManager
from nodeagent.resources.catalog import dra_of
from tests.doubles.sriov_kernel import SriovKernel
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import NODE, result
from tests.support.long_form import LONG

PF, OTHER = "0000:3b:00.0", "0000:5e:00.0"
RESOURCE = {"name": "vf", "kind": "nic", "serve": "both", "match": {"sriov": "vf"}}


class KilledError(Exception):
    """The agent is gone."""


class Node:
    """Two ports of an adapter, and what makes their virtual functions."""

    def __init__(self, room: Room, kernel: SriovKernel) -> None:
        self.room = room
        self.kernel = kernel
        self.now = 0.0
        self.boot = "boot"
        self.put: Any = _Direct(kernel.put)
        self.configure([])
        self.open()

    def configure(self, rules: list[dict[str, Any]]) -> None:
        self.rules = rules
        self.config = msgspec.convert({"resources": [RESOURCE], "network": {"vfs": rules}}, Config)

    def open(self) -> None:
        """As after kill -9."""
        room = self.room
        functions = VirtualFunctions(SysFs(room.tree.root), self.put)

        async def rescan() -> None:
            room.rescan()

        self.vfs = VfsManager(
            room.agent,
            SysFs(room.tree.root),
            room.folder / "state",
            lambda: self.config,
            rescan,
            functions=functions,
            clock=lambda: self.now,
        )

    def counts(self) -> tuple[int, int]:
        return self.kernel.count(PF), self.kernel.count(OTHER)

    async def settle(self, *rules: dict[str, Any]) -> list[str]:
        """Settle, with these rules from now on; return the notes."""
        if rules:
            self.configure(list(rules))
        self.room.rescan()
        await self.vfs.settle()
        return self.vfs.notes()

    async def claim(self, address: str) -> ClaimRef:
        ref = self.room.claim(f"c-{address[-4:]}", result("nic", address.replace(":", "-").replace(".", "-")))
        (answer,) = await self.room.prepare(ref)
        assert answer.error == ""
        return ref

    async def restart(self, boot_id: str = "") -> None:
        self.boot = boot_id or self.boot
        await self.vfs.close()
        await self.room.restart(self.boot)
        self.open()


class _Direct(TimedPut):
    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {text} to {path}: {error.strerror}") from None


@contextlib.asynccontextmanager
async def node(folder: Path, **limits: int) -> AsyncIterator[Node]:
    async with claim_room(folder, RESOURCE) as room:
        room.dra = dra_of(room.config, _families(), NODE)
        kernel = SriovKernel(room.tree, limits={PF: limits.get("makes", 64)})
        kernel.port(PF, name="ens1f0")
        kernel.port(OTHER, name="ens2f0")
        room.rescan()
        made = Node(room, kernel)
        try:
            yield made
        finally:
            await made.vfs.close()


def _families() -> Any:
    from nodeagent.host.devices.all_kinds import builtin_kinds

    return builtin_kinds()


def _wait(event: threading.Event) -> None:
    assert event.wait(20)


def of(count: int, name: str = "ens1f0", **more: Any) -> dict[str, Any]:
    return {"match": {"netdevs": name}, "count": count, **more}


async def test_a_port_gets_what_is_asked_for_and_others_nothing(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        assert await one.settle(of(4)) == []
        assert one.counts() == (4, 0)
        assert [device.id for device in one.room.agent.inventory.devices if device.parent == PF] == one.kernel.vfs(PF)
        written = len(one.kernel.written)
        assert await one.settle() == []
        assert len(one.kernel.written) == written


async def test_a_port_is_chosen_by_any_pattern_and_the_first_rule_counts(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle({"match": {"id": OTHER}, "count": 2}, {"match": {"vendor": "8086"}, "count": 3})
        assert one.counts() == (3, 2)


async def test_a_port_that_is_plugged_in_later_gets_its_functions_too(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle({"match": {"vendor": "8086"}, "count": 2})
        one.kernel.port("0000:af:00.0")
        await one.settle()
        assert one.kernel.count("0000:af:00.0") == 2


async def test_drivers_are_probed_as_asked(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(1, driversAutoprobe=False), of(1, "ens2f0"))
        drivers = {
            vf: one.room.agent.inventory.device_by_id[vf].driver for vf in (*one.kernel.vfs(PF), *one.kernel.vfs(OTHER))
        }
        assert list(drivers.values()) == [None, "iavf"]
        assert (OTHER, "sriov_drivers_autoprobe", "1") not in one.kernel.written


async def test_the_number_changes_through_0_while_nothing_is_held(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        for count in (4, 6, 2, 0):
            assert await one.settle(of(count)) == []
            assert one.counts() == (count, 0)
        assert not (tmp_path / "state" / "vfs.json").exists()


async def test_no_holder_loses_its_function(tmp_path: Path) -> None:
    """Not for more of them either: the kernel removes all first. Once it is released, the number changes."""
    async with node(tmp_path) as one:
        await one.settle(of(4))
        held = one.kernel.vfs(PF)[2]
        ref = await one.claim(held)
        for count in (2, 8, 0):
            assert await one.settle(of(count)) == [f"network.vfs: {PF}: {count} wanted, 4 there: {held}: held"]
            assert one.counts() == (4, 0)
        await one.room.unprepare(ref)
        assert await one.settle() == []
        assert one.counts() == (0, 0)


async def test_functions_that_another_program_made_are_never_removed(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        one.kernel.put(str(one.room.tree.root / f"sys/bus/pci/devices/{PF}/sriov_numvfs"), "3")
        (note,) = await one.settle(of(4))
        assert note.endswith(
            "4 wanted, 3 there: the 3 that are there were not made by the agent: remove them, or ask for 3"
        )
        assert await one.settle(of(3)) == []
        assert one.counts() == (3, 0)


async def test_what_another_program_makes_at_the_same_moment_stays(tmp_path: Path) -> None:
    """After the scan, before the write."""
    async with node(tmp_path) as one:
        one.configure([of(4)])
        one.kernel._make(PF, 1)
        await one.vfs.settle()
        assert one.counts() == (1, 0)
        assert "another program made 1 meanwhile" in one.vfs.notes()[0]


async def test_a_port_without_its_rule_keeps_what_it_has(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(4))
        one.configure([])
        assert await one.settle() == []
        assert one.counts() == (4, 0)


@pytest.mark.parametrize(("error", "words"), [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output error")])
async def test_a_driver_that_refuses_is_a_note_and_is_asked_again_later(tmp_path: Path, error: int, words: str) -> None:
    """And the other port is not kept waiting."""
    async with node(tmp_path) as one:
        one.kernel.refusals[PF] = error
        (note,) = await one.settle(of(4), of(2, "ens2f0"))
        assert note.startswith(f"network.vfs: {PF}: cannot write 4 to") and words in note
        assert one.counts() == (0, 2)
        written = len(one.kernel.written)
        assert await one.settle() == [note]
        assert len(one.kernel.written) == written
        one.kernel.refusals.clear()
        one.now += 61
        assert await one.settle() == []
        assert one.counts() == (4, 2)


async def test_what_another_program_makes_after_a_refusal_is_not_the_agents(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        it.kernel.refusals[PF] = errno.ENOSPC
        assert (await it.settle(of(4)))[0].startswith("network.vfs: 0000:3b:00.0: cannot write 4")
        it.kernel.refusals.clear()
        it.kernel.put(str(it.room.tree.root / f"sys/bus/pci/devices/{PF}/sriov_numvfs"), "4")
        (note,) = await it.settle(of(8))
        assert "the 4 that are there were not made by the agent" in note
        assert it.counts() == (4, 0)


async def test_another_number_is_tried_at_once(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        one.kernel.refusals[PF] = errno.EIO
        await one.settle(of(4))
        one.kernel.refusals.clear()
        assert await one.settle(of(3)) == []
        assert one.counts() == (3, 0)


async def test_a_driver_that_makes_fewer_leaves_none(tmp_path: Path) -> None:
    async with node(tmp_path, makes=2) as one:
        (note,) = await one.settle(of(4))
        assert note.endswith(f"cannot give {PF} 4 virtual functions: its driver made 2")
        assert one.counts() == (0, 0)


async def test_more_than_the_adapter_can_have_is_not_tried(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        assert await one.settle(of(9)) == [f"network.vfs: {PF}: 9 wanted, 0 there: it can have at most 8"]
        assert one.kernel.written == []


async def test_a_write_that_hangs_has_a_deadline_and_is_not_repeated_before_it_ends(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        release = threading.Event()
        one.kernel.before = lambda address, text: _wait(release)
        one.put = TimedPut(one.kernel.put, deadline_s=0.05)
        await one.vfs.close()
        one.open()
        (note,) = await one.settle(of(4))
        assert "it did not end within 0.05 s" in note
        one.now += 61
        (note,) = await one.settle()
        assert "an earlier write has not ended" in note
        release.set()
        for thread in threading.enumerate():
            if thread.name == "vfio":
                thread.join(10)
        one.now += 61
        assert await one.settle() == []
        assert one.counts() == (4, 0)


async def test_a_grant_in_the_last_moment_keeps_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the ledger and the write; and none is granted from then on."""
    async with node(tmp_path) as one:
        await one.settle(of(2))
        vf, refresh = one.kernel.vfs(PF)[0], one.room.agent.refresh

        async def grant_first() -> None:
            monkeypatch.setattr(one.room.agent, "refresh", refresh)
            await one.claim(vf)

        monkeypatch.setattr(one.room.agent, "refresh", grant_first)
        await one.settle(of(4))
        assert one.counts() == (2, 0)


async def test_nothing_is_granted_while_the_number_changes(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(2))
        vf, seen = one.kernel.vfs(PF)[0], list[bool]()
        agent = one.room.agent
        one.kernel.before = lambda address, text: seen.append(vf in agent.ledger.devices_taken)
        await one.settle(of(3))
        assert seen and all(seen)
        assert vf not in agent.ledger.devices_taken


async def test_after_a_reboot_they_are_made_again(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(4))
        one.kernel.reboot()
        await one.restart("another boot")
        assert await one.settle() == []
        assert one.counts() == (4, 0)


async def test_an_unreadable_record_removes_nothing(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(4))
        (tmp_path / "state" / "vfs.json").write_text("{")
        (note,) = await one.settle(of(2))
        assert "were not made by the agent" in note and one.counts() == (4, 0)


def _steps(kernel: SriovKernel, at: int) -> Iterator[None]:
    """Kill before the write number `at`, or after it if `at` is odd."""
    count = 0

    def step(address: str, text: str) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise KilledError

    kernel.before = kernel.after = step
    yield
    kernel.before = kernel.after = lambda address, text: None


@pytest.mark.parametrize("seed", range(2000 if LONG else 20))
async def test_an_agent_that_is_killed_at_any_step_is_followed_by_one_that_completes_it(
    tmp_path: Path, seed: int
) -> None:
    """Random numbers, holders, kills and reboots: no holder loses its function, and in the end all is as configured."""
    chance = random.Random(seed)
    async with node(tmp_path) as one:
        held: dict[str, ClaimRef] = {}
        for _ in range(6):
            count = chance.randint(0, 5)
            kill = _steps(one.kernel, chance.randint(0, 5))
            next(kill)
            with contextlib.suppress(KilledError):
                await one.settle(of(count))
            next(kill, None)
            assert held.keys() <= {*one.kernel.vfs(PF)}
            await one.restart()
            if not held and chance.random() < 0.3:
                one.kernel.reboot()
                await one.restart(f"boot {chance.random()}")
            one.room.rescan()
            if free := sorted({*one.kernel.vfs(PF)} - held.keys()):
                vf = chance.choice(free)
                held[vf] = await one.claim(vf)
            if held and chance.random() < 0.6:
                vf = chance.choice(sorted(held))
                await one.room.unprepare(held.pop(vf))
        for ref in held.values():
            await one.room.unprepare(ref)
        one.now += 61
        assert await one.settle(of(3)) == []
        assert one.counts() == (3, 0)
