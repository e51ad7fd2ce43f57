"""Both APIs at once, in random order, over an agent that is killed, stopped and replaced: nothing is held twice, and
nothing is lost.

Each seed draws batches of steps that run at the same time: pods admitted and deleted, claims prepared, prepared again,
unprepared, given up in the middle, calls cut off, the API server away, kubelet restarted. Agents (mortal.py) die by
kill -9 during a batch, are told to stop, or are replaced by one that starts alongside them. What rivals.py knows of the
answers must hold at every answer; the ledger is compared after every batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.pb import deviceplugin_pb2 as pb
from tests.doubles.api_server import CLAIMS, FakeApiServer, Fault
from tests.doubles.dra_kubelet import ClaimId, DraCallError, FakeDraKubelet, Outcome
from tests.doubles.kubelet import AdmissionError, FakeKubelet
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels
from tests.support.dra_node import DRIVER, consumed
from tests.support.long_form import share_of
from tests.support.mortal import Life, Nursery, ask, nursery
from tests.support.rivals import (
    ASKED,
    CPU,
    CPUS,
    GONE,
    HELD,
    LEAVING,
    NEW,
    PAGES,
    PORT,
    SHARED,
    UNLISTED_S,
    Bid,
    World,
    draw_results,
    of_answer,
    published,
    write_node,
)
from tests.support.until import until

SEEDS, STEPS, KILLS = share_of(8, 0.5), 1280, 13
"""Of each seed: at least so many steps, and so many agents killed."""
WAIT_S = 10.0
"""The longest that anything may take to settle."""
STRIKE_S = 0.03
"""A death comes within so long after the beginning of a batch."""
SLOW_S = 0.002
"""Between two pieces of an answer of the API server on a bad day."""
EVERY = (CPU, PAGES, PORT, SHARED)
Step = Coroutine[Any, Any, object]


# ---------------------------------------------------------------- steps: pods


@dataclass
class Node:
    """The world and the agents in it."""

    world: World
    born: Nursery
    words: list[str]
    lives: list[Life] = field(default_factory=list)
    admissions: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Kubelet admits one pod after the other."""
    busy: set[Bid] = field(default_factory=set)
    upgrades: int = 0


async def admit(node: Node, name: str, wants: dict[str, int]) -> None:
    """A pod as kubelet admits it; what it is given may be refused."""
    world = node.world
    async with node.admissions:
        begun = time.monotonic()
        world.note("admit", name, wants)
        # A call on a connection that a kubelet closes which is going down.
        with contextlib.suppress(AdmissionError, grpc.aio.UsageError):
            pod = await world.kubelet.admit_pod("default", name, {"main": wants})
            world.counts["pods admitted"] += 1
            world.trace.append(f"  {name} got {pod.devices}")
            if time.monotonic() - begun > 0.8 * UNLISTED_S:
                await world.kubelet.delete_pod("default", name)
                world.counts["admitted too slowly"] += 1
            world.check()
            return
    world.counts["pods refused"] += 1


async def delete(node: Node, name: str) -> None:
    if ("default", name) in node.world.kubelet.pods:
        node.world.note("delete", name)
        await node.world.kubelet.delete_pod("default", name)


async def grab(node: Node, ids: Sequence[str], resource: str) -> None:
    """An admission by what kubelet saw before the claims came, of a pod that then fails for another reason."""
    world = node.world
    async with node.admissions:
        taken = {one for pod in world.kubelet.pods.values() for one in pod.held(resource)}
        request = pb.ContainerAllocateRequest(devices_ids=[one for one in ids if one not in taken])
        plugin = world.kubelet.endpoints.get(resource)
        if not request.devices_ids or plugin is None:
            return
        world.note("grab", resource, request.devices_ids)
        begun = time.monotonic()
        async with channels.channel(plugin.path) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await rpc.DevicePluginStub(channel).Allocate(pb.AllocateRequest(container_requests=[request]))
                if time.monotonic() - begun < 0.8 * UNLISTED_S:
                    world.check({"grab": of_answer(answer.container_responses[0], request.devices_ids)})
                world.counts["grabs granted"] += 1


# ---------------------------------------------------------------- steps: claims


async def prepare(node: Node, bids: Sequence[Bid]) -> bool:
    """Several claims in one call; whether it was answered. What was answered once is answered again, whichever
    process died meanwhile."""
    world = node.world
    world.note("prepare", *(bid.claim.name for bid in bids))
    for bid in bids:
        bid.state = ASKED if bid.state in (NEW, GONE) else bid.state
    try:
        answers = await world.dra.prepare(DRIVER, [bid.claim for bid in bids])
    except DraCallError as error:
        world.trace.append(f"  no answer: {error}")
        return False
    for bid in bids:
        take(world, bid, answers[bid.claim.uid])
    return True


