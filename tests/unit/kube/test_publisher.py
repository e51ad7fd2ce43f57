"""Publication against an API server that is away, older, full of others' edits, and that refuses."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.pool import Capacity, CounterSet, DevicePart, Features, Pool, PoolDevice, Taint
from nodeagent.kube.apiserver import client as apiserver
from nodeagent.kube.apiserver.client import Access, ApiServer
from nodeagent.kube.resourceslice.pool_writer import FAILED, PUBLISHED, WAITING, PublishPace
from nodeagent.kube.resourceslice.publisher import PublicationState, Publisher
from nodeagent.kube.resourceslice.render import Object, Owner, render
from nodeagent.telemetry.event_timer import EventTimer
from tests.doubles.api_server import CONSUMABLE, COUNTERS, LISTS, NODES, SLICES, TAINTS, FakeApiServer, Fault
from tests.support.observed import observed

NODE, DRIVER = "node-1", "nodeagent.dev"
QUICK = PublishPace(
    start_jitter_s=0.0,
    batch_s=0.02,
    settle_s=0.01,
    first_retry_s=0.02,
    last_retry_s=0.1,
    doubt_s=0.02,
    refused_s=0.2,
    most_s=0.4,
    withdraw_s=2.0,
)
DEADLINE_S = 20
TAINT = Taint(key="nodeagent.dev/unhealthy")


class Source:
    """The pools, changed by the test; forms them without what the server does not keep, as the core does."""

    def __init__(self, *pools: Pool) -> None:
        self.revision = Revision()
        self.wanted: tuple[Pool, ...] = pools
        self.asked = Revision()
        self.timer = EventTimer("t-slices")
        self._seen: tuple[int, float | None] = 1, None

    def event(self, *pools: Pool) -> None:
        """Change the pools by an event of the kernel."""
        self._seen = self._seen[0] + 1, time.monotonic()
        self.set(*pools)

    def set(self, *pools: Pool) -> None:
        self.wanted = pools
        self.revision.bump()

    def pools(self, features: Features) -> Sequence[Pool]:
        self.asked.bump()
        self.timer.looked(*self._seen)
        return [self._formed(one, features) for one in self.wanted]

    def _formed(self, pool: Pool, features: Features) -> Pool:
        devices = [one for one in pool.devices if features.taints or not one.taints]
        devices = devices if features.counters else [replace(one, consumes={}) for one in devices]
        devices = devices if features.consumable else [replace(one, shared=False) for one in devices]
        return replace(pool, devices=tuple(devices), counters=pool.counters if features.counters else ())


def gpus(count: int = 2, **parts: Any) -> Pool:
    return Pool(
        kind="gpu", devices=tuple(PoolDevice(name=f"gpu-{n}", part=DevicePart(), **parts) for n in range(count))
    )


def nics(count: int = 1, **parts: Any) -> Pool:
    return Pool(
        kind="nic", devices=tuple(PoolDevice(name=f"nic-{n}", part=DevicePart(), **parts) for n in range(count))
    )


class Bench:
    """A server, a source of pools and a publisher at work between them."""

    def __init__(self, server: FakeApiServer, source: Source, publisher: Publisher, api: Client) -> None:
        self.server, self.source, self.publisher, self.api = server, source, publisher, api

    @property
    def standing(self) -> PublicationState:
        return self.publisher.standing

    async def until(self, holds: Callable[[PublicationState], bool]) -> PublicationState:
        seen = 0
        async with asyncio.timeout(DEADLINE_S):
            while not holds(self.standing):
                seen = await self.publisher.changed(seen)
        return self.standing

    async def until_server(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.server.until(holds)

    async def until_right(self) -> None:
        """Until the server holds the pools, all of them and nothing else, and the publisher says so."""
        async with asyncio.timeout(DEADLINE_S):
            await self.server.until(lambda: self.stored() == self.wanted())
        await self.until(lambda it: it.state == PUBLISHED)

    def stored(self) -> dict[str, list[Object]]:
        """Devices by pool, as the scheduler sees complete pools; what it ignores is under "ignored"."""
        found = [one["spec"] for one in self.server.slices(node=NODE, driver=DRIVER)]
        shown: dict[str, list[Object]] = {}
        for name in sorted({one["pool"]["name"] for one in found}):
            parts = [one for one in found if one["pool"]["name"] == name]
            newest = max(one["pool"]["generation"] for one in parts)
            live = [one for one in parts if one["pool"]["generation"] == newest]
            complete = len(live) == live[0]["pool"]["resourceSliceCount"]
            shown[name if complete else "ignored"] = [without_time(it) for one in live for it in one.get("devices", ())]
            if len(live) < len(parts):
                shown["ignored"] = []
        return shown

    def wanted(self) -> dict[str, list[Object]]:
        owner = Owner(driver=DRIVER, node_name=NODE)
        written = {one.kind: render(one, owner, 1) for one in self.source.wanted if one.devices}
        return {
            f"{NODE}/{kind}": [it for part in parts for it in part["spec"].get("devices", ())]
            for kind, parts in written.items()
        }

    async def quiet(self) -> int:
        """How many requests there were, once a change that is none has been seen: no request is made any longer."""
        seen = self.source.asked.value
        self.source.revision.bump()
        async with asyncio.timeout(DEADLINE_S):
            await self.source.asked.changed(seen)
        return len(self.server.requests)


def without_time(device: Object) -> Object:
    taints = [{key: one for key, one in it.items() if key != "timeAdded"} for it in device.get("taints", ())]
    return {**device, **({"taints": taints} if taints else {})}


class Client(ApiServer):
    """The real one; it counts how often the publisher begins again."""

    tries: Revision

    async def get(self, *args: Any, **more: Any) -> Object | None:
        self.tries.bump()
        return await super().get(*args, **more)


def client(server: FakeApiServer) -> Client:
    found = Client(Access(source="test", host="127.0.0.1", port=server.port, tls=False), timeout_s=2.0)
    found.tries = Revision()
    return found


def published_by(api: ApiServer, source: Source, pace: PublishPace = QUICK) -> Publisher:
    """Also says to the type checker that the real client is what the publisher needs."""
    return Publisher(
        api,
        DRIVER,
        NODE,
        source.pools,
        source.revision.changed,
        nodes=apiserver.NODES,
        slices=apiserver.SLICES,
        pace=pace,
        timer=source.timer,
    )


@contextlib.asynccontextmanager
async def bench(
    *pools: Pool, pace: PublishPace = QUICK, node: bool = True, server: FakeApiServer | None = None
) -> AsyncIterator[Bench]:
    """A publisher at work; it must have no error when it ends."""
    async with contextlib.AsyncExitStack() as stack:
        if server is None:
            server = await stack.enter_async_context(FakeApiServer())
        if node and server.find(NODES, NODE) is None:
            server.add_node(NODE)
        api, source = client(server), Source(*pools)
        publisher = published_by(api, source, pace)
        task = asyncio.create_task(publisher.run())
        try:
            yield Bench(server, source, publisher, api)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await api.close()
            assert not server.rejected, server.rejected


async def withdrawn(it: Bench) -> bool:
    """What withdraw() answered, after run() has ended."""
    try:
        return await it.publisher.withdraw()
    finally:
        await it.api.close()


def names(server: FakeApiServer) -> list[str]:
    return [one["metadata"]["name"] for one in server.slices()]


# Publishing


async def test_pools_are_published_with_the_node_as_owner() -> None:
    """As they are, and the standing says how many slices and devices of which generation there are."""
    async with bench(gpus(65), nics()) as it:
        await it.until_right()
        uid = it.server.find(NODES, NODE)["metadata"]["uid"]  # type: ignore[index]
        assert {one["metadata"]["ownerReferences"][0]["uid"] for one in it.server.slices()} == {uid}
        standing = it.standing
        assert [(one.name, one.state, one.generation, one.slices, one.devices) for one in standing.pools] == [
            ("node-1/gpu", PUBLISHED, 1, 2, 65),
            ("node-1/nic", PUBLISHED, 1, 1, 1),
        ]
        assert (standing.writes, standing.reason, standing.lost, standing.broken) == (3, "", (), ())


async def test_a_change_is_written_within_half_a_second() -> None:
    """One slice of a large pool, and no other request is made for it."""
    async with bench(gpus(200)) as it:
        await it.until_right()
        before = await it.quiet()
        began_s = time.monotonic()
        devices = it.source.wanted[0].devices
        it.source.set(replace(it.source.wanted[0], devices=(replace(devices[0], taints=(TAINT,)), *devices[1:])))
        await it.until_server(lambda: it.stored() == it.wanted())
        assert time.monotonic() - began_s < 0.5
        assert await it.quiet() == before + 1
        assert it.server.requests[-1].verb == "replace"


async def test_a_pool_that_a_kernel_event_changes_is_timed_until_it_is_written() -> None:
    """Once: the other pool, and what changes later for another reason, are not the event's."""
    before = observed("event_to_list", api="t-slices")
    async with bench(gpus(), nics()) as it:
        await it.until_right()
        await it.quiet()
        it.source.event(gpus(3), nics())
        await it.until_right()
        await it.quiet()
        assert observed("event_to_list", api="t-slices") == before + 1
        it.source.set(gpus(3), nics(2))
        await it.until_right()
        await it.quiet()
        assert observed("event_to_list", api="t-slices") == before + 1


