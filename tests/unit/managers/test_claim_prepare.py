"""Claims prepared and unprepared, in one process, with a real ledger and real files: what kubelet is answered, what
lies on disk, and what is held, whatever goes wrong in between."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.core.dra.device_pool import label
from nodeagent.core.ledger.ledger import GRANTED, Change
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import HostError, StateError
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.kube.resourceclaim import POD_CLAIM_NAME
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.claim_files import ClaimRenderer, claims_held
from nodeagent.resources.catalog import Dra
from tests.oracles import device_metadata as reader
from tests.support.claim_node import Gate, Room, claim_room
from tests.support.dra_node import CPUS, DRIVER, PAGES, SERIAL, consumed, result
from tests.support.observed import observed
from tests.support.until import until

CPUS_OF_NODE_0 = CpuSet([0, 4])
PORT, OTHER_PORT = label("/dev/ttyS0"), label("/dev/ttyS1")


async def reached(gate: Gate) -> None:
    await asyncio.wait_for(gate.reached.wait(), 5)


def nothing_held(room: Room) -> None:
    assert not room.agent.ledger.grants
    assert room.files() == []


# ---------------------------------------------------------------- what is in use


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the last process of a pod to end."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)


async def test_a_claim_whose_pod_runs_is_not_given_back(folder: Path, impatient: None) -> None:
    """A kubelet that has lost track of a pod unprepares its claims: it is told that they are in use, and asks again."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        other = room.claim("d", result("char", PORT, "port"))
        assert [one.error for one in await room.prepare(claim)] == [""]
        room.alive.add("pod-uid")
        why = "cannot unprepare claim default/c: it is in use, it runs"
        assert await room.unprepare(claim, other) == [why, ""]
        assert room.cpus(claim) == CPUS_OF_NODE_0 and room.spec_file(claim).exists()
        room.alive.clear()
        assert await room.unprepare(claim) == [""]
        nothing_held(room)


async def test_a_runtimes_helper_that_outlives_the_container_is_waited_for(folder: Path) -> None:
    """Kubelet need not ask again for that."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(claim)
        room.alive.add("pod-uid")
        unprepared = asyncio.create_task(room.unprepare(claim))
        asyncio.get_running_loop().call_later(0.1, room.alive.clear)
        assert await unprepared == [""]
        nothing_held(room)


async def test_a_claim_allocated_anew_keeps_what_its_old_pod_still_uses(folder: Path) -> None:
    """The scheduler took it back and allocated something else; the container of before has not ended."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(claim)
        before = room.agent.ledger
        room.alive.add("pod-uid")
        room.claim("c", consumed("cpu", "numa1", cpus="2"), uid=claim.uid)
        (answer,) = await room.prepare(claim)
        assert answer.error == "cannot prepare claim default/c: it was allocated something else before, and it runs"
        assert room.agent.ledger == before
        room.alive.clear()
        assert [one.error for one in await room.prepare(claim)] == [""]
        assert room.cpus(claim).isdisjoint(CPUS_OF_NODE_0)


# ---------------------------------------------------------------- what is asked at the same time


async def test_calls_that_prepare_and_unprepare_claims_are_timed(folder: Path) -> None:
    """And so is each decision that they write."""
    names = ("prepare", "unprepare", "ledger_write")
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        before = [observed(one) for one in names]
        await room.prepare(claim)
        await room.unprepare(claim)
        assert [observed(one) for one in names] == [one + more for one, more in zip(before, (1, 1, 2), strict=True)]


async def test_what_is_unprepared_while_it_is_read_is_not_granted(folder: Path) -> None:
    """Kubelet gave up: no call would ever give back what it were granted."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        room.delay = gate = Gate()
        prepared = asyncio.create_task(room.prepare(claim))
        await reached(gate)
        assert await room.unprepare(claim) == [""]
        gate.opened.set()
        (answer,) = await prepared
        assert answer.error == "cannot prepare claim default/c: it was unprepared meanwhile"
        nothing_held(room)


async def test_what_is_unprepared_while_it_is_decided_is_not_answered(folder: Path) -> None:
    """No answer has kubelet start containers with what is no longer held."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        disk = held_up(room)
        prepared = asyncio.create_task(room.prepare(claim))
        await until(lambda: bool(room.agent.newest.grants))
        unprepared = asyncio.create_task(room.unprepare(claim))
        await until(lambda: not room.agent.newest.grants)
        disk.release()
        (answer,) = await prepared
        assert answer.error == "cannot prepare claim default/c: it was unprepared meanwhile"
        assert await unprepared == [""]
        nothing_held(room)
        assert [error for _, _, error in room.told] == [answer.error]


