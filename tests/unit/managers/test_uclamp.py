"""Utilization clamps in force before a container's first instruction: over a real socket of a runtime's, on control
groups that answer as the kernel does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from nodeagent.config.isolation import UclampConfig
from nodeagent.config.schema import Config
from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.container import Pod
from nodeagent.core.pinning.plan import variable
from nodeagent.core.uclamp.clamps import MAX, MIN
from nodeagent.daemon.divided import Part, uclamp
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.uclamp.manager import UclampManager
from nodeagent.pb import nri_pb2 as pb
from tests.doubles.runtime import PluginRefusedError
from tests.support.pin_node import PinNode, pin_node, where
from tests.support.until import until

DRIVER, NODE = "nodeagent.dev", "node-1"
PATIENCE_S = 60.0
"""How long the runtime waits here: a busy machine is none of what is tried."""
CLASSES: Mapping[str, Any] = {"classes": [{"name": "fast", "min": 80}, {"name": "slow", "min": "2.5", "max": "25"}]}
UNCLAMPED = ("0.00", "max")


def document(uid: str, pod: str, **config: Any) -> dict[str, Any]:
    """A claim of two CPUs with a CpuConfig."""
    result = {"request": "cpus", "driver": DRIVER, "pool": f"{NODE}/cpu", "device": "numa0"}
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "CpuConfig", **config}
    opaque = {"driver": DRIVER, "parameters": parameters}
    devices = {
        "results": [{**result, "consumedCapacity": {"cpus": "2"}}],
        "config": [{"source": "FromClaim", "requests": ["cpus"], "opaque": opaque}],
    }
    reserved = [{"resource": "pods", "name": pod, "uid": f"uid-{pod}"}]
    return {
        "metadata": {"name": uid, "namespace": "default", "uid": uid},
        "status": {"allocation": {"devices": devices}, "reservedFor": reserved},
    }


@dataclass
class UclampNode:
    """A node that confines containers and clamps their utilization."""

    pins: PinNode
    made: list[Part[UclampManager]]
    """Of each agent."""
    leading: asyncio.Task[None] | None = None

    def another(self, config: Mapping[str, Any]) -> Part[UclampManager]:
        """Another agent with a configuration of its own, which has the runtime's containers from the first."""
        pins = self.pins
        pinning = msgspec.structs.replace(pins.config, uclamp=msgspec.convert(config, UclampConfig))
        table, report = pins.pins.reconciler.table, pins.reported.append
        made = uclamp(pins.agent, where(pins.folder), lambda: Config(pinning=pinning), table, lambda: pins.pins, report)
        made.manager.load().learn(
            [Pod(id=f"sandbox-{uid}", uid=uid, namespace="default", name=uid) for uid in table.pods]
        )
        return made

    @property
    def part(self) -> Part[UclampManager]:
        return self.made[-1]

    async def prepare(self, uid: str, pod: str, **config: Any) -> str:
        """Kubelet has a claim prepared. Return why it was refused, or ""."""
        claim: Claim = wire.read(document(uid, pod, **config), DRIVER)
        catalog = Catalog(driver=DRIVER, node_name=NODE, kinds={"cpu": CpuPool()})
        batch = await self.pins.agent.prepare(catalog, [claim], "op")
        assert not batch.errors, batch.errors
        self.pins.claims[uid] = document(uid, pod, **config)
        return (await self.part.prepare({uid: list(batch.grants[uid])})).get(uid, "")

    async def unprepare(self, uid: str) -> None:
        await self.pins.agent.unprepare([uid], "it is over", "op", lambda done: None)

    async def create(self, pod: str, name: str, *uids: str) -> None:
        """The runtime makes a container, which has not begun."""
        env = [f"{variable(f'{uid}-0')}={uid}-0" for uid in uids]
        await self.pins.create(pod, name, env=env)

    async def run(self, pod: str, name: str, *uids: str) -> None:
        await self.create(pod, name, *uids)
        await self.pins.start(pod, name)

    def annotate(self, pod: str, annotations: Mapping[str, str]) -> None:
        sandbox = pb.PodSandbox(id=f"sandbox-{pod}", uid=f"uid-{pod}", name=pod, namespace="default")
        sandbox.annotations.update(annotations)
        self.pins.runtime.pods[sandbox.id] = sandbox

    def values(self, pod: str = "", name: str = "") -> tuple[str, str]:
        """What the files of a container's cgroup say, of a pod's, or of kubepods."""
        path = self.pins.path(pod, name) if name else f"kubepods/poduid-{pod}" if pod else "kubepods"
        return self.pins.tree.text(path, MIN), self.pins.tree.text(path, MAX)

    async def configure(self, config: Mapping[str, Any] | None) -> None:
        """The configuration is reloaded."""
        found = msgspec.convert(config, UclampConfig) if config is not None else None
        self.pins.config = msgspec.structs.replace(self.pins.config, uclamp=found)
        await self.part.manager.apply(Config(pinning=self.pins.config))
        self.pins.pins.revision.bump()

    def lead(self) -> None:
        self.leading = asyncio.create_task(self.part.manager.lead())

    async def end(self) -> None:
        if self.leading is not None:
            self.leading.cancel()
            await asyncio.gather(self.leading, return_exceptions=True)
        self.leading = None
        await self.part.manager.close()


