"""What happens to claims between kubelet's calls: the forgotten are released, statuses written, files put back."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.device_pool import label
from nodeagent.core.model.claim import ClaimRef, Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.errors import PeerError, StateError
from nodeagent.kube.apiserver.call import ApiError
from nodeagent.managers.dra import garbage_collector as claimcare
from nodeagent.managers.dra.claim_files import claims_held
from nodeagent.managers.dra.garbage_collector import SECOND_LOOK_S, ClaimGarbageCollector, StatusWriter, keep_rendered
from tests.builders.inventories import even_rows, inventory_of
from tests.support.claim_node import Gate, Room, claim_room
from tests.support.dra_node import DRIVER, consumed, result
from tests.support.until import until

PORT = label("/dev/ttyS0")


# ---------------------------------------------------------------- the forgotten


@dataclass
class Looking:
    """Forgotten in a room, kubelet's word, and a clock that goes when told to."""

    room: Room
    in_use: set[tuple[str, str]] = field(default_factory=set)
    silent: bool = False
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.forgotten = ClaimGarbageCollector(
            self.room.agent, self.room.fetch, self.used, DRIVER, clock=lambda: self.now_s
        )

    async def used(self) -> frozenset[tuple[str, str]]:
        if self.silent:
            raise PeerError("cannot list pod resources: on purpose")
        return frozenset(self.in_use)

    async def look(self, *, after_s: float = SECOND_LOOK_S) -> list[str]:
        """The names of the claims that were released by another look."""
        self.now_s += after_s
        return sorted({grant.holder.claim for grant in await self.forgotten.look()})


@contextlib.asynccontextmanager
async def looking(folder: Path, *names: str) -> AsyncIterator[Looking]:
    """Some prepared claims of two devices each."""
    async with claim_room(folder, ports=len(names)) as room:
        for number, name in enumerate(names):
            results = consumed("cpu", "numa0", cpus="1"), result("char", label(f"/dev/ttyS{number}"), "port")
            (answer,) = await room.prepare(room.claim(name, *results))
            assert answer.error == ""
        yield Looking(room)


def document(look: Looking, name: str = "c") -> dict[str, Any]:
    return look.room.objects["default", name]


def gone(look: Looking) -> None:
    del look.room.objects["default", "c"]


def made_anew(look: Looking) -> None:
    document(look)["metadata"]["uid"] = "another"


def unreserved(look: Looking) -> None:
    document(look)["status"]["reservedFor"] = []


def deallocated(look: Looking) -> None:
    document(look)["status"]["allocation"] = None


async def test_a_claim_that_is_gone_is_not_forgotten_while_its_pod_runs(folder: Path) -> None:
    """A pod deleted by force: neither the API server nor kubelet has it any longer, its processes go on."""
    async with looking(folder, "c") as look:
        gone(look)
        look.room.alive.add("pod-uid")
        with capture_logs() as logs:
            assert [await look.look() for _ in range(4)] == [[], [], [], []]
        assert "it is in use, it runs" in next(one["error"] for one in logs if one["event"] == "claim-in-use")
        look.room.alive.clear()
        assert await look.look() == ["c"]


@pytest.mark.parametrize("reason", [gone, made_anew, unreserved, deallocated])
async def test_a_claim_that_is_no_more_is_released_at_the_second_look(reason: Any, folder: Path) -> None:
    """All that it holds, and no other claim's; its files go with the next rendering."""
    async with looking(folder, "c", "other") as look:
        reason(look)
        assert await look.look() == []
        assert await look.look(after_s=SECOND_LOOK_S - 1) == []
        with capture_logs() as logs:
            assert await look.look(after_s=1) == ["c"]
        assert [(line["event"], line["claim"]) for line in logs] == [("claim-forgotten", "claim default/c")] * 2
        assert {one.holder.claim for one in look.room.agent.ledger.grants.values()} == {"other"}
        await look.room.rendering.restore()
        assert len(look.room.files()) == 2
        assert await look.look() == []


async def test_a_claim_that_is_there_is_never_released(folder: Path) -> None:
    async with looking(folder, "c") as look:
        for _ in range(5):
            assert await look.look() == []
        assert len(look.room.agent.ledger.grants) == 2


async def test_a_claim_that_is_back_in_between_is_missed_anew(folder: Path) -> None:
    """Two looks in a row have to say that it is gone."""
    async with looking(folder, "c") as look:
        there = look.room.objects.pop(("default", "c"))
        assert await look.look() == []
        look.room.objects["default", "c"] = there
        assert await look.look() == []
        gone(look)
        assert await look.look() == []
        assert await look.look() == ["c"]