def take(world: World, bid: Bid, outcome: Outcome) -> None:
    world.trace.append(f"  {bid.claim.name}: {outcome.error or 'prepared'}")
    if outcome.error:
        world.counts["claims refused"] += 1
        assert bid.state == ASKED or not bid.there or "stopping" in outcome.error, f"{bid.claim}: {outcome.error}"
        return
    answer = outcome, world.cdi_file(bid)
    assert bid.answer in (None, answer), f"{bid.claim} got another answer"
    world.counts["claims prepared" if bid.answer is None else "same answer"] += 1
    bid.answer, bid.state = answer, HELD
    world.check()


async def unprepare(node: Node, bids: Sequence[Bid]) -> bool:
    """Several claims in one call, held or not; whether all of it was answered well."""
    world = node.world
    world.note("unprepare", *(bid.claim.name for bid in bids))
    for bid in bids:
        bid.state, bid.answer = (GONE if bid.state in (NEW, GONE) else LEAVING), None
    with contextlib.suppress(DraCallError):
        answers = await world.dra.unprepare(DRIVER, [bid.claim for bid in bids])
        for bid in bids:
            error = answers[bid.claim.uid]
            # Of two agents, one may be writing what the other removes: kubelet tries again.
            assert not error or "stopping" in error or "not empty" in error, error
            bid.state = bid.state if error else GONE
    return all(bid.state == GONE for bid in bids)


async def unprepare_unknown(node: Node, uid: str) -> None:
    node.world.note("unprepare unknown")
    with contextlib.suppress(DraCallError):
        answers = await node.world.dra.unprepare(DRIVER, [ClaimId("default", "nobody", uid)])
        assert not answers[uid] or "stopping" in answers[uid]


async def hang_up(step: Step, after_s: float) -> None:
    """The caller does not wait for the answer."""
    task = asyncio.ensure_future(step)
    await asyncio.wait({task}, timeout=after_s)
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def give_up(node: Node, bid: Bid, after_s: float) -> None:
    """The pod is deleted while its claim is being prepared."""
    await hang_up(prepare(node, [bid]), after_s)
    await unprepare(node, [bid])


async def forget(node: Node, bid: Bid) -> None:
    """The object is gone before kubelet has it unprepared."""
    if bid.there:
        node.world.note("delete claim", bid.claim.name)
        bid.there = False
        node.world.api.delete(CLAIMS, bid.claim.name, "default")


# ---------------------------------------------------------------- drawing


def draw_step(node: Node) -> Step | None:
    """One step of the many; None where the drawn one has nothing to work on."""
    draws: dict[Callable[[Node], Step | None], int] = {
        draw_admission: 16,
        draw_deletion: 16,
        draw_grab: 8,
        draw_fresh: 22,
        draw_again: 10,
        draw_unprepare: 22,
        draw_forget: 2,
        draw_give_up: 6,
        draw_unknown: 1,
    }
    (draw,) = node.world.random.choices([*draws], [*draws.values()])
    return draw(node)


def draw_admission(node: Node) -> Step:
    world, most = node.world, {CPU: 3, PAGES: 3, PORT: 2, SHARED: 2}
    resources = world.random.sample(EVERY, world.random.randint(1, 3))
    wants = {one: world.random.randint(1, most[one]) for one in resources}
    step = admit(node, f"p{world.counts['drawn pods']}", wants)
    world.counts["drawn pods"] += 1
    return hang_up(step, world.random.uniform(0, 0.02)) if world.random.random() < 0.08 else step


def draw_deletion(node: Node) -> Step | None:
    names = [name for _, name in node.world.kubelet.pods]
    return delete(node, node.world.random.choice(names)) if names else None


def draw_grab(node: Node) -> Step:
    draw, resource = node.world.random, node.world.random.choice((CPU, PORT))
    ids = [f"cpu{one}" for one in range(CPUS)] if resource == CPU else [f"/dev/ttyS{one}" for one in range(4)]
    return grab(node, draw.sample(ids, draw.randint(1, 2)), resource)


def draw_fresh(node: Node) -> Step | None:
    """One to three new claims of one pod, sometimes all asked for twice at once."""
    world = node.world
    every = [results for _ in range(world.random.choice((1, 1, 1, 2, 3))) if (results := draw_results(world))]
    bids = [world.bid(results) for results in every]
    return asked(node, bids) if bids else None