async def test_nothing_is_asked_or_written_when_nothing_changed() -> None:
    """However often the pools say that they may have changed."""
    async with bench(gpus(), nics()) as it:
        await it.until_right()
        await it.until_server(lambda: it.server.watching == 1)
        before = await it.quiet()
        for _ in range(20):
            assert await it.quiet() == before


async def test_a_restart_writes_nothing() -> None:
    """What is stored is what would be written: kept over a rolling upgrade."""
    async with FakeApiServer() as server:
        async with bench(gpus(70), nics(), server=server) as first:
            await first.until_right()
        writes = server.writes
        async with bench(gpus(70), nics(), server=server) as second:
            await second.until_right()
            assert second.standing.writes == 0
        assert server.writes == writes


async def test_a_kind_that_is_served_no_more_is_deleted_and_others_are_left_alone() -> None:
    """Also what an older version named in its own way; never the slices of another driver or node."""
    async with FakeApiServer() as server:
        old = render(gpus(), Owner(driver=DRIVER, node_name=NODE), 3)[0]
        server.add(SLICES, {**old, "metadata": {"name": "an-old-name"}})
        for owner in (Owner(driver="other.dev", node_name=NODE), Owner(driver=DRIVER, node_name="node-2")):
            server.add(SLICES, render(gpus(), owner, 1)[0])
        async with bench(gpus(), nics(), server=server) as it:
            await it.until_right()
            assert "an-old-name" not in names(server)
            it.source.set(gpus())
            await it.until_server(lambda: it.stored() == it.wanted())
            assert len(server.slices()) == 3


