"""Two agents on one node, as real processes: as during a rolling upgrade, and as no admin would want it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.core.dra.device_pool import label
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.pb import dra_v1_pb2 as pb
from nodeagent.state.leader import LOCK as LEAD
from nodeagent.state.lock import FileLock
from nodeagent.state.store import FILE, LOCK
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import CLAIMS
from tests.doubles.dra_kubelet import ClaimId, Plugin
from tests.pb import dra_v1_pb2_grpc as rpc
from tests.support.dra_node import CPU, CPUS, DRIVER, SERIAL, DraNode, consumed, dra_node, result
from tests.support.running import Running, block, put_back
from tests.support.until import until

NOBODY = ClaimId("default", "nobody", "8f2d2c1e-0000-4000-8000-0000000000ff")
OTHER_POD = "8f2d2c1e-0000-4000-8000-00000000000a"
STEPS, WORKERS = 240, 6
FAILOVER_S = 8.0


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A machine of 8 CPUs on 2 NUMA nodes, with two serial ports."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for number in range(2):
        made.node(f"/dev/ttyS{number}")
    return made


@contextlib.asynccontextmanager
async def second(node: DraNode, tree: DeviceTree, **changes: Any) -> AsyncIterator[Running]:
    """Another instance on the same node, with a configuration file of its own, registered with kubelet alongside the
    first."""
    own = node.folder / "second"
    own.mkdir()
    places = {"stateDir": str(node.agent.state), "runtimeDir": str(node.agent.socket.parent)}
    agent = Running(own, root=tree.root, kubelet=node.folder / "kubelet", **{**node.options, **places, **changes})
    agent.socket, agent.state = node.agent.socket, node.agent.state
    count = node.dra.registrations[DRIVER]
    await agent.start(env={"POD_UID": OTHER_POD})
    try:
        await agent.said("another-agent-leads")
        await node.dra.wait_registered(DRIVER, count + 1)
        yield agent
    finally:
        if agent.returncode is None:
            await agent.stop()  # not by force: who is killed inside Register cannot be dialled back
        sys.stderr.write(agent.stderr)
    assert not agent.tracebacks()


async def call(plugin: Plugin, verb: str, *claims: ClaimId) -> dict[str, str]:
    """Ask one instance, whichever kubelet would ask; the error of each claim by UID."""
    stub = rpc.DRAPluginStub(plugin.channel)  # type: ignore[no-untyped-call]
    named = [pb.Claim(namespace=one.namespace, name=one.name, uid=one.uid) for one in claims]
    request = getattr(pb, f"Node{verb}ResourcesRequest")(claims=named)
    answer = await getattr(stub, f"Node{verb}Resources")(request, timeout=30)
    return {uid: one.error for uid, one in answer.claims.items()}


def cpus(node: DraNode, claim: ClaimId) -> CpuSet:
    return CpuSet.parse(node.env(claim)["NODEAGENT_CPUS"])


async def shown(node: DraNode, *claims: ClaimId) -> None:
    """Return once the leading agent shows the grants of these claims and of no others, as their files have them: of the
    other's decisions it learns a moment later."""
    wanted = {claim.name: str(cpus(node, claim)) for claim in claims}
    async with asyncio.timeout(FAILOVER_S):
        await node.agent.until("/v1/grants", lambda grants: {one["claim"]: one["cpus"] for one in grants} == wanted)


def in_force(node: DraNode, *some: Mapping[str, CpuSet]) -> None:
    """Of all these sets, no two overlap."""
    every = [one for sets in some for one in sets.values()]
    assert sum(map(len, every)) == len(CpuSet(cpu for one in every for cpu in one))


# ---------------------------------------------------------------- both decide