def draw_again(node: Node) -> Step | None:
    bids = pick(node, 3, NEW, ASKED, HELD, GONE)
    return asked(node, bids) if bids else None


def asked(node: Node, bids: Sequence[Bid]) -> Step:
    draw = node.world.random
    node.busy.update(bids)
    if draw.random() < 0.1:
        return hang_up(prepare(node, bids), draw.uniform(0, 0.02))
    return both(prepare(node, bids), prepare(node, bids)) if draw.random() < 0.1 else prepare(node, bids)


async def both(*steps: Awaitable[object]) -> None:
    await asyncio.gather(*steps)


def draw_unprepare(node: Node) -> Step | None:
    draw, bids = node.world.random, pick(node, 3, ASKED, HELD, LEAVING, GONE)
    if not bids:
        return None
    node.busy.update(bids)
    return hang_up(unprepare(node, bids), draw.uniform(0, 0.01)) if draw.random() < 0.1 else unprepare(node, bids)


def draw_forget(node: Node) -> Step | None:
    bids = pick(node, 1, ASKED, HELD)
    node.busy.update(bids)
    return forget(node, bids[0]) if bids else None


def draw_give_up(node: Node) -> Step | None:
    results = draw_results(node.world)
    if not results:
        return None
    bid = node.world.bid(results)
    node.busy.add(bid)
    return give_up(node, bid, node.world.random.uniform(0, 0.012))


def draw_unknown(node: Node) -> Step:
    return unprepare_unknown(node, node.world.new_uid())


def pick(node: Node, most: int, *states: str) -> list[Bid]:
    """Some claims that no other task works on: those with something at stake rather than those that are gone."""
    world = node.world
    some = [bid for bid in world.some(*states) if bid not in node.busy]
    weights = [0.05 if bid.state == GONE else 1.0 for bid in some]
    picked = world.random.choices(some, weights, k=world.random.randint(1, most)) if some else []
    return list(dict.fromkeys(picked))


# ---------------------------------------------------------------- batches


async def batch(node: Node, *alongside: Step) -> None:
    """One to nine steps at the same time."""
    world = node.world
    node.busy.clear()
    steps = [step for _ in range(world.random.randint(1, 9)) if (step := draw_step(node)) is not None]
    world.trace.append(f"--- {len(steps)} steps")
    away = bad_day(world)
    async with world.api.away() if away else contextlib.nullcontext():
        for error in await asyncio.gather(*steps, *alongside, return_exceptions=True):
            if isinstance(error, Exception):
                raise error  # a call whose connection kubelet closed is cancelled: that is no error
    node.world.bids = [bid for bid in world.bids if bid.state != GONE] + world.some(GONE)[-30:]


def bad_day(world: World) -> bool:
    """Have the API server answer some reads of claims late or not at all; whether it is away altogether."""
    world.api.answers.clear()
    drawn = world.random.random()
    if drawn < 0.1:
        world.note("API server slow")
        kinds = world.random.choices(("slow", "slow", "status", "half", "close"), k=3)
        world.api.answers.extend(Fault(kind=one, verb="get", resource=CLAIMS, pause_s=SLOW_S) for one in kinds)
    elif drawn < 0.15:
        world.note("API server away")
    return 0.1 <= drawn < 0.15


async def compare(node: Node) -> None:
    """The ledger that the agent shows is what was answered. Another agent's decisions are learned a moment later."""
    deadline = time.monotonic() + (WAIT_S if len(node.lives) > 1 else 0)
    while True:
        try:
            node.world.check_ledger(await ask(node.world.status, "/v1/grants"))
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.02)


# ---------------------------------------------------------------- lives


async def begin(node: Node, **env: str) -> None:
    """A life, registered with both sides of kubelet."""
    world = node.world
    before = {one: world.kubelet.registrations.get(one, 0) for one in EVERY}
    claims = world.dra.registrations.get(DRIVER, 0)
    alone = not node.lives
    node.lives.append(await node.born.life(*node.words, **env))
    await asyncio.wait_for(world.dra.wait_registered(DRIVER, claims + 1), WAIT_S)
    if alone:
        await leads(node, before)


async def leads(node: Node, before: dict[str, int]) -> None:
    world = node.world
    for one in EVERY:
        await asyncio.wait_for(world.kubelet.wait_registered(one, before[one] + 1), WAIT_S)
    await asyncio.wait_for(world.kubelet.until(lambda: all(world.kubelet.devices(one) for one in EVERY)), WAIT_S)
    while True:
        with contextlib.suppress(OSError):
            await ask(world.status, "/v1/status")
            return
        await asyncio.sleep(0.01)