def held_up(room: Room) -> threading.Lock:
    """Files wait until this is released."""
    lock: threading.Lock = room.rendering._disk
    lock.acquire()
    return lock


async def test_what_was_prepared_again_meanwhile_is_written_as_it_is_held_now(folder: Path) -> None:
    """The same ids, other CPUs: a late writer must not hand out the old ones."""
    async with claim_room(folder) as room:
        claim, blocker = (room.claim(name, consumed("cpu", "numa0", cpus="2")) for name in ("c", "blocker"))
        disk = held_up(room)
        first = asyncio.create_task(room.prepare(claim))
        await until(lambda: claim.uid in claims_held(room.agent.newest))
        (old,) = claims_held(room.agent.newest)[claim.uid]
        away = asyncio.create_task(room.unprepare(claim))
        await until(lambda: not room.agent.newest.grants)
        other = asyncio.create_task(room.prepare(blocker))
        await until(lambda: blocker.uid in claims_held(room.agent.newest))
        second = asyncio.create_task(room.prepare(claim))
        await until(lambda: claim.uid in claims_held(room.agent.newest))
        (new,) = claims_held(room.agent.newest)[claim.uid]
        assert old.id == new.id and not old.cpus & new.cpus
        disk.release()
        answers = [(await one)[0].error for one in (first, other, second)]
        assert answers == ["cannot prepare claim default/c: it was unprepared meanwhile", "", ""]
        assert await away == [""]
        assert room.cpus(claim) == new.cpus


