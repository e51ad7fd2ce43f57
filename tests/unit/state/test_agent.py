"""The one owner of the state: what is answered, what is refused, what is given back, and that memory and disk agree."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource, still_told
from nodeagent.core.ledger.ledger import GRANTED, RELEASED, Change
from nodeagent.core.ledger.rebuild import Sources
from nodeagent.core.ledger.release import Patience
from nodeagent.core.ledger.witness import Sight, Sighting, Witnesses
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import ContainerEdits, Device, Link
from nodeagent.core.model.grant import CLAIM, Grant, Holder, Holding
from nodeagent.core.model.health import UNHEALTHY, Evidence
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError, PeerError, Refused, StateError
from nodeagent.host.devices import all_kinds
from nodeagent.resources.offer import Offer, offers
from nodeagent.state.agent import Agent
from nodeagent.state.audit import newest
from nodeagent.state.store import FILE, Store
from nodeagent.state.values import AgentSettings
from tests.builders.inventories import even_rows, inventory_of

MIB = 1 << 20
RESOURCES = [
    {"name": "cpu", "kind": "cpu"},
    {"name": "fullcpu", "kind": "cpu"},
    {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 4},
    {"name": "gpu", "kind": "gpu"},
    {"name": "anygpu", "kind": "gpu"},
    {"name": "fuse", "kind": "char", "paths": ["/dev/fuse"], "replicas": 3},
]


def offered(*resources: Mapping[str, object]) -> dict[str, Offer]:
    config = msgspec.convert({"resources": resources or RESOURCES}, Config)
    return {offer.config.name: offer for offer in offers(config, all_kinds.builtin_kinds())}


OFFERS = offered()
RESOURCES = [one.resource for one in OFFERS.values()]
CPU, FULL, PAGES, GPU, ANY_GPU, FUSE = (OFFERS[name] for name in ("cpu", "fullcpu", "pages", "gpu", "anygpu", "fuse"))
WHOLE_FUSE = replace(FUSE, resource=DeviceResource(name="nodeagent.dev/wholefuse", kind="char"))


def gpu(number: int, node: int, **more: object) -> Device:
    paths = (f"/dev/dri/card{number}",)
    return Device(kind="gpu", id=f"gpu{number}", numa_node=node, paths=paths, **more)  # type: ignore[arg-type]


def machine(*, without: Iterable[int] = (), devices: Sequence[Device] | None = None) -> Inventory:
    """2 packages, 2 NUMA nodes, 16 cores: CPUs 0-7 on node 0, 8-15 on node 1; 8 blocks of 4 pages on each node."""
    gone = set(without)
    rows = [row for row in even_rows(2, 1, 1, 8, 1) if row[0] not in gone]
    parts = [gpu(0, 0), gpu(1, 1), gpu(2, 1, parent="gpu1")]
    fuse = Device(kind="char", id="/dev/fuse", paths=("/dev/fuse",), attributes=MappingProxyType({"selector": "fuse"}))
    links = (Link(a="gpu0", b="gpu1", type="nvlink", weight=100),)
    shown = [fuse, *parts] if devices is None else devices
    return inventory_of(rows, pages={(0, 2 * MIB): 32, (1, 2 * MIB): 32}, devices=shown, links=links)


def with_free_pages(inventory: Inventory, node: int, free: int) -> Inventory:
    nodes = [
        replace(one, hugepages=tuple(replace(pool, free_pages=free) for pool in one.hugepages))
        if one.id == node
        else one
        for one in inventory.numa_nodes
    ]
    return replace(inventory, numa_nodes=tuple(nodes))


def holding(pod: str, offer: Offer, *ids: str) -> Holding:
    return Holding(namespace="ns", pod=pod, container="main", resource=offer.name, ids=ids)


def uid(pod: str) -> str:
    return f"uid-{pod}"


@dataclass
class Node:
    """An agent, what kubelet would list, and a clock that goes when told to."""

    folder: Path
    agent: Agent
    lists: list[Holding] | PeerError = field(default_factory=list)
    now_s: float = 1000.0
    settings: AgentSettings = field(default_factory=AgentSettings)
    kubelet: int = 1
    """Another number is another start of kubelet."""
    alive: set[str] = field(default_factory=set)
    """UIDs of the pods that have processes."""
    sight: Sight = Sight.EMPTY
    """What there is to see of all other pods."""

    async def listing(self) -> tuple[Holding, ...]:
        if isinstance(self.lists, PeerError):
            raise self.lists
        return tuple(self.lists)

    async def allocate(self, offer: Offer, *ids: str) -> ContainerEdits:
        return (await self.agent.allocate(offer.resource, [ids], offer.edits, "op"))[0]

    async def grant(self, offer: Offer, *ids: str) -> Grant:
        await self.allocate(offer, *ids)
        return self.agent.ledger.by_id[offer.name, ids[0]]

    async def reconcile(self, *holdings: Holding, after_s: float = 0.0, by: Sequence[Offer] | None = None) -> None:
        self.now_s += after_s + 0.001
        self.lists = list(holdings)
        resources = RESOURCES if by is None else [one.resource for one in by]
        await self.agent.reconcile(holdings, resources, "op", witnesses=self.witnesses(*holdings))

    def witnesses(self, *holdings: Holding) -> Witnesses:
        """A checkpoint that says the same as the list, and what there is to see of every pod."""
        given = {(uid(one.pod), one.container): frozenset((one.resource, id) for id in one.ids) for one in holdings}
        uids = {*(one for one, _ in given), *(one for grant in self.agent.ledger.grants.values() for one in grant.pods)}
        sights = {one: Sighting(Sight.LIVES, "it runs") if one in self.alive else Sighting(self.sight) for one in uids}
        return Witnesses(kubelet=self.kubelet, knows_pods=bool(holdings), given=given, sights=sights)

    async def living(self, grants: Sequence[Grant]) -> Mapping[str, str]:
        return {one.id: "it runs" for one in grants if self.alive.intersection(one.pod_uids)}

    def open(self, inventory: Inventory) -> Agent:
        clock = lambda: self.now_s  # noqa: E731
        return Agent(Store(self.folder), inventory, self.settings, self.listing, living=self.living, clock=clock)

    async def restart(self) -> None:
        await self.agent.close()
        self.agent = self.open(self.agent.inventory)

    def check(self) -> None:
        """Memory and disk say the same."""
        assert {one.id: one for one in self.agent._store.load()} == dict(self.agent.ledger.grants)


@contextlib.asynccontextmanager
async def node(
    folder: Path, inventory: Inventory | None = None, settings: AgentSettings | None = None
) -> AsyncIterator[Node]:
    """A node with an empty ledger and a kubelet that knows its pods."""
    one = Node(folder=folder, agent=None, settings=settings or AgentSettings(boot_id="boot"))  # type: ignore[arg-type]
    one.agent = one.open(inventory or machine())
    await one.reconcile()
    try:
        yield one
        one.check()
    finally:
        await one.agent.close()


# Allocate


async def test_what_is_granted_is_on_disk_before_it_is_answered(folder: Path) -> None:
    """The answer names the grant, its CPUs and their NUMA nodes."""
    async with node(folder) as one:
        edits = await one.allocate(CPU, "cpu3", "cpu12")
        (stored,) = one.agent._store.load()
        assert edits.env == {
            "NODEAGENT_CPU_GRANT": stored.id,
            "NODEAGENT_CPUS": "3,12",
            "NODEAGENT_NUMA_NODES": "0,1",
        }
        assert (stored.ids, stored.cpus, stored.boot_id) == (("cpu3", "cpu12"), CpuSet([3, 12]), "boot")


@pytest.mark.parametrize(
    ("offer", "ids", "text"),
    [
        (CPU, ["cpu99", "cpu1", "cpu01", "cpu²", "CPU2", "cpu-1"], "cpu99, cpu01, cpu², CPU2, cpu-1"),
        (PAGES, ["node0-2Mi-0", "node0-2Mi-8", "node7-2Mi-0", "node0-1Gi-0"], "node0-2Mi-8, node7-2Mi-0, node0-1Gi-0"),
        (PAGES, ["node0-2Mi-00", "node00-2Mi-1", "node0-2Mi-１"], "node0-2Mi-00, node00-2Mi-1, node0-2Mi-１"),
        (GPU, ["gpu9", "/dev/fuse"], "gpu9, /dev/fuse"),
        (FUSE, ["/dev/fuse", "/dev/fuse::3"], "/dev/fuse, /dev/fuse::3"),
    ],
)
async def test_unknown_ids_are_named_and_nothing_is_granted(
    offer: Offer, ids: list[str], text: str, folder: Path
) -> None:
    """Also where they stand in the second container only."""
    good = {"cpu": "cpu0", "hugepages": "node0-2Mi-0", "gpu": "gpu0", "char": "/dev/fuse::0"}[offer.resource.kind]
    async with node(folder) as one:
        for containers in ([ids], [[good], [x for x in ids if x != good]]):
            with pytest.raises(InputError) as error:
                await one.agent.allocate(offer.resource, containers, offer.edits, "op")
            assert str(error.value) == f"cannot allocate {text} of {offer.name}: unknown"
        assert not one.agent.ledger.grants


@pytest.mark.parametrize("containers", [[["cpu1", "cpu1"]], [["cpu1"], ["cpu1", "cpu2"]]])
async def test_ids_asked_for_twice_are_named_and_nothing_is_granted(containers: list[list[str]], folder: Path) -> None:
    """In one container or in two."""
    async with node(folder) as one:
        with pytest.raises(InputError, match=f"cannot allocate {CPU.name}: asked for twice: cpu1"):
            await one.agent.allocate(CPU.resource, containers, CPU.edits, "op")
        assert not one.agent.ledger.grants


async def test_several_containers_are_granted_all_or_none(folder: Path) -> None:
    """The third wants what another resource has given away."""
    async with node(folder) as one:
        held = await one.grant(FULL, "cpu5")
        with pytest.raises(Refused, match=r"5 held by a container not yet listed \(nodeagent.dev/fullcpu\)"):
            await one.agent.allocate(CPU.resource, [["cpu1"], ["cpu2"], ["cpu5"]], CPU.edits, "op")
        assert dict(one.agent.ledger.grants) == {held.id: held}
        assert len(await one.agent.allocate(CPU.resource, [["cpu1"], ["cpu2"]], CPU.edits, "op")) == 2


async def test_the_same_ids_again_are_the_same_grant(folder: Path) -> None:
    """In another order, and after a restart: the same answer, and no second line in the ledger."""
    async with node(folder) as one:
        first = await one.allocate(CPU, "cpu1", "cpu2")
        assert await one.allocate(CPU, "cpu2", "cpu1") == first
        await one.restart()
        assert await one.allocate(CPU, "cpu1", "cpu2") == first
        assert len(one.agent.ledger.grants) == 1


async def test_a_repeated_call_gets_its_answer_although_the_pages_are_in_use_by_then(folder: Path) -> None:
    """They are in use by the one who asks."""
    async with node(folder) as one:
        first = await one.allocate(PAGES, *(f"node0-2Mi-{block}" for block in range(8)))
        one.agent.see(with_free_pages(machine(), 0, 0))
        assert await one.allocate(PAGES, *(f"node0-2Mi-{block}" for block in range(8))) == first


async def test_ids_of_a_grant_that_was_never_listed_are_taken_over(folder: Path) -> None:
    """Its pod was not admitted: what is left of it stays until it is given up."""
    async with node(folder) as one:
        old = await one.grant(CPU, "cpu1", "cpu2", "cpu3")
        new = await one.grant(CPU, "cpu2", "cpu4")
        grants = one.agent.ledger.grants
        assert (grants[old.id].ids, grants[old.id].cpus) == (("cpu1", "cpu3"), CpuSet([1, 3]))
        assert grants[new.id].cpus == CpuSet([2, 4])
        await one.grant(CPU, "cpu1", "cpu3", "cpu5")
        assert old.id not in one.agent.ledger.grants


async def test_what_is_left_of_a_grant_stays_held_although_it_is_offline(folder: Path) -> None:
    """It is no other pod's only because the machine does not show it."""
    async with node(folder) as one:
        old = await one.grant(CPU, "cpu1", "cpu2")
        one.agent.see(machine(without=[2]))
        await one.grant(CPU, "cpu1")
        assert one.agent.ledger.grants[old.id].cpus == CpuSet([2])