async def test_a_node_that_does_not_exist_yet_is_waited_for() -> None:
    """The agent may start before kubelet has registered its node."""
    async with bench(gpus(), node=False) as it:
        standing = await it.until(lambda it: "does not exist" in it.reason)
        assert (standing.state, it.server.writes) == (WAITING, 0)
        it.server.add_node(NODE)
        await it.until_right()


async def test_the_first_look_comes_at_a_random_moment() -> None:
    """Which differs from node to node, lies within the bound, and is the same for the same node."""
    async with bench(gpus(), pace=replace(QUICK, start_jitter_s=3600.0)) as it:
        standing = await it.until(lambda it: "so that not all nodes write at once" in it.reason)
        assert standing.state == WAITING
        assert not it.server.requests


# What others do


async def test_kubelets_wipe_is_undone() -> None:
    """Kubelet deletes every slice of its node when it starts."""
    async with bench(gpus(130), nics()) as it:
        for _ in range(3):
            await it.until_right()
            it.server.wipe(NODE)
            assert it.server.slices() == []
        await it.until_right()


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_slice_that_somebody_deletes_comes_back(index: int) -> None:
    """With one write, and the others stay as they are."""
    async with bench(gpus(130)) as it:
        await it.until_right()
        before = it.server.slices()
        it.server.delete(SLICES, before[index]["metadata"]["name"])
        await it.until_right()
        assert [one["spec"] for one in it.server.slices()] == [one["spec"] for one in before]
        assert it.server.count("create") == 4


async def test_slices_that_are_deleted_while_they_are_replaced_come_back_at_once() -> None:
    """Kubelet deletes one after the other: a replacement meets one that is gone, and that is no refusal."""
    async with bench(gpus(130), pace=replace(QUICK, refused_s=600.0, most_s=600.0)) as it:
        await it.until_right()
        it.server.answers.append(Fault(kind="status", status=404, verb="replace", resource=SLICES))
        it.source.set(gpus(129))
        await it.until_right()
        assert not it.server.answers
        gone = it.server.slices()[0]["metadata"]["name"]
        it.source.set(gpus(128))
        it.server.delete(SLICES, gone)
        await it.until_right()


async def test_what_another_client_edits_is_repaired() -> None:
    """Also where a slice of our pool is added."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        (one,) = it.server.slices()
        spec = copy.deepcopy(one["spec"])
        spec["devices"][0]["name"] = "forged"
        it.server.change(SLICES, one["metadata"]["name"], spec=spec)
        await it.until_right()
        it.server.add(SLICES, {"metadata": {"name": "extra"}, "spec": one["spec"]})
        await it.until_server(lambda: names(it.server) == [one["metadata"]["name"]])
        await it.until_right()


async def test_another_node_of_the_same_name_becomes_the_owner() -> None:
    """A node that was deleted takes its slices along; the new ones belong to the new node."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        it.server.delete(NODES, NODE)
        uid = it.server.add_node(NODE)["metadata"]["uid"]
        it.server.wipe(NODE)
        await it.until_right()
        assert it.server.slices()[0]["metadata"]["ownerReferences"][0]["uid"] == uid