async def test_asked_for_many_times_at_once_a_claim_is_granted_once(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        answers = await asyncio.gather(*(room.prepare(claim) for _ in range(20)))
        assert len({one.devices for (one,) in answers}) == 1 and not answers[0][0].error
        assert len(room.agent.ledger.grants) == 2
        await asyncio.gather(*(room.unprepare(claim) for _ in range(20)))
        nothing_held(room)


async def test_who_hangs_up_finds_the_claim_prepared_or_not_at_all(folder: Path) -> None:
    """Cancelled at every step of the way."""
    async with claim_room(folder) as room:
        for steps in range(40):
            claim = room.claim(f"c{steps}", consumed("cpu", "numa0", cpus="4"))
            task = asyncio.create_task(room.prepare(claim))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            (answer,) = await room.prepare(claim)
            assert answer.error == "" and len(room.cpus(claim)) == 4
            assert await room.unprepare(claim) == [""]
            nothing_held(room)


async def test_a_claim_that_is_deleted_once_it_was_read_is_answered_and_can_be_given_back(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        assert (await room.prepare(claim))[0].error == ""
        del room.objects["default", "c"]
        (again,) = await room.prepare(claim)
        assert "the API server has no such claim" in again.error
        assert len(room.agent.ledger.grants) == 1
        assert await room.unprepare(claim) == [""]
        nothing_held(room)


# ---------------------------------------------------------------- the API server


async def test_a_server_that_hangs_is_not_waited_for_longer_than_kubelet_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 claims, some of them granted before: those are answered as they were."""
    monkeypatch.setattr(claims_of, "READ_S", 0.2)
    async with claim_room(folder) as room:
        known = [room.claim(f"k{n}", consumed("cpu", f"numa{n}", cpus="1")) for n in (0, 1)]
        before = await room.prepare(*known)
        room.delay = Gate()
        fresh = [room.claim(f"f{n}", consumed("cpu", "numa0", cpus="1")) for n in range(30)]
        answers = await room.prepare(*fresh, *known)
        assert answers[30:] == before
        assert {one.error.partition(": ")[2] for one in answers[:30]} == {"the API server did not answer within 0.2 s"}
        assert len(claims_held(room.agent.ledger)) == 2


async def nothing(*_: object) -> None:
    """At once."""


async def test_no_more_claims_are_read_at_once_than_the_client_asks_at_once(folder: Path) -> None:
    """Others would wait there with their time running."""
    async with claim_room(folder) as room:
        every = [room.claim(f"c{n}", result("char", PORT)) for n in range(32)]

        async def slow(ref: ClaimRef) -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        room.delay = slow
        answers = await room.prepare(*every)
        assert room.most_reading == claims_of.MOST_READS == 4
        assert sum(not one.error for one in answers) == 1


async def test_while_the_server_is_slow_everything_else_goes_on(folder: Path) -> None:
    async with claim_room(folder) as room:
        slow, other = room.claim("slow", consumed("cpu", "numa0", cpus="1")), room.claim("o", result("char", PORT))
        assert (await room.prepare(other))[0].error == ""
        room.delay = gate = Gate()
        waiting = asyncio.create_task(room.prepare(slow))
        await reached(gate)
        assert await room.unprepare(other) == [""]
        await room.rendering.restore()
        gate.opened.set()
        assert (await waiting)[0].error == ""


async def test_what_the_server_says_of_another_claim_is_not_believed(folder: Path) -> None:
    async with claim_room(folder) as room:
        asked = room.claim("c", result("char", PORT))
        room.objects["default", "c"]["metadata"]["name"] = "../../etc"
        (answer,) = await room.prepare(asked)
        assert "the API server has it as default/../../etc" in answer.error
        room.objects["default", "c"]["metadata"]["name"] = "c"
        assert (await room.prepare(asked))[0].error == ""


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("uid", ["../../x", "x" * 300, "a\nb", "", ".", "..", "a/b", "a\0b"])
async def test_files_are_named_after_no_hostile_uid(uid: str, folder: Path) -> None:
    """The DRA plugin passes none on; nothing is written wherever it points, and giving back the unknown is no error."""
    async with claim_room(folder) as room:
        claim = ClaimRef(namespace="default", name="c", uid=uid)
        room.claim("c", consumed("cpu", "numa0", cpus="1"))
        room.objects["default", "c"]["metadata"]["uid"] = uid
        before = everything(folder)
        (answer,) = await room.prepare(claim)
        assert "cannot name files after claim" in answer.error
        assert await room.unprepare(claim) == [""]
        nothing_held(room)
        assert {one.name for one in everything(folder) - before} <= {"cdi", "claims", "run"}


def everything(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


@pytest.mark.parametrize("name", ["a", "0", "a.b-c.d", "x" * 63, ".".join(["y" * 62] * 4)[:253], "1.2.3.4"])
async def test_the_longest_and_oddest_names_that_kubernetes_has_are_prepared(name: str, folder: Path) -> None:
    """Of claims (DNS subdomains) and of requests (DNS labels)."""
    async with claim_room(folder) as room:
        request = name.replace(".", "-")[:63].rstrip("-")
        claim = room.claim(name, consumed("cpu", "numa0", request, cpus="1"))
        (answer,) = await room.prepare(claim)
        assert answer.error == "" and answer.devices[0].requests == (request,)
        assert f'"containerPath": "/var/run/nodeagent/claims/{name}"' in room.spec_file(claim).read_text()


def mounts(room: Room, claim: ClaimRef) -> dict[str, str]:
    """Host paths by container path, of the files for applications of every driver."""
    devices = json.loads(room.spec_file(claim).read_text())["devices"]
    every = [one for it in devices for one in it["containerEdits"]["mounts"]]
    found = [one for one in every if one["containerPath"].startswith(reader.FOLDER)]
    assert all("ro" in one["options"] and "bind" in one["options"] for one in found)
    return {one["containerPath"]: one["hostPath"] for one in found}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def contents(mounts: dict[str, str]) -> dict[str, bytes]:
    return {path: Path(host_path).read_bytes() for path, host_path in mounts.items()}


async def test_applications_find_the_devices_of_a_claim_where_every_driver_puts_them(folder: Path) -> None:
    """From Prepare to Unprepare; put back where another program deletes it, and after a restart."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", "cpus", cpus="2"), result("char", PORT, "port/a"))
        await room.prepare(claim)
        cpus, port = (reader.claim_path(DRIVER, "c", request) for request in ("cpus", "port"))
        before = mounts(room, claim)
        assert list(before) == [cpus, port]
        files_of = contents(before)
        assert [one.name for one in reader.read(files_of[port]).requests or ()] == ["port/a"]
        for lost in (*before.values(), str(room.readable)):
            remove(Path(lost))
            await room.restart()
            await room.rendering.restore()
            assert contents(before) == files_of
        await room.unprepare(claim)
        nothing_held(room)