async def test_a_confirmed_holder_that_is_still_listed_keeps_what_it_has(folder: Path) -> None:
    """Refused by the name of the pod."""
    async with node(folder) as one:
        held = await one.grant(CPU, "cpu1", "cpu2")
        await one.reconcile(holding("a", CPU, "cpu1", "cpu2"))
        with pytest.raises(Refused, match=f"cannot grant cpu2 of {CPU.name}: held by ns/a/main"):
            await one.allocate(CPU, "cpu2", "cpu3")
        assert one.agent.ledger.grants[held.id].ids == ("cpu1", "cpu2")


async def test_a_confirmed_holder_that_is_gone_gives_way_at_once(folder: Path) -> None:
    """Kubelet knows before the next list comes; the audit has both ends."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        one.lists = []
        new = await one.grant(CPU, "cpu1")
        assert (new.holder.pod, new.confirmed) == ("", False)


async def test_nobody_gives_way_while_kubelet_does_not_say_who_is_there(folder: Path) -> None:
    """Neither granted nor lost."""
    async with node(folder) as one:
        held = await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        one.lists = PeerError("cannot list: gone")
        with pytest.raises(Refused, match="last held by ns/a/main, and cannot list: gone"):
            await one.allocate(CPU, "cpu0", "cpu1")
        assert list(one.agent.ledger.grants) == [held.id]


async def test_a_part_and_its_whole_are_not_given_to_two(folder: Path) -> None:
    """Through one resource or two, whichever comes first; and kubelet is told before it asks."""
    async with node(folder) as one:
        await one.grant(GPU, "gpu2")
        for offer in (GPU, ANY_GPU):
            with pytest.raises(Refused, match="cannot grant gpu1: gpu2 is of the same device and held by"):
                await one.allocate(offer, "gpu1")
        shown = {
            (offer.name, x.id): x.healthy for offer in (GPU, ANY_GPU) for x in one.agent.advertised(offer.resource)
        }
        assert [key[1] for key, healthy in shown.items() if healthy] == ["gpu0", "gpu2", "gpu0"]
        await one.allocate(GPU, "gpu0")


async def test_a_part_and_its_whole_do_not_count_as_two(folder: Path) -> None:
    """Neither by request nor by preference: parts come first."""
    async with node(folder) as one:
        with pytest.raises(Refused, match="cannot grant gpu1, gpu2: gpu2 is a part of gpu1"):
            await one.allocate(GPU, "gpu2", "gpu1")
        every = ["gpu0", "gpu1", "gpu2"]
        assert sorted(one.agent.prefer(GPU.resource, every, [], 2)) == ["gpu0", "gpu2"]
        assert sorted(one.agent.prefer(GPU.resource, every, ["gpu1"], 2)) == ["gpu0", "gpu1"]
        with pytest.raises(Refused, match="cannot place 3 devices of kind gpu: 2 of 3 can be given away together"):
            one.agent.prefer(GPU.resource, every, [], 3)


async def test_a_device_is_held_whole_or_by_shares_never_both(folder: Path) -> None:
    """Three shares of it go to three; the whole to no pod then."""
    async with node(folder) as one:
        for share in range(3):
            await one.allocate(FUSE, f"/dev/fuse::{share}")
        with pytest.raises(Refused, match="cannot grant /dev/fuse: held by"):
            await one.allocate(WHOLE_FUSE, "/dev/fuse")
        assert not any(x.healthy for x in one.agent.advertised(WHOLE_FUSE.resource))


async def test_pages_that_the_host_has_taken_meanwhile_are_refused(folder: Path) -> None:
    """With the numbers."""
    async with node(folder) as one:
        one.agent.see(with_free_pages(machine(), 0, 6))
        with pytest.raises(Refused, match="cannot grant 8 hugepages of 2097152 bytes on NUMA node 0: 6") as refusal:
            await one.allocate(PAGES, "node0-2Mi-0", "node0-2Mi-1")
        assert (refusal.value.want, refusal.value.free) == (8, 6)
        await one.allocate(PAGES, "node0-2Mi-0", "node1-2Mi-1")


async def test_reserved_cpus_are_refused(folder: Path) -> None:
    """By name of what is reserved."""
    async with node(folder, settings=AgentSettings(reserved=CpuSet([0, 1]))) as one:
        with pytest.raises(Refused, match="cannot grant CPUs 1: they are reserved"):
            await one.allocate(CPU, "cpu1", "cpu2")
        assert [x.id for x in one.agent.advertised(CPU.resource)] == [f"cpu{n}" for n in range(2, 16)]


async def test_cpus_that_become_reserved_during_a_decision_stay_reserved(folder: Path) -> None:
    """The decision took its ledger before, and is saved after."""
    async with node(folder) as one:
        loop, save, applied = asyncio.get_running_loop(), one.agent._store.save_all, threading.Event()

        def apply() -> None:
            one.agent.apply_settings(AgentSettings(reserved=CpuSet([0])))
            applied.set()

        def slow(*args: Any, **more: Any) -> None:
            loop.call_soon_threadsafe(apply)
            assert applied.wait(10)
            save(*args, **more)

        one.agent._store.save_all = slow  # type: ignore[method-assign]
        await one.allocate(CPU, "cpu4")
        assert applied.is_set()
        assert one.agent.ledger.reserved == CpuSet([0])


async def test_what_an_earlier_agent_granted_is_a_new_pods_once_it_is_requested_again(folder: Path) -> None:
    """Its pod has the time of a pod in admission, not the patience for what an earlier agent left."""
    patience = Patience(unconfirmed_s=60.0, unobserved_s=5.0)
    async with node(folder, settings=AgentSettings(boot_id="boot", patience=patience)) as one:
        old = await one.grant(CPU, "cpu1")
        await one.restart()
        await one.reconcile()
        assert (await one.grant(CPU, "cpu1")).id == old.id
        for _ in range(2):
            one.now_s += 10.0
            await one.reconcile()
            assert old.id in one.agent.ledger.grants
        one.now_s += 60.0
        await one.reconcile()
        assert not one.agent.ledger.grants


# Hanging up, closing, full disks


async def test_a_caller_that_hangs_up_during_the_save_leaves_memory_and_disk_equal(folder: Path) -> None:
    """gRPC cancels the handler; the call that asks again gets the same grant."""
    async with node(folder) as one:
        for number in range(8):
            call = asyncio.ensure_future(one.allocate(CPU, f"cpu{number}"))
            for _ in range(number):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
        await one.agent.release([], "op")
        one.check()
        before = {grant.ids: grant.id for grant in one.agent.ledger.grants.values()}
        assert before
        for ids, grant in before.items():
            assert (await one.grant(CPU, *ids)).id == grant


async def test_a_failure_that_nobody_waits_for_is_in_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller hung up, then the decision could not be saved; or it was refused in a turn of its own."""
    async with node(folder) as one:
        with capture_logs() as logs, monkeypatch.context() as patch:
            patch.setattr(Store, "save_all", _full)
            for call in (one.allocate(CPU, "cpu1"), one.reconcile(holding("a", CPU, "cpu2"))):
                task = asyncio.ensure_future(call)
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await one.agent.refresh()
        failed = [line["error"] for line in logs if line["event"] == "abandoned-decision-failed"]
        assert failed == ["cannot save ledger.db: database or disk is full"] * 2
        assert not one.agent.ledger.grants


