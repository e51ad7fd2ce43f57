"""CPUs that go offline while they are held: who holds them is told, all others live on, and they come back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.cpu_pool import CPUS as COUNT
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.ledger.offline import lost_cpus
from nodeagent.core.ledger.stable_ids import Numbers, numbered, numbers_held
from nodeagent.core.model.claim import ClaimRef, Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.core.model.inventory import Inventory
from nodeagent.managers.dra.manager import DraHealth, Pools
from tests.builders.devices import DeviceTree
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.machines import machine
from tests.builders.pools import NOBODY, amounts, taints
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import CPU, CPUS, DRIVER, NODE, consumed, dra_node, result

ALL = "0-7"


def claimed(name: str, device: str, cpus: str) -> Grant:
    holder = Holder(api=CLAIM, namespace="ns", claim=name, uid=name)
    allocated = Result(request="r", driver=DRIVER, pool="n/cpu", device=device)
    return Grant(id=f"{name}-0", holder=holder, cpus=CpuSet.parse(cpus), result=allocated)


def holding(*grants: Grant) -> Ledger:
    ledger = NOBODY
    for one in grants:
        ledger = grant(ledger, one)
    return ledger


def test_what_is_lost_is_said_by_device_with_the_cpus_and_the_claims() -> None:
    """In a fixed order; what containers hold, and what is online, is not."""
    rows = [row for row in even_rows(1, 2, 1, 2, 2) if row[0] not in (1, 4, 5, 6)]
    container = Grant(id="c", holder=Holder(api=DEVICE_PLUGIN, resource="r"), cpus=CpuSet([6]))
    ledger = holding(
        claimed("b", "numa0", "0,4-5"), container, claimed("a", "numa0", "1"), claimed("d", "numa1", "2-3")
    )
    assert lost_cpus(inventory_of(rows), ledger) == {
        ("n/cpu", "numa0"): "offline: CPU 1 of claim ns/a, CPUs 4-5 of claim ns/b"
    }
    assert lost_cpus(inventory_of(even_rows(1, 2, 1, 2, 2)), ledger) == {}


# ---------------------------------------------------------------- claims


def go_online(room: Room, cpus: str) -> None:
    """As the kernel shows it."""
    set_online(room.tree, cpus)
    room.rescan()


def set_online(tree: DeviceTree, cpus: str) -> None:
    tree.write("sys/devices/system/cpu/online", cpus)
    tree.write("sys/devices/system/cpu/offline", str(CpuSet.parse(ALL) - CpuSet.parse(cpus)))


def health_of(room: Room) -> DraHealth:
    pools = Pools(room.agent, lambda: room.dra)
    return DraHealth(room.agent, lambda: room.dra, pools, Revision(*room.agent.revisions))


def health(room: Room) -> dict[str, tuple[str, str]]:
    """(state, message) by device."""
    states = health_of(room).states()
    return {one.device: (one.state, one.message) for one in states if one.pool == f"{NODE}/cpu"}


def held(room: Room, ref: ClaimRef) -> CpuSet:
    (mine,) = [one for one in room.agent.ledger.grants.values() if one.holder.uid == ref.uid]
    return mine.cpus


def capacities(room: Room) -> dict[str, int]:
    (pool,) = Pools(room.agent, lambda: room.dra).known()
    assert taints(pool) == {}
    return amounts(pool, COUNT)


async def test_a_lost_cpu_makes_its_device_unhealthy_and_the_rest_lives_on(folder: Path) -> None:
    """The claim that holds it keeps its answer, other claims get other CPUs, and it comes back as the same claim's."""
    async with claim_room(folder, CPUS, ports=0) as room:
        a, b = room.claim("a", consumed("cpu", "numa0", cpus="2")), room.claim("b", consumed("cpu", "numa0", cpus="1"))
        c = room.claim("c", consumed("cpu", "numa1", cpus="1"))
        first = await room.prepare(a, b, c)
        cpus = held(room, a)
        assert (str(cpus), health(room)) == ("0,4", {"numa0": (HEALTHY, ""), "numa1": (HEALTHY, "")})
        go_online(room, "0-3,5-7")
        assert health(room) == {"numa0": (UNHEALTHY, "offline: CPU 4 of claim default/a"), "numa1": (HEALTHY, "")}
        assert capacities(room) == {"numa0": 3, "numa1": 4}
        assert await room.prepare(a, b, c) == first
        assert held(room, a) == cpus == room.cpus(a)
        fits, more = (room.claim(name, consumed("cpu", "numa0", cpus="1")) for name in ("fits", "more"))
        answers = await room.prepare(fits, more)
        assert answers[0].error == ""
        assert held(room, fits) == CpuSet([0, 1, 5]) - cpus - held(room, b)
        assert answers[1].error.startswith("cannot prepare claim default/more: ")
        go_online(room, ALL)
        assert (health(room)["numa0"], capacities(room)) == ((HEALTHY, ""), {"numa0": 4, "numa1": 4})
        assert "default/more" in (await room.prepare(more))[0].error, "the CPU that came back is still held"
        assert await room.unprepare(a) == [""]
        assert (await room.prepare(more))[0].error == ""
        assert held(room, more) <= cpus


