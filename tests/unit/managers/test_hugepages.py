"""Pools of hugepages that the agent provides: what is configured, what claims need, and what goes back, whatever the
kernel gives and whenever the agent dies."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.core.dra.memory_pools import SIZE as CAPACITY
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.hugepages import resize as hugepageset
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.hugepages.growth import GrowthTiming
from nodeagent.managers.hugepages.pool_resizer import LOCK
from nodeagent.state.lock import FileLock
from tests.builders.machines import MIB, machine
from tests.support.claim_node import Gate
from tests.support.dra_node import DRIVER
from tests.support.hugepage_node import CLAIM_UID, POOL, QUICK, RULE, SIZE, STEPS, PageRoom, page_room
from tests.support.paths import CHECKOUT
from tests.support.running import running

PROVIDED: Mapping[str, Any] = {"pageSize": "2Mi", "node": 0, "pages": 700}
PATIENT = GrowthTiming(poll_s=0.01, rest_s=3600, lock_s=5, grow_s=5)


def published(room: PageRoom) -> int:
    """Pages of node 0 that the scheduler sees."""
    agent = room.room.agent
    pool = room.room.dra.catalog.kinds["hugepages"].pool(agent.inventory, agent.ledger, agent.health, ALL_FEATURES)
    return pool.devices[0].capacity[CAPACITY].value // SIZE


# ---------------------------------------------------------------- what the configuration wants


async def test_a_pool_is_made_as_large_as_configured(folder: Path) -> None:
    async with page_room(folder, PROVIDED) as room, room.following():
        await room.until(lambda: room.room.agent.inventory.numa_nodes[0].hugepages[0].total_pages == 700)
        assert room.kernel.sizes == [520, 700], "by steps of 1 GiB"
        assert room.total(1) == 4
        assert room.pages.notes() == []
        assert not room.record.exists(), "these pages stay"


async def test_a_pool_that_is_larger_already_is_left_alone(folder: Path) -> None:
    async with page_room(folder, {**PROVIDED, "pages": 5}, {**PROVIDED, "node": 1, "pages": 6}) as room:
        async with room.following():
            await room.until(lambda: room.total(1) == 6)
        assert [path for path, _ in room.kernel.written if "node0" in path] == []


async def test_what_the_kernel_does_not_give_is_said_once_and_asked_again_when_something_changes(folder: Path) -> None:
    async with page_room(folder, PROVIDED, memory={POOL: 300}) as room:
        with capture_logs() as logs:
            async with room.following():
                await room.until(lambda: bool(room.pages.notes()))
                assert room.pages.notes() == ["not provided: 2Mi on node 0: 700 wanted, 300 given"]
                tries = len(room.kernel.sizes)
                room.kernel.memory = {POOL: 1000}
                room.configure({**PROVIDED, "pages": 701})
                await room.until(lambda: room.pages.notes() == [])
        assert room.total() == 701
        assert [one["problem"] for one in logs if one["event"] == "pages-not-provided"] == [
            "not provided: 2Mi on node 0: 700 wanted, 300 given"
        ]
        assert tries < 10, "it is not asked at every look"


async def test_a_pool_that_somebody_else_made_smaller_is_provided_again(folder: Path) -> None:
    async with page_room(folder, PROVIDED) as room, room.following():
        await room.until(lambda: published(room) == 700)
        room.kernel.add(POOL, -600)
        await room.until(lambda: room.total() == 700)


async def test_a_pool_that_is_what_it_was_after_a_scan_saw_it_smaller_is_seen(folder: Path) -> None:
    async with page_room(folder) as room:
        await room.pages._look()
        room.kernel.add(POOL, 5)
        await room.rescan()
        room.kernel.add(POOL, -5)
        await room.pages._look()
        assert room.room.agent.inventory.numa_nodes[0].hugepages[0].total_pages == 8


async def test_a_pool_that_no_scan_can_show_causes_one_scan_alone(folder: Path) -> None:
    async with page_room(folder) as room:
        path = room.kernel.root / "sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages"
        path.write_text("many")
        await room.rescan()
        scans = room.rescans
        for _ in range(3):
            await room.pages._look()
        assert room.rescans == scans + 1


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"pageSize": "2Mi", "node": 7, "pages": 1}, "2Mi on node 7: this machine has no NUMA node 7, it has 0-1$"),
        (
            {"pageSize": "1Gi", "node": 0, "pages": 1},
            "1Gi on node 0: NUMA node 0 has no pages of that size, it has 2Mi$",
        ),
    ],
)
async def test_a_pool_that_the_machine_does_not_have_is_said_and_the_others_are_provided(
    folder: Path, rule: Mapping[str, Any], why: str
) -> None:
    async with page_room(folder, rule, PROVIDED) as room, room.following():
        await room.until(lambda: room.total() == 700 and bool(room.pages.notes()))
        (problem,) = room.pages.notes()
        assert problem.startswith("not provided: ")
        assert re.search(why, problem), problem


async def test_a_read_only_sys_is_said_with_path_and_value(folder: Path) -> None:
    def put(path: str, value: str) -> None:
        raise HostError(f"cannot write {path}: Read-only file system, value {value!r}")

    async with page_room(folder) as room:
        room.open(PROVIDED, put=put)
        async with room.following():
            await room.until(lambda: bool(room.pages.notes()))
        (problem,) = room.pages.notes()
        assert problem.endswith("hugepages-2048kB/nr_hugepages: Read-only file system, value '520'")


async def test_a_pool_that_changes_its_size_is_seen_soon_and_faults_alone_cause_no_scan(folder: Path) -> None:
    async with page_room(folder, RULE) as room, room.following():
        room.kernel.use(POOL, 3)
        room.kernel.add((1, SIZE), 5)
        await room.until(lambda: room.room.agent.inventory.numa_nodes[1].hugepages[0].total_pages == 9)
        assert room.rescans == 1
        room.kernel.use(POOL, -1)
        looks = room.rescans
        await asyncio.to_thread(room.pages._totals)
        await room.pages._look()
        assert room.rescans == looks


async def test_a_running_agent_provides_what_its_configuration_says_now(folder: Path) -> None:
    """On a tree of files, that takes any number: at the start, and after the configuration changed."""
    root = machine(folder / "root", "1s2n4c", hugepages={POOL: (8, 8, 0)})
    pool = root / "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
    rules = [{"pageSize": "2Mi", "node": 0, "pages": 12}, {"pageSize": "2Mi", "node": 7, "pages": 1}]
    async with running(folder, root=root, resources=[], hugepages=rules) as agent:
        said = await agent.said("pages-not-provided")
        assert said["problem"] == "not provided: 2Mi on node 7: this machine has no NUMA node 7, it has 0-1"
        assert int(pool.read_text()) == 12
        status = await agent.until("/v1/status", lambda status: status["notes"])
        assert status["notes"] == [said["problem"]]
        metrics = await agent.until("/metrics", lambda text: 'state="total"} 12.0' in text)
        assert 'nodeagent_hugepages{node="0",size="2Mi",state="free"} 8.0' in metrics
        assert "foreign" not in metrics.partition("nodeagent_hugepages{")[2]
        agent.configure(resources=[], hugepages=[{**rules[0], "pages": 20}])
        await agent.said("pages-provided", pages=20)
        assert (await agent.until("/v1/status", lambda status: not status["notes"]))["config_error"] == ""


# ---------------------------------------------------------------- what claims need


async def test_a_claim_that_needs_more_pages_than_there_are_gets_them(folder: Path) -> None:
    async with page_room(folder) as room:
        assert published(room) == 2000
        claim = room.claim("c", 20)
        (answer,) = await room.prepare(claim)
        assert answer.error == ""
        assert (room.total(), room.kernel.sizes) == (20, [20])
        assert published(room) == 2000
        assert json.loads(room.record.read_text()) == [
            {"node": 0, "page_bytes": SIZE, "base_pages": 8, "grown_pages": 20, "boot_id": "boot"}
        ]
        assert await room.prepare(claim) == [answer]
        assert room.kernel.sizes == [20], "the same claim again makes nothing grow"


async def test_a_claim_that_fits_touches_no_pool(folder: Path) -> None:
    async with page_room(folder) as room:
        (answer,) = await room.prepare(room.claim("c", 8))
        assert (answer.error, room.kernel.written, room.rescans) == ("", [], 0)


async def test_a_claim_for_a_pool_that_may_not_grow_is_refused_with_its_numbers(folder: Path) -> None:
    async with page_room(folder) as room:
        (answer,) = await room.prepare(room.claim("c", 5, node=1))
        assert "5 hugepages of 2097152 bytes on NUMA node 1: 4 can be granted" in answer.error
        assert room.kernel.written == []


async def test_pages_in_use_by_others_are_made_up_for(folder: Path) -> None:
    """Known again before the pool grows: 6 of 8 pages went to other processes since the last scan."""
    async with page_room(folder) as room:
        room.kernel.use(POOL, 6)
        (answer,) = await room.prepare(room.claim("c", 10))
        assert (answer.error, room.total()) == ("", 16)


async def test_what_the_kernel_gave_for_a_refused_claim_goes_back_at_once(folder: Path) -> None:
    async with page_room(folder, memory={POOL: 15}) as room:
        (answer,) = await room.prepare(room.claim("c", 20))
        assert "20 hugepages of 2097152 bytes on NUMA node 0: 15 can be granted" in answer.error
        assert answer.error.endswith("; the pool was to grow by 12 pages, the kernel gave 7")
        assert room.total() == 8
        assert not room.record.exists()


# ---------------------------------------------------------------- what stays free


def available(room: PageRoom, size: int) -> None:
    """So much memory of node 0 is available, and of the machine twice as much."""
    for path, prefix, name, kib in (
        ("sys/devices/system/node/node0/meminfo", "Node 0 ", "MemFree", size >> 10),
        ("proc/meminfo", "", "MemAvailable", size >> 9),
    ):
        (room.kernel.root / path).write_text(f"{prefix}MemTotal: {16 << 20} kB\n{prefix}{name}: {kib} kB\n")


@pytest.mark.parametrize("spare", [-1, 0, 1])
async def test_a_pool_grows_only_as_far_as_memory_stays_free(spare: int, folder: Path) -> None:
    """The node's other applications are neither reclaimed from nor evicted for the pages of a claim."""
    async with page_room(folder, {**RULE, "keepFree": "64Mi"}) as room:
        available(room, (32 + 12) * SIZE + spare)
        answers = await room.prepare(room.claim("c", 8 + 12))
        if spare >= 0:
            assert [one.error for one in answers] == [""] and room.total() == 20
        else:
            assert re.search(
                r"the pool was to grow by 12 pages and grew by 11: \d+ bytes of NUMA node 0 are available, "
                r"of which 64Mi stay free \(keepFree\)$",
                answers[0].error,
            )
            assert room.total() == 8, "what was grown in vain goes back"