async def test_who_undoes_every_write_makes_no_storm() -> None:
    """After some tries the pool waits ever longer between two, says so once, and others are published as ever."""
    with capture_logs() as logs:
        async with bench(gpus(1), pace=replace(QUICK, most_s=3600.0)) as it:
            edits = 0
            name = ""

            def undo() -> bool:
                nonlocal edits, name
                for one in it.server.slices(node=NODE):
                    name = name or one["metadata"]["name"]
                    if one["metadata"]["name"] == name and one["spec"]["devices"][0]["name"] != f"edit-{edits}":
                        edits += 1
                        spec = {**one["spec"], "devices": [{"name": f"edit-{edits}"}]}
                        it.server.change(SLICES, name, spec=spec)
                return it.standing.state == FAILED and edits > 9

            await it.until_server(undo)
            standing = await it.until(lambda it: it.state == FAILED)
            assert "changed back" in standing.reason
            writes = it.server.writes
            assert writes == edits <= 12
            it.source.set(gpus(1), nics())
            await it.until_server(lambda: "node-1/nic" in it.stored())
    assert [one["event"] for one in logs].count("pool-contested") == 1


async def test_a_change_in_the_same_moment_loses_nothing() -> None:
    """A conflict: the newest state is looked at again, and written over."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        it.server.fail(409, verb="replace")
        it.source.set(gpus(3))
        await it.until_right()


# A server in trouble


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "replace", "delete"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=429, retry_after_s=1),
        Fault(status=503),
        Fault(kind="half"),
        Fault(kind="close"),
        Fault(kind="garbage"),
        Fault(kind="close", done=True),
        Fault(status=410),
        Fault(status=409),
    ],
    ids=["500", "429", "503", "half", "close", "garbage", "lost-answer", "410", "409"],
)
async def test_a_fault_delays_and_loses_nothing(verb: str, fault: Fault) -> None:
    """Whatever call it hits, in the middle of whatever: in the end the server holds the pools."""
    async with FakeApiServer() as server:
        server.add(SLICES, render(nics(), Owner(driver=DRIVER, node_name=NODE), 1)[0])
        server.add(SLICES, render(gpus(3), Owner(driver=DRIVER, node_name=NODE), 1)[0])
        server.answers.append(dataclasses.replace(fault, verb=verb, resource=NODES if verb == "get" else SLICES))
        async with bench(gpus(130), server=server) as it:
            await it.until_right()
            assert not server.answers
            assert len(server.slices()) == 3


async def test_retry_after_is_kept() -> None:
    """A server that says when it wants to be asked again is not asked before."""
    async with FakeApiServer() as server:
        server.fail(429, verb="create", retry_after_s=1)
        began_s = time.monotonic()
        async with bench(gpus(), server=server) as it:
            await it.until_right()
            assert time.monotonic() - began_s >= 1.0


async def test_a_server_that_goes_away_gets_everything_later() -> None:
    """Meanwhile the standing says what is wrong; when it is back, the newest state is written."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        async with it.server.away():
            standing = await it.until(lambda it: it.state == FAILED)
            assert "127.0.0.1" in standing.reason
            it.source.set(gpus(5))
        await it.until_right()


async def test_a_server_that_is_away_at_the_start_is_waited_for() -> None:
    """The daemon serves on; the failure is said once, not with every try."""
    with capture_logs() as logs:
        async with FakeApiServer() as server:
            server.add_node(NODE)
            async with server.away():
                stack = contextlib.AsyncExitStack()
                it = await stack.enter_async_context(bench(gpus(2), server=server))
                await it.until(lambda it: it.state == FAILED)
                async with asyncio.timeout(DEADLINE_S):
                    while it.api.tries.value < 10:
                        await it.api.tries.changed(it.api.tries.value)
            async with stack:
                await it.until_right()
    assert [one["event"] for one in logs].count("slices-not-published") == 1


async def test_a_forgotten_revision_is_no_failure() -> None:
    """Told in the stream or refused: everything is listed again, and changes are seen again."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        await it.until_server(lambda: it.server.watching == 1)
        it.server.expire_watches()
        await it.until_server(lambda: it.server.count("list") == 2 and it.server.watching == 1)
        it.server.forget()
        it.server.end_watches()
        it.server.wipe(NODE)
        await it.until_right()


async def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    """The server ends each after a while: no list is needed then."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        for _ in range(3):
            await it.until_server(lambda: it.server.watching == 1)
            it.server.end_watches()
            await it.until_server(lambda: it.server.watching == 0)
        it.server.wipe(NODE)
        await it.until_right()
        assert it.server.count("list") == 2


async def test_what_is_forbidden_is_said_once_and_tried_again_slowly() -> None:
    """A missing permission stands until an admin acts; then the pool is published without a restart."""
    with capture_logs() as logs:
        async with FakeApiServer() as server:
            server.fail(403, times=3, verb="create")
            async with bench(gpus(2), server=server) as it:
                standing = await it.until(lambda it: it.state == FAILED)
                assert "403" in standing.reason
                assert standing.pools[0].state == FAILED
                await it.until_right()
                assert server.count("create") == 4
    assert [one["event"] for one in logs].count("pool-refused") == 1


