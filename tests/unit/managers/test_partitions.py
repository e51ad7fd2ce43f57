"""MIG instances follow the ledger: made when a claim is prepared, destroyed when it is released; never another's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from nodeagent.core.dra.pool import HELD_TAINT
from nodeagent.managers.partitions import manager as manager_of
from nodeagent.managers.partitions.journal import PartitionJournal
from tests.support.mig_driver import FIRST_CAP, address, uuid
from tests.support.mig_node import MigRoom, mig_room
from tests.support.until import until

CREATE_GI, CREATE_CI = "nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceCreateComputeInstance"


@pytest.fixture(autouse=True)
def state_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back after each test what the library in this process reads."""
    monkeypatch.setenv("FAKE_NVML_STATE", "")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_of, "ENDING_S", 0.0)
    monkeypatch.setattr(manager_of, "RETRY_S", 0.01)


async def test_a_claim_gets_the_instance_that_was_allocated_with_its_nodes_and_its_uuid(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        (answer,) = await room.prepare(claim)
        assert answer.error == ""
        assert room.driver.there() == {(0, "3g.40gb", 4)}
        (made,) = room.driver.instances()
        assert room.env(claim)["NVIDIA_VISIBLE_DEVICES"] == f"MIG-00000000-0000-0000-0000-{made.id:012x}"
        nodes = [one["path"] for one in room.spec(claim)["devices"][0]["containerEdits"]["deviceNodes"]]
        first = FIRST_CAP + made.id * 10
        caps = [f"/dev/nvidia-caps/nvidia-cap{first}", f"/dev/nvidia-caps/nvidia-cap{first + 1}"]
        assert nodes == ["/dev/nvidia0", "/dev/nvidiactl", *caps]
        assert await room.unprepare(claim) == [""]
        assert room.driver.instances() == []
        assert not (folder / "state" / "partitions.json").exists()
        assert room.files() == []


async def test_the_same_claim_gets_the_same_instance_also_after_kill_9(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        first = await room.prepare(claim)
        before = room.driver.instances()
        await room.restart()
        assert await room.prepare(claim) == first
        assert room.driver.instances() == before


async def test_nothing_that_is_published_changes_when_an_instance_is_made_or_destroyed(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        inventory, pool = room.agent.inventory, room.pool()
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        await room.prepare(claim)
        room.look()
        assert room.agent.inventory is inventory
        assert room.pool() == pool
        await room.unprepare(claim)
        room.look()
        assert room.agent.inventory is inventory


async def test_two_claims_are_not_given_what_overlaps(folder: Path) -> None:
    """As where a scheduler knows of no counters."""
    async with mig_room(folder, "h100-80") as room:
        await room.prepare(room.mig_claim("a", "mig-3g.40gb-4"))
        (answer,) = await room.prepare(room.mig_claim("b", "mig-1g.10gb-6"))
        assert "held by claim default/a" in answer.error
        assert room.driver.there() == {(0, "3g.40gb", 4)}


async def test_what_the_driver_refuses_is_said_and_nothing_of_the_claim_is_held(folder: Path) -> None:
    """A claim for two: the first was made already."""
    async with mig_room(folder, "h100-80") as room:
        room.driver.fault(CREATE_CI, "23")
        claim = room.mig_claim("c", "mig-3g.40gb-4", "mig-3g.40gb-0")
        (answer,) = await room.prepare(claim)
        where = f"MIG instance 3g.40gb at slice 4 of GPU {address(0)}"
        assert answer.error == f"cannot prepare claim default/c: cannot create {where}: Insufficient Resources"
        assert (room.driver.instances(), room.held(), room.files()) == ([], set(), [])
        assert await room.prepare(claim) != [answer]
        assert len(room.driver.instances()) == 2


async def test_the_second_instance_of_a_claim_that_is_refused_takes_the_first_with_it(folder: Path) -> None:
    async with mig_room(folder, "h100-80", "h100-80") as room:
        claim = room.mig_claim("c", f"{address(0)}/mig-3g.40gb-4", f"{address(1)}/mig-3g.40gb-4")
        room.driver.lose(1)
        (answer,) = await room.prepare(claim)
        assert f"of GPU {address(1)}: GPU is lost" in answer.error
        room.driver.lose(1, lost=False)
        await room.manager.settle()
        assert await room.unprepare(claim) == [""]
        assert room.driver.instances() == []


@pytest.mark.parametrize("what", ["lost", "late"])
async def test_a_creation_of_unknown_effect_is_looked_up_when_kubelet_asks_again(folder: Path, what: str) -> None:
    """The claim keeps what it was granted meanwhile, and no other claim gets it."""
    async with mig_room(folder, "h100-80") as room:
        room.probe.failing = [what]
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        (answer,) = await room.prepare(claim)
        assert "did not answer within 10 s" in answer.error
        assert room.held() == {f"{address(0)}/mig-3g.40gb-4"}
        (answer,) = await room.prepare(claim)
        assert answer.error == ""
        assert room.driver.there() == {(0, "3g.40gb", 4)}


async def test_instances_of_others_are_left_alone_and_hold_their_slices(folder: Path) -> None:
    """Also one that another program made since the machine was scanned."""
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        room.driver.make(0, "1g.10gb", 6)
        (answer,) = await room.prepare(claim)
        assert "an instance that the agent did not make has slices 6 to 6" in answer.error
        assert room.held() == set()
        room.look()
        assert not [one for one in room.pool().devices if one.part.device.endswith("3g.40gb-4")]
        assert room.driver.there() == {(0, "1g.10gb", 6)}


async def test_after_a_reboot_the_instance_is_made_again_and_one_that_others_made_there_is_not_taken(
    folder: Path,
) -> None:
    async with mig_room(folder, "h100-80", "h100-80") as room:
        mine = room.mig_claim("a", f"{address(0)}/mig-3g.40gb-4")
        other = room.mig_claim("b", f"{address(1)}/mig-3g.40gb-4")
        await room.prepare(mine)
        await room.prepare(other)
        room.driver.reset()
        room.driver.make(1, "3g.40gb", 4)
        await room.restart("another boot")
        await room.manager.settle()
        assert room.driver.there() == {(1, "3g.40gb", 4)}
        (answer,) = await room.prepare(mine)
        assert answer.error == ""
        assert room.driver.there() == {(0, "3g.40gb", 4), (1, "3g.40gb", 4)}
        assert await room.unprepare(other) == [""]
        assert room.driver.there() == {(0, "3g.40gb", 4), (1, "3g.40gb", 4)}


@pytest.mark.usefixtures("impatient")
async def test_an_instance_in_use_is_held_back_until_it_is_gone(folder: Path) -> None:
    """Kubelet is not kept waiting; the status names the reason; nothing that overlaps it is granted."""
    async with mig_room(folder, "h100-80") as room:
        claim, later = room.mig_claim("c", "mig-3g.40gb-4"), room.mig_claim("d", "mig-1g.10gb-6")
        await room.prepare(claim)
        (made,) = room.driver.instances()
        room.driver.use(0, made.id)
        assert await room.unprepare(claim) == [""]
        assert room.held() == set()
        (note,) = room.manager.notes()
        assert "In use" in note and "mig-3g.40gb-4 is held back" in note
        tainted = {one.part.device for one in room.pool().devices if HELD_TAINT in [taint.key for taint in one.taints]}
        assert f"{address(0)}/mig-1g.10gb-6" in tainted
        assert f"{address(0)}/mig-4g.40gb-0" not in tainted
        (answer,) = await room.prepare(later)
        assert "held by an instance that is to be destroyed" in answer.error
        following = asyncio.create_task(room.manager.lead())
        room.driver.use(0, made.id, busy=False)
        await until(lambda: not room.driver.instances())
        await until(lambda: not room.manager.notes())
        following.cancel()
        (answer,) = await room.prepare(later)
        assert answer.error == ""


@pytest.mark.usefixtures("impatient")
async def test_an_instance_in_use_is_held_back_by_the_next_agent_too(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        await room.prepare(claim)
        (made,) = room.driver.instances()
        room.driver.use(0, made.id)
        await room.unprepare(claim)
        await room.restart()
        await room.manager.settle()
        (answer,) = await room.prepare(room.mig_claim("d", "mig-1g.10gb-6"))
        assert "held by an instance that is to be destroyed" in answer.error


async def test_an_admin_who_destroys_an_instance_is_not_fought(folder: Path) -> None:
    """Its claim gets another when it is prepared again; one that another program made there meanwhile stays."""
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        await room.prepare(claim)
        (made,) = room.driver.instances()
        room.driver.destroy(0, made.id)
        room.driver.make(0, "3g.40gb", 4, id=3)
        await room.manager.settle()
        assert await room.unprepare(claim) == [""]
        assert [one.id for one in room.driver.instances()] == [3]


async def test_a_damaged_journal_leaves_every_instance_as_it_is(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-3g.40gb-4")
        await room.prepare(claim)
        (folder / "state" / "partitions.json").write_text("{")
        await room.restart()
        await room.unprepare(claim)
        assert room.driver.there() == {(0, "3g.40gb", 4)}


async def test_the_journal_is_written_before_the_driver_is_asked(folder: Path) -> None:
    seen = []

    class Watched(PartitionJournal):
        def keep(self, records):  # type: ignore[no-untyped-def]
            seen.append(room.driver.there())
            super().keep(records)

    async with mig_room(folder, "h100-80", journal_class=Watched) as room:
        await room.prepare(room.mig_claim("c", "mig-3g.40gb-4"))
        document = json.loads((folder / "state" / "partitions.json").read_text())
    assert seen == [set(), {(0, "3g.40gb", 4)}]
    assert [(one["gpu"], one["start"], one["boot_id"]) for one in document] == [(uuid(0), 4, "boot")]


async def test_an_error_of_an_instance_is_that_of_its_place(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        await room.prepare(room.mig_claim("c", "mig-3g.40gb-4"))
        (made,) = room.driver.instances()
        assert room.table.partition_of(room.agent.inventory, address(0), made.id) == f"{address(0)}/mig-3g.40gb-4"
        assert room.table.partition_of(room.agent.inventory, address(0), made.id + 1) is None


def stands(room: MigRoom) -> list[tuple[str, int, int, str, str, str]]:
    every = room.manager.document().get("instances", [])
    return [(one["profile"], one["start"], one["size"], one["state"], one["claim"], one["why"]) for one in every]


async def test_admins_see_the_agent_s_own_instances_as_they_stand(folder: Path, impatient: None) -> None:
    """Asked for, made, and in use after the claim has ended; those of others are not listed."""
    async with mig_room(folder, "h100-80") as room:
        room.driver.make(0, "1g.10gb", 6, id=14)
        room.look()
        assert room.manager.document() == {}
        claim = room.mig_claim("c", "mig-3g.40gb-0")
        room.driver.fault(CREATE_GI, "999")
        await room.prepare(claim)
        assert stands(room) == []
        room.probe.failing = ["lost"]
        (answer,) = await room.prepare(claim)
        assert "did not answer" in answer.error
        assert stands(room) == [("3g.40gb", 0, 4, "intended", "default/c", "")]
        await room.prepare(claim)
        assert stands(room) == [("3g.40gb", 0, 4, "made", "default/c", "")]
        (one,) = room.manager.document()["instances"]
        assert (one["device"], one["gpu"]) == (f"{address(0)}/mig-3g.40gb-0", address(0))
        assert one["uuid"] == room.env(claim)["NVIDIA_VISIBLE_DEVICES"]
        (ours,) = [it for it in room.driver.instances() if it.id != 14]
        room.driver.use(0, ours.id)
        await room.unprepare(claim)
        ((*_, state, claim_name, why),) = stands(room)
        assert (state, claim_name, "In use" in why) == ("held-back", "", True)
        room.driver.use(0, ours.id, busy=False)
        await room.manager.settle()
        assert room.manager.document() == {}


async def test_after_a_reboot_an_instance_is_intended_until_its_claim_is_prepared(folder: Path) -> None:
    async with mig_room(folder, "h100-80") as room:
        claim = room.mig_claim("c", "mig-2g.20gb-2")
        await room.prepare(claim)
        room.driver.reset()
        await room.restart("another boot")
        assert stands(room) == [("2g.20gb", 2, 2, "intended", "default/c", "")]
        await room.prepare(claim)
        assert stands(room) == [("2g.20gb", 2, 2, "made", "default/c", "")]