async def end(node: Node, how: signal.Signals) -> None:
    """The oldest agent's end in the middle of a batch."""
    world, life = node.world, node.lives.pop(0)
    world.note("kill -9" if how is signal.SIGKILL else "stop")
    delay_s = world.random.uniform(0, STRIKE_S)
    if how is signal.SIGKILL:
        life.kill_after(delay_s)
    else:
        asyncio.get_running_loop().call_later(delay_s, os.kill, life.pid, how)
    await batch(node, asyncio.wait_for(life.death(), WAIT_S))
    forgive_the_dead(world)


def forgive_the_dead(world: World) -> None:
    """Who dies inside Register cannot be dialled back."""
    world.kubelet.violations[:] = [one for one in world.kubelet.violations if "cannot dial" not in str(one)]


async def restart_kubelet(node: Node) -> None:
    """Both its sides, in the middle of a batch."""
    world = node.world
    before = {one: world.kubelet.registrations.get(one, 0) for one in EVERY}
    claims, wipe = world.dra.registrations.get(DRIVER, 0), world.random.random() < 0.5
    world.note("restart kubelet", "wiping" if wipe else "")
    await batch(node, world.kubelet.restart(wipe=wipe), world.dra.restart())
    await asyncio.wait_for(world.dra.wait_registered(DRIVER, claims + len(node.lives)), WAIT_S)
    await leads(node, before)


async def upgrade(node: Node) -> None:
    """Another instance starts alongside the one there is, gets the claims, and then has everything."""
    world = node.world
    world.note("upgrade")
    before = {one: world.kubelet.registrations.get(one, 0) for one in EVERY}
    await begin(node, POD_UID=world.new_uid())
    for _ in range(world.random.randint(1, 5)):
        await batch(node)
        await compare(node)
    await end(node, world.random.choice((signal.SIGKILL, signal.SIGTERM)))
    await leads(node, before)


async def recall(node: Node) -> None:
    """What was answered is answered alike by the agents that live now; what is not known for sure is given back."""
    world = node.world
    held, leaving = world.some(HELD, there=[True]), world.some(LEAVING)
    if held:
        await insist(lambda: prepare(node, held))
    if leaving:
        await insist(lambda: unprepare(node, leaving))
    await compare(node)
    await until_right(lambda: files_are_of(node, world.some(HELD)))


async def insist(call: Callable[[], Awaitable[bool]]) -> None:
    """Repeat a call until it is answered: kubelet may be taking a fresh socket for another one at this moment."""
    deadline = time.monotonic() + WAIT_S
    while not await call():
        assert time.monotonic() < deadline, "no answer"
        await asyncio.sleep(0.02)


async def files_are_of(node: Node, bids: Sequence[Bid]) -> str:
    """The CDI folder has the files of these claims alone; it is not known whether some others were granted."""
    known = {bid.claim.uid for bid in node.world.some(ASKED)}
    found = {one.name.rpartition("_")[2].removesuffix(".json") for one in (node.world.folder / "cdi").glob("*")}
    return await same(found - known, {bid.claim.uid for bid in bids})


async def live(node: Node) -> None:
    """Batches until the drawn end."""
    world = node.world
    await recall(node)
    for _ in range(world.random.randint(5, 30)):
        await batch(node)
        await compare(node)
        if world.random.random() < 0.02:
            await restart_kubelet(node)
        if world.random.random() < 0.02:
            await upgrade(node)
    await end(node, signal.SIGKILL if world.random.random() < 0.9 else signal.SIGTERM)


# ---------------------------------------------------------------- the end


async def give_everything_back(node: Node) -> None:
    world = node.world
    for _, name in [*world.kubelet.pods]:
        await delete(node, name)
    bids = world.some(NEW, ASKED, HELD, LEAVING)
    await insist(lambda: unprepare(node, bids))
    # As on any node: from a pod that is listed, an agent that has just started learns that kubelet knows the API
    # server's pods.
    await world.kubelet.admit_pod("default", "bystander", {"main": {}})
    await until_right(lambda: nothing_is_held(node))
    full = {CPU: CPUS, PAGES: 16, PORT: 4, SHARED: 4}
    await until_right(lambda: same({one: world.kubelet.allocatable(one) for one in EVERY}, full))
    await until_right(lambda: same(published(world), world.names))
    await until_right(lambda: same([*(world.folder / "cdi").iterdir()], []))
    await until_right(lambda: same([*(world.folder / "run" / "claims").iterdir()], []))