@pytest.mark.parametrize("times", [1, 3])
async def test_a_slice_that_the_node_authorizer_does_not_know_is_no_refusal(times: int) -> None:
    """With kubelet's credentials a slice that was just deleted is forbidden, and one that was just made is until the
    server has seen it."""
    with capture_logs() as logs:
        async with bench(gpus(2), pace=replace(QUICK, refused_s=300.0, most_s=600.0)) as it:
            await it.until_right()
            it.server.fail(403, times=times, verb="replace")
            it.source.set(gpus(3))
            await it.until_right()
            assert it.server.count("replace") == times + 1
    assert "pool-refused" not in [one["event"] for one in logs]


async def test_a_slice_that_stays_forbidden_is_a_refusal() -> None:
    """A missing permission is not taken for a slice that the server does not know."""
    with capture_logs() as logs:
        async with bench(gpus(2), pace=replace(QUICK, refused_s=300.0, most_s=600.0)) as it:
            await it.until_right()
            it.server.fail(403, times=9, verb="replace")
            it.source.set(gpus(3))
            await it.until_server(lambda: it.server.count("replace") == 1 + QUICK.most_doubts)
            standing = await it.until(lambda it: it.state == FAILED)
            assert "403" in standing.reason
            await it.quiet()
            assert it.server.count("replace") == 1 + QUICK.most_doubts
    assert [one["event"] for one in logs].count("pool-refused") == 1


async def test_one_refused_pool_keeps_no_other_from_being_published() -> None:
    """Each pool stands for itself."""
    async with FakeApiServer() as server:
        server.fail(403, verb="create")
        async with bench(gpus(2), nics(), server=server, pace=replace(QUICK, refused_s=300.0, most_s=600.0)) as it:
            await it.until(lambda it: [one.state for one in it.pools] == [FAILED, PUBLISHED])
            assert list(it.stored()) == ["node-1/nic"]


async def test_a_cluster_without_resource_slices_is_told() -> None:
    """An API server that is too old has no such path; it is asked again slowly, and it may be upgraded."""
    async with FakeApiServer() as server:
        server.absent.add(SLICES)
        async with bench(gpus(2), server=server) as it:
            standing = await it.until(lambda it: it.state == FAILED)
            assert "404" in standing.reason
            server.absent.clear()
            await it.until_right()


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_in_whatever_order_the_end_is_right(seed: int) -> None:
    """Changes, edits, deletions, faults, lost answers, cut connections; then the pools are there, and it is quiet."""
    dice = random.Random(seed)
    faults = [Fault(status=status) for status in (409, 410, 429, 500)]
    faults += [Fault(kind="half"), Fault(kind="close"), Fault(kind="close", done=True)]

    def edit(server: FakeApiServer) -> None:
        for one in dice.sample(server.slices(), min(1, len(server.slices()))):
            spec = {**one["spec"], "pool": {**one["spec"]["pool"], "generation": dice.randrange(9)}}
            server.change(SLICES, one["metadata"]["name"], spec={**spec, "devices": [{"name": "forged"}]})

    def remove(server: FakeApiServer) -> None:
        for one in dice.sample(server.slices(), min(2, len(server.slices()))):
            server.delete(SLICES, one["metadata"]["name"])

    async with bench(gpus(3), nics(), pace=replace(QUICK, batch_s=0.002)) as it:
        for _ in range(60):
            match dice.randrange(8):
                case 0 | 1:
                    it.source.set(gpus(dice.choice([1, 64, 65, 130]), attributes={"n": dice.randrange(3)}), nics())
                case 2:
                    it.source.set(gpus(dice.randrange(3)))
                case 3:
                    edit(it.server)
                case 4:
                    remove(it.server)
                case 5:
                    await it.server.cut()
                case _:
                    it.server.answers.append(dice.choice(faults))
            seen = len(it.server.requests)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await it.server.until(lambda seen=seen: len(it.server.requests) > seen + dice.randrange(6))  # type: ignore[misc]
        it.server.answers.clear()
        await it.until_right()
        await it.until_server(lambda: it.server.watching == 1)
        await it.until_right()
        writes = it.server.writes
        await it.quiet()
        assert it.server.writes == writes


# Our own faults


async def test_a_device_that_breaks_a_rule_is_left_out_and_named() -> None:
    """The others of its pool are published; nothing that the server would refuse is sent."""
    bad = PoolDevice(name="bad", part=DevicePart(), attributes={"model": "x" * 65})
    with capture_logs() as logs:
        async with bench(replace(gpus(2), devices=(*gpus(2).devices, bad)), nics()) as it:
            standing = await it.until(lambda it: it.state == PUBLISHED)
            assert [one["name"] for one in it.stored()["node-1/gpu"]] == ["gpu-0", "gpu-1"]
            assert list(it.stored()) == ["node-1/gpu", "node-1/nic"]
            assert standing.broken == (
                f"pool 'node-1/gpu': device 'bad': attributes[model].string: '{'x' * 65}': "
                "it has 65 bytes, the limit is 64",
            )
            it.source.set(gpus(2), nics())
            standing = await it.until(lambda it: not it.broken)
    assert [one["event"] for one in logs].count("slice-rule-broken") == 1


