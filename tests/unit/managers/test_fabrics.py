"""NVMe targets on the network, connected for claims: recorded before, undone afterwards, whatever the target does and
whenever the agent is killed. With a real ledger and real files, on a double of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.health import UNHEALTHY
from nodeagent.daemon.fabrics import connected_nqns
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.devices.base import BLOCK_TYPES
from nodeagent.host.fabrics.connections import Connection
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.fabrics import connector
from nodeagent.managers.fabrics.journal import Connected, FabricsJournal
from nodeagent.managers.fabrics.manager import FabricsManager
from nodeagent.managers.fabrics.table import ConnectedTable
from tests.doubles.fabrics_kernel import HOSTNQN, FabricsKernel, Target
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import DRIVER
from tests.support.long_form import share_of
from tests.support.unreadable import unreadable
from tests.support.until import until

NAMES = ("fast", "slow", "big")
NQNS = {name: f"nqn.2024-01.com.example:{name}" for name in NAMES}
QUICK = {"connect_s": 0.3, "disks_s": 0.5, "settle_s": 0.0}
LIVES = share_of(400, 0.2)
MOST_STEPS = 12
"""More than one call has: before and after each change in the kernel and each write of the journal."""


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


@dataclass
class Doom:
    """Kills at a step; 0: never."""

    left: int = 0
    dead: bool = False

    def step(self, *_: object) -> None:
        if self.dead:
            raise Killed
        if self.left:
            self.left -= 1
            if not self.left:
                self.dead = True
                raise Killed

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **more: Any) -> Any:
            self.step()
            done = work(*args, **more)
            self.step()
            return done

        return stepped


@dataclass
class Node:
    """A node, its kernel and the targets that it reaches, and the agent's part that prepares claims."""

    room: Room
    kernel: FabricsKernel
    targets: dict[str, Target]
    boot: str = "boot"
    fabrics: FabricsManager = field(init=False)

    def claim(self, name: str, *targets: str) -> ClaimRef:
        every = [
            {"request": f"r{n}", "driver": DRIVER, "pool": f"nvmeof-{one}", "device": f"nvmeof-{one}"}
            for n, one in enumerate(targets)
        ]
        return self.room.claim(name, *every)

    async def prepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.prepare(ref)
        return answer.error

    async def unprepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.unprepare(ref)
        return answer

    def nodes(self, ref: ClaimRef, device: int = 0) -> list[str]:
        """The device nodes that a container of a claim gets."""
        edits = json.loads(self.room.spec_file(ref).read_text())["devices"][device]["containerEdits"]
        return [one["path"] for one in edits.get("deviceNodes", ())]

    @property
    def journal(self) -> FabricsJournal:
        return FabricsJournal(self.room.folder / "state", self.boot)

    def is_untouched(self) -> bool:
        return not self.kernel.controllers and not self.journal.path.exists()

    def open(self) -> None:
        """Start what prepares claims, as after kill -9."""
        room = self.room
        sysfs, state = SysFs(str(room.tree.root)), room.folder / "state"
        self.fabrics = FabricsManager(room.agent, sysfs, state, lambda: room.config, self.hide, self.kernel, **QUICK)
        old = room.rendering
        view = ConnectedTable(self.journal).view
        room.rendering = ClaimRenderer(
            room.agent, lambda: room.dra, old._cdi, old._readable, room.folder / "run" / "mps", view
        )
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, passthrough=self.fabrics
        )
        room.rescan()

    async def hide(self) -> None:
        await self.room.rendering.restore(afresh=False)

    async def restart(self, boot: str = "") -> None:
        await self.fabrics.close()
        self.boot = boot or self.boot
        await self.room.restart(self.boot)
        self.open()


def resource(**more: Mapping[str, Any]) -> dict[str, Any]:
    """What serves the targets. more: other keys, by name of the target."""
    targets = [{"name": one, "nqn": NQNS[one], "traddr": "192.0.2.1", **more.get(one, {})} for one in NAMES]
    return {"name": "san", "kind": "nvmeof", "serve": "dra", "targets": targets}