async def test_a_pool_does_not_grow_where_hardly_any_memory_is_free(folder: Path) -> None:
    """Nothing is asked of the kernel, which would take it from page caches and swap."""
    async with page_room(folder) as room:
        available(room, 256 * MIB)
        (answer,) = await room.prepare(room.claim("c", 9))
        assert answer.error.endswith(
            "268435456 bytes of NUMA node 0 are available, of which 256Mi stay free (keepFree)"
        )
        assert room.kernel.sizes == [] and not room.record.exists()
        available(room, 256 * MIB + SIZE)
        assert [one.error for one in await room.prepare(room.claim("c", 9))] == [""]


async def test_memory_that_others_take_while_a_pool_grows_is_left_to_them(folder: Path) -> None:
    """It is looked at again after each step of 1 GiB."""
    async with page_room(folder) as room:
        available(room, 3 << 30)
        real = room.kernel.put

        def put(path: str, value: str) -> None:
            real(path, value)
            if len(room.kernel.sizes) == 1:
                room.kernel.take(0, (1 << 30) + (512 << 20))

        room.open(RULE, put=put)
        (answer,) = await room.prepare(room.claim("c", 8 + 1200))
        assert "(keepFree)" in answer.error
        assert max(room.kernel.sizes) == 8 + 512 + 128