async def test_a_pool_that_breaks_a_rule_is_kept_as_it_was_and_named() -> None:
    """What is stored stays; the other pools are published."""
    async with bench(gpus(2)) as it:
        await it.until_right()
        sets = (CounterSet(name="not_a_label", counters={"c": 1}),)
        it.source.set(replace(gpus(3), counters=sets), nics())
        standing = await it.until(lambda it: it.state == FAILED and len(it.pools) == 2)
        assert "'not_a_label'" in standing.reason
        assert {name: len(devices) for name, devices in it.stored().items()} == {"node-1/gpu": 2, "node-1/nic": 1}


async def test_pools_that_cannot_be_formed_are_shown_and_tried_again() -> None:
    """An unforeseen error ends no publication indefinitely."""
    async with FakeApiServer() as server:
        server.add_node(NODE)
        source, broken = Source(gpus(2)), True

        def pools(features: Features) -> Sequence[Pool]:
            if broken:
                raise ZeroDivisionError("on purpose")
            return source.pools(features)

        api = client(server)
        publisher = published_by(api, source)
        publisher._pools = pools
        task = asyncio.create_task(publisher.run())
        it = Bench(server, source, publisher, api)
        await it.until(lambda it: it.state == FAILED and it.reason == "on purpose")
        broken = False
        await it.until_right()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await api.close()


# Older servers


SHARED = {"shared": True, "capacity": {"memory": Capacity(value=8)}}
COUNTED = replace(gpus(2, consumes={"card": {"c": 1}}), counters=(CounterSet(name="card", counters={"c": 2}),))


@pytest.mark.parametrize(
    ("dropped", "pool", "lost"),
    [
        ({TAINTS}, replace(gpus(2), devices=(*gpus(2).devices, *nics(1, taints=(TAINT,)).devices)), ("taints",)),
        ({CONSUMABLE}, gpus(2, **SHARED), ("consumable",)),
        ({COUNTERS}, COUNTED, ("counters",)),
        (
            {TAINTS, CONSUMABLE, COUNTERS},
            replace(gpus(2, consumes={"card": {"c": 1}}, taints=(TAINT,), **SHARED), counters=COUNTED.counters),
            ("consumable", "counters", "taints"),
        ),
    ],
    ids=["taints", "consumable", "counters", "all"],
)
async def test_an_older_server_gets_a_form_that_it_keeps(dropped: set[str], pool: Pool, lost: tuple[str, ...]) -> None:
    """What it drops is noticed from its answer, said once, and published without; then nothing more is written."""
    with capture_logs() as logs:
        async with FakeApiServer() as server:
            server.dropped_fields = dropped
            async with bench(pool, server=server) as it:
                standing = await it.until(lambda it: it.state == PUBLISHED and it.lost == lost)
                formed = it.source._formed(pool, Features(**dict.fromkeys(lost, False)))
                plain = [part["spec"] for part in render(formed, Owner(driver=DRIVER, node_name=NODE), 1)]
                devices = [one for part in plain for one in part["devices"]]
                assert it.stored() == ({"node-1/gpu": devices} if devices else {})
                before = await it.quiet()
                assert await it.quiet() == before
                assert standing.lost == lost
    said = [one["lost"] for one in logs if one["event"] == "features-lost"]
    assert said[-1] == lost
    assert len(said) == len(set(said)) <= len(lost)


async def test_a_server_that_refuses_lists_gets_the_same_pool_without_them() -> None:
    """With the gate off it takes the values away and then refuses the whole slice: at once, and no other pool waits."""
    pools = {True: gpus(2, attributes={"numaNode": (0, 1)}), False: gpus(2, attributes={"numaNode": 0})}
    with capture_logs() as logs:
        async with FakeApiServer() as server:
            server.dropped_fields = {LISTS}
            server.add_node(NODE)
            api = client(server)
            publisher = published_by(api, Source(), QUICK)
            publisher._pools = lambda features: [pools[features.lists], nics(1)]
            task = asyncio.create_task(publisher.run())
            async with asyncio.timeout(DEADLINE_S):
                await server.until(lambda: len(server.slices()) == 2)
            stored = [one["spec"]["devices"][0].get("attributes") for one in server.slices()]
            assert {"numaNode": {"int": 0}} in stored
            task.cancel()
            await asyncio.wait({task})
            await api.close()
            assert publisher.standing.lost == ("lists",)
    assert not [one for one in logs if one["event"] in ("pool-refused", "slices-not-published")]