async def test_a_claim_made_from_a_template_is_found_by_its_name_in_the_pod(folder: Path) -> None:
    """Its own name is generated. The name is kept where the API server is away, over a restart and over a reboot."""
    async with claim_room(folder) as room:
        claim = room.claim("pod-mine-x7k2p", consumed("cpu", "numa0", "cpus", cpus="2"))
        room.objects["default", claim.name]["metadata"]["annotations"] = {POD_CLAIM_NAME: "mine"}
        await room.prepare(claim)
        path = reader.template_path(DRIVER, "mine", "cpus")
        before = mounts(room, claim)
        assert list(before) == [path]
        assert reader.read(contents(before)[path]).pod_claim_name == "mine"
        room.away = True
        await room.restart()
        room.spec_file(claim).unlink()
        shutil.rmtree(room.readable)
        await room.rendering.restore()
        assert mounts(room, claim) == before
        assert [one.error for one in await room.prepare(claim)] == [""]
        assert mounts(room, claim) == before


async def test_the_name_in_the_pod_that_another_agent_has_learned_is_kept(folder: Path) -> None:
    """During a rolling upgrade one prepares claims and the other keeps the files of both."""
    async with claim_room(folder) as room:
        claim = room.claim("pod-mine-x7k2p", consumed("cpu", "numa0", "cpus", cpus="2"))
        await room.prepare(claim)
        await room.restart()
        await room.rendering.restore()
        room.objects["default", claim.name]["metadata"]["annotations"] = {POD_CLAIM_NAME: "mine"}
        leader = room.rendering
        room.open()
        await room.prepare(claim)
        await leader.restore()
        assert list(mounts(room, claim)) == [reader.template_path(DRIVER, "mine", "cpus")]