@contextlib.asynccontextmanager
async def node(folder: Path, multipath: bool = False, **more: Mapping[str, Any]) -> AsyncIterator[Node]:
    async with claim_room(folder, resource(**more)) as room:
        targets = {name: Target(NQNS[name], disks=2 if name == "big" else 1) for name in NAMES}
        made = Node(room, FabricsKernel(room.tree, list(targets.values()), multipath=multipath), targets)
        made.open()
        try:
            yield made
        finally:
            await made.fabrics.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the last process of a pod to end."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)
    monkeypatch.setattr(connector, "POLL_S", 0.002)


# ---------------------------------------------------------------- connected and disconnected


async def test_a_record_that_cannot_be_read_for_the_moment_keeps_the_claim(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "big")
        assert await one.prepare(ref) == ""
        with unreadable("fabrics.json"):
            error = await one.unprepare(ref)
        assert "cannot unprepare claim" in error and "Input/output error" in error
        assert one.kernel.connected() == {"nvme0": NQNS["big"]} and one.room.agent.ledger.grants
        assert await one.unprepare(ref) == ""
        assert one.is_untouched() and one.room.agent.ledger.grants == {}


@pytest.mark.parametrize("multipath", [False, True])
async def test_a_claims_target_is_connected_and_its_container_gets_the_disks(folder: Path, multipath: bool) -> None:
    async with node(folder, multipath) as one:
        ref = one.claim("c", "big")
        assert await one.prepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["big"]}
        assert one.nodes(ref) == (["/dev/nvme40n1", "/dev/nvme40n2"] if multipath else ["/dev/nvme0n1", "/dev/nvme0n2"])
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()
        assert await one.unprepare(ref) == ""


async def test_the_kernel_is_asked_as_nvme_cli_asks_it(folder: Path) -> None:
    more = {"hostNqn": "nqn.2024-01.com.example:host-1", "reconnectDelay": 5, "fastIoFailTmo": 20, "ctrlLossTmo": 60}
    async with node(folder, fast=more) as one:
        assert await one.prepare(one.claim("c", "fast")) == ""
        (text,) = one.kernel.written
        said = dict(word.split("=", 1) for word in text.split(","))
        assert said.pop("hostid")
        assert said == {
            "transport": "tcp",
            "traddr": "192.0.2.1",
            "trsvcid": "4420",
            "nqn": NQNS["fast"],
            "hostnqn": "nqn.2024-01.com.example:host-1",
            "ctrl_loss_tmo": "60",
            "reconnect_delay": "5",
            "fast_io_fail_tmo": "20",
        }


async def test_the_host_is_called_as_nvme_cli_calls_it(folder: Path) -> None:
    async with node(folder) as one:
        one.room.tree.write("etc/nvme/hostnqn", f"{HOSTNQN}\n")
        assert await one.prepare(one.claim("c", "fast")) == ""
        assert f"hostnqn={HOSTNQN},hostid={HOSTNQN[-36:]}" in one.kernel.written[0]