async def test_two_agents_that_decide_at_the_same_time_give_nothing_twice(folder: Path, tree: DeviceTree) -> None:
    """Claims are prepared by one and unprepared by the other, hundreds of times, several at a time."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree):
        await node.published("cpu")
        dice, now, counts = random.Random(1), dict[str, CpuSet](), {"prepared": 0, "refused": 0}
        instances = node.dra.plugins[DRIVER]
        assert len(instances) == 2

        async def work(number: int) -> None:
            for step in range(STEPS // WORKERS):
                one = consumed("cpu", f"numa{dice.randrange(2)}", cpus=str(dice.randint(1, 3)))
                claim = node.claim(f"c{number}-{step}", one)
                (error,) = (await call(dice.choice(instances), "Prepare", claim)).values()
                counts["refused" if error else "prepared"] += 1
                if not error:
                    now[claim.name] = cpus(node, claim)
                    in_force(node, now)
                    assert (await call(dice.choice(instances), "Prepare", claim)) == {claim.uid: ""}
                    assert cpus(node, claim) == now.pop(claim.name)
                assert (await call(dice.choice(instances), "Unprepare", claim)) == {claim.uid: ""}

        await asyncio.gather(*map(work, range(WORKERS)))
        assert counts["prepared"] > STEPS / 4 and sum(counts.values()) == STEPS
        await shown(node)
        async with asyncio.timeout(FAILOVER_S):
            while [*node.cdi.glob("*.json")]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_the_same_claim_asked_of_both_at_once_is_granted_once(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node, second(node, tree):
        await node.published("cpu")
        for number in range(20):
            claim = node.claim(f"c{number}", consumed("cpu", "numa0", cpus="3"))
            answers = await asyncio.gather(*(call(one, "Prepare", claim) for one in node.dra.plugins[DRIVER] * 2))
            assert answers == [{claim.uid: ""}] * 4
            given = await asyncio.gather(*(call(one, "Unprepare", claim) for one in node.dra.plugins[DRIVER] * 2))
            assert given == [{claim.uid: ""}] * 4
        await shown(node)


# ---------------------------------------------------------------- one ends


async def test_the_other_takes_over_within_seconds_after_kill_9(folder: Path, tree: DeviceTree) -> None:
    """The device plugin, the status socket, the slices and the files; what was held stays held."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree) as other:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        pod = await node.kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        assert await call(node.dra.plugins[DRIVER][0], "Prepare", claim) == {claim.uid: ""}
        given = CpuSet(int(one.removeprefix("cpu")) for one in pod.held(CPU))
        in_force(node, {"pod": given, "claim": cpus(node, claim)})
        before = node.kubelet.registrations[CPU]
        await node.agent.stop(signal.SIGKILL)
        async with asyncio.timeout(FAILOVER_S):
            await other.said("leading")
            await node.kubelet.wait_registered(CPU, before + 1)
            await node.kubelet.wait_allocatable(CPU, 6)
            status = await other.until("/v1/status", lambda status: status["ready"])
        assert status["dra"]["claims"] == 1
        await node.api.until(
            lambda: sum(int(one["capacity"]["cpus"]["value"]) for one in node.devices("cpu").values()) == 6
        )
        shutil.rmtree(node.cdi)
        await appears(node.cdi / f"{DRIVER}-claim_{claim.uid}.json")
        late = [node.claim(f"late{n}", consumed("cpu", f"numa{n}", cpus="1")) for n in (0, 1)]
        granted = [one for one, answer in zip(late, await node.prepare(*late), strict=True) if not answer.error]
        assert granted
        in_force(node, {"pod": given}, {one.name: cpus(node, one) for one in (claim, *granted)})


async def appears(path: Path) -> None:
    await until(path.exists, limit_s=FAILOVER_S)


@contextlib.contextmanager
def struck_in_its_turn(lock: Path, pid: int) -> Iterator[threading.Event]:
    """Kill a process as soon as a process is found to have the turn."""
    done, struck = threading.Event(), threading.Event()

    def watch() -> None:
        handle = os.open(lock, os.O_RDWR)
        while not done.wait(0.0002):
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(handle, fcntl.LOCK_UN)
            except BlockingIOError:
                os.kill(pid, signal.SIGKILL)
                struck.set()
                break
        os.close(handle)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield struck
    finally:
        done.set()
        thread.join()


