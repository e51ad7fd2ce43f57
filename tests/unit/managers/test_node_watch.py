"""Claims in the scheduler's books: published where the Node and the server agree on it, never at a pool's expense."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.memory_pools import PagePool
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.kube.apiserver.client import NODES as NODE_RESOURCE
from nodeagent.kube.apiserver.client import SLICES as SLICE_RESOURCE
from nodeagent.kube.apiserver.client import Access, ApiError, ApiServer
from nodeagent.kube.resourceslice.pool_writer import PUBLISHED, PublishPace
from nodeagent.kube.resourceslice.publisher import PublicationState, Publisher
from nodeagent.managers import node_follower
from nodeagent.managers.dra.manager import Pools
from nodeagent.managers.dra.node_watch import NodeWatch
from tests.builders.inventories import even_rows, inventory_of
from tests.doubles.api_server import NODES, SLICES, FakeApiServer, Fault

NODE, DRIVER, GATE = "node-1", "nodeagent.dev", "DRANodeAllocatableResources"
MIB = 1 << 20
WAIT_S = 20.0
QUICK = PublishPace(
    start_jitter_s=0.0, batch_s=0.02, settle_s=0.01, first_retry_s=0.02, last_retry_s=0.1, refused_s=0.2, most_s=0.4
)
PATIENT = PublishPace(
    start_jitter_s=0.0, batch_s=0.02, settle_s=0.01, first_retry_s=0.02, last_retry_s=0.1, refused_s=600.0
)
MACHINE = inventory_of(even_rows(1, 2, 1, 4, 1), pages={(node, 2 * MIB): 4 for node in range(2)})
SMALLER = inventory_of(even_rows(1, 2, 1, 4, 1)[:-1], pages={(node, 2 * MIB): 4 for node in range(2)})
FORBIDDEN = f'is forbidden: node "{NODE}" does not support {GATE} feature'
Object = dict[str, Any]


def status(*, declared: bool = True, pages: str = "16Mi") -> Object:
    """The status of a Node whose kubelet has the feature or not, and has seen so many pages."""
    return {"declaredFeatures": [GATE] if declared else [], "allocatable": {"cpu": "8", "hugepages-2Mi": pages}}


class Bench:
    """A publisher of CPUs and pages at work, and what follows the Node."""

    def __init__(self, server: FakeApiServer, api: ApiServer, pace: PublishPace) -> None:
        self.server = server
        self.revision = Revision()
        self.machine = SimpleNamespace(inventory=MACHINE, ledger=Ledger(), health={}, event_s=None)
        self.on = True
        self.watch = NodeWatch(api, NODE, self.revision.bump)
        kinds = MappingProxyType({"cpu": CpuPool(), "hugepages": PagePool(sizes=(2 * MIB,))})
        served = SimpleNamespace(catalog=SimpleNamespace(kinds=kinds))
        self.pools = Pools(self.machine, lambda: served, lambda: self.watch.books)  # type: ignore[arg-type, return-value]
        self.publisher = Publisher(
            api,
            DRIVER,
            NODE,
            self.pools.published,
            self.revision.changed,
            nodes=NODE_RESOURCE,
            slices=SLICE_RESOURCE,
            node=self.watch,
            pace=pace,
        )

    def kubelet(self, **now: Any) -> None:
        """Kubelet writes the Node's status."""
        self.server.change(NODES, NODE, status=status(**now))

    def rescan(self, inventory: Inventory) -> None:
        self.machine.inventory = inventory
        self.revision.bump()

    def counted(self) -> dict[str, list[str]]:
        """What is said to be taken of the Node, by pool; none while a pool is not complete."""
        found: dict[str, list[str]] = {}
        for pool in ("cpu", "hugepages"):
            devices = self.devices(pool)
            costs = {name for one in devices for name in one.get("nodeAllocatableResources", ())}
            assert all(bool(one.get("nodeAllocatableResources")) == bool(costs) for one in devices), "all or none"
            if devices:
                found[pool] = sorted(costs)
        return found

    def devices(self, pool: str) -> list[Object]:
        """The devices of a pool as the scheduler sees it: of its newest generation, where that is complete."""
        every = [one["spec"] for one in self.server.slices() if one["spec"]["pool"]["name"] == f"{NODE}/{pool}"]
        newest = max((one["pool"]["generation"] for one in every), default=0)
        live = [one for one in every if one["pool"]["generation"] == newest]
        complete = live and len(live) == live[0]["pool"]["resourceSliceCount"]
        return [device for one in live for device in one["devices"]] if complete else []

    async def until(self, **counted: Sequence[str]) -> PublicationState:
        """Until this is counted of each pool, all is published, and the publisher says so."""
        async with asyncio.timeout(WAIT_S):
            await self.server.until(lambda: self.counted() == {pool: [*names] for pool, names in counted.items()})
        return await self.settled()

    async def settled(self) -> PublicationState:
        return await self.until_standing(lambda it: it.state == PUBLISHED)

    async def until_standing(self, holds: Callable[[PublicationState], bool]) -> PublicationState:
        seen = 0
        async with asyncio.timeout(WAIT_S):
            while not holds(self.publisher.standing):
                seen = await self.publisher.changed(seen)
        return self.publisher.standing