@pytest.mark.parametrize("path", ["sys/devices/system/node/node0/meminfo", "proc/meminfo"])
async def test_a_pool_does_not_grow_where_nobody_knows_what_is_free(path: str, folder: Path) -> None:
    async with page_room(folder) as room:
        (room.kernel.root / path).write_text(f"MemTotal: {16 << 20} kB\n")
        (answer,) = await room.prepare(room.claim("c", 9))
        assert re.search(rf"cannot read .*/{path}: expected a line Mem(Free|Available): N kB$", answer.error)
        assert room.total() == 8


async def test_of_two_claims_the_one_that_can_be_granted_keeps_its_pages(folder: Path) -> None:
    async with page_room(folder, memory={POOL: 15}) as room:
        first, second = await room.prepare(room.claim("a", 12), room.claim("b", 12))
        assert (first.error, bool(second.error)) == ("", True)
        assert room.total() == 12


async def test_a_refusal_for_another_reason_gives_all_pages_back(folder: Path) -> None:
    async with page_room(folder) as room:
        claim = room.claim("c", 20)
        said = {"driver": DRIVER, "parameters": {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "Nonsense"}}
        devices = room.room.objects["default", "c"]["status"]["allocation"]["devices"]
        devices["config"] = [{"source": "FromClaim", "opaque": said}]
        (answer,) = await room.prepare(claim)
        assert "Nonsense" in answer.error
        assert room.kernel.sizes == [20, 8]
        assert (room.total(), room.record.exists()) == (8, False)