async def test_closing_lets_decisions_finish_and_takes_no_more(folder: Path) -> None:
    """Whatever was asked before is answered and on disk."""
    async with node(folder) as one:
        calls = [asyncio.ensure_future(one.allocate(CPU, f"cpu{n}")) for n in range(5)]
        await asyncio.sleep(0)
        await one.agent.close()
        assert all(isinstance(edits, ContainerEdits) for edits in await asyncio.gather(*calls))
        with pytest.raises(StateError, match="cannot decide: the agent is stopping"):
            await one.allocate(CPU, "cpu9")
        one.agent = Agent(Store(folder), machine(), one.settings, one.listing)
        assert one.agent.ledger.cpus_held == CpuSet(range(5))


async def test_a_save_that_fails_leaves_memory_and_disk_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call later is good."""
    async with node(folder) as one:
        held = await one.grant(CPU, "cpu1")
        seen = await one.agent.revisions.ledger.changed(1)  # the news of a decision comes a moment after its answer
        with monkeypatch.context() as patch:
            patch.setattr(Store, "save_all", _full)
            with pytest.raises(StateError, match="disk is full"):
                await one.allocate(CPU, "cpu1", "cpu2")
            with pytest.raises(StateError, match="disk is full"):
                await one.reconcile(holding("a", CPU, "cpu1"))
        assert (dict(one.agent.ledger.grants), one.agent.revisions.ledger.value) == ({held.id: held}, seen)
        one.check()
        one.lists = []
        assert (await one.grant(CPU, "cpu1", "cpu2")).cpus == CpuSet([1, 2])


def _full(*args: object, **more: object) -> None:
    raise StateError("cannot save ledger.db: database or disk is full")


async def test_a_ledger_folder_removed_under_the_agent_is_put_back(folder: Path) -> None:
    """With what was granted before and after."""
    async with node(folder / "state") as one:
        await one.grant(CPU, "cpu1")
        (folder / "state").rename(folder / "elsewhere")
        await one.grant(CPU, "cpu2")
        await one.restart()
        assert one.agent.ledger.cpus_held == CpuSet([1, 2])


# Kubelet's list


async def test_a_listed_holder_is_known_by_name_from_then_on(folder: Path) -> None:
    """Over a restart too."""
    async with node(folder) as one:
        grant = await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        await one.restart()
        held = one.agent.ledger.grants[grant.id]
        assert (str(held.holder), held.confirmed) == ("ns/a/main", True)


async def test_what_is_listed_no_more_is_released_after_the_time_it_is_given(folder: Path) -> None:
    """5 s for a pod that was listed once, 60 s for one that may still be on its way."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        await one.grant(CPU, "cpu2")
        for after_s, left in ((1, [1, 2]), (4, [1, 2]), (1, [2]), (29, [2]), (25, [2]), (2, [])):
            await one.reconcile(after_s=after_s)
            assert one.agent.ledger.cpus_held == CpuSet(left), after_s
        assert one.agent.look_again_s is None