async def test_who_is_killed_in_its_turn_leaves_nothing_half_done(folder: Path, tree: DeviceTree) -> None:
    """The other one has the turn at once; the claim that was being decided is granted whole or not at all."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree) as other:
        await node.published("cpu")
        first, survivor = node.dra.plugins[DRIVER]
        claims = [node.claim(f"c{n}", consumed("cpu", f"numa{n % 2}", cpus="1")) for n in range(8)]
        with struck_in_its_turn(node.agent.state / LOCK, node.agent.pid) as struck:
            for claim in claims:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(first, "Prepare", claim)
                if struck.is_set():
                    break
        assert struck.is_set()
        async with asyncio.timeout(FAILOVER_S):
            for claim in claims:
                assert await call(survivor, "Prepare", claim) == {claim.uid: ""}
            await other.said("leading")
        in_force(node, {claim.name: cpus(node, claim) for claim in claims})
        await shown(node, *claims)


async def test_both_end_at_once_when_both_are_told(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node, second(node, tree) as other:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        before = await node.prepare(claim)
        async with asyncio.timeout(FAILOVER_S):
            assert await asyncio.gather(node.agent.stop(), other.stop()) == [0, 0]
        assert not node.dra.plugins[DRIVER]
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 3)
        assert await node.prepare(claim) == before


# ---------------------------------------------------------------- the state is lost


async def test_one_of_two_leads_after_the_state_folder_was_deleted(folder: Path, tree: DeviceTree) -> None:
    """It is the one that did before; the ledger is put back with what both have granted."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree) as other:
        await node.published("cpu")
        first, late = node.dra.plugins[DRIVER]
        one, two = (node.claim(f"c{n}", consumed("cpu", f"numa{n}", cpus="2")) for n in (0, 1))
        assert await call(first, "Prepare", one) == {one.uid: ""}
        assert await call(late, "Prepare", two) == {two.uid: ""}
        shutil.rmtree(node.agent.state.rename(folder / "aside"))
        await appears(node.agent.state / LEAD)
        rest = [node.claim(f"r{n}", consumed("cpu", f"numa{n}", cpus="2")) for n in (0, 1)]
        assert await call(late, "Prepare", rest[0]) == {rest[0].uid: ""}
        assert await call(first, "Prepare", rest[1]) == {rest[1].uid: ""}
        in_force(node, {claim.name: cpus(node, claim) for claim in (one, two, *rest)})
        await shown(node, one, two, *rest)
        with contextlib.closing(FileLock(node.agent.state / LEAD)) as lead:
            assert not lead.try_take()
        assert not [line for line in other.log if line["event"] == "leading"]
        await node.agent.stop(signal.SIGKILL)
        async with asyncio.timeout(FAILOVER_S):
            await other.said("leading")
        await shown(node, one, two, *rest)


async def test_who_finds_another_one_in_the_lead_ends(folder: Path, tree: DeviceTree) -> None:
    """Two that serve the same resources would take them from each other; started again, it follows."""
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        await node.agent.ready()
        with contextlib.closing(FileLock(folder / "lead")) as lead:
            assert lead.try_take()
            (folder / "lead").rename(node.agent.state / LEAD)
            assert await node.agent.end() == 1
            assert f"nodeagent: cannot go on: another agent has taken {node.agent.state / LEAD}" in node.agent.stderr
            await node.agent.start()
            await node.agent.said("another-agent-leads", after=len(node.agent.log))
        await node.agent.ready()


