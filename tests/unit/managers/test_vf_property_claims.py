"""Claims that want properties of their virtual functions: set when prepared and set back when unprepared, with a real
ledger and real files, on a double of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.config.schema import Config
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.opaque.decode import API_VERSION
from nodeagent.host.devices import all_kinds
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.network import vf_properties
from nodeagent.managers.network.vf_properties import VfPropertiesManager
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.resources.catalog import dra_of
from nodeagent.state.lock import FileLock
from nodeagent.state.store import FILE
from tests.doubles.vf_kernel import Vf, VfKernel
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import DRIVER, NODE, result
from tests.support.unreadable import unreadable

PF, VFS = "0000:3b:00.0", ["0000:3b:02.0", "0000:3b:02.1"]
RESOURCE = {"name": "nic", "kind": "nic", "serve": "both", "match": {"sriov": ["pf", "vf"]}}
EVERY = ["mac", "vlan", "txRate", "spoofCheck", "linkState", "trust"]
ASKED = {"vlan": 100, "vlanQoS": 3, "spoofCheck": False}


@dataclass
class Node:
    """A node with an adapter that has two virtual functions, and its kernel."""

    room: Room
    kernel: VfKernel
    manager: VfPropertiesManager

    def claim(self, name: str, vf: str, said: Mapping[str, Any] | None) -> ClaimRef:
        ref = self.room.claim(name, result("nic", vf.replace(":", "-").replace(".", "-")))
        if said is not None:
            parameters = {"apiVersion": API_VERSION, "kind": "NicConfig", "vf": said}
            config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
            self.room.objects["default", name]["status"]["allocation"]["devices"]["config"] = [config]
        return ref

    async def prepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.prepare(ref)
        return answer.error

    def has(self, vf: str) -> Vf:
        return self.kernel.pfs["ens1f0"].vfs[VFS.index(vf)]

    def configure(self, *allowed: str) -> None:
        network = {"vfProperties": [*allowed]}
        self.room.config = msgspec.convert({"resources": [RESOURCE], "network": network}, Config)
        self.room.dra = dra_of(self.room.config, all_kinds.builtin_kinds(), NODE)

    async def restart(self, boot_id: str = "boot") -> None:
        """As after kill -9."""
        await self.manager.close()
        await self.room.restart(boot_id)
        self.open()

    def open(self) -> None:
        room = self.room
        self.manager = VfPropertiesManager(room.agent, room.folder / "state", exchange=self.kernel.open)
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, passthrough=self.manager
        )

    @property
    def record(self) -> Path:
        return self.room.folder / "state/vf-properties.json"


@contextlib.asynccontextmanager
async def node(folder: Path, *allowed: str) -> AsyncIterator[Node]:
    async with claim_room(folder, RESOURCE) as room:
        room.tree.pci(PF, pci_class="020000", driver="ice")
        room.tree.net(PF, "ens1f0")
        for index, vf in enumerate(VFS):
            room.tree.vf(PF, index, vf)
        kernel = VfKernel()
        kernel.add("ens1f0", PF, len(VFS))
        made = Node(room, kernel, None)  # type: ignore[arg-type]
        made.configure(*allowed)
        room.rescan()
        made.open()
        try:
            yield made
        finally:
            await made.manager.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for the last process of a pod."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)


async def test_a_claim_has_what_it_wants_until_it_is_unprepared(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[1], ASKED)
        assert await one.prepare(claim) == ""
        assert one.has(VFS[1]) == Vf(vlan=100, qos=3, spoofchk=0)
        assert one.has(VFS[0]) == Vf()
        done = len(one.kernel.changes)
        assert await one.prepare(claim) == ""
        assert len(one.kernel.changes) == done
        await one.manager.recover()
        assert one.has(VFS[1]).vlan == 100
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[1]) == Vf()
        assert one.room.agent.ledger.grants == {} and not one.record.exists()
        assert await one.room.unprepare(claim) == [""]


async def test_what_another_claim_has_by_the_time_of_a_turn_is_left_alone(folder: Path) -> None:
    """Another agent has released the claim and prepared the next one meanwhile."""
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        async with one.manager._turns.alone(1.0):
            giving = asyncio.create_task(one.manager.give_back([claim.uid]))
            await asyncio.sleep(0.05)
            journal = VfPropertyJournal(one.room.folder / "state", "boot")
            journal.keep({VFS[0]: replace(journal.read()[VFS[0]], claim="next")})
        assert await giving == {}
        assert one.has(VFS[0]).vlan == 100 and [record.claim for record in journal.read().values()] == ["next"]


async def test_what_the_admin_does_not_allow_is_refused_and_nothing_is_set(folder: Path) -> None:
    async with node(folder, "vlan") as one:
        assert "network.vfProperties of this node does not allow spoofCheck" in await one.prepare(
            one.claim("c", VFS[0], ASKED)
        )
        assert one.room.agent.ledger.grants == {} and one.kernel.changes == []
        assert await one.prepare(one.claim("d", VFS[0], {"vlan": 100})) == ""
        one.configure()
        assert "does not allow vlan" in await one.prepare(one.claim("e", VFS[1], {"vlan": 100}))


async def test_a_device_that_is_no_virtual_function_is_refused(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        assert f"vf: {PF} is no virtual function" in await one.prepare(one.claim("c", PF, ASKED))


async def test_what_the_driver_refuses_fails_the_claim_with_the_kernels_words(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        one.kernel.pfs["ens1f0"].can -= {"spoofchk"}
        error = await one.prepare(claim := one.claim("c", VFS[0], ASKED))
        assert "cannot set spoof checking off of VF 0 of ens1f0: Operation not supported" in error
        assert one.has(VFS[0]) == Vf() and not one.record.exists()
        one.kernel.pfs["ens1f0"].can |= {"spoofchk"}
        assert await one.prepare(claim) == ""
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[0]) == Vf()


async def test_what_cannot_be_set_back_keeps_the_claim(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        one.kernel.may = False
        (error,) = await one.room.unprepare(claim)
        assert "cannot unprepare claim" in error and "Operation not permitted" in error
        assert one.room.agent.ledger.grants
        one.kernel.may = True
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[0]) == Vf() and one.room.agent.ledger.grants == {}


async def test_a_record_that_cannot_be_read_for_the_moment_keeps_the_claim(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        with unreadable(one.record.name):
            (error,) = await one.room.unprepare(claim)
        assert "cannot unprepare claim" in error and "Input/output error" in error
        assert one.has(VFS[0]).vlan == 100 and one.room.agent.ledger.grants
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[0]) == Vf() and one.room.agent.ledger.grants == {}


async def test_what_may_be_as_another_claim_had_it_is_handed_to_nobody_while_the_record_cannot_be_read(
    folder: Path,
) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        await one.room.agent.unprepare([claim.uid], "an admin", "op")
        with unreadable(one.record.name):
            assert "Input/output error" in await one.prepare(plain := one.claim("d", VFS[0], None))
        assert f"what it had before claim {claim.uid} is not set back" in await one.prepare(plain)


async def test_a_pod_that_still_runs_keeps_what_it_has(folder: Path, impatient: None) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        one.room.alive.add("pod-uid")
        assert "it is in use" in (await one.room.unprepare(claim))[0]
        assert one.has(VFS[0]).vlan == 100
        one.room.alive.clear()
        assert await one.room.unprepare(claim) == [""]


async def test_what_a_released_claim_left_is_set_back_at_the_start_and_handed_to_no_other_before(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        await one.room.agent.unprepare([claim.uid], "an admin", "op")
        await one.restart()
        one.kernel.may = False
        for said in (None, {"vlan": 5}):
            error = await one.prepare(other := one.claim("d", VFS[0], said))
            assert f"what it had before claim {claim.uid} is not set back" in error
            assert await one.room.unprepare(other) == [""]
        await one.manager.recover()
        assert any("Operation not permitted" in note for note in one.manager.notes())
        one.kernel.may = True
        await one.manager.recover()
        assert one.has(VFS[0]) == Vf() and one.manager.notes() == [] and not one.record.exists()
        assert await one.prepare(one.claim("e", VFS[1], {"vlan": 5})) == ""


async def test_killed_before_it_was_set_the_repeated_call_completes_it(folder: Path) -> None:
    class KilledError(Exception):
        pass

    async with node(folder, *EVERY) as one:

        def die(step: str) -> None:
            if step.endswith("spoofchk"):
                raise KilledError

        one.kernel.before = die
        claim = one.claim("c", VFS[0], ASKED)
        with pytest.raises(KilledError):
            await one.prepare(claim)
        one.kernel.before = lambda step: None
        await one.restart()
        assert one.has(VFS[0]) == Vf(vlan=100, qos=3)
        assert await one.prepare(claim) == ""
        assert one.has(VFS[0]) == Vf(vlan=100, qos=3, spoofchk=0)
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[0]) == Vf()


async def test_after_a_reboot_the_record_is_void_and_the_claim_is_set_again(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        one.kernel.reboot()
        await one.restart("another boot")
        assert one.manager.concerned([claim.uid]) == []
        assert await one.prepare(claim) == ""
        assert one.has(VFS[0]).vlan == 100
        assert await one.room.unprepare(claim) == [""]
        assert one.has(VFS[0]) == Vf()


async def test_while_the_ledger_may_be_lost_nothing_is_set_back(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        assert await one.prepare(one.claim("c", VFS[0], ASKED)) == ""
        await one.room.agent.close()
        for path in (folder / "state").glob(f"{FILE}*"):
            path.unlink()
        await one.restart()
        assert one.room.agent.loss
        await one.manager.recover()
        assert one.has(VFS[0]).vlan == 100 and one.record.exists()


async def test_another_agent_that_does_not_end_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vf_properties, "LOCK_S", 0.1)
    async with node(folder, *EVERY) as one:
        claim = one.claim("c", VFS[0], ASKED)
        assert await one.prepare(claim) == ""
        lock = FileLock(folder / "state/vf-properties.lock")
        assert lock.try_take()
        try:
            for error in (await one.prepare(claim), (await one.room.unprepare(claim))[0]):
                assert "cannot set virtual functions: another agent has" in error
        finally:
            lock.close()
        assert await one.room.unprepare(claim) == [""]


async def test_a_claim_that_asks_for_nothing_opens_nothing(folder: Path) -> None:
    async with node(folder, *EVERY) as one:
        opened: list[str] = []
        one.kernel.get = lambda what, kind, body: opened.append(what)  # type: ignore[method-assign,assignment]
        claim = one.claim("c", VFS[0], None)
        assert await one.prepare(claim) == ""
        assert await one.room.unprepare(claim) == [""]
        assert opened == []