async def test_one_list_with_the_pod_ends_its_absence(folder: Path) -> None:
    """Only an unbroken absence counts."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        for _ in range(3):
            await one.reconcile(after_s=4)
            await one.reconcile(holding("a", CPU, "cpu1"), after_s=4)
        assert one.agent.ledger.cpus_held == CpuSet([1])


async def test_asking_again_gives_a_grant_its_whole_time_again(folder: Path) -> None:
    """A second try to admit the pod just before the first would have been given up."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        for _ in range(3):
            await one.reconcile(after_s=19)
        await one.grant(CPU, "cpu1")
        for _ in range(4):
            await one.reconcile(after_s=19)
        assert one.agent.ledger.cpus_held == CpuSet([1])
        await one.reconcile(after_s=5)
        assert one.agent.ledger.cpus_held == EMPTY


async def test_a_kubelet_that_starts_again_and_lists_nothing_releases_nothing(folder: Path) -> None:
    """However long its API server is silent. Once it lists other pods, what it has no record of goes."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        one.kubelet += 1
        for _ in range(50):
            await one.agent.reconcile([], [], "op", witnesses=replace(one.witnesses(), given=None))
            one.now_s += 60
        assert one.agent.ledger.cpus_held == CpuSet([1])
        await one.reconcile(holding("b", CPU, "cpu2"))
        await one.reconcile(holding("b", CPU, "cpu2"), after_s=6)
        assert one.agent.ledger.cpus_held == CpuSet([2])


async def test_the_cpus_of_a_running_pod_are_not_given_to_another_that_kubelet_prefers(folder: Path) -> None:
    """Kubelet stops listing a pod that runs: the grant is disputed, its ids are not healthy, and no other pod gets
    them; when the pod ends they are free at once."""
    async with node(folder) as one:
        grant = await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        one.alive.add(uid("a"))
        for _ in range(20):
            await one.reconcile(after_s=100)
        assert one.agent.disputed == {grant.id}
        assert one.agent.held_back == {grant.id: "kubelet no longer lists it, and it runs"}
        assert "cpu1" not in {shown.id for shown in one.agent.advertised(CPU.resource) if shown.healthy}
        with pytest.raises(Refused, match="held by ns/a/main, and it runs"):
            await one.allocate(CPU, "cpu1")
        one.alive.clear()
        one.sight = Sight.ABSENT
        await one.reconcile()
        assert (one.agent.ledger.grants, one.agent.disputed) == ({}, frozenset())
        await one.allocate(CPU, "cpu1")


@pytest.mark.parametrize(
    ("offer", "id"), [(CPU, "cpu1"), (GPU, "gpu0"), (PAGES, "node0-2Mi-0"), (FUSE, "/dev/fuse::0")]
)
async def test_what_a_pod_holds_that_kubelet_has_forgotten_counts_as_held(offer: Offer, id: str, folder: Path) -> None:
    """Whatever the resource: it is not ill."""
    async with node(folder) as one:
        await one.grant(offer, id)
        await one.reconcile(holding("a", offer, id))
        one.alive.add(uid("a"))
        for _ in range(20):
            await one.reconcile(after_s=100)
        assert one.agent.disputed
        shown = {ad.id: ad for ad in one.agent.advertised(offer.resource)}
        assert (shown[id].healthy, shown[id].held, shown[id].reason) == (False, True, "")
        assert all(ad.healthy for other, ad in shown.items() if other != id)


@pytest.mark.parametrize(
    ("offer", "id"), [(CPU, "cpu1"), (GPU, "gpu0"), (PAGES, "node0-2Mi-0"), (FUSE, "/dev/fuse::0")]
)
async def test_what_is_free_is_not_held_while_the_ledger_may_lack_decisions(
    offer: Offer, id: str, folder: Path
) -> None:
    """What the ledger has stays as it is; what other grants hold is held; the rest is unhealthy for the reason."""
    async with node(folder) as one:
        await one.grant(offer, id)
        await one.grant(FULL, "cpu5")
        before = {ad.id: ad for ad in one.agent.advertised(offer.resource)}
        one.agent.loss = "moved aside"
        for ad in one.agent.advertised(offer.resource):
            if ad.id == id or not before[ad.id].healthy:
                assert ad == before[ad.id]
            else:
                assert (ad.healthy, ad.held) == (False, False)
                assert ad.reason == "the ledger may lack decisions: moved aside"
        one.agent.loss = ""


async def test_a_list_from_before_a_grant_says_nothing_about_it(folder: Path) -> None:
    """Kubelet was asked, the pod ended, another was admitted: the old list names the wrong pod."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        stale = [holding("a", CPU, "cpu1")]
        await one.reconcile(*stale)
        asked_at, one.now_s, one.lists = one.now_s, one.now_s + 0.1, []
        new = await one.grant(CPU, "cpu1")
        await one.agent.reconcile(stale, RESOURCES, "op", asked_at=asked_at, witnesses=one.witnesses(*stale))
        assert one.agent.ledger.grants[new.id] == new
        assert one.agent.look_again_s == 0.0
        await one.reconcile(after_s=10)
        assert new.id in one.agent.ledger.grants