async def test_what_kubelet_has_a_container_with_is_not_released(folder: Path) -> None:
    """Whatever the API server says: a container may outlive its pod's object. The time counts from its end."""
    async with looking(folder, "c") as look:
        gone(look)
        assert await look.look() == []
        look.in_use = {("default", "c")}
        assert await look.look() == []
        assert await look.look() == []
        look.in_use = {("another", "c"), ("default", "d")}
        assert await look.look() == []
        assert await look.look() == ["c"]


async def test_while_kubelet_is_silent_nothing_is_released(folder: Path) -> None:
    """It counts again from where it was: no answer said that the claim is there."""
    async with looking(folder, "c") as look:
        gone(look)
        look.silent = True
        for _ in range(3):
            assert await look.look() == []
        look.silent = False
        assert await look.look() == []
        assert await look.look() == ["c"]


async def test_while_the_api_server_is_away_nothing_is_released(folder: Path) -> None:
    async with looking(folder, "c") as look:
        gone(look)
        assert await look.look() == []
        look.room.away = True
        for _ in range(3):
            assert await look.look() == []
        look.room.away = False
        assert await look.look() == ["c"]


async def test_a_claim_that_cannot_be_read_is_not_released(folder: Path) -> None:
    """Of what cannot be read it cannot be said that it is gone."""
    async with looking(folder, "c") as look:
        document(look)["status"]["reservedFor"] = "nobody"
        for _ in range(3):
            assert await look.look() == []


async def test_a_claim_that_several_pods_share_is_kept_for_the_last_of_them(folder: Path) -> None:
    async with looking(folder, "c") as look:
        pods = document(look)["status"]["reservedFor"]
        pods.append({"resource": "pods", "name": "other", "uid": "other"})
        while pods:
            assert await look.look() == []
            assert await look.look() == []
            pods.pop()
        assert await look.look() == []
        assert await look.look() == ["c"]


async def test_a_claim_that_is_reserved_again_while_others_are_looked_for_is_kept(folder: Path) -> None:
    """Each is released right after the API server's word about it."""
    async with looking(folder, "a", "c") as look:
        unreserved(look)
        assert await look.look() == []

        async def reserve_again(ref: ClaimRef) -> None:
            if ref.name == "a":
                document(look)["status"]["reservedFor"] = [{"resource": "pods", "name": "p", "uid": "p"}]

        look.room.delay = reserve_again
        assert await look.look() == []
        assert len(look.room.agent.ledger.grants) == 4