@contextlib.asynccontextmanager
async def uclamp_node(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Mapping[str, Any] | None = None,
    *,
    kernel: bool = True,
    **pinning: Any,
) -> AsyncIterator[UclampNode]:
    made: list[Part[UclampManager]] = []

    def clamps(node: PinNode, table: ContainerTable) -> Part[UclampManager]:
        config, report = lambda: Config(pinning=node.config), node.reported.append
        made.append(uclamp(node.agent, where(folder), config, table, lambda: node.pins, report))
        return made[-1]

    (folder / "state").mkdir()
    patience = {"request_timeout_s": PATIENCE_S}
    async with pin_node(folder, monkeypatch, caches_of=clamps, uclamp=kernel, **patience, **pinning) as pins:
        node = UclampNode(pins, made)
        await node.configure(config)
        try:
            yield node
        finally:
            await node.end()


# ---------------------------------------------------------------- claims


async def test_a_container_of_a_claim_is_clamped_before_it_begins_and_the_others_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", uclampMin=50, uclampMax="87.5") == ""
        await node.create("db", "main", "c1")
        assert node.values("db", "main") == UNCLAMPED
        await node.run("db", "side")
        await node.pins.start("db", "main")
        assert node.values("db", "main") == ("50.00", "87.50")
        assert node.values() == node.values("db") == ("50.00", "max")
        assert node.pins.tree.clamped(node.pins.path("db", "main")) == (512, 896)
        assert node.pins.tree.clamped(node.pins.path("db", "side")) == (0, 1024)


async def test_a_start_of_another_pod_lowers_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with uclamp_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", uclampMin=50) == await node.prepare("c2", "web", uclampMin=20) == ""
        await node.run("db", "main", "c1")
        await node.run("web", "main", "c2")
        assert node.values()[0] == "50.00" and node.values("web")[0] == "20.00"


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (CLASSES, "gold", "there is no uclamp class 'gold' on this node (pinning.uclamp.classes has fast, slow)"),
        (None, "fast", "there are no uclamp classes on this node (pinning.uclamp is not set): 'fast'"),
    ],
)
async def test_a_claim_of_an_unknown_class_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: Mapping[str, Any] | None, name: str, why: str
) -> None:
    async with uclamp_node(folder, monkeypatch, config) as node:
        assert await node.prepare("c1", "db", uclampClass=name) == f"cannot clamp utilization: {why}"


# ---------------------------------------------------------------- classes


async def test_the_annotation_chooses_a_class_and_the_default_is_for_all_others_with_exclusive_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch, {**CLASSES, "default": "slow"}) as node:
        node.annotate("db", {"nodeagent.dev/uclamp-class": "fast"})
        assert await node.prepare("c1", "db") == await node.prepare("c2", "web") == ""
        await node.run("db", "main", "c1")
        await node.run("web", "main", "c2")
        await node.run("job", "main")
        assert node.values("db", "main") == ("80.00", "max")
        assert node.values("web", "main") == ("2.50", "25.00")
        assert node.values("job", "main") == UNCLAMPED


async def test_containers_of_the_device_plugin_have_a_class_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with uclamp_node(folder, monkeypatch, CLASSES) as node:
        node.annotate("db", {"nodeagent.dev/uclamp-class": "slow"})
        await node.pins.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        assert node.values("db", "main") == ("2.50", "25.00")


async def test_an_unknown_class_keeps_a_container_from_being_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch, CLASSES) as node:
        node.annotate("db", {"nodeagent.dev/uclamp-class": "gold"})
        assert await node.prepare("c1", "db") == ""
        with pytest.raises(PluginRefusedError, match="cannot clamp its utilization: there is no uclamp class 'gold'"):
            await node.create("db", "main", "c1")


# ---------------------------------------------------------------- what cannot be