async def test_what_the_server_keeps_is_known_from_what_it_stores() -> None:
    """Of what was never published nothing is known; what it drops later is lost."""
    async with bench(gpus(2, **SHARED)) as it:
        await it.until_right()
        await it.until(lambda it: it.kept == ("consumable",))
        it.source.set(gpus(2, taints=(TAINT,), **SHARED))
        await it.until_right()
        await it.until(lambda it: it.kept == ("consumable", "taints"))
        it.source.set(gpus(2))
        await it.until_right()
        assert it.standing.kept == ("consumable", "taints")
        it.server.dropped_fields = {CONSUMABLE}
        it.source.set(gpus(3, **SHARED))
        standing = await it.until(lambda it: bool(it.lost) and it.state == PUBLISHED)
        assert (standing.kept, standing.lost) == (("taints",), ("consumable",))


async def test_a_start_after_an_upgrade_of_the_server_uses_all_features_again() -> None:
    """What was lost is remembered for the life of the process alone."""
    async with FakeApiServer() as server:
        server.dropped_fields = {CONSUMABLE}
        async with bench(gpus(2, **SHARED), server=server) as it:
            await it.until(lambda it: it.lost == ("consumable",) and it.state == PUBLISHED)
        server.dropped_fields = set()
        async with bench(gpus(2, **SHARED), server=server) as it:
            await it.until_right()
            assert it.standing.lost == ()


async def test_what_was_lost_is_tried_again_when_the_server_is_of_another_version() -> None:
    """Only then: with the same version nothing is written again, however often its watches end."""
    async with bench(gpus(2, **SHARED)) as it, asyncio.timeout(DEADLINE_S):
        await it.until_right()
        it.server.dropped_fields = {CONSUMABLE}
        it.source.set(gpus(3, **SHARED))
        await it.until(lambda it: it.lost == ("consumable",) and it.state == PUBLISHED)
        it.server.dropped_fields = set()
        writes, watches = it.server.writes, it.server.count("watch")
        it.server.end_watches()
        await it.server.until(lambda: it.server.count("watch") > watches)
        await it.quiet()
        assert (it.server.writes, it.standing.lost) == (writes, ("consumable",))
        it.server.version = "v1.38.0"
        it.server.end_watches()
        await it.until(lambda it: it.lost == ())
        await it.until_right()


async def test_a_server_without_its_version_is_published_to_all_the_same() -> None:
    async with FakeApiServer() as server:
        server.version = ""
        async with bench(gpus(2, **SHARED), server=server) as it:
            await it.until_right()
            server.end_watches()
            it.source.set(gpus(3, **SHARED))
            await it.until_right()


# When a taint was added


HOT, COLD = Taint(key="nodeagent.dev/unhealthy", value="hot"), Taint(key="nodeagent.dev/unhealthy", value="cold")


def added(server: FakeApiServer) -> dict[str, list[str]]:
    """The stored timeAdded of every tainted device."""
    devices = [it for one in server.slices() for it in one["spec"].get("devices", ()) if it.get("taints")]
    return {it["name"]: [taint["timeAdded"] for taint in it["taints"]] for it in devices}


def with_taints(pool: Pool, **taints: tuple[Taint, ...]) -> Pool:
    """The pool with the taints of each device that is named, with underscores for hyphens."""
    found = {name.replace("_", "-"): one for name, one in taints.items()}
    return replace(pool, devices=tuple(replace(it, taints=found.get(it.name, ())) for it in pool.devices))


async def test_a_taint_keeps_its_time_when_something_else_is_written() -> None:
    """A pod that tolerates it for a while is evicted in time, however often another device of the slice changes."""
    async with bench(with_taints(gpus(2), gpu_0=(HOT,))) as it:
        it.server.clock = lambda: 1_000.0
        await it.until_right()
        before = added(it.server)["gpu-0"]
        it.server.clock = lambda: 2_000.0
        it.source.set(with_taints(gpus(2), gpu_0=(HOT,), gpu_1=(HOT,)))
        await it.until_right()
        assert added(it.server) == {"gpu-0": before, "gpu-1": ["1970-01-01T00:33:20Z"]}
        it.server.clock = lambda: 3_000.0
        it.source.set(with_taints(gpus(2), gpu_0=(TAINT, HOT), gpu_1=(COLD,)))
        await it.until_right()
        assert added(it.server) == {"gpu-0": ["1970-01-01T00:50:00Z", *before], "gpu-1": ["1970-01-01T00:50:00Z"]}


async def test_a_taint_that_went_and_came_back_has_a_new_time() -> None:
    """The device was healthy in between."""
    async with bench(with_taints(gpus(2), gpu_0=(HOT,))) as it:
        it.server.clock = lambda: 1_000.0
        await it.until_right()
        it.source.set(gpus(2))
        await it.until_right()
        it.server.clock = lambda: 2_000.0
        it.source.set(with_taints(gpus(2), gpu_0=(HOT,)))
        await it.until_right()
        assert added(it.server) == {"gpu-0": ["1970-01-01T00:33:20Z"]}