async def test_what_is_not_served_any_more_stays_held_while_it_is_listed(folder: Path) -> None:
    """The configuration dropped a resource; its pods run on, and no other pod gets their CPUs."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        for _ in range(5):
            await one.reconcile(holding("a", CPU, "cpu1"), after_s=20, by=[FULL])
        with pytest.raises(Refused, match="1 held by ns/a/main"):
            await one.allocate(FULL, "cpu1")
        await one.reconcile(after_s=1, by=[FULL])
        await one.reconcile(after_s=6, by=[FULL])
        await one.allocate(FULL, "cpu1")


async def test_a_lost_ledger_is_rebuilt_from_kubelets_list(folder: Path) -> None:
    """Every holding of a resource that is served, by name."""
    async with node(folder) as one:
        lists = [holding("a", CPU, "cpu1", "cpu9"), holding("b", PAGES, "node1-2Mi-3"), holding("c", GPU, "gpu0")]
        await one.reconcile(*lists, Holding(namespace="n", pod="x", container="y", resource="other/x", ids=("1",)))
        held = one.agent.ledger
        assert {grant.holder.pod for grant in held.grants.values()} == {"a", "b", "c"}
        assert (held.cpus_held, held.devices_held) == (CpuSet([1, 9]), {"gpu0"})
        assert held.pages_held == {(1, 2 * MIB): 4}
        assert await one.agent.reconcile(lists, RESOURCES, "op") is not None
        assert len(one.agent.ledger.grants) == 3


async def test_what_kubelet_says_against_the_ledger_is_named_once(folder: Path) -> None:
    """Overlaps, parts of what is held, ids that mean nothing; what can be adopted is."""
    async with node(folder) as one:
        await one.grant(FULL, "cpu1")
        await one.grant(ANY_GPU, "gpu2")
        lists = [
            holding("a", CPU, "cpu1"),
            holding("b", GPU, "gpu1"),
            holding("c", CPU, "cpu77"),
            holding("d", CPU, "cpu4"),
        ]
        with capture_logs() as logs:
            await one.reconcile(*lists)
            await one.reconcile(*lists)
        assert one.agent.conflicts == (
            f"ns/a/main: cannot grant CPUs 1: 1 held by a container not yet listed ({FULL.name})",
            f"ns/b/main: cannot grant gpu1: gpu2 is of the same device and held by a container not yet listed "
            f"({ANY_GPU.name})",
            f"ns/c: cannot allocate cpu77 of {CPU.name}: unknown",
        )
        assert [line["event"] for line in logs].count("ledger-and-kubelet-disagree") == 3
        assert one.agent.ledger.by_id[CPU.name, "cpu4"].holder.pod == "d"


async def test_an_admin_releases_by_id(folder: Path) -> None:
    """Unknown ids and repeated ones are no error."""
    async with node(folder) as one:
        grant = await one.grant(CPU, "cpu1")
        assert await one.agent.release([grant.id, grant.id, "g-none"], "op") == (grant,)
        assert await one.agent.release([grant.id], "op") == ()
        assert one.agent.ledger.cpus_held == EMPTY


async def test_a_claims_grant_is_not_kubelets_lists_to_release(folder: Path) -> None:
    """It is given back by its own protocol."""
    with contextlib.closing(Store(folder)) as store:
        claim = Grant(id="c", holder=Holder(api=CLAIM, namespace="ns", claim="c", uid="u"), cpus=CpuSet([3]))
        store.save([Change(action=GRANTED, grant=claim)], op="op", at=1)
    async with node(folder) as one:
        await one.reconcile(after_s=20)
        with pytest.raises(Refused, match="3 held by claim ns/c"):
            await one.allocate(CPU, "cpu3")


# Preference, news


async def test_cpus_are_preferred_near_the_gpu_granted_a_moment_ago(folder: Path) -> None:
    """The pod is not known by name, but it is the one being admitted."""
    every = [f"cpu{n}" for n in range(16)]
    async with node(folder) as one:
        await one.grant(GPU, "gpu1")
        assert set(one.agent.prefer(CPU.resource, every, [], 2)) <= {f"cpu{n}" for n in range(8, 16)}
        await one.grant(CPU, "cpu9")
        blocks = [f"node{n}-2Mi-{block}" for n in (0, 1) for block in range(8)]
        assert one.agent.prefer(PAGES.resource, blocks, [], 2) == ["node1-2Mi-0", "node1-2Mi-1"]


async def test_what_is_available_by_kubelets_word_is_preferred_whoever_held_it(folder: Path) -> None:
    """Kubelet knows of the pod's end before the list does; an id that is none any longer is left out."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1", "cpu2")
        await one.reconcile(holding("a", CPU, "cpu1", "cpu2"))
        assert sorted(one.agent.prefer(CPU.resource, ["cpu1", "cpu2", "cpu99"], ["cpu2"], 2)) == ["cpu1", "cpu2"]


