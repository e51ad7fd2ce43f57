"""kill -9 at 200 random moments during a stream of allocations: nothing that was answered is lost, nothing is given
twice, and the same request gets the same answer.

Each life is a whole agent (mortal.py): its own process, sockets, SQLite file. Pods come and go through FakeKubelet, and
alongside them a client asks for exact CPUs over the socket of a second resource and has some of them released. The
moment of death is drawn before the agent serves, anywhere in the stream, or within the length of one call. After each
death the ledger that the next life shows is compared with what was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.pb import deviceplugin_pb2 as pb
from tests.builders.machines import MIB, Shape, build
from tests.doubles.kubelet import AdmissionError, FakeKubelet, Pod
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels
from tests.support.long_form import share_of
from tests.support.mortal import Life, Nursery, ask, nursery

CPU, PINNED, PAGES, SHARED = (f"nodeagent.dev/{name}" for name in ("cpu", "pinned", "pages", "shared"))
LIVES, SEEDS = 25, share_of(8, 0.5)
BIRTH_S, STREAM_S = 0.25, 0.08
"""The longest time from birth, or from the first call, to death."""
CALL_S = 0.006
"""About how long one call takes."""
HANG_UP_S = 0.05
"""How long the streams have to notice a death."""


@dataclass
class World:
    """A node, and what its agents have answered so far."""

    folder: Path
    kubelet: FakeKubelet
    random: random.Random
    answered: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Grant id -> ids of PINNED, as answered and not given back."""
    asked: set[tuple[str, ...]] = field(default_factory=set)
    """Asked for without an answer: granted or not."""
    returned: set[str] = field(default_factory=set)
    """Grants whose release was answered."""
    returning: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    pods: int = 0

    @property
    def status(self) -> Path:
        return self.folder / "run" / "status.sock"