async def test_a_claim_with_two_targets_gets_both_or_none(folder: Path) -> None:
    async with node(folder) as one:
        one.targets["slow"].up = False
        ref = one.claim("c", "fast", "slow")
        assert "cannot connect nqn.2024-01.com.example:slow at tcp://192.0.2.1:4420" in await one.prepare(ref)
        one.targets["slow"].up = True
        assert await one.prepare(ref) == ""
        assert [one.nodes(ref, 0), one.nodes(ref, 1)] == [["/dev/nvme0n1"], ["/dev/nvme1n1"]]
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_preparing_twice_connects_once(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        for _ in range(2):
            assert await one.prepare(ref) == ""
        assert len(one.kernel.written) == 1


async def test_another_claim_of_the_same_target_is_refused_by_the_ledger(folder: Path) -> None:
    """As if the scheduler had allocated it twice."""
    async with node(folder) as one:
        assert await one.prepare(one.claim("c", "fast")) == ""
        assert "held by claim default/c" in await one.prepare(one.claim("d", "fast"))
        assert len(one.kernel.written) == 1


async def test_a_key_is_read_from_its_file_and_is_in_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with node(folder, fast={"dhchapSecretFile": "/etc/keys/host"}) as one:
        one.targets["fast"].key = "DHHC-1:00:right:"
        ref = one.claim("c", "fast")
        assert "cannot read" in await one.prepare(ref)
        one.room.tree.write("etc/keys/host", "DHHC-1:00:wrong:\n")
        error = await one.prepare(ref)
        assert "the target does not accept the key" in error
        one.room.tree.write("etc/keys/host", "no key, hostnqn=x\n")
        assert "expected one key of DH-HMAC-CHAP" in await one.prepare(ref)
        one.room.tree.write("etc/keys/host", "DHHC-1:00:right:\n")
        assert await one.prepare(ref) == ""
        said = capsys.readouterr()
        for text in (error, said.out, said.err, one.journal.path.read_text()):
            assert "DHHC-1:00" not in text


# ---------------------------------------------------------------- bad days


async def test_a_refused_host_is_said(folder: Path) -> None:
    async with node(folder) as one:
        one.targets["fast"].hosts = frozenset({"nqn.2024-01.com.example:other"})
        ref = one.claim("c", "fast")
        assert "the target refuses it: it has no such subsystem, or does not allow this host" in await one.prepare(ref)
        assert not one.journal.read()
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_without_the_module_it_says_what_to_load(folder: Path) -> None:
    async with node(folder) as one:
        one.kernel.loaded = False
        (one.room.tree.root / "dev/nvme-fabrics").unlink()
        assert "there is no /dev/nvme-fabrics; `modprobe nvme-tcp`" in await one.prepare(one.claim("c", "fast"))


async def test_what_an_admin_has_connected_is_neither_handed_over_nor_disconnected(folder: Path) -> None:
    async with node(folder) as one:
        name = one.kernel.by_admin(one.targets["fast"])
        ref = one.claim("c", "fast")
        assert f"is connected to it already as {name}, and not by this agent" in await one.prepare(ref)
        assert await one.unprepare(ref) == ""
        await one.fabrics.recover()
        assert one.kernel.connected() == {name: NQNS["fast"]}
        one.kernel.remove(name)
        assert await one.prepare(ref) == ""


async def test_an_admin_who_is_faster_than_the_kernels_answer_keeps_the_connection(folder: Path) -> None:
    async with node(folder) as one:
        one.kernel.before = lambda step: (
            one.kernel.by_admin(one.targets["fast"]) if not one.kernel.controllers else None
        )  # type: ignore[assignment, return-value]
        ref = one.claim("c", "fast")
        assert "it is connected already, and not by this agent" in await one.prepare(ref)
        one.kernel.before = lambda step: None
        assert not one.journal.read()
        assert await one.unprepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["fast"]}


async def test_a_second_path_of_an_admin_stays_when_the_claim_ends(folder: Path) -> None:
    async with node(folder, multipath=True) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        other = one.kernel.by_admin(one.targets["fast"], traddr="192.0.2.2")
        assert await one.unprepare(ref) == ""
        assert one.kernel.connected() == {other: NQNS["fast"]}


async def test_a_target_that_never_answers_fails_the_claim_in_time_and_delays_no_other(folder: Path) -> None:
    async with node(folder) as one:
        answer = one.targets["fast"].silent = threading.Event()
        ref = one.claim("c", "fast")
        assert "the target has not answered for 0.3 s" in await one.prepare(ref)
        assert "the kernel has not given up connecting it yet" in await one.prepare(ref)
        assert "the kernel has not given up connecting it yet" in await one.unprepare(ref)
        assert await one.prepare(one.claim("d", "slow")) == ""
        answer.set()
        await until(lambda: NQNS["fast"] in one.kernel.connected().values())
        assert await one.prepare(ref) == ""  # with the late connection
        assert await one.unprepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["slow"]}