async def test_news_of_machine_health_and_settings_are_told_and_no_news_are_not(folder: Path) -> None:
    """The same machine seen again keeps the snapshot and all that was worked out of it."""
    async with node(folder) as one:
        agent = one.agent
        before, seen = agent.inventory, [each.value for each in agent.revisions]
        assert not agent.see(machine())
        assert agent.inventory is before
        agent.observe([])
        assert [each.value for each in agent.revisions] == seen
        assert agent.see(machine(without=[5]))
        agent.observe([Evidence(device="gpu0", source="nvml", state=UNHEALTHY, reason="Xid 79")])
        agent.apply_settings(AgentSettings(reserved=CpuSet([0])))
        assert [each.value for each in agent.revisions] == [number + 1 for number in seen]
        assert {x.id: x.healthy for x in agent.advertised(GPU.resource)} == {"gpu0": False, "gpu1": True, "gpu2": True}


async def test_a_device_that_recovers_is_shown_again_when_its_time_has_come(folder: Path) -> None:
    """recover_due says when to come back."""
    async with node(folder) as one:
        for state in (UNHEALTHY, "healthy"):
            one.agent.observe([Evidence(device="gpu0", source="nvml", state=state)])
        assert one.agent.recover_due() == 30.0
        one.now_s += 29
        assert one.agent.recover_due() == 1.0
        assert not one.agent.advertised(GPU.resource)[0].healthy
        one.now_s += 1
        assert one.agent.recover_due() is None
        assert one.agent.advertised(GPU.resource)[0].healthy