def write_node(folder: Path) -> list[str]:
    """The machine and the configuration; the words of the command."""
    build(folder / "root", Shape(packages=2, cores_per_l3=32, hugepages={(n, 2 * MIB): (64, 64, 0) for n in (0, 1)}))
    (folder / "root" / "dev").mkdir()
    (folder / "root" / "dev" / "shared").touch()
    resources = [
        {"name": "cpu", "kind": "cpu"},
        {"name": "pinned", "kind": "cpu"},
        {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 4},
        {"name": "shared", "kind": "char", "paths": ["/dev/shared"], "replicas": 50},
    ]
    config = {
        "stateDir": str(folder / "state"),
        "runtimeDir": str(folder / "run"),
        "reservedCpus": "",
        "resources": resources,
        "release": {"pollSeconds": 0.5, "unconfirmedSeconds": 3600},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    options = {"--config": folder / "config.yaml", "--root": folder / "root", "--kubelet-dir": folder / "kubelet"}
    return ["run", *(str(word) for option in options.items() for word in option)]


# What comes in while the agent lives


async def pods_come_and_go(world: World) -> None:
    """Pods with every resource, one after the other as kubelet admits them; nearly as many go as come."""
    while world.kubelet.allocatable(CPU):
        if world.kubelet.pods and world.random.random() < 0.4:
            await world.kubelet.delete_pod(*world.random.choice(list(world.kubelet.pods)))
        world.pods += 1
        wants = {CPU: world.random.randint(1, 3), PAGES: 1, SHARED: 1}
        with contextlib.suppress(AdmissionError):
            note_pod(world, await world.kubelet.admit_pod("default", f"p{world.pods}", {"main": wants}))
        await asyncio.sleep(0)


def note_pod(world: World, pod: Pod) -> None:
    """An answer may not overlap what another pod has."""
    world.counts["answered"] += 1
    others = [one for one in world.kubelet.pods.values() if one is not pod]
    assert cpus_of(pod).isdisjoint(union(cpus_of(one) for one in others) | pinned(world))
    assert len(cpus_of(pod)) == len(pod.held(CPU))


async def cpus_are_pinned(world: World, stub: Any, in_flight: asyncio.Event) -> None:
    """Calls for exact CPUs, new ones and repeated ones, and releases by hand."""
    while True:
        drawn = world.random.random()
        if world.answered and drawn < 0.25:
            await give_back(world, world.random.choice(list(world.answered)))
        elif world.answered and drawn < 0.5:
            await pin(world, stub, in_flight, world.random.choice(list(world.answered.values())))
        else:
            taken = pinned(world) | CpuSet(int(one[3:]) for ids in world.asked for one in ids)
            spare = [f"cpu{one}" for one in range(64) if one not in taken]
            await pin(world, stub, in_flight, tuple(sorted(world.random.sample(spare, world.random.randint(1, 2)))))
        await asyncio.sleep(0)


async def pin(world: World, stub: Any, in_flight: asyncio.Event, ids: tuple[str, ...]) -> None:
    before = {held: grant for grant, held in world.answered.items()}
    request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
    world.asked.add(ids)
    in_flight.set()
    try:
        answer = await stub.Allocate(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            world.asked.discard(ids)
            assert ids not in before
            return
        raise
    world.asked.discard(ids)
    env = answer.container_responses[0].envs
    grant = env["NODEAGENT_PINNED_GRANT"]
    assert before.get(ids, grant) == grant, "the same request got another answer"
    assert CpuSet.parse(env["NODEAGENT_CPUS"]) == cpus(ids)
    assert cpus(ids).isdisjoint(union(cpus_of(pod) for pod in world.kubelet.pods.values()))
    world.answered[grant] = ids
    world.counts["answered"] += 1


async def give_back(world: World, grant: str) -> None:
    world.returning.add(grant)
    await ask(world.status, f"/v1/grants/{grant}", "DELETE")
    world.returning.discard(grant)
    del world.answered[grant]
    world.returned.add(grant)


# One life


async def live_and_die(world: World, born: Nursery, words: list[str]) -> None:
    """One life with its death; `serving` counts the lives that came as far as a stream."""
    registered = world.kubelet.registrations.get(PINNED, 0)
    life = await born.life(*words)
    if world.random.random() < 0.15:
        world.counts["died young"] += 1
        life.kill_after(world.random.uniform(0, BIRTH_S))
        await life.death()
        forgive_the_dead(world)
        return
    await world.kubelet.wait_registered(PINNED, registered + 1)
    await world.kubelet.until(lambda: all(world.kubelet.devices(one) for one in (CPU, PAGES, SHARED)))
    await check(world)
    async with channels.channel(world.kubelet.endpoints[PINNED].path) as channel:
        await stream_until_death(world, life, rpc.DevicePluginStub(channel))


async def stream_until_death(world: World, life: Life, stub: Any) -> None:
    in_flight = asyncio.Event()
    streams = [pods_come_and_go(world), cpus_are_pinned(world, stub, in_flight)]
    tasks = [asyncio.ensure_future(one) for one in streams]
    await strike(world, life, in_flight)
    await life.death()
    forgive_the_dead(world)
    world.counts["died in a call"] += bool(world.asked)
    await asyncio.wait(tasks, timeout=HANG_UP_S)
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if error is not None and not isinstance(error, (grpc.aio.AioRpcError, OSError, asyncio.CancelledError)):
            raise error


def forgive_the_dead(world: World) -> None:
    """Who dies inside Register cannot be dialled back."""
    world.kubelet.violations[:] = [one for one in world.kubelet.violations if "cannot dial" not in str(one)]


async def strike(world: World, life: Life, in_flight: asyncio.Event) -> None:
    """Draw the moment: anywhere in the stream, or within a call that has just been sent."""
    if world.random.random() < 0.5:
        life.kill_after(world.random.uniform(0, STREAM_S))
        return
    for _ in range(world.random.randint(1, 4)):
        in_flight.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(in_flight.wait(), 2)
    life.kill_after(world.random.uniform(0, CALL_S))


# What must hold after a death


async def check(world: World) -> None:
    """Compare what the new life holds with what the lives before it answered."""
    grants = {one["id"]: one for one in await ask(world.status, "/v1/grants")}
    check_pods(world, grants)
    for grant, ids in world.answered.items():
        if grant not in world.returning:
            assert tuple(sorted(grants[grant]["ids"])) == ids, f"{grant} was answered and is lost"
            assert CpuSet.parse(grants[grant]["cpus"]) == cpus(ids)
    assert not world.returned & grants.keys(), "a released grant came back"
    check_overlaps(grants.values())
    settle(world, grants)


def check_pods(world: World, grants: dict[str, Any]) -> None:
    for pod in world.kubelet.pods.values():
        for resource, answer in pod.responses["main"].items():
            word = resource.partition("/")[2].upper()
            grant = grants[answer.envs[f"NODEAGENT_{word}_GRANT"]]
            assert (grant["resource"], set(grant["ids"])) == (resource, pod.held(resource))
            assert grant["cpus"] == answer.envs["NODEAGENT_CPUS"]


def check_overlaps(grants: Iterable[Any]) -> None:
    held: Counter[object] = Counter()
    for grant in grants:
        held.update((grant["resource"], one) for one in grant["ids"])
        held.update(CpuSet.parse(grant["cpus"]))
    assert not [one for one, times in held.items() if times > 1], "held twice"


def settle(world: World, grants: dict[str, Any]) -> None:
    """What was under way at the death was done whole or not at all; from now on it is known which."""
    for grant in world.returning:
        world.counts["released unheard" if grant not in grants else "release lost"] += 1
        if grant not in grants:
            world.answered.pop(grant)
    world.returning.clear()
    held = {tuple(sorted(one["ids"])): one["id"] for one in grants.values() if one["resource"] == PINNED}
    for ids in world.asked - set(world.answered.values()):
        world.counts["granted unheard" if ids in held else "never granted"] += 1
        if ids in held:
            world.answered[held[ids]] = ids
    world.asked.clear()


def check_audit(file: Path) -> None:
    """Every grant that is held is what the audit's last word on it says."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        grants = dict(db.execute("SELECT id, body FROM grants"))
        told: dict[str, str] = {}
        for action, grant, body in db.execute("SELECT action, grant_id, body FROM audit ORDER BY seq"):
            told.pop(grant, None)
            if action != "released":
                told[grant] = body
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert told == grants


def cpus(ids: Iterable[str]) -> CpuSet:
    return CpuSet(int(one[3:]) for one in ids)


def cpus_of(pod: Pod) -> CpuSet:
    return CpuSet.parse(pod.responses["main"][CPU].envs["NODEAGENT_CPUS"])


def pinned(world: World) -> CpuSet:
    return union(cpus(ids) for grant, ids in world.answered.items() if grant not in world.returning)


def union(sets: Iterable[CpuSet]) -> CpuSet:
    return CpuSet(one for each in sets for one in each)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_after_kill_9_at_any_moment_no_answer_is_lost_and_nothing_is_given_twice(seed: int, folder: Path) -> None:
    """25 deaths for each seed; the last life is asked for the same again. The moments are spread: some grants
    were on disk and not answered, some calls had not come that far."""
    words = write_node(folder)
    async with FakeKubelet(folder / "kubelet", seed=seed) as kubelet, nursery(folder / "log") as born:
        world = World(folder=folder, kubelet=kubelet, random=random.Random(seed))
        for _ in range(LIVES):
            await live_and_die(world, born, words)
        await last_life(world, born, words)
        check_audit(folder / "state" / "ledger.db")
    print(f"seed {seed}: {dict(sorted(world.counts.items()))}")
    # How many agents live to answer depends on how fast the machine starts them.
    assert world.counts["answered"] > LIVES // 2
    assert world.counts["died in a call"] >= 5
    assert world.counts["never granted"] + world.counts["granted unheard"] >= 3
    assert "ledger-recreated" not in (folder / "log").read_text()


async def last_life(world: World, born: Nursery, words: list[str]) -> None:
    """Each pod and claim that asks again gets what it got."""
    registered = world.kubelet.registrations.get(PINNED, 0)
    life = await born.life(*words)
    await world.kubelet.wait_registered(PINNED, registered + 1)
    await check(world)
    async with channels.channel(world.kubelet.endpoints[PINNED].path) as channel:
        for ids in list(world.answered.values()):
            await pin(world, rpc.DevicePluginStub(channel), asyncio.Event(), ids)
    life.kill_after(0)
    await life.death()