BOTH = {"cpu": ["cpu"], "hugepages": ["hugepages-2Mi"]}
NONE: Mapping[str, list[str]] = {"cpu": [], "hugepages": []}


@contextlib.asynccontextmanager
async def bench(
    *, gate: bool = True, pace: PublishPace = PATIENT, server: FakeApiServer | None = None, **node: Any
) -> AsyncIterator[Bench]:
    """gate: of the API server. node: how kubelet has written it."""
    async with contextlib.AsyncExitStack() as stack:
        server = server or await stack.enter_async_context(FakeApiServer())
        server.node_allocatable = gate
        if server.find(NODES, NODE) is None:
            server.add(NODES, {"metadata": {"name": NODE}, "status": status(**node)})
        api = ApiServer(Access(source="test", host="127.0.0.1", port=server.port, tls=False), timeout_s=2.0)
        made = Bench(server, api, pace)
        tasks = [asyncio.create_task(made.publisher.run()), asyncio.create_task(made.watch.follow())]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await api.close()
            assert not server.rejected, server.rejected


# ---------------------------------------------------------------- where it is published


@pytest.mark.parametrize("gate", [False, True], ids=["server without", "server with"])
@pytest.mark.parametrize("declared", [False, True], ids=["kubelet without", "kubelet with"])
async def test_claims_are_counted_where_server_and_kubelet_have_the_feature(gate: bool, declared: bool) -> None:
    """Everywhere else the pools are published as ever, without a refusal."""
    async with bench(gate=gate, declared=declared) as it:
        standing = await it.until(**(BOTH if gate and declared else NONE))
        assert standing.lost == (("allocatable",) if declared and not gate else ())
        assert standing.withheld == ""


async def test_pages_that_kubelet_has_not_seen_are_published_without() -> None:
    """And with it, once kubelet was restarted and has seen them."""
    async with bench(pages="14Mi") as it:
        await it.until(cpu=["cpu"], hugepages=[])
        it.kubelet(pages="16Mi")
        await it.until(**BOTH)


async def test_a_restart_of_the_agent_writes_nothing() -> None:
    """The Node is read before the first pool is formed."""
    async with FakeApiServer() as server:
        async with bench(server=server) as first:
            await first.until(**BOTH)
        writes = server.writes
        async with bench(server=server) as second:
            await second.settled()
        assert server.writes == writes


# ---------------------------------------------------------------- the Node changes


async def test_a_kubelet_that_gains_and_loses_the_feature_is_followed_without_a_pool_ever_missing() -> None:
    """As with each restart of kubelet under another configuration; its deletion of the slices is another matter."""
    async with bench(declared=False) as it:
        await it.until(**NONE)
        with complete_all_the_time(it):
            for declared, counted in ((True, BOTH), (False, NONE), (True, BOTH)):
                it.kubelet(declared=declared)
                await it.until(**counted)


@contextlib.contextmanager
def complete_all_the_time(it: Bench) -> Any:
    """Fail if any state of the server, after any change, lacks a pool or a device of it."""
    put, missing = it.server._put, []

    def watched(*args: Any) -> Any:
        found = put(*args)
        if len(it.devices("cpu")) != 2 or len(it.devices("hugepages")) != 2:
            missing.append(args[1])
        return found

    it.server._put = watched  # type: ignore[method-assign]
    yield
    assert not missing