async def test_a_release_that_fails_is_tried_again_at_the_next_look_and_hurries_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that was first missed a moment ago still has its time."""
    async with looking(folder, "c", "d") as look:
        gone(look)
        assert await look.look() == []
        del look.room.objects["default", "d"]

        def refuse(*_: object, **__: object) -> None:
            raise StateError("cannot save: disk full")

        with monkeypatch.context() as patch:
            patch.setattr(look.room.agent._store, "save_all", refuse)
            with pytest.raises(StateError):
                await look.look()
        assert await look.look(after_s=1) == ["c"]
        assert await look.look(after_s=1) == []
        assert await look.look() == ["d"]


async def test_nobody_is_asked_while_nothing_is_held(folder: Path) -> None:
    async with claim_room(folder) as room:
        look = Looking(room, silent=True)
        with capture_logs() as logs:
            assert await look.look() == []
        assert logs == []


async def test_looking_goes_on_sooner_while_something_is_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claimcare, "LOOK_S", 0.01)
    monkeypatch.setattr(claimcare, "SECOND_LOOK_S", 0.05)
    async with looking(folder, "c") as look:
        forgotten = ClaimGarbageCollector(look.room.agent, look.room.fetch, look.used, DRIVER)
        task = asyncio.create_task(forgotten.follow())
        gone(look)
        async with asyncio.timeout(5):
            while look.room.agent.ledger.grants:
                await look.room.agent.revisions.ledger.changed(look.room.agent.revisions.ledger.value)
        task.cancel()
        await asyncio.wait({task})


# ---------------------------------------------------------------- status.devices

NIC = Device(
    kind="nic", id="0000:5e:00.0", attributes=MappingProxyType({"netdevs": "eth0,eth1", "mac": "02:00:00:00:00:01"})
)
NAMELESS = Device(kind="nic", id="0000:5e:00.1", attributes=MappingProxyType({"netdevs": ""}))
GPU = Device(kind="gpu", id="0000:3b:00.0", attributes=MappingProxyType({"netdevs": "odd"}))
REF = ClaimRef(namespace="ns", name="c", uid="u")


def grant(**parts: Any) -> Grant:
    made = Result(request="r", driver=DRIVER, pool="node-a/x", device="d")
    holder = Holder(api=CLAIM, namespace="ns", claim="c", uid="u")
    return Grant(**{"id": "u-0", "holder": holder, "result": made, "granted_at": 1e9, **parts})


class Server:
    """Takes statuses, or fails as told."""

    def __init__(self) -> None:
        self.taken: list[tuple[ClaimRef, Mapping[str, Any]]] = []
        self.tries = 0
        self.fault: PeerError | None = None
        self.before: Any = None
        self.news = asyncio.Event()

    async def tell(self, ref: ClaimRef, body: Mapping[str, Any], manager: str) -> None:
        assert manager == DRIVER
        self.tries += 1
        if self.before is not None:
            await self.before()
        self.news.set()
        if self.fault is not None:
            raise self.fault
        self.taken.append((ref, body))

    async def tried(self, times: int) -> None:
        async with asyncio.timeout(5):
            while self.tries < times:
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def writing(*devices: Device) -> AsyncIterator[tuple[StatusWriter, Server]]:
    server, inventory = Server(), inventory_of(even_rows(1, 1, 1, 2, 1), devices=devices)
    writer = StatusWriter(server.tell, DRIVER, lambda: inventory)
    task = asyncio.create_task(writer.follow())
    try:
        yield writer, server
        await settled()
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def settled() -> None:
    """Each task that can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_status_is_written_once_until_it_says_something_else() -> None:
    """Kubelet asks for a claim again and again."""
    async with writing() as (writer, server):
        for _ in range(3):
            writer.told(REF, [grant()], "")
        await server.tried(1)
        writer.told(REF, [grant()], "")
        await settled()
        assert server.tries == 1
        ((ref, body),) = server.taken
        assert ref == REF and body["metadata"]["uid"] == "u"
        (condition,) = body["status"]["devices"][0]["conditions"]
        assert condition == {
            "type": "Ready",
            "status": "True",
            "reason": "Prepared",
            "message": "no exclusive part",
            "lastTransitionTime": "2001-09-09T01:46:40Z",
        }
        writer.told(REF, [grant()], "cannot prepare claim ns/c: disk full")
        await server.tried(2)
        (condition,) = server.taken[-1][1]["status"]["devices"][0]["conditions"]
        assert (condition["status"], condition["reason"]) == ("False", "NotPrepared")
        assert condition["message"] == "cannot prepare claim ns/c: disk full"


async def test_only_the_newest_status_of_a_claim_is_written() -> None:
    """Of many that come while another one is being written."""
    async with writing() as (writer, server):
        server.before = gate = Gate()
        writer.told(replace(REF, uid="other"), [grant()], "")
        await asyncio.wait_for(gate.reached.wait(), 5)
        for number in range(100):
            writer.told(REF, [grant()], f"error {number}")
        gate.opened.set()
        await server.tried(2)
        await settled()
        assert server.tries == 2
        assert server.taken[-1][1]["status"]["devices"][0]["conditions"][0]["message"] == "error 99"


async def test_a_status_that_fails_is_not_tried_again_before_there_is_another(folder: Path) -> None:
    """A courtesy; the next prepare says it again."""
    async with writing() as (writer, server):
        server.fault = PeerError("cannot reach the API server")
        with capture_logs() as logs:
            writer.told(REF, [grant()], "")
            await server.tried(1)
            await settled()
        assert [line["event"] for line in logs] == ["claim-status-not-written"]
        assert server.tries == 1
        server.fault = None
        writer.told(REF, [grant()], "")
        await server.tried(2)
        assert len(server.taken) == 1


async def test_where_it_may_not_be_written_nothing_is_tried_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with writing() as (writer, server):
        server.fault = ApiError("forbidden", status=403)
        server.before = gate = Gate()
        for number in range(10):
            writer.told(replace(REF, uid=f"u{number}"), [grant()], "")
        await asyncio.wait_for(gate.reached.wait(), 5)
        gate.opened.set()
        await settled()
        assert server.tries == 1, "also what waits already is dropped"
        server.fault = None
        writer.told(REF, [grant()], "")
        await settled()
        assert server.tries == 1
        late_s = time.monotonic() + claimcare.NOT_ALLOWED_S + 1
        clock = SimpleNamespace(monotonic=lambda: late_s, strftime=time.strftime, gmtime=time.gmtime)
        monkeypatch.setattr(claimcare, "time", clock)
        writer.told(REF, [grant()], "")
        await server.tried(2)
        assert len(server.taken) == 1