async def test_a_lost_cpu_stays_held_over_a_restart(folder: Path) -> None:
    async with claim_room(folder, CPUS, ports=0) as room:
        a = room.claim("a", consumed("cpu", "numa0", cpus="2"))
        first = await room.prepare(a)
        go_online(room, "0-3,5-7")
        await room.restart()
        assert health(room)["numa0"] == (UNHEALTHY, "offline: CPU 4 of claim default/a")
        assert await room.prepare(a) == first
        go_online(room, ALL)
        other = room.claim("other", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(other)
        assert held(room, other).isdisjoint(held(room, a))


async def test_a_claim_may_be_unprepared_while_its_cpu_is_lost(folder: Path) -> None:
    """Then the device is well, and the CPU anybody's when it comes back."""
    async with claim_room(folder, CPUS, ports=0) as room:
        a = room.claim("a", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(a)
        go_online(room, "0-3,5-7")
        assert await room.unprepare(a) == [""]
        assert health(room)["numa0"] == (HEALTHY, "")
        go_online(room, ALL)
        whole = room.claim("whole", consumed("cpu", "numa0", cpus="4"))
        assert (await room.prepare(whole))[0].error == ""


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"grouping": "socket"}, consumed("cpu", "socket0", cpus="8")),
        ({"grouping": "l3"}, consumed("cpu", "l3-1", cpus="4")),
        ({"options": ["full-pcpus-only"]}, consumed("cpu", "numa1", cpus="4")),
        ({"grouping": "individual"}, result("cpu", "cpu7")),
    ],
)
async def test_every_grouping_tells_of_a_lost_cpu(
    folder: Path, options: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Also where the whole device is gone with it."""
    async with claim_room(folder, {**CPUS, **options}, ports=0) as room:
        a = room.claim("a", wanted)
        first = await room.prepare(a)
        assert first[0].error == ""
        go_online(room, "0-6")
        message = "offline: CPU 7 of claim default/a"
        assert health(room)[wanted["device"]] == (UNHEALTHY, message)
        assert [name for name, (state, _) in health(room).items() if state == UNHEALTHY] == [wanted["device"]]
        assert await room.prepare(a) == first
        go_online(room, ALL)
        assert set(health(room).values()) == {(HEALTHY, "")}
        assert await room.unprepare(a) == [""]


async def test_a_group_of_which_all_cpus_are_lost_says_so_of_every_claim(folder: Path) -> None:
    """There is no such device any longer; a claim that was allocated from it and not prepared yet is refused."""
    async with claim_room(folder, CPUS, ports=0) as room:
        a, b = room.claim("a", consumed("cpu", "numa1", cpus="2")), room.claim("b", consumed("cpu", "numa1", cpus="1"))
        first = await room.prepare(a, b)
        go_online(room, "0-1,4-5")
        late = room.claim("late", consumed("cpu", "numa1", cpus="1"))
        lost = {str(ref.name): f"{held(room, ref)} of claim default/{ref.name}" for ref in (a, b)}
        state, message = health(room)["numa1"]
        assert state == UNHEALTHY
        assert all(part in message for part in lost.values())
        assert capacities(room) == {"numa0": 4}
        assert "pool node-a/cpu has no device 'numa1' (or no longer has it)" in (await room.prepare(late))[0].error
        assert await room.prepare(a, b) == first
        go_online(room, ALL)
        assert (await room.prepare(late))[0].error == ""
        assert held(room, late).isdisjoint(held(room, a) | held(room, b))


async def test_a_core_of_which_a_thread_is_lost_is_given_to_nobody_whole(folder: Path) -> None:
    """Where cores are given whole; the core of the claim that lost it stays that claim's."""
    async with claim_room(folder, {**CPUS, "options": ["full-pcpus-only"]}, ports=0) as room:
        a = room.claim("a", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(a)
        assert held(room, a) == CpuSet([0, 4])
        go_online(room, "0-3,5-7")
        b = room.claim("b", consumed("cpu", "numa0", cpus="2"))
        assert (await room.prepare(b))[0].error == ""
        assert held(room, b) == CpuSet([1, 5])
        assert await room.unprepare(a) == [""]
        c = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        assert "cannot prepare claim default/c" in (await room.prepare(c))[0].error
        go_online(room, ALL)
        assert (await room.prepare(c))[0].error == ""
        assert held(room, c) == CpuSet([0, 4])


async def test_a_list_of_health_in_which_nothing_changed_is_the_same_list(folder: Path) -> None:
    """So that it is not sent again."""
    async with claim_room(folder, CPUS, ports=0) as room:
        await room.prepare(room.claim("a", consumed("cpu", "numa0", cpus="2")))
        go_online(room, "0-3,5-7")
        source = health_of(room)
        assert source.states() == source.states()


# ---------------------------------------------------------------- names that last


@pytest.mark.parametrize(("group", "name"), [("l3", "l3-1"), ("socket", "socket1")])
async def test_groups_keep_their_names_while_the_first_cpu_of_one_is_lost(folder: Path, group: str, name: str) -> None:
    """And while all of one are; whatever the order in which they come back."""
    async with claim_room(folder, {**CPUS, "grouping": group}, shape="4s4n4c-smt", ports=0) as room:
        before = parts(room)
        assert before[name] == CpuSet([1, 5])
        a, late = room.claim("a", consumed("cpu", name, cpus="1")), room.claim("late", consumed("cpu", name, cpus="1"))
        await room.prepare(a)
        for online in ("0,2-7", "0,2-4,6-7", "0,3-4,7", "0,2-4,6-7", "0,2-7", ALL):
            go_online(room, online)
            assert parts(room) == {one: left for one, cpus in before.items() if (left := cpus & CpuSet.parse(online))}
            seen = room.agent.inventory
            caches = [one for one in seen.caches if one.level == 3]
            assert {cpu: one.index for one in caches for cpu in one.cpus} == {cpu.id: cpu.l3 for cpu in seen.cpus}
        go_online(room, "0,2-7")
        assert (await room.prepare(late))[0].error == ""
        assert held(room, late) == CpuSet([5])


def parts(room: Room) -> dict[str, CpuSet]:
    (pool,) = Pools(room.agent, lambda: room.dra).known()
    return {one.name: one.part.cpus for one in pool.devices}


@pytest.mark.parametrize(("group", "name"), [("l3", "l3-1"), ("socket", "socket1")])
def test_a_restarted_agent_learns_the_names_from_the_claims(group: str, name: str) -> None:
    """Of a machine that it sees for the first time with a CPU offline."""
    rows = [row for row in even_rows(4, 1, 1, 1, 2) if row[0] != 1]
    ledger = holding(claimed("a", name, "1,5"), claimed("b", "numa0", "0"))
    inventory, known = numbered(inventory_of(rows), numbers_held(ledger))
    assert names(inventory, group)[5] == 1
    assert sorted(set(names(inventory, group).values())) == [0, 1, 2, 3]
    whole, _ = numbered(inventory_of(even_rows(4, 1, 1, 1, 2)), known)
    assert {cpu: names(whole, group)[cpu] for cpu in (1, 5)} == {1: 1, 5: 1}


def names(inventory: Inventory, group: str) -> dict[int, int | None]:
    return {cpu.id: cpu.package if group == "socket" else cpu.l3 for cpu in inventory.cpus}


def test_a_machine_of_another_shape_is_numbered_again() -> None:
    """No two groups are ever called the same; a machine that nothing is known of keeps the kernel's order."""
    rows = even_rows(4, 1, 1, 1, 2)
    first, known = numbered(inventory_of(rows), Numbers())
    assert names(first, "socket") == {cpu.id: cpu.package for cpu in inventory_of(rows).cpus}
    for other in (even_rows(2, 1, 2, 1, 2), even_rows(1, 1, 1, 4, 2, adjacent=True), even_rows(4, 2, 1, 1, 2)):
        plain = inventory_of(other)
        found, known = numbered(plain, known)
        for group in ("socket", "l3"):
            pairs = {(names(plain, group)[cpu.id], names(found, group)[cpu.id]) for cpu in plain.cpus}
            assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})