async def test_a_pool_that_cannot_be_written_is_the_reason_of_the_refusal(folder: Path) -> None:
    def put(path: str, value: str) -> None:
        raise HostError(f"cannot write {path}: Permission denied, value {value!r}")

    async with page_room(folder) as room:
        room.open(RULE, put=put)
        (answer,) = await room.prepare(room.claim("c", 20))
        assert "8 can be granted; cannot write " in answer.error
        assert answer.error.endswith("nr_hugepages: Permission denied, value '20'")


async def test_a_record_that_cannot_be_written_keeps_the_pool_as_it_is(folder: Path) -> None:
    """What would not be known after a crash is not done."""
    async with page_room(folder) as room:
        room.record.mkdir()
        (answer,) = await room.prepare(room.claim("c", 20))
        assert f"8 can be granted; cannot write {room.record}: " in answer.error
        assert room.kernel.written == []


async def test_claims_at_once_grow_a_pool_for_each(folder: Path) -> None:
    async with page_room(folder) as room:
        answers = await asyncio.gather(*(room.prepare(room.claim(f"c{n}", 5)) for n in range(6)))
        assert [one[0].error for one in answers] == [""] * 6
        assert room.total() == 30


async def test_another_agent_that_grows_pools_is_waited_for(folder: Path) -> None:
    async with page_room(folder) as room:
        other = FileLock(folder / "state" / LOCK)
        assert other.try_take()
        prepared = asyncio.create_task(room.prepare(room.claim("c", 20)))
        await asyncio.sleep(0)
        assert not prepared.done() and room.kernel.written == []
        other.close()
        assert [one.error for one in await prepared] == [""]


async def test_while_another_agent_grows_pools_for_too_long_claims_are_decided_by_what_is_there(folder: Path) -> None:
    async with page_room(folder, pace=GrowthTiming(lock_s=0.1)) as room:
        other = FileLock(folder / "state" / LOCK)
        assert other.try_take()
        fits, lacks = await room.prepare(room.claim("a", 8), room.claim("b", 1))
        assert fits.error == ""
        assert lacks.error.endswith(f"; cannot change hugepage pools: another agent has {folder}/state/{LOCK}")
        other.close()


