"""Containers in the groups of resctrl of their claims and classes before their first instruction: over a real socket of
a runtime's, on a resctrl that answers as the kernel does. No hardware is behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.isolation import ResctrlConfig
from nodeagent.config.schema import Config
from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.grant import Grant
from nodeagent.core.pinning.plan import variable
from nodeagent.daemon.divided import Part, caches
from nodeagent.host.resctrl import write
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.resctrl.manager import ResctrlManager
from nodeagent.nri.translation import read_container, read_pod
from nodeagent.pb import nri_pb2 as pb
from tests.doubles.resctrl import FakeResctrl
from tests.doubles.runtime import PluginRefusedError
from tests.support.pin_node import PinNode, pin_node, where
from tests.support.until import until

DRIVER, NODE = "nodeagent.dev", "node-1"
PATIENCE_S = 60.0
"""How long the runtime waits here: a busy machine is none of what is tried."""
BATCH = {"name": "batch", "caches": {"L3": 2}}


def document(uid: str, device: str, pod: str, **config: Any) -> dict[str, Any]:
    """A claim of two CPUs with a CpuConfig."""
    result = {
        "request": "cpus",
        "driver": DRIVER,
        "pool": f"{NODE}/cpu",
        "device": device,
        "consumedCapacity": {"cpus": "2"},
    }
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "CpuConfig", **config}
    opaque = {"driver": DRIVER, "parameters": parameters}
    devices = {"results": [result], "config": [{"source": "FromClaim", "requests": ["cpus"], "opaque": opaque}]}
    reserved = [{"resource": "pods", "name": pod, "uid": f"uid-{pod}"}]
    return {
        "metadata": {"name": uid, "namespace": "default", "uid": uid},
        "status": {"allocation": {"devices": devices}, "reservedFor": reserved},
    }


@dataclass
class CacheNode:
    """A node that confines containers and divides caches."""

    pins: PinNode
    kernel: FakeResctrl
    caches: Part[ResctrlManager]
    leading: asyncio.Task[None] | None = None

    async def prepare(self, uid: str, pod: str, *, device: str = "numa0", **config: Any) -> str:
        """Kubelet has a claim prepared. Return why it was refused, or ""."""
        claim: Claim = wire.read(document(uid, device, pod, **config), DRIVER)
        catalog = Catalog(driver=DRIVER, node_name=NODE, kinds={"cpu": CpuPool()})
        batch = await self.pins.agent.prepare(catalog, [claim], "op")
        assert not batch.errors
        self.pins.claims[uid] = document(uid, device, pod, **config)
        return (await self.caches.prepare({uid: list(batch.grants[uid])})).get(uid, "")

    async def unprepare(self, uid: str) -> Mapping[str, str]:
        grants: list[Grant] = [one for one in self.pins.agent.ledger.grants.values() if one.holder.uid == uid]
        await self.pins.agent.unprepare([uid], "it is over", "op", lambda done: None)
        return await self.caches.release({uid: grants})

    async def create(self, pod: str, name: str, *uids: str) -> Any:
        """The runtime makes a container; it has a process that has not begun. Return the class that it was given."""
        env = [f"{variable(f'{uid}-0')}={uid}-0" for uid in uids]
        answer = await self.pins.create(pod, name, env=env)
        self.kernel.spawn(self.tid(pod, name), self.pins.path(pod, name))
        return answer.adjust.linux.resources.rdt_class.value

    def tid(self, pod: str, name: str) -> int:
        return 1000 + sum(map(ord, f"{pod}{name}"))

    def group(self, pod: str, name: str) -> str:
        return self.kernel.tasks[self.tid(pod, name)]

    def lead(self) -> None:
        self.leading = asyncio.create_task(self.caches.manager.lead())


@contextlib.asynccontextmanager
async def cache_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, resctrl: Mapping[str, Any] | None, **machine: Any
) -> AsyncIterator[CacheNode]:
    kernel = FakeResctrl(folder / "root", domains={0: range(8), 1: range(8, 16)}, **machine)
    for name in ("put", "mkdir", "rmdir"):
        monkeypatch.setattr(write, name, getattr(kernel, name))
    made: list[Part[ResctrlManager]] = []

    def caches_of(node: PinNode, table: ContainerTable) -> Part[ResctrlManager]:
        one = caches(node.agent, where(folder), lambda: Config(pinning=node.config), table, lambda: node.pins)
        made.append(one)
        return made[-1]

    (folder / "state").mkdir()
    patience = {"request_timeout_s": PATIENCE_S}
    async with pin_node(folder, monkeypatch, caches_of=caches_of, resctrl=resctrl, **patience) as pins:
        node = CacheNode(pins, kernel, made[-1])
        await node.caches.manager.apply(Config(pinning=pins.config))
        try:
            yield node
        finally:
            if node.leading is not None:
                node.leading.cancel()
                await asyncio.gather(node.leading, return_exceptions=True)
            await node.caches.manager.close()


def annotate(node: CacheNode, pod: str, annotations: Mapping[str, str]) -> None:
    sandbox = pb.PodSandbox(id=f"sandbox-{pod}", uid=f"uid-{pod}", name=pod, namespace="default")
    sandbox.annotations.update(annotations)
    node.pins.runtime.pods[sandbox.id] = sandbox


async def test_a_container_of_a_claim_is_in_its_group_before_it_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        assert await node.prepare("c1", "db", cacheWays=2, memoryBandwidthPercent=50) == ""
        assert node.kernel.schemata("nodeagent-c1") == {"L3": {0: 0x3, 1: 0xFF0}, "MB": {0: 50, 1: 100}}
        assert await node.create("db", "main", "c1") == "nodeagent-c1"
        assert node.group("db", "main") == ""
        await node.pins.start("db", "main")
        assert node.group("db", "main") == "nodeagent-c1"
        assert await node.unprepare("c1") == {}
        assert set(node.kernel.groups) == {""}


async def test_a_container_without_settings_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        assert await node.prepare("c1", "db") == ""
        assert await node.create("db", "main", "c1") == ""
        await node.pins.start("db", "main")
        assert node.group("db", "main") == "" and set(node.kernel.groups) == {""}


async def test_where_the_processor_is_none_that_the_runtime_knows_the_agent_assigns_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """runc creates no container with a class where /proc/cpuinfo has no flags of x86, as on Arm."""
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        (node.kernel.root / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
        assert await node.prepare("c1", "db", cacheWays=2) == ""
        assert await node.create("db", "main", "c1") == ""
        await node.pins.start("db", "main")
        assert node.group("db", "main") == "nodeagent-c1"


@pytest.mark.parametrize("container", ["main", "side"])
async def test_an_annotation_of_the_pod_chooses_a_class(
    folder: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    classes = [BATCH, {"name": "tiny", "caches": {"L3": 1}}]
    async with cache_node(folder, monkeypatch, {"classes": classes}) as node:
        annotate(node, "job", {"nodeagent.dev/cache-class": "batch", "nodeagent.dev/cache-class.side": "tiny"})
        expected = f"nodeagent-class-{'tiny' if container == 'side' else 'batch'}"
        assert await node.create("job", container) == expected
        await node.pins.start("job", container)
        assert node.group("job", container) == expected


async def test_a_reload_that_begins_to_divide_knows_the_classes_of_pods_that_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, None) as node:
        annotate(node, "job", {"nodeagent.dev/cache-class": "batch"})
        for name in ("main", "side"):
            assert await node.create("job", name) == ""
        await node.pins.start("job", "main")
        assert node.group("job", "main") == ""
        resctrl = msgspec.convert({"classes": [BATCH]}, ResctrlConfig)
        node.pins.config = msgspec.structs.replace(node.pins.config, resctrl=resctrl)
        await node.caches.manager.apply(Config(pinning=node.pins.config))
        node.lead()
        await until(lambda: node.group("job", "main") == "nodeagent-class-batch")
        await node.pins.start("job", "side")
        assert node.group("job", "side") == "nodeagent-class-batch"


async def test_a_reload_that_ends_it_lets_pods_with_annotations_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        annotate(node, "job", {"nodeagent.dev/cache-class": "batch"})
        assert await node.create("job", "main") == "nodeagent-class-batch"
        node.pins.config = msgspec.structs.replace(node.pins.config, resctrl=None)
        assert await node.create("job", "side") == ""
        await node.pins.start("job", "side")
        assert node.group("job", "side") == ""


async def test_a_claim_chooses_a_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cache_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        assert await node.prepare("c1", "db", cacheClass="batch") == ""
        assert await node.prepare("c2", "web", cacheClass="bach") == (
            "there is no cache class 'bach' on this node (pinning.resctrl.classes has batch)"
        )
        assert await node.create("db", "main", "c1") == "nodeagent-class-batch"


async def test_an_unknown_class_keeps_a_container_from_being_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        annotate(node, "job", {"nodeagent.dev/cache-class": "gold"})
        with pytest.raises(PluginRefusedError, match="there is no cache class 'gold' on this node"):
            await node.create("job", "main")


async def test_a_class_that_the_machine_cannot_have_refuses_its_containers_and_no_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"classes": [{"name": "l2", "caches": {"L2": 1}}, BATCH]}) as node:
        annotate(node, "job", {"nodeagent.dev/cache-class": "l2"})
        with pytest.raises(PluginRefusedError, match="the machine has no L2 that can be divided"):
            await node.create("job", "main")
        annotate(node, "other", {"nodeagent.dev/cache-class": "batch"})
        assert await node.create("other", "main") == "nodeagent-class-batch"


async def test_two_claims_with_ways_of_their_own_are_too_many_for_a_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        assert await node.prepare("c1", "db", cacheWays=1) == await node.prepare("c2", "db", cacheWays=1) == ""
        why = "its claims ask for different cache ways or bandwidth: claim default/c1, claim default/c2"
        with pytest.raises(PluginRefusedError, match=why):
            await node.create("db", "main", "c1", "c2")


@pytest.mark.parametrize(
    ("resctrl", "config", "why"),
    [
        (None, {"cacheWays": 2}, "are not divided on this node (pinning.resctrl is not set)"),
        ({}, {"cacheWays": 2}, "none are set aside for claims (exclusiveWays)"),
        ({"exclusiveWays": 4}, {"cacheWays": 5}, "of 4 that are set aside 4 are free, at most 4 consecutive ones"),
        ({}, {"memoryBandwidthPercent": 5}, "cannot limit memory bandwidth to 5 %: the least is 10 %"),
        ({}, {"memoryBandwidthMBps": 500}, "give memoryBandwidthPercent, or mount resctrl with mba_MBps"),
    ],
)
async def test_a_claim_that_cannot_have_what_it_asks_for_is_refused_and_leaves_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    resctrl: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    why: str,
) -> None:
    async with cache_node(folder, monkeypatch, resctrl) as node:
        assert why in await node.prepare("c1", "db", **config)
        assert set(node.kernel.groups) == {""}


async def test_the_leading_agent_repairs_moves_and_follows_the_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        node.pins.config = msgspec.structs.replace(node.pins.config, verify_seconds=0.1)
        assert await node.prepare("c1", "db", cacheWays=2) == ""
        await node.create("db", "main", "c1")
        await node.pins.start("db", "main")
        node.lead()
        node.kernel.put(str(node.kernel.mount / "nodeagent-c1/schemata"), "L3:0=1")
        node.kernel.put(str(node.kernel.mount / "tasks"), str(node.tid("db", "main")))
        await until(lambda: node.group("db", "main") == "nodeagent-c1")
        await until(lambda: node.kernel.schemata("nodeagent-c1")["L3"][0] == 0x3)
        shown = node.caches.document()
        assert (shown["groups_used"], shown["groups_most"], shown["aside"]) == (2, 8, {"0": "f", "1": "f"})
        (group,) = shown["groups"]
        assert (group["claim"], group["in_force"], group["ways"]) == ("default/c1", True, {"0": "3"})
        node.pins.config = msgspec.structs.replace(node.pins.config, resctrl=None)
        node.pins.pins.revision.bump()
        await until(lambda: set(node.kernel.groups) == {""} and node.kernel.schemata()["L3"] == {0: 0xFFF, 1: 0xFFF})


async def test_a_container_is_put_into_its_group_after_a_restart_and_without_the_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent was away while it was started: the runtime lists it, and its tasks are moved."""
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        assert await node.prepare("c1", "db", cacheWays=2) == ""
        await node.create("db", "main", "c1")
        await node.pins.start("db", "main")
        node.kernel.put(str(node.kernel.mount / "tasks"), str(node.tid("db", "main")))
        node.lead()
        await until(lambda: node.group("db", "main") == "nodeagent-c1")