async def test_only_changes_of_health_are_logged_and_strangers_are_left_out(folder: Path) -> None:
    """A device that is healthy when it is first looked at is no news, and one that is not there has no health."""
    async with node(folder) as one:
        with capture_logs() as lines:
            for state in ("healthy", UNHEALTHY):
                one.agent.observe([Evidence(device=id, source="aer", state=state) for id in ("gpu0", "stranger")])
        told = [(line["device"], line["state"]) for line in lines if line["event"] == "health-changed"]
        assert told == [("gpu0", UNHEALTHY)]
        assert set(one.agent.health) == {"gpu0"}


async def test_whoever_watches_is_told_of_a_decision_after_it_is_in_force(folder: Path) -> None:
    """Who asked is answered first; one telling for one decision, none for a call repeated."""
    async with node(folder) as one:
        await asyncio.wait_for(one.agent.revisions.ledger.changed(0), 5)
        seen = one.agent.revisions.ledger.value
        await one.grant(CPU, "cpu1")
        assert await asyncio.wait_for(one.agent.revisions.ledger.changed(seen), 5) == seen + 1
        await one.grant(CPU, "cpu1")
        await one.reconcile(holding("a", CPU, "cpu1"))
        assert await asyncio.wait_for(one.agent.revisions.ledger.changed(seen + 1), 5) == seen + 2


async def test_old_lines_of_the_audit_go_with_prune(folder: Path) -> None:
    """In their turn, between decisions."""
    async with node(folder) as one:
        await one.grant(CPU, "cpu1")
        await one.grant(CPU, "cpu2")
        assert await one.agent.prune(0) == 0
        assert await one.agent.prune(1e12) == 1, "all but the newest, which says how far the ledger has counted"


# Everything at once