@pytest.mark.parametrize("name", ["", "../../etc", "x" * 64, "Mine", 7, None])
async def test_an_annotation_that_names_no_claim_of_a_pod_counts_for_nothing(name: object, folder: Path) -> None:
    """Anyone may write one: the claim is found by its own name."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", "cpus", cpus="2"))
        room.objects["default", "c"]["metadata"]["annotations"] = {POD_CLAIM_NAME: name}
        assert [one.error for one in await room.prepare(claim)] == [""]
        assert list(mounts(room, claim)) == [reader.claim_path(DRIVER, "c", "cpus")]


async def test_a_claim_allocated_to_other_requests_has_no_files_of_the_former_ones(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", "before", cpus="2"))
        await room.prepare(claim)
        room.claim("c", consumed("cpu", "numa0", "after", cpus="2"), uid=claim.uid)
        await room.prepare(claim)
        assert sorted(one.name for one in (room.readable / claim.uid).iterdir()) == [
            "metadata.json",
            "request-after.json",
        ]


async def test_thirty_two_devices_in_one_claim_are_named_in_order(folder: Path) -> None:
    """The order of the allocation, not of the names: -10 comes after -9."""
    async with claim_room(folder, ports=32) as room:
        ports = [label(f"/dev/ttyS{n}") for n in range(32)]
        claim = room.claim("c", *(result("char", port, f"r{n}") for n, port in enumerate(ports)))
        (answer,) = await room.prepare(claim)
        assert [one.device for one in answer.devices] == ports
        assert len({one.cdi_ids for one in answer.devices}) == 32
        assert [one.ids for one in claims_held(room.agent.ledger)[claim.uid]] == [(port,) for port in ports]
        await room.restart()
        assert await room.prepare(claim) == [answer]


# ---------------------------------------------------------------- the disk


def full(where: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """No space for files below a folder for as long as the list has something."""
    is_full, real = [True], files._replace

    def replace_unless_full(path: Path, content: bytes, mode: int, durable: bool) -> None:
        if is_full and where in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content, mode, durable)

    monkeypatch.setattr(files, "_replace", replace_unless_full)
    return is_full


@pytest.mark.parametrize("where", ["/cdi/", "/claims/"])
async def test_a_full_disk_is_an_error_of_the_claim_and_the_next_try_succeeds(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided stays decided; nothing half-written lies about."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        is_full = full(where, monkeypatch)
        (answer,) = await room.prepare(claim)
        assert answer.error.startswith("cannot prepare claim default/c: cannot write ")
        assert answer.error.endswith("No space left on device") and not answer.devices
        decided = dict(room.agent.ledger.grants)
        assert len(decided) == 2
        is_full.clear()
        (again,) = await room.prepare(claim)
        assert again.error == "" and dict(room.agent.ledger.grants) == decided
        assert [error for _, _, error in room.told] == [answer.error, ""]
        await room.unprepare(claim)
        nothing_held(room)


async def test_a_ledger_that_cannot_be_written_grants_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        with monkeypatch.context() as patch:
            patch.setattr(room.agent._store, "save_all", refuse_to_save)
            with pytest.raises(StateError, match="disk is full"):
                await room.prepare(claim)
            nothing_held(room)
        assert (await room.prepare(claim))[0].error == ""
        with monkeypatch.context() as patch:
            patch.setattr(room.agent._store, "save_all", refuse_to_save)
            with pytest.raises(StateError, match="disk is full"):
                await room.unprepare(claim)
            assert len(room.agent.ledger.grants) == 2 and room.spec_file(claim).exists()
        assert await room.unprepare(claim) == [""]
        nothing_held(room)


def refuse_to_save(*_: object, **__: object) -> None:
    raise StateError("cannot save ledger.db: database or disk is full")


async def test_a_file_in_the_place_of_the_cdi_folder_is_said_and_overcome(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        room.cdi.touch()
        (answer,) = await room.prepare(claim)
        assert answer.error.startswith(f"cannot prepare claim default/c: cannot write {room.cdi}")
        with capture_logs() as logs:
            await room.rendering.restore()
            await room.rendering.restore()
        assert [line["event"] for line in logs].count("claim-not-rendered") == 1, "what does not change is said once"
        room.cdi.unlink()
        await room.rendering.restore()
        assert room.cpus(claim) == CPUS_OF_NODE_0
        assert (await room.prepare(claim))[0].error == ""


async def test_what_cannot_be_removed_is_an_error_and_given_back_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelet asks again until the files are gone; who else wants the CPUs has them at once."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="4"))
        await room.prepare(claim)

        def refuse(path: Path, *, durable: bool = True) -> bool:
            raise HostError(f"cannot remove {path}: Read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", refuse)
            (error,) = await room.unprepare(claim)
        assert error.startswith(f"cannot unprepare claim {claim.uid}: cannot remove ")
        assert (await room.prepare(room.claim("other", consumed("cpu", "numa0", cpus="4"))))[0].error == ""
        assert await room.unprepare(claim) == [""]
        assert not room.spec_file(claim).exists()


async def test_deleted_folders_are_put_back_and_orphans_and_drafts_removed(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(claim)
        before = room.files()
        for gone in (room.cdi, room.readable.parent):
            shutil.rmtree(gone)
            await room.rendering.restore()
            assert room.files() == before
        orphan = ClaimRef(namespace="default", name="x", uid="0ddba11d")
        room.spec_file(orphan).write_text("{}")
        (room.readable / orphan.uid).mkdir()
        (room.cdi / f".{room.spec_file(claim).name}.abc.tmp").touch()
        await room.rendering.restore()
        assert room.files() == before


def _delete(path: Path) -> None:
    path.unlink()


def _alter(path: Path) -> None:
    """Of the same length, in place, with the time of modification put back."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"', b"'"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _hide(path: Path) -> None:
    path.chmod(0o600)