async def test_what_is_unprepared_while_pools_grow_is_not_granted(folder: Path) -> None:
    async with page_room(folder) as room:
        gate = Gate()

        async def rescan() -> None:
            await gate()
            await room.rescan()

        room.open(RULE, rescan=rescan)
        claim = room.claim("c", 20)
        prepared = asyncio.create_task(room.prepare(claim))
        await asyncio.wait_for(gate.reached.wait(), 5)
        await room.room.unprepare(claim)
        gate.opened.set()
        (answer,) = await prepared
        assert answer.error == "cannot prepare claim default/c: it was unprepared meanwhile"
        assert not room.room.agent.ledger.grants
        assert room.total() == 8


async def test_the_machine_itself_grows_a_pool_for_a_claim_and_has_its_pages_back(folder: Path) -> None:
    """Its real pools, seen through links from a built machine."""
    try:
        before = hugepageset.counts(SysFs(), *POOL).persistent_pages
        cgroupset.put("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", str(before))
    except HostError as error:
        pytest.skip(f"this machine's pools cannot be changed: {error}")
    async with page_room(folder) as room:
        for path in ("sys/devices/system/node/node0/hugepages", "sys/kernel/mm/hugepages"):
            (room.kernel.root / path).rename(folder / path.replace("/", "-"))
            (room.kernel.root / path).symlink_to(f"/{path}")
        room.open({**RULE, "maxPages": before + 6}, put=cgroupset.put)
        await room.rescan()
        fits, lacks = await room.prepare(room.claim("a", before + 6), room.claim("b", 1))
        assert fits.error == ""
        assert "1 hugepages of 2097152 bytes on NUMA node 0: 0 can be granted" in lacks.error
        assert room.total() == before + 6
        await room.room.agent.release([*room.room.agent.ledger.grants], "op")
        await room.pages._growth.give_back()
        assert room.total() == before


# ---------------------------------------------------------------- what claims need no longer


async def test_a_released_claims_pages_go_back_after_a_rest(folder: Path) -> None:
    async with page_room(folder) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        async with room.following():
            await room.room.unprepare(claim)
            await room.until(lambda: room.total() == 8)
            await room.until(lambda: not room.record.exists())
        assert published(room) == 2000


async def test_pages_of_a_claim_that_lives_stay(folder: Path) -> None:
    async with page_room(folder) as room:
        stays, goes = room.claim("stays", 12), room.claim("goes", 12)
        await room.prepare(stays)
        await room.prepare(goes)
        assert room.total() == 24
        await room.room.unprepare(goes)
        for _ in range(3):
            await room.pages._growth.give_back()
        assert room.total() == 24, "only when nothing of what was grown is granted any longer"
        await room.room.unprepare(stays)
        await room.pages._growth.give_back()
        assert room.total() == 8


async def test_what_rests_too_short_stays(folder: Path) -> None:
    async with page_room(folder, pace=PATIENT) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        await room.room.unprepare(claim)
        await room.pages._growth.give_back()
        await room.pages._growth.give_back()
        assert room.total() == 20


async def test_pages_that_another_agent_granted_meanwhile_stay(folder: Path) -> None:
    """As during a rolling change: this one has not learned of the grant when it is about to give back."""
    async with page_room(folder) as room, page_room(folder) as other:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        await room.room.unprepare(claim)
        await other.rescan()
        (answer,) = await other.prepare(other.claim("d", 20))
        assert (answer.error, other.kernel.written) == ("", [])
        await room.pages._growth.give_back()
        assert room.total() == 20


async def test_pages_that_somebody_took_since_the_last_scan_are_not_torn_from_the_rest(folder: Path) -> None:
    async with page_room(folder) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        await room.room.unprepare(claim)
        room.kernel.use(POOL, 15)
        await room.pages._growth.give_back()
        assert (room.total(), room.record.exists()) == (20, True)


async def test_pages_that_are_still_in_use_after_the_release_stay_until_they_are_free(folder: Path) -> None:
    async with page_room(folder) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        room.kernel.use(POOL, 20)
        await room.room.unprepare(claim)
        await room.pages._growth.give_back()
        assert room.kernel.counts(POOL) == (20, 0, 0)
        room.kernel.use(POOL, -20)
        await room.rescan()
        await room.pages._growth.give_back()
        assert room.kernel.counts(POOL) == (8, 8, 0)