# ---------------------------------------------------------------- the whole agent


async def test_kubelet_is_told_over_both_apis_of_a_cpu_that_went_offline(folder: Path, tmp_path: Path) -> None:
    """The pod of the device plugin by its CPU's id, those of claims by their device, with the names; and of its
    return."""
    tree = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        first = await node.prepare(claim)
        (mine,) = await node.grants()
        await node.kubelet.until(lambda: len(node.kubelet.healthy(CPU)) == 6)
        pod = await node.kubelet.admit_pod("ns", "pod", {"main": {CPU: 2}})
        theirs = CpuSet(int(one.removeprefix("cpu")) for one in pod.devices["main"][CPU])
        lost = CpuSet([max(CpuSet.parse(mine["cpus"])), max(theirs)])
        set_online(tree, str(CpuSet.parse(ALL) - lost))
        at = (f"{NODE}/cpu", "numa0")
        await node.dra.wait_health(DRIVER, *at, "UNHEALTHY")
        named = f"offline: CPU {lost & CpuSet.parse(mine['cpus'])} of claim default/c"
        assert node.dra.health(DRIVER)[at] == ("UNHEALTHY", named)
        gone = f"cpu{max(theirs)}"
        await node.kubelet.until(lambda: gone not in node.kubelet.healthy(CPU))
        assert gone in {one.ID for one in node.kubelet.devices(CPU)}, "it is still in the list, so that its pod is told"
        assert await node.prepare(claim) == first
        set_online(tree, ALL)
        await node.dra.wait_health(DRIVER, *at, "HEALTHY")
        await node.kubelet.until(lambda: gone in node.kubelet.healthy(CPU))