async def test_nothing_is_loaded_where_nothing_asks_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cache_node(folder, monkeypatch, None) as node:
        assert await node.prepare("c1", "db") == ""
        await node.create("db", "main", "c1")
        assert node.caches.manager.loaded is None and not node.kernel.writes


async def test_a_container_without_a_group_costs_nothing_and_one_with_a_group_little(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most 1 ms more in CreateContainer; the limit here leaves room for a busy machine."""
    async with cache_node(folder, monkeypatch, {"exclusiveWays": 4}) as node:
        assert await node.prepare("c1", "db", cacheWays=2) == ""
        await node.create("db", "main", "c1")
        manager = node.caches.manager.load()
        pod, container = read(node, "db", "main")
        spent = await timed(lambda: manager.created(pod, container, ["c1-0"], PATIENCE_S))
        begun = await timed(lambda: manager.starting(container, node.pins.path("db", "main"), ["c1-0"], PATIENCE_S))
        assert spent < 0.001
        with capsys.disabled():
            print(f"\nresctrl: CreateContainer {spent * 1e6:.0f} us, StartContainer {begun * 1e6:.0f} us more (median)")


def read(node: CacheNode, pod: str, name: str) -> tuple[Any, Any]:
    found = node.pins.runtime.containers[f"{pod}_{name}"]
    whose = read_pod(node.pins.runtime.pods[f"sandbox-{pod}"])
    return whose, read_container(found, whose)


async def timed(act: Any) -> float:
    """The median of a hundred, in seconds."""
    taken: list[float] = []
    for _ in range(100):
        began = time.perf_counter()
        await act()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[50]