async def test_files_are_rendered_again_only_if_they_or_what_they_come_from_have_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Housekeeping after each of many claims would otherwise cost more than the claims."""
    rendered: list[str] = []
    render = ClaimRenderer._write

    def counted(self: ClaimRenderer, dra: Dra, inventory: Inventory, uid: str, grants: Sequence[Grant]) -> None:
        rendered.append(uid)
        render(self, dra, inventory, uid, grants)

    async with claim_room(folder) as room:
        claim, other = (room.claim(name, consumed("cpu", "numa0", "cpus", cpus="2")) for name in ("c", "d"))
        await room.prepare(claim, other)
        own = [room.spec_file(claim), *sorted((room.readable / claim.uid).iterdir())]
        assert len(own) == 3
        before = {path: path.read_bytes() for path in own}
        monkeypatch.setattr(ClaimRenderer, "_write", counted)
        await room.rendering.restore(afresh=False)
        assert rendered == []
        for path, harm in itertools.product(own, (_delete, _alter, _hide)):
            harm(path)
            await room.rendering.restore(afresh=False)
            assert {one: one.read_bytes() for one in own} == before
            assert path.stat().st_mode & 0o777 == 0o644
            assert rendered == [claim.uid]
            rendered.clear()
        room.agent.inventory = replace(room.agent.inventory, generation=room.agent.inventory.generation + 1)
        await room.rendering.restore(afresh=False)
        assert sorted(rendered) == sorted([claim.uid, other.uid])
        await room.rendering.restore(afresh=True)
        assert len(rendered) == 4


# ---------------------------------------------------------------- the machine and the configuration change


async def test_a_device_that_vanishes_after_the_decision_is_an_error_until_it_is_back(folder: Path) -> None:
    """It stays held, and what else the claim has stays as it was."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        disk = held_up(room)
        prepared = asyncio.create_task(room.prepare(claim))
        await until(lambda: len(room.agent.newest.grants) == 2)
        (room.tree.root / "dev/ttyS0").unlink()
        room.rescan()
        disk.release()
        (answer,) = await prepared
        assert "cannot hand over /dev/ttyS0: it is not there at this moment" in answer.error
        assert len(room.agent.ledger.grants) == 2
        taken = (await room.prepare(room.claim("d", consumed("cpu", "numa0", cpus="3"))))[0].error
        assert "held there by claim default/c" in taken
        room.tree.node("/dev/ttyS0")
        room.rescan()
        await room.rendering.restore()
        assert room.spec_file(claim).exists()
        assert (await room.prepare(claim))[0].error == ""


async def test_a_reload_during_prepare_is_decided_and_written_by_one_configuration_each(folder: Path) -> None:
    """A claim of what is served no more can be given back; once it is served again it is prepared again."""
    async with claim_room(folder) as room:
        claim = room.claim("c", result("char", PORT))
        room.delay = gate = Gate()
        prepared = asyncio.create_task(room.prepare(claim))
        await reached(gate)
        room.serve(CPUS)
        gate.opened.set()
        assert "there is no pool 'node-a/char' on this node (there are: node-a/cpu)" in (await prepared)[0].error
        room.serve(CPUS, SERIAL)
        (answer,) = await room.prepare(claim)
        assert answer.error == ""
        before = room.spec_file(claim).read_bytes()
        room.serve(CPUS)
        (stale,) = await room.prepare(claim)
        assert "no configured resource serves it" in stale.error
        await room.rendering.restore()
        assert room.spec_file(claim).read_bytes() == before, "running containers may be started again with it"
        room.serve(CPUS, SERIAL)
        assert await room.prepare(claim) == [answer]
        room.serve(CPUS)
        assert await room.unprepare(claim) == [""]
        nothing_held(room)