async def test_what_is_no_news_for_the_books_writes_nothing() -> None:
    """Kubelet writes the Node again and again."""
    async with bench() as it:
        await it.until(**BOTH)
        writes = it.server.writes
        before = it.revision.value
        for beat in range(5):
            it.server.change(NODES, NODE, status={**status(), "conditions": [{"lastHeartbeatTime": str(beat)}]})
        it.kubelet(pages="18Mi")  # this one is seen after the others
        async with asyncio.timeout(WAIT_S):
            await it.revision.changed(before)
        await it.settled()
        assert (it.revision.value, it.server.writes) == (before + 1, writes)


async def test_an_agent_that_may_not_watch_the_node_looks_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rights of an earlier version it may read the Node only."""
    monkeypatch.setattr(node_follower, "NOT_ALLOWED_S", 0.05)
    async with FakeApiServer() as server:
        server.fail(403, times=10_000, verb="watch", resource=NODES)
        with capture_logs() as logs:
            async with bench(server=server, declared=False) as it:
                await it.until(**NONE)
                it.kubelet(declared=True)
                await it.until(**BOTH)
        assert [one["event"] for one in logs].count("node-not-watched") == 1


@pytest.mark.parametrize("odd", [{"declaredFeatures": GATE}, {"allocatable": {"hugepages-2Mi": "many"}}, [], None])
async def test_an_odd_node_object_changes_nothing(odd: Any) -> None:
    """What was known before holds; what the server refuses then is published without it as ever."""
    async with bench() as it:
        await it.until(**BOTH)
        before = it.watch.books
        it.watch.take({"metadata": {"name": NODE}, "status": odd})
        assert it.watch.books == before or odd is None


async def test_the_books_stay_as_they_were_while_the_server_is_away() -> None:
    """Silence is no news."""
    async with bench() as it:
        await it.until(**BOTH)
        async with it.server.away():
            await it.server.cut()
            assert it.watch.books.declared
        it.rescan(SMALLER)
        await it.until(**BOTH)


# ---------------------------------------------------------------- refusals


async def test_a_pool_that_is_forbidden_with_its_costs_is_published_without_them_at_once() -> None:
    """The server's view of the Node may be older or newer than ours. One request for all pools, and the status says
    why."""
    async with bench(declared=False) as it:
        await it.until(**NONE)
        it.server.fail(403, verb="replace", resource=SLICES, times=1)
        it.server.answers[-1].message = FORBIDDEN
        writes = it.server.writes
        it.kubelet(declared=True)
        standing = await it.until_standing(lambda it: GATE in it.withheld and it.state == PUBLISHED)
        assert all(one.state == PUBLISHED for one in standing.pools)
        assert (it.counted(), it.server.writes) == (NONE, writes + 1)
        it.kubelet(pages="18Mi")  # the Node has changed
        await it.until(**BOTH)
        await it.until_standing(lambda it: not it.withheld)


async def test_a_change_of_a_pool_is_not_lost_when_kubelet_loses_the_feature_unseen() -> None:
    """Every write of the slice is refused by then, also one for another reason."""
    async with FakeApiServer() as server, bench(server=server) as it:
        await it.until(**BOTH)
        server.fail(500, times=10_000, verb="watch", resource=NODES)
        server.fail(500, times=10_000, verb="get", resource=NODES)
        server.end_watches()
        it.kubelet(declared=False)
        it.rescan(SMALLER)
        async with asyncio.timeout(WAIT_S):
            await server.until(lambda: [one["capacity"]["cpus"]["value"] for one in it.devices("cpu")] == ["4", "3"])
        assert it.counted()["cpu"] == []


async def test_what_was_forbidden_is_tried_again_after_a_while() -> None:
    """Where the Node says nothing new: ever more slowly, with one refused request each time."""
    async with bench(declared=False, pace=QUICK) as it:
        await it.until(**NONE)
        it.server.fail(403, verb="replace", resource=SLICES, times=2)
        for fault in it.server.answers:
            fault.message = FORBIDDEN
        it.kubelet(declared=True)
        await it.until(**BOTH)
        assert not it.server.answers


async def test_a_refusal_in_other_words_costs_no_pool_either() -> None:
    """422 or 403: what is refused is the pool with its costs, until it is refused without them too."""
    for status_code in (403, 422):
        async with bench(declared=False) as it:
            await it.until(**NONE)
            it.server.answers.append(Fault(status=status_code, verb="replace", resource=SLICES, message="no"))
            it.kubelet(declared=True)
            async with asyncio.timeout(WAIT_S):
                await it.server.until(lambda it=it: not it.server.answers)
            await it.settled()
            assert all(one.state == PUBLISHED for one in it.publisher.standing.pools)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_in_whatever_order_the_end_is_right_and_no_pool_is_missing(seed: int) -> None:
    """Kubelet with and without the feature, pages seen or not, refusals, edits of others, other CPUs."""
    draw = random.Random(seed)
    async with bench(pace=QUICK, declared=draw.random() < 0.5) as it:
        await it.settled()
        now = {"declared": True, "pages": "16Mi"}
        for _ in range(25):
            now = {"declared": draw.random() < 0.5, "pages": draw.choice(["0", "14Mi", "16Mi"])}
            act = draw.choice([_fail, _rescan, _edit, _cut, None])
            it.kubelet(**now)
            if act is not None:
                act(it, draw)
            await asyncio.sleep(draw.choice([0, 0.01, 0.05]))
        pages = ["hugepages-2Mi"] if now["declared"] and now["pages"] == "16Mi" else []
        await it.until(cpu=["cpu"] if now["declared"] else [], hugepages=pages)
        assert {len(it.devices(pool)) for pool in ("cpu", "hugepages")} == {2}


def _fail(it: Bench, draw: random.Random) -> None:
    it.server.answers.append(Fault(status=draw.choice([403, 422, 500]), verb="replace", resource=SLICES))


def _rescan(it: Bench, draw: random.Random) -> None:
    it.rescan(draw.choice([MACHINE, SMALLER]))


def _edit(it: Bench, draw: random.Random) -> None:
    if found := it.server.slices():
        one = draw.choice(found)
        for device in one["spec"].get("devices", ()):
            device.pop("nodeAllocatableResources", None)
        it.server.change(SLICES, one["metadata"]["name"], spec=one["spec"])


def _cut(it: Bench, draw: random.Random) -> None:
    it.server.end_watches()


# ---------------------------------------------------------------- the server that stands for the real one


async def test_the_double_treats_the_field_as_the_real_server_does() -> None:
    """Observed on Kubernetes 1.37.2: dropped in silence without the gate; 403 for each create and update without the
    Node's declaration, also of a slice that is stored with it; 422 before that for what is malformed."""
    good: Object = {"cpu": {"mapping": {"capacityKey": "cpus", "capacityMultiplier": "1"}}}
    async with FakeApiServer() as server:
        server.add(NODES, {"metadata": {"name": NODE}, "status": status()})
        api = ApiServer(Access(source="test", host="127.0.0.1", port=server.port, tls=False), timeout_s=2.0)
        try:
            assert "nodeAllocatableResources" not in _device(await api.create(SLICE_RESOURCE, _slice("off", good)))
            server.node_allocatable = True
            stored = await api.create(SLICE_RESOURCE, _slice("on", good))
            assert _device(stored)["nodeAllocatableResources"] == good
            server.node_allocatable = False
            _device(stored)["attributes"] = {"n": {"int": 1}}
            stored = await api.replace(SLICE_RESOURCE, stored)
            assert _device(stored)["nodeAllocatableResources"] == good, "kept where it is stored already"
            server.node_allocatable = True
            assert await _refusal(api.create(SLICE_RESOURCE, _slice("bad", {"cpu": {"mapping": {}}}))) == 422
            server.change(NODES, NODE, status=status(declared=False))
            assert await _refusal(api.create(SLICE_RESOURCE, _slice("late", good))) == 403
            assert await _refusal(api.replace(SLICE_RESOURCE, stored)) == 403
            _device(stored).pop("nodeAllocatableResources")
            plain = await api.replace(SLICE_RESOURCE, stored)
            assert "nodeAllocatableResources" not in _device(plain)
        finally:
            await api.close()


async def _refusal(call: Any) -> int:
    with pytest.raises(ApiError) as refused:
        await call
    return refused.value.status


def _slice(name: str, costs: Object) -> Object:
    device = {
        "name": "numa0",
        "allowMultipleAllocations": True,
        "capacity": {"cpus": {"value": "4"}},
        "nodeAllocatableResources": costs,
    }
    spec = {
        "driver": DRIVER,
        "nodeName": NODE,
        "pool": {"name": NODE, "generation": 1, "resourceSliceCount": 1},
        "devices": [device],
    }
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": name}, "spec": spec}


def _device(one: Object) -> Object:
    (found,) = one["spec"]["devices"]
    assert isinstance(found, dict)
    return found