async def test_what_does_not_fit_the_queue_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits already is not; kubelet never waits."""
    monkeypatch.setattr(claimcare, "MOST_WAITING", 3)
    async with writing() as (writer, server):
        server.before = gate = Gate()
        writer.told(replace(REF, uid="first"), [grant()], "")
        await asyncio.wait_for(gate.reached.wait(), 5)
        for number in range(10):
            writer.told(replace(REF, uid=f"u{number}"), [grant()], "")
        writer.told(replace(REF, uid="u1"), [grant()], "newer")
        gate.opened.set()
        await server.tried(4)
        await settled()
        assert [ref.uid for ref, _ in server.taken] == ["first", "u0", "u2", "u1"]


async def test_what_was_written_is_remembered_of_the_newest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claimcare, "MOST_WAITING", 2)
    async with writing() as (writer, server):
        for tries, uid in enumerate(("a", "b", "c"), 1):
            writer.told(replace(REF, uid=uid), [grant()], "")
            await server.tried(tries)
        await settled()
        writer.told(replace(REF, uid="c"), [grant()], "")
        writer.told(replace(REF, uid="a"), [grant()], "")
        await server.tried(4)
        await settled()
        assert [ref.uid for ref, _ in server.taken] == ["a", "b", "c", "a"]


async def test_what_is_held_is_said_in_words_and_of_network_adapters_the_interface() -> None:
    """As it is called at this moment; of no other kind."""
    async with writing(NIC, NAMELESS, GPU) as (writer, server):
        shared = Result(request="r", driver=DRIVER, pool="node-a/nic", device="n", share_id="s")
        writer.told(
            REF,
            [
                grant(cpus=CpuSet([1, 2]), memory=((0, 4096),)),
                grant(hugepages=(Pages(node=1, page_bytes=2 << 20, pages=4),)),
                grant(devices=(NIC.id,)),
                grant(shares=(NIC.id,), result=shared),
                grant(devices=(NAMELESS.id,)),
                grant(devices=(GPU.id,)),
                grant(devices=("gone",)),
                grant(result=None),
            ],
            "",
        )
        await server.tried(1)
        devices = server.taken[0][1]["status"]["devices"]
        assert [one["conditions"][0]["message"] for one in devices] == [
            "CPUs 1-2, 4096 bytes on NUMA node 0",
            "4 pages of 2097152 bytes on NUMA node 1",
            NIC.id,
            NIC.id,
            NAMELESS.id,
            GPU.id,
            "gone",
        ]
        interface = {"interfaceName": "eth0", "hardwareAddress": "02:00:00:00:00:01"}
        assert [one.get("networkData") for one in devices] == [None, None, interface, interface, None, None, None]
        assert [one.get("shareID") for one in devices] == [None, None, None, "s", None, None, None]


async def test_a_claim_without_devices_of_ours_has_no_status() -> None:
    async with writing() as (writer, server):
        writer.told(REF, [], "cannot prepare claim ns/c: no such claim")
        await settled()
        assert server.tries == 0


# ---------------------------------------------------------------- files


async def test_files_are_kept_whatever_happens_to_them_or_to_the_grants(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written at the start, put back when they are deleted, removed when a grant goes without kubelet's word."""
    monkeypatch.setattr(claimcare, "SETTLE_S", 0.01)
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        await room.prepare(claim)
        before = room.files()
        shutil.rmtree(room.cdi)
        task = asyncio.create_task(keep_rendered(Revision(*room.agent.revisions), room.rendering, room.cdi))
        await eventually(room, before)
        room.spec_file(claim).unlink()
        await eventually(room, before)
        shutil.rmtree(room.cdi)
        await eventually(room, before)
        await room.agent.release([next(iter(room.agent.ledger.grants))], "op")
        await eventually(room, [])
        assert not claims_held(room.agent.ledger)
        task.cancel()
        await asyncio.wait({task})


async def eventually(room: Room, files: list[str]) -> None:
    await until(lambda: room.files() == files, otherwise=lambda: f"{room.files()}, expected {files}")