async def test_a_kernel_without_clamps_is_named_once_and_all_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "this kernel has no cpu.uclamp.min (CONFIG_UCLAMP_TASK_GROUP)"
    async with uclamp_node(folder, monkeypatch, CLASSES, kernel=False) as node:
        with capture_logs() as logs:
            assert await node.prepare("c1", "db", uclampMin=50) == await node.prepare("c1", "db", uclampMin=50) == ""
        warned = [(one["claim"], one["error"]) for one in logs if one["event"] == "utilization-not-clamped"]
        assert warned == [("claim default/c1", why)]
        node.lead()
        nothing = f"pinning.uclamp: cannot clamp utilization: {why}: no class has an effect"
        await until(lambda: node.part.manager.notes() == [nothing])
        await node.run("db", "main", "c1")
        run_without = f"pinning.uclamp: cannot clamp utilization: {why}: default/db/main run without"
        await until(lambda: node.part.manager.notes() == [run_without])
        assert not [one for one in node.pins.tree.writes if "uclamp" in one[0]]
        await node.pins.remove("db", "main")
        await node.configure(None)
        await until(lambda: node.part.manager.notes() == [])


async def test_a_container_that_cannot_be_clamped_starts_and_the_status_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", uclampMin=50) == ""
        await node.create("db", "main", "c1")
        node.pins.tree.refuses[f"{node.pins.path('db', 'main')}/{MIN}"] = 5
        await node.pins.start("db", "main")
        node.lead()
        await until(lambda: any("Input/output error" in one for one in node.part.manager.notes()))
        (note,) = node.part.manager.notes()
        assert note.startswith("pinning.uclamp: default/db/main: cannot write ")
        node.pins.tree.refuses.clear()
        node.pins.pins.limits_written.bump()
        await until(lambda: node.values("db", "main")[0] == "50.00" and not node.part.manager.notes())


# ---------------------------------------------------------------- between calls


async def test_the_leading_agent_repairs_at_once_follows_the_configuration_and_gives_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch, CLASSES) as node:
        node.annotate("db", {"nodeagent.dev/uclamp-class": "slow"})
        assert await node.prepare("c1", "db") == ""
        await node.run("db", "main", "c1")
        node.lead()
        await until(lambda: bool(node.part.document().get("cgroups")))
        shown = {one["path"]: one for one in node.part.document()["cgroups"]}
        mine = shown[node.pins.path("db", "main")]
        assert (mine["container"], mine["in_force"]) == ("default/db/main", True)
        assert mine["files"] == {MIN: "2.50", MAX: "25.00"}
        assert (shown["kubepods"]["container"], shown["kubepods"]["pod_uid"]) == ("", "")
        node.pins.tree.set("kubepods", MIN, "0")
        await until(lambda: node.values()[0] == "2.50")
        await until(lambda: any(MIN in one.note for one in node.pins.reported))
        node.pins.tree.set(node.pins.path("db", "main"), MAX, "max")
        await until(lambda: node.values("db", "main") == ("2.50", "25.00"))
        await node.configure({"classes": [{"name": "slow", "max": 50}]})
        await until(lambda: node.values("db", "main") == ("0.00", "50.00"))
        await until(lambda: node.values() == UNCLAMPED)
        await node.configure(None)
        await until(lambda: node.values("db", "main") == UNCLAMPED and not (folder / "state/uclamp.json").exists())


async def test_of_two_agents_the_leading_one_alone_writes_and_neither_counts_drifts_of_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an upgrade they may have other classes, and lead in turn."""
    async with uclamp_node(folder, monkeypatch, {**CLASSES, "default": "fast"}) as node:
        assert await node.prepare("c1", "db") == ""
        await node.run("db", "main", "c1")
        other = node.another({"classes": [{"name": "fast", "min": 40}], "default": "fast"})
        for leading, least in ((node.part, "80.00"), (other, "40.00")) * 2:
            waiting = other if leading is node.part else node.part
            task = asyncio.create_task(leading.manager.lead())
            await until(lambda: node.values("db", "main")[0] == node.values()[0] == least)  # noqa: B023
            node.pins.tree.writes.clear()
            assert await waiting.prepare({"c1": list(node.pins.agent.ledger.grants.values())}) == {}
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not [one for one in node.pins.tree.writes if "uclamp" in one[0]]
        assert not [one for one in node.pins.reported if MIN in one.note]
        await other.manager.close()


async def test_clamps_stay_over_an_agents_death_and_end_with_the_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uclamp_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", uclampMin=50) == ""
        await node.run("db", "main", "c1")
        await node.end()
        await node.pins.end()
        node.pins.tree.writes.clear()
        node.pins.begin()
        await node.configure(None)
        node.lead()
        await node.pins.runtime.connected()
        await until(lambda: bool(node.part.document().get("cgroups")))
        assert node.values("db", "main")[0] == node.values()[0] == "50.00"
        assert not [one for one in node.pins.tree.writes if "uclamp" in one[0]]
        await node.pins.remove("db", "main")
        await node.unprepare("c1")
        await until(lambda: node.values() == UNCLAMPED and not (folder / "state/uclamp.json").exists())


async def test_a_claim_without_clamps_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with uclamp_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db") == ""
        await node.run("db", "main", "c1")
        assert node.part.manager.loaded is None
        assert not [one for one in node.pins.tree.writes if "uclamp" in one[0]]