async def test_a_reboot_keeps_claims_and_puts_back_what_tmpfs_forgot(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        before = await room.prepare(claim)
        shutil.rmtree(room.cdi)
        shutil.rmtree(room.readable)
        await room.restart("another boot")
        assert await room.prepare(claim) == before
        assert room.cpus(claim) == CPUS_OF_NODE_0


async def test_an_agent_that_stops_during_prepare_grants_whole_or_not_at_all(folder: Path) -> None:
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        room.delay = gate = Gate()
        prepared = asyncio.create_task(room.prepare(claim))
        await reached(gate)
        await room.agent.close()
        gate.opened.set()
        with pytest.raises(StateError, match="the agent is stopping"):
            await prepared
        room.delay = nothing
        await room.restart()
        assert (await room.prepare(claim))[0].error == ""


# ---------------------------------------------------------------- odd ledgers


async def test_what_an_older_build_has_recorded_without_a_result_is_decided_again(folder: Path) -> None:
    """Until then it is said of that claim alone, and files of others are written."""
    async with claim_room(folder) as room:
        odd, good = (room.claim(name, consumed("cpu", f"numa{n}", cpus="2")) for n, name in enumerate(("odd", "good")))
        await room.prepare(odd, good)
        (grant,) = claims_held(room.agent.ledger)[odd.uid]
        bare = replace(grant, result=None)
        room.agent._store.save([Change(action=GRANTED, grant=bare)], op="op", at=1)
        await room.restart()
        room.away = True
        stale, fine = await room.prepare(odd, good)
        assert f"grant {grant.id} of the ledger does not say what was allocated" in stale.error
        assert fine.error == ""
        room.away = False
        assert (await room.prepare(odd))[0].error == ""
        assert claims_held(room.agent.ledger)[odd.uid][0].result is not None


async def test_an_admin_who_releases_part_of_a_claim_releases_all_of_it(folder: Path) -> None:
    """Half a claim is nothing that kubelet could be told of; asked again, it is granted whole."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", PORT, "port"))
        other = room.claim("o", result("char", OTHER_PORT))
        before = await room.prepare(claim, other)
        gone = await room.agent.release([f"{claim.uid}-1"], "op")
        assert {one.id for one in gone} == {f"{claim.uid}-0", f"{claim.uid}-1"}
        assert [one.holder.claim for one in room.agent.ledger.grants.values()] == ["o"]
        await room.rendering.restore()
        assert not room.spec_file(claim).exists()
        room.away = True
        assert "on purpose" in (await room.prepare(claim))[0].error
        room.away = False
        assert await room.prepare(claim, other) == before


async def test_pages_of_a_size_that_is_served_no_more_are_given_back(folder: Path) -> None:
    hugepages = {(0, 2 << 20): (8, 8, 0), (1, 2 << 20): (4, 4, 0)}
    async with claim_room(folder, CPUS, PAGES, hugepages=hugepages) as room:
        claim = room.claim("c", consumed("hugepages", "numa0-2mi", size="4Mi"))
        (answer,) = await room.prepare(claim)
        assert answer.error == ""
        room.serve(CPUS)
        assert await room.prepare(claim) == [answer], "pages need no resource to be handed over"
        assert await room.unprepare(claim) == [""]
        nothing_held(room)


# ---------------------------------------------------------------- anything at all


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("puaord"), st.integers(0, 6)), max_size=25))
def test_whatever_is_asked_in_whatever_order_answers_files_and_ledger_agree(steps: list[tuple[int, str, int]]) -> None:
    """Calls overlap by as many steps of the loop as drawn."""
    with tempfile.TemporaryDirectory(prefix="na-") as name:
        asyncio.run(_overlapping(Path(name), steps))


async def _overlapping(folder: Path, steps: list[tuple[int, str, int]]) -> None:
    async with claim_room(folder) as room:
        every = [room.claim(f"c{n}", consumed("cpu", f"numa{n % 2}", cpus="3")) for n in range(3)]
        every.append(room.claim("c3", result("char", PORT), consumed("cpu", "numa0", "cpus", cpus="2")))
        running: list[asyncio.Task[object]] = []
        for number, what, pause in steps:
            claim = every[number]
            match what:
                case "p":
                    running.append(asyncio.create_task(room.prepare(claim)))
                case "u":
                    running.append(asyncio.create_task(room.unprepare(claim)))
                case "a":
                    room.away = not room.away
                case "o":
                    running.append(asyncio.create_task(room.rendering.restore()))
                case "r":
                    running.append(asyncio.create_task(room.agent.release([f"{claim.uid}-0"], "op")))  # type: ignore[arg-type]
                case "d":
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(room.cdi)
            for _ in range(pause):
                await asyncio.sleep(0)
        await asyncio.gather(*running)
        room.away = False
        await room.rendering.restore()
        held = claims_held(room.agent.ledger)
        assert sorted(one.name for one in room.readable.glob("*")) == sorted(held)
        for claim in every:
            if claim.uid in held:
                words = [room.env(claim, n).get("NODEAGENT_CPUS", "") for n in range(len(held[claim.uid]))]
                cpus = [str(grant.cpus) for grant in held[claim.uid]]
                assert words == cpus
        total = [cpu for grants in held.values() for grant in grants for cpu in grant.cpus]
        assert len(total) == len(set(total))


async def test_a_peer_error_of_an_unknown_claim_is_its_own(folder: Path) -> None:
    async with claim_room(folder) as room:
        unknown = ClaimRef(namespace="default", name="x", uid="8f2d2c1e")
        room.away = True
        with capture_logs() as logs:
            (answer,) = await room.prepare(unknown)
        assert answer.error == "cannot prepare claim default/x: cannot reach the API server: on purpose"
        assert [line["event"] for line in logs] == ["claim-refused"]