async def test_pages_that_somebody_else_added_are_theirs(folder: Path) -> None:
    async with page_room(folder) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        room.kernel.add(POOL, 30)
        await room.room.unprepare(claim)
        await room.rescan()
        await room.pages._growth.give_back()
        assert room.total() == 38


async def test_a_pool_is_not_made_smaller_than_configured(folder: Path) -> None:
    async with page_room(folder, {**RULE, "pages": 15}) as room:
        claim = room.claim("c", 20)
        await room.prepare(claim)
        await room.room.unprepare(claim)
        await room.pages._growth.give_back()
        assert room.total() == 15


async def test_a_record_that_cannot_be_read_is_said_and_takes_no_page_from_anybody(folder: Path) -> None:
    async with page_room(folder) as room:
        room.kernel.add(POOL, 50)
        await room.rescan()
        room.record.write_text("[")
        with capture_logs() as logs:
            await room.pages._growth.give_back()
            await room.pages._growth.give_back()
        assert [one["event"] for one in logs] == ["page-records-unreadable"]
        assert room.total() == 58


steps_ = st.lists(st.tuples(st.sampled_from("puugrax"), st.integers(0, 3), st.integers(1, 12)), max_size=20)


@settings(max_examples=25)
@given(steps_, st.integers(8, 40))
def test_whatever_happens_nobody_elses_page_is_taken_and_all_of_ours_go_back(
    steps: list[tuple[str, int, int]], memory: int
) -> None:
    """Claims come and go, a restart comes between, the host uses pages, gives them back and adds some of its own."""
    with tempfile.TemporaryDirectory(prefix="na-") as name:
        asyncio.run(_happening(Path(name), steps, memory))


async def _happening(folder: Path, steps: list[tuple[str, int, int]], memory: int) -> None:
    async with page_room(folder, memory={POOL: memory}) as room:
        claims, used, added = {n: room.claim(f"c{n}", 3 + 5 * n) for n in range(4)}, 0, 0
        for what, number, pages in steps:
            match what:
                case "p":
                    await room.prepare(claims[number], claims[(number + 1) % 4])
                case "u":
                    await room.room.unprepare(claims[number])
                case "g":
                    await room.pages._growth.give_back()
                case "r":
                    await room.pages.close()
                    room.open(RULE)
                case "a" if not used:  # what is added is free: so it cannot be told from ours while others use some
                    room.kernel.add(POOL, pages)
                    added += pages
                case "x":
                    free = room.kernel.counts(POOL)[1]
                    room.kernel.use(POOL, min(free, pages))
                    used += min(free, pages)
            total, free, surplus = room.kernel.counts(POOL)
            assert (total - free, surplus) == (used, 0)
            assert total >= 8 + added
            assert sum(room.room.agent.ledger.pages_held.values()) <= total
        await room.room.unprepare(*claims.values())
        room.kernel.use(POOL, -used)
        await room.rescan()
        await room.pages._growth.give_back()
        assert room.total() == 8 + added


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("step", STEPS)
async def test_after_kill_9_at_any_step_the_next_agent_gives_back_what_nobody_was_granted(
    folder: Path, step: str
) -> None:
    """Between the record and the first page, half-way, before the decision, and after it: then the pages stay."""
    dying = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.hugepage_node", str(folder), step, cwd=CHECKOUT
    )
    assert await dying.wait() == -signal.SIGKILL
    async with page_room(folder, pace=QUICK) as room:
        left = {"recorded": 8, "half-way": 520, "grown": 1000, "decided": 1000}[step]
        assert (room.total(), room.record.exists()) == (left, True)
        claim = room.claim("c", 1000, uid=CLAIM_UID)
        async with room.following():
            if step == "decided":
                (answer,) = await room.prepare(claim)
                assert (answer.error, room.total()) == ("", 1000)
                await room.room.unprepare(claim)
            await room.until(lambda: room.total() == 8 and not room.record.exists())
        assert room.kernel.counts(POOL) == (8, 8, 0)