async def test_neither_ends_while_the_state_folder_cannot_be_used(folder: Path, tree: DeviceTree) -> None:
    """Nothing is granted until it can be; then everything is as it was."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree) as other:
        await node.published("cpu")
        one = node.claim("one", consumed("cpu", "numa0", cpus="2"))
        assert (await node.prepare(one))[0].error == ""
        aside = node.agent.state.rename(folder / "aside")
        block(node.agent.state)
        await other.said("ledger-not-durable")
        late = node.claim("late", consumed("cpu", "numa1", cpus="2"))
        for plugin in node.dra.plugins[DRIVER]:
            assert "cannot" in (await call(plugin, "Prepare", late))[late.uid]
        put_back(aside, node.agent.state)
        for plugin in node.dra.plugins[DRIVER]:
            assert await call(plugin, "Prepare", late, one) == {late.uid: "", one.uid: ""}
        await shown(node, late, one)
        assert node.agent.returncode is None and other.returncode is None


async def test_a_ledger_that_is_damaged_under_both_loses_nothing(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node, second(node, tree):
        await node.published("cpu")
        first, late = node.dra.plugins[DRIVER]
        claims = [node.claim(f"c{n}", consumed("cpu", f"numa{n % 2}", cpus="1")) for n in range(8)]
        for number, claim in enumerate(claims):
            assert await call((first, late)[number % 2], "Prepare", claim) == {claim.uid: ""}
            if number in (3, 6):
                # The agent that finds the damage has to know all by then.
                assert await call((late, first)[number % 2], "Unprepare", NOBODY) == {NOBODY.uid: ""}
                with contextlib.closing(sqlite3.connect(node.agent.state / FILE)) as db:
                    db.execute("DROP TABLE grants")
        in_force(node, {claim.name: cpus(node, claim) for claim in claims})
        await shown(node, *claims)


async def test_who_starts_beside_an_agent_whose_ledger_is_damaged_does_not_begin_with_nothing(
    folder: Path, tree: DeviceTree
) -> None:
    """What is held is known to each agent that runs."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu")
        first = [node.claim(f"c{n}", consumed("cpu", f"numa{n % 2}", cpus="1")) for n in range(4)]
        assert not [one for one in await node.prepare(*first) if one.error]
        damage(node.agent.state)
        async with second(node, tree):
            rest = [node.claim(f"r{n}", consumed("cpu", f"numa{n % 2}", cpus="1")) for n in range(4)]
            node.dra.remember(DRIVER, rest)
            async with asyncio.timeout(FAILOVER_S):
                # Until the first agent has put back what it knows, the second one grants nothing.
                while set((await call(node.dra.plugins[DRIVER][-1], "Prepare", *rest)).values()) != {""}:
                    await node.agent.until("/v1/status", lambda status: status["ledger"]["whole"])
            in_force(node, {claim.name: cpus(node, claim) for claim in (*first, *rest)})
            await shown(node, *first, *rest)


def damage(state: Path) -> None:
    """Nonsense over all that lies on the disk."""
    for name in (FILE, f"{FILE}-wal"):
        with contextlib.suppress(FileNotFoundError), (state / name).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            file.write(b"\xa5" * size)


# ---------------------------------------------------------------- another configuration


async def test_a_second_instance_with_a_newer_configuration_serves_what_the_first_does_not(
    folder: Path, tree: DeviceTree
) -> None:
    """What it has written stays as it is while the first one still looks after the files."""
    async with dra_node(folder, tree, [CPUS]) as node, second(node, tree, resources=[CPUS, SERIAL]) as other:
        await node.published("cpu")
        claim = node.claim("c", result("char", label("/dev/ttyS0")))
        late = node.dra.plugins[DRIVER][-1]
        assert await call(late, "Prepare", claim) == {claim.uid: ""}
        spec = node.spec(claim)
        await node.agent.said("claim-not-rendered")
        assert node.spec(claim) == spec
        await node.agent.stop(signal.SIGKILL)
        await other.said("leading")
        await node.api.until(lambda: bool(node.devices("char")))
        assert node.spec(claim) == spec
        assert await node.unprepare(claim) == [""]
        assert node.api.find(CLAIMS, "c", "default") is not None