async def until_right(wrong: Callable[[], Awaitable[str]]) -> None:
    """Return once nothing is wrong; what is, when WAIT_S have passed."""
    last = ""

    async def right() -> bool:
        nonlocal last
        last = await wrong()
        return not last

    await until(right, limit_s=WAIT_S, otherwise=lambda: last)


async def same(found: object, wanted: object) -> str:
    return "" if found == wanted else f"{found}, expected {wanted}"


async def nothing_is_held(node: Node) -> str:
    return await same(await ask(node.world.status, "/v1/grants"), [])


def check_audit(file: Path) -> None:
    """Each grant was granted and then released, the one before it is granted again."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        told: dict[str, str] = {}
        for action, grant in db.execute("SELECT action, grant_id FROM audit ORDER BY seq"):
            assert action != "released" or grant in told, f"{grant} was released twice"
            told.pop(grant, None) if action == "released" else told.update({grant: action})
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not told


@contextlib.asynccontextmanager
async def new_node(folder: Path, seed: int) -> AsyncIterator[Node]:
    async with (
        FakeApiServer() as api,
        FakeKubelet(folder / "kubelet", seed=seed) as kubelet,
        FakeDraKubelet(folder / "kubelet", seed=seed) as dra,
        nursery(folder / "log") as born,
    ):
        world = World(folder, seed, kubelet, dra, api, random.Random(seed))
        node = Node(world, born, write_node(folder, api))
        api.add_node("node-a")
        try:
            yield node
        finally:
            for life in node.lives:
                life.kill_after(0)
                await life.death()


async def test_a_claim_that_kubelet_gave_up_while_it_was_read_holds_nothing(folder: Path) -> None:
    """Its pod was deleted, so it is unprepared before the API server has answered: no call would do it later."""
    async with new_node(folder, 0) as node:
        world = node.world
        await begin(node)
        bid = world.bid([consumed("cpu", "numa0", cpus="2")])
        world.api.answers.append(Fault(kind="slow", verb="get", resource=CLAIMS, pause_s=0.1))
        task = asyncio.ensure_future(world.dra.prepare(DRIVER, [bid.claim]))
        await world.api.until(lambda: world.api.count("get", CLAIMS) == 1)
        task.cancel()
        assert await world.dra.unprepare(DRIVER, [bid.claim]) == {bid.claim.uid: ""}
        await until_right(lambda: said(folder, "it was unprepared meanwhile"))
        assert await ask(world.status, "/v1/grants") == []
        assert (await world.dra.prepare(DRIVER, [bid.claim]))[bid.claim.uid].error == ""


async def test_what_a_killed_agent_left_half_written_is_removed(folder: Path) -> None:
    async with new_node(folder, 0) as node:
        left = folder / "cdi" / f".{DRIVER}-claim_{node.world.new_uid()}.json.abc.tmp"
        left.parent.mkdir()
        left.write_text("{")
        await begin(node)
        await until_right(lambda: files_are_of(node, []))


async def said(folder: Path, text: str) -> str:
    return "" if text in (folder / "log").read_text() else f"nothing said of {text!r}"


@pytest.mark.parametrize("seeds", [(one, one + 1) for one in range(0, SEEDS, 2)])
async def test_over_both_apis_nothing_is_held_twice_and_nothing_is_lost(seeds: Sequence[int], folder: Path) -> None:
    """In the long form more than 10,000 steps over all seeds, and more than 100 agents killed in the middle of them.
    Two nodes live at once: most of a life is waiting."""
    async with asyncio.TaskGroup() as nodes:
        for seed in seeds:
            (folder / str(seed)).mkdir()
            nodes.create_task(run(folder / str(seed), seed))


async def run(folder: Path, seed: int) -> None:
    """The whole story of one node."""
    async with new_node(folder, seed) as node:
        world = node.world
        try:
            await live_often(node)
            await recall(node)
            await give_everything_back(node)
        except Exception:
            print(f"seed {seed}, after {json.dumps(world.counts)}:", *world.trace[-80:], sep="\n")
            raise
        check_audit(folder / "state" / "ledger.db")
    print(f"seed {seed}: {dict(sorted(world.counts.items()))}")
    log = (folder / "log").read_text()
    assert "Traceback" not in log and "ledger-recreated" not in log
    assert all(world.counts[one] >= 10 for one in ("pods admitted", "pods refused", "claims prepared", "same answer"))


async def live_often(node: Node) -> None:
    world = node.world
    await begin(node)
    await asyncio.wait_for(world.api.until(lambda: len(published(world)) == CPUS + 1), WAIT_S)
    world.names = published(world)
    while world.counts["steps"] < STEPS or world.counts["kill -9"] < KILLS:
        await live(node)
        await begin(node)