class Crowd:
    """Kubelet and its pods, drawn at random: what it was answered is the truth that the ledger is held against."""

    def __init__(self, one: Node, seed: int) -> None:
        self.node = one
        self.random = random.Random(seed)
        self.admitting: dict[str, tuple[Offer, tuple[str, ...], float]] = {}
        self.listed: dict[str, tuple[Offer, tuple[str, ...]]] = {}
        self.older: list[Holding] = []
        self.counts: Counter[str] = Counter()

    def holdings(self) -> list[Holding]:
        return [holding(pod, offer, *ids) for pod, (offer, ids) in self.listed.items()]

    def held(self, offer: Offer) -> set[str]:
        every = [*self.listed.values(), *((offer, ids) for offer, ids, _ in self.admitting.values())]
        return {one for by, ids in every if by is offer for one in ids}

    async def admit(self) -> None:
        """Kubelet chooses among what is shown healthy and is not held by its own account."""
        offer = self.random.choice([CPU, CPU, FULL, PAGES, GPU, ANY_GPU, FUSE])
        healthy = [one.id for one in self.node.agent.advertised(offer.resource) if one.healthy]
        free = [one for one in healthy if one not in self.held(offer)]
        if not free:
            return
        ids = tuple(self.random.sample(free, min(len(free), self.random.randint(1, 3))))
        self.node.lists = self.holdings()
        try:
            await self.node.allocate(offer, *ids)
        except Refused:
            self.counts["refused"] += 1
            return
        self.counts["granted"] += 1
        if self.random.random() < 0.9:
            self.admitting[f"p{self.counts['granted']}"] = offer, ids, self.node.now_s

    async def list_pods(self) -> None:
        for pod, (offer, ids, _) in list(self.admitting.items()):
            self.listed[pod] = offer, ids
            del self.admitting[pod]

    async def delete(self) -> None:
        if self.listed:
            del self.listed[self.random.choice(list(self.listed))]

    async def reconcile(self) -> None:
        await self.node.reconcile(*self.holdings(), after_s=self.random.choice([0, 1, 3, 6, 20]))
        late = [pod for pod, (_, _, at) in self.admitting.items() if self.node.now_s - at > 30]
        if late:
            await self.list_pods()

    async def reconcile_late(self) -> None:
        """The list was asked for before whatever comes in between."""
        asked_at, lists = self.node.now_s, self.holdings()
        self.node.now_s += 0.1
        await self.admit()
        witnesses = self.node.witnesses(*lists)
        await self.node.agent.reconcile(lists, RESOURCES, "op", asked_at=asked_at, witnesses=witnesses)

    async def restart(self) -> None:
        await self.node.restart()

    async def lose_the_ledger(self) -> None:
        """The file is gone; kubelet's list brings back what is on this machine."""
        self.node.agent.see(machine())
        await self.list_pods()
        await self.node.agent.close()
        (self.node.folder / FILE).unlink()
        self.node.agent = self.node.open(machine())
        given = self.node.witnesses(*self.holdings()).given
        if self.node.agent.loss:
            assert await self.node.agent.rebuild(Sources(given=given), RESOURCES, "op") == {}
        await self.node.reconcile(*self.holdings())
        assert (self.node.agent.conflicts, self.node.agent.loss) == ((), "")

    async def change_the_machine(self) -> None:
        inventory = machine(without=self.random.sample(range(16), self.random.choice([0, 0, 2, 5])))
        self.node.agent.see(with_free_pages(inventory, self.random.choice([0, 1]), self.random.choice([32, 32, 10])))

    async def hang_up(self) -> None:
        """A call that is not waited for: kubelet is never notified."""
        free = [
            one.id for one in self.node.agent.advertised(CPU.resource) if one.healthy and one.id not in self.held(CPU)
        ]
        if not free:
            return
        self.node.lists = self.holdings()
        call = asyncio.ensure_future(self.node.allocate(CPU, free[0]))
        for _ in range(self.random.randint(0, 4)):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        if not call.cancelled():
            call.exception()
        await self.node.agent.release([], "op")

    async def step(self) -> None:
        weights: dict[Callable[[], object], int] = {
            self.admit: 30, self.list_pods: 10, self.delete: 12, self.reconcile: 20, self.reconcile_late: 5,
            self.restart: 2, self.lose_the_ledger: 1, self.change_the_machine: 6, self.hang_up: 3,
        }  # fmt: skip
        (chosen,) = self.random.choices(list(weights), list(weights.values()))
        self.counts[chosen.__name__] += 1
        await chosen()  # type: ignore[misc]
        self.check()

    def check(self) -> None:
        """Everything that is held is held once and by those that were told so."""
        ledger = self.node.agent.ledger
        every = [*self.listed.values(), *((offer, ids) for offer, ids, _ in self.admitting.values())]
        cpus = Counter(one for offer, ids in every if offer in (CPU, FULL) for one in ids)
        assert not [one for one, times in cpus.items() if times > 1], "a CPU was given twice"
        for offer, ids in every:
            assert {ledger.by_id[offer.name, one].id for one in ids}, "what was given is lost"
            assert len({ledger.by_id[offer.name, one].id for one in ids}) == 1
        held = Counter(cpu for grant in ledger.grants.values() for cpu in grant.cpus)
        whole = Counter(one for grant in ledger.grants.values() for one in grant.devices)
        assert max([*held.values(), *whole.values(), 1]) == 1, "held twice"
        assert not ({"gpu1", "gpu2"} <= ledger.devices_held), "a part and its whole"
        fresh = replace(ledger)
        for name in ("cpus_held", "devices_held", "devices_whole", "by_id", "pages_held"):
            assert getattr(fresh, name) == getattr(ledger, name), name
        self.node.check()


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_comes_in_whatever_order_nothing_is_held_twice_or_lost(seed: int, folder: Path) -> None:
    """300 random steps for each of 8 seeds, checked after each."""
    async with node(folder) as one:
        crowd = Crowd(one, seed)
        for _ in range(300):
            await crowd.step()
        assert crowd.counts["granted"] > 20
    gone = [line for line in newest(folder / FILE, -1) if line.action == RELEASED]
    assert all(line.why for line in gone), "a release without a reason"


def test_what_a_held_adapter_told_of_its_interface_is_kept() -> None:
    """A container's network namespace hides it; what is not held is as it is seen."""
    told = {"netdevs": "eth1", "rdma": "mlx5_1", "mac": "aa:bb", "mtu": 1500, "sriov": "vf"}
    one, other = (Device(kind="nic", id=id, attributes=told) for id in ("a", "b"))
    hidden = tuple(replace(device, attributes={"sriov": "vf"}) for device in (one, other))
    before, after = Inventory(devices=(one, other)), Inventory(devices=hidden)
    assert still_told(before, after, {"a"}).devices == (one, hidden[1])
    assert still_told(before, before, {"a"}) is before
    changed = Inventory(devices=(replace(one, attributes={**told, "mtu": 9000}), other))
    assert still_told(before, changed, {"a"}) is changed
    passed = Inventory(devices=(replace(hidden[0], driver="vfio-pci"), other))  # RDMA ends with the driver
    kept = {key: value for key, value in told.items() if key != "rdma"}
    assert still_told(before, passed, {"a"}).devices[0].attributes == kept