async def test_a_mounted_disk_is_not_taken_away(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.mounted.add("nvme0n1")
        error = await one.unprepare(ref)
        assert "/dev/nvme0n1 is in use, by a mounted file system" in error
        assert one.kernel.connected() and one.room.agent.ledger.grants
        one.kernel.mounted.clear()
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_a_target_that_another_claim_has_by_the_time_of_a_turn_stays_connected(folder: Path) -> None:
    """Another agent has released the claim and prepared the next one meanwhile."""
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        async with one.fabrics._turns.alone(1.0):
            giving = asyncio.create_task(one.fabrics.give_back([ref.uid]))
            await asyncio.sleep(0.05)
            records = one.journal.read()
            one.journal.keep({id: replace(record, claim="next") for id, record in records.items()})
        assert await giving == {}
        assert one.kernel.connected() and [record.claim for record in one.journal.read().values()] == ["next"]


async def test_a_mounted_disk_of_a_claim_that_an_admin_released_is_reported(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.mounted.add("nvme0n1")
        await one.room.agent.unprepare([ref.uid], "an admin released it", "op")
        await one.fabrics.recover()
        (note,) = one.fabrics.notes()
        assert "is in use" in note
        one.kernel.mounted.clear()
        await one.fabrics.recover()
        assert one.fabrics.notes() == [] and one.is_untouched()


async def test_a_target_without_disks_for_this_host_fails_the_claim(folder: Path) -> None:
    async with node(folder) as one:
        one.targets["fast"].disks = 0
        ref = one.claim("c", "fast")
        assert "it has no disk for this host" in await one.prepare(ref)
        assert not one.kernel.controllers


async def test_a_lost_path_is_bad_health_and_heals(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.lose(one.targets["fast"])
        await one.fabrics.look()
        state = one.room.agent.health["nvmeof-fast"]
        assert state.state == UNHEALTHY
        assert state.reason.endswith(f"the path to {NQNS['fast']} at tcp://192.0.2.1:4420 is lost: nvme0 is connecting")
        with unreadable("fabrics.json"):  # whether it is connected cannot be told: that is no sign of health
            await one.fabrics.look()
        assert one.room.agent.health["nvmeof-fast"] == state
        one.kernel.restore(one.targets["fast"])
        await one.fabrics.look()
        assert one.room.agent.health["nvmeof-fast"].seen["path"].state != UNHEALTHY
        one.kernel.lose(one.targets["fast"])
        assert await one.unprepare(ref) == ""
        assert "path" not in getattr(one.room.agent.health.get("nvmeof-fast"), "seen", {})
        assert one.is_untouched()


async def test_a_connection_that_an_admin_ended_is_made_again_when_kubelet_asks(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.remove("nvme0")
        await one.fabrics.look()
        assert "nvme0 was disconnected" in one.room.agent.health["nvmeof-fast"].reason
        assert await one.prepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["fast"]}
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_a_disk_is_handed_over_no_longer_before_another_target_can_have_its_name(folder: Path) -> None:
    """A container that starts again at any moment gets the disks of its claim, or does not start."""
    async with node(folder) as one:
        first, second = one.claim("first", "fast"), one.claim("second", "slow")
        assert await one.prepare(first) == ""
        one.kernel.remove("nvme0")
        shown: list[bool] = []
        one.kernel.before = lambda step: shown.append(one.room.spec_file(first).exists())
        assert await one.prepare(second) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["slow"]}
        assert shown and not any(shown)


async def test_a_connection_that_ends_while_another_is_made_hands_over_no_disk_of_that(folder: Path) -> None:
    """Whatever else the agent does then."""
    async with node(folder) as one:
        first, second = one.claim("first", "fast"), one.claim("second", "slow")
        assert await one.prepare(first) == ""

        def ends(step: str) -> None:
            if "nvme0" in one.kernel.controllers and one.kernel.connected()["nvme0"] == NQNS["fast"]:
                one.kernel.remove("nvme0")

        one.kernel.before = ends
        assert await one.prepare(second) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["slow"]}
        assert one.nodes(second) == ["/dev/nvme0n1"] and not one.room.spec_file(first).exists()


async def test_what_is_disconnected_while_disks_are_forgotten_is_not_recorded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls for claims and the look at the connections run at the same time."""
    async with node(folder) as one:
        assert await one.prepare(one.claim("c", "fast")) == ""
        one.kernel.remove("nvme0")
        it = one.fabrics._connector
        standing = it.standing

        def meanwhile(record: Connected) -> Connection | None:
            one.journal.forget(record.device)
            return standing(record)

        monkeypatch.setattr(it, "standing", meanwhile)
        await it.forget_disks()
        assert not one.journal.read()


async def test_a_look_hides_the_disks_of_a_connection_that_has_ended_at_once(folder: Path) -> None:
    """What an admin connects may have their names by now."""
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.remove("nvme0")
        assert one.kernel.by_admin(one.targets["slow"]) == "nvme0"
        await one.fabrics.look()
        assert not one.room.spec_file(ref).exists()


@pytest.mark.parametrize("looked", [True, False])
async def test_a_claim_hands_over_no_disk_of_another_target_under_the_same_name(folder: Path, looked: bool) -> None:
    """Kubelet does not prepare again when a container is restarted in its pod."""
    async with node(folder) as one:
        first, second = one.claim("first", "fast"), one.claim("second", "slow")
        assert await one.prepare(first) == ""
        one.kernel.remove("nvme0")
        if looked:
            await one.fabrics.look()
            await one.room.rendering.restore(afresh=False)
            assert not one.room.spec_file(first).exists()
        assert await one.prepare(second) == ""
        await one.room.rendering.restore(afresh=False)
        assert one.nodes(second) == ["/dev/nvme0n1"]
        assert not one.room.spec_file(first).exists()
        assert await one.prepare(first) == ""
        assert (one.nodes(first), one.nodes(second)) == (["/dev/nvme1n1"], ["/dev/nvme0n1"])
        assert [await one.unprepare(ref) for ref in (first, second)] == ["", ""]
        assert one.is_untouched()


async def test_what_a_claim_has_connected_stays_connected_whatever_is_configured_meanwhile(folder: Path) -> None:
    """A kubelet that starts prepares the claims of all pods that run."""
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.room.serve(resource(fast={"traddr": "192.0.2.9", "hostNqn": "nqn.2024-01.com.example:other"}))
        one.room.rescan()
        assert await one.prepare(ref) == ""
        assert (one.kernel.connected(), one.nodes(ref)) == ({"nvme0": NQNS["fast"]}, ["/dev/nvme0n1"])
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_a_prepare_that_fails_ends_no_connection_of_an_earlier_one(folder: Path) -> None:
    """The target has got a disk, and its path is lost: the disks cannot be read again at this moment."""
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.grow("nvme0")
        one.kernel.lose(one.targets["fast"])
        assert "its state is connecting" in await one.prepare(ref)
        assert one.kernel.connected() == {"nvme0": NQNS["fast"]}
        one.kernel.restore(one.targets["fast"])
        assert (await one.prepare(ref), one.nodes(ref)) == ("", ["/dev/nvme0n1", "/dev/nvme0n2"])
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_another_connection_under_the_same_name_is_left_alone(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.remove("nvme0")
        assert one.kernel.by_admin(one.targets["slow"]) == "nvme0"
        assert await one.unprepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["slow"]}


async def test_after_a_reboot_a_claim_is_connected_again(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.kernel.reboot()
        await one.restart("boot-2")
        assert not one.journal.read()
        assert await one.prepare(ref) == ""
        assert one.kernel.connected() == {"nvme0": NQNS["fast"]}
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_a_claim_of_a_target_that_is_no_longer_configured_is_disconnected(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.claim("c", "fast")
        assert await one.prepare(ref) == ""
        one.room.serve({"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"], "serve": "dra"})
        one.room.rescan()
        assert await one.unprepare(ref) == ""
        assert one.is_untouched()


async def test_the_disks_of_a_claim_are_no_devices_of_their_own_when_its_target_is_no_longer_configured(
    folder: Path,
) -> None:
    async with node(folder) as one:
        where = SimpleNamespace(state_dir=one.room.folder / "state")
        connected = connected_nqns(where, one.room.agent)  # type: ignore[arg-type]

        def found() -> set[str]:
            tree = SysFs(str(one.room.tree.root))
            selectors = Selectors(connected_nqns=connected(), block_types=frozenset(BLOCK_TYPES))
            devices = scan(tree, builtin_kinds(), selectors).devices
            return {device.kind for device in devices if "nvme0" in device.attributes.get("controller", "")}

        ref = one.claim("c", "fast")
        assert (connected(), await one.prepare(ref)) == (frozenset(), "")
        assert (connected(), found()) == ({NQNS["fast"]}, set())
        assert await one.unprepare(ref) == ""
        assert one.kernel.by_admin(one.targets["fast"]) == "nvme0"
        assert (connected(), found()) == (frozenset(), {"nvme", "block"})


async def test_a_pool_that_no_one_serves_is_named(folder: Path) -> None:
    async with node(folder) as one:
        ref = one.room.claim("c", {"request": "r", "driver": DRIVER, "pool": "node-a/nvmeof", "device": "nvmeof-fast"})
        assert "there is no pool 'node-a/nvmeof' on this node (there are: nvmeof-" in await one.prepare(ref)


async def test_killed_before_or_after_any_step_what_is_held_is_connected_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims come and go, targets are lost and return, admins connect others; agents die at random steps, now and then
    with the machine, begin again, and complete or undo what the ledger says."""
    drawn, doom, deaths = random.Random(11), Doom(), 0
    monkeypatch.setattr(FabricsJournal, "change", doom.around(FabricsJournal.change))
    async with node(folder) as one:
        one.kernel.before = doom.step
        other = Target("nqn.2024-01.com.example:admin")
        refs = [one.claim(f"c{n}", *names) for n, names in enumerate((("fast", "big"), ("slow",), ("fast",)))]
        for _ in range(LIVES):
            doom.left, doom.dead = drawn.randint(1, MOST_STEPS), False
            for target in one.targets.values():
                target.up = drawn.random() > 0.1
            if drawn.random() < 0.2 and other.nqn not in one.kernel.connected().values():
                one.kernel.by_admin(other)
            with contextlib.suppress(Killed):
                for ref in drawn.sample(refs, len(refs)):
                    await (one.prepare(ref) if drawn.random() < 0.6 else one.unprepare(ref))
            if doom.dead:
                deaths += 1
                doom.left, doom.dead = 0, False
                boot = ""
                if drawn.random() < 0.1:
                    one.kernel.reboot()
                    boot = f"boot-{deaths}"
                await one.restart(boot)
            doom.left, doom.dead = 0, False
            for target in one.targets.values():
                target.up = True
            await one.fabrics.recover()
            held = {grant.holder.uid for grant in one.room.agent.ledger.grants.values()}
            for ref in refs:
                if ref.uid in held:
                    assert await one.prepare(ref) == ""
            ids = {id for grant in one.room.agent.ledger.grants.values() for id in grant.devices}
            wanted = sorted(NQNS[id.removeprefix("nvmeof-")] for id in ids)
            there = sorted(nqn for nqn in one.kernel.connected().values() if nqn != other.nqn)
            assert there == wanted
            assert one.journal.read().keys() == ids
        for ref in refs:
            assert await one.unprepare(ref) == ""
        assert {*one.kernel.connected().values()} <= {other.nqn} and not one.journal.path.exists()
    assert deaths >= LIVES // 4