async def test_a_taint_keeps_its_time_in_another_slice_and_generation() -> None:
    """Where devices come before it, its own moves on to the next slice, which may be a new one."""
    last = PoolDevice(name="last", part=DevicePart(), taints=(HOT,))
    async with bench(replace(gpus(63), devices=(*gpus(63).devices, last))) as it:
        it.server.clock = lambda: 1_000.0
        await it.until_right()
        before = added(it.server)
        it.server.clock = lambda: 2_000.0
        it.source.set(replace(gpus(63), devices=(*gpus(70).devices, last)))
        await it.until_right()
        assert len(it.server.slices()) == 2
        assert added(it.server) == before


async def test_a_taint_keeps_its_time_over_kubelets_wipe_and_over_a_restart() -> None:
    """The device has been ill all the time."""
    async with FakeApiServer() as server:
        server.clock = lambda: 1_000.0
        async with bench(with_taints(gpus(2), gpu_0=(HOT,)), server=server) as it:
            await it.until_right()
            before = added(server)
            server.clock = lambda: 2_000.0
            server.wipe(NODE)
            await it.until_right()
            assert added(server) == before
        server.clock = lambda: 3_000.0
        async with bench(with_taints(gpus(3), gpu_0=(HOT,)), server=server) as it:
            await it.until_right()
            assert added(server) == before


# Pace


async def test_many_changes_become_few_writes() -> None:
    """At most one batch in batch_s over time; the newest state is what is written in the end."""
    async with bench(gpus(1), pace=replace(QUICK, batch_s=0.3, burst=2)) as it:
        await it.until_right()
        began_s, before = time.monotonic(), it.server.writes
        for count in range(2, 40):
            it.source.set(gpus(count))
            await it.quiet()
        waiting = it.standing
        await it.until_right()
        most = 2 + (time.monotonic() - began_s) / 0.3
        assert 1 <= it.server.writes - before <= most
        assert waiting.state in (WAITING, PUBLISHED)


async def test_changes_of_a_refused_pool_are_paced_too() -> None:
    """A new form may be what the server takes, so it is tried before the long wait is over, but not at any rate."""
    async with FakeApiServer() as server:
        server.fail(422, times=1000, verb="create")
        began_s = time.monotonic()
        async with bench(gpus(1), server=server, pace=replace(QUICK, batch_s=0.5, burst=2, refused_s=300.0)) as it:
            await it.until(lambda it: it.state == FAILED)
            for count in range(2, 40):
                it.source.set(gpus(count))
                await it.quiet()
            assert 2 <= server.count("create") <= 2 + (time.monotonic() - began_s) / 0.5


async def test_a_large_pool_is_published_in_good_time() -> None:
    """1,024 single CPUs: 16 slices."""
    cpus = Pool(
        kind="cpu",
        devices=tuple(
            PoolDevice(name=f"cpu-{n}", part=DevicePart(), attributes={"numaNode": n % 8}) for n in range(1024)
        ),
    )
    async with bench(cpus) as it:
        await it.until_right()
        assert it.standing.writes == 16


# The end


async def test_withdrawing_deletes_every_slice_of_this_driver_and_node() -> None:
    """And no other; an admin who ends the agent for good leaves nothing behind that could be scheduled on."""
    async with FakeApiServer() as server:
        other = render(gpus(), Owner(driver="other.dev", node_name=NODE), 1)[0]
        server.add(SLICES, other)
        async with bench(gpus(130), nics(), server=server) as it:
            await it.until_right()
        assert len(server.slices()) == 5
        assert await withdrawn(it) is True
        assert names(server) == [other["metadata"]["name"]]
        assert (it.standing.state, it.standing.reason, it.standing.pools) == (WAITING, "withdrawn", ())


async def test_withdrawing_from_a_server_that_is_away_ends_soon_and_says_so() -> None:
    """A stop never hangs; what stays is deleted by kubelet or with the node."""
    async with FakeApiServer() as server:
        async with bench(gpus(), server=server, pace=replace(QUICK, withdraw_s=0.3)) as it:
            await it.until_right()
        server.answers.append(Fault(kind="hang", verb="delete"))
        began_s = time.monotonic()
        assert await withdrawn(it) is False
        assert time.monotonic() - began_s < 2.0
        assert (it.standing.state, "not withdrawn" in it.standing.reason) == (FAILED, True)


async def test_one_slice_that_cannot_be_deleted_keeps_no_other() -> None:
    """All are tried."""
    async with FakeApiServer() as server:
        async with bench(gpus(130), server=server) as it:
            await it.until_right()
        server.fail(403, verb="delete")
        assert await withdrawn(it) is False
        assert len(server.slices()) == 1


def test_importing_the_publisher_imports_no_http() -> None:
    """The client is handed in; who does not publish does not pay for it."""
    code = "import sys, nodeagent.kube.resourceslice.publisher\n"
    code += "print({'h11', 'nodeagent.kube.apiserver.client'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
