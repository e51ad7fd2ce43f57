"""Limits of disk I/O in force before a container's first instruction: over a real socket of a runtime's, on control
groups that answer as the kernel does. tests/vm/test_vm_io.py shows what they do on a real kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import msgspec
import pytest
from structlog.testing import capture_logs

from nodeagent.config.isolation import IoConfig, UclampConfig
from nodeagent.config.schema import Config
from nodeagent.core.blockio.limits import BFQ_WEIGHT, LATENCY, THROTTLE, WEIGHT, parse
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.device import Device
from nodeagent.core.pinning.plan import variable
from nodeagent.daemon.divided import Divided
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.blockio.manager import IoManager
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.nri.translation import read_container, read_pod
from nodeagent.pb import nri_pb2 as pb
from nodeagent.state.lock import FileLock
from tests.builders.io_files import IoDisks, add_disk
from tests.doubles.runtime import PluginRefusedError
from tests.support.pin_node import PinNode, pin_node, where
from tests.support.until import until
from tests.unit.state.test_agent import machine

DRIVER, NODE = "nodeagent.dev", "node-1"
PATIENCE_S = 60.0
"""How long the runtime waits here: a busy machine is none of what is tried."""
BATCH = {"name": "batch", "disks": ["sda"], "writeBytesPerSecond": "1Mi", "readIOPS": 100}
DISKS = {"sda": "8:0", "sdb": "8:16", "nvme0n1": "259:0", "nvme0n2": "259:1"}
DEVICES = (
    Device(kind="block", id="block-a", paths=("/dev/sda",)),
    Device(kind="block", id="block-b", paths=("/dev/sdb",)),
    Device(kind="nvme", id="0000:01:00.0", paths=("/dev/nvme0n1", "/dev/nvme0n2")),
    Device(kind="nvme", id="0000:02:00.0", paths=("/dev/vfio/12", "/dev/vfio/vfio")),
)
KINDS = {
    "block": DevicePool(kind="block", resources=(DeviceResource(name="x/block", kind="block", replicas=4),)),
    "nvme": DevicePool(kind="nvme", resources=(DeviceResource(name="x/nvme", kind="nvme"),)),
}


def document(uid: str, device: str, pod: str, kind: str, **config: Any) -> dict[str, Any]:
    """A claim of a disk with a BlockConfig."""
    result = {"request": "disk", "driver": DRIVER, "pool": f"{NODE}/{kind}", "device": device}
    share = {"consumedCapacity": {"shares": "1"}, "shareID": str(uuid.uuid5(uuid.NAMESPACE_OID, uid))}
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "BlockConfig", **config}
    opaque = {"driver": DRIVER, "parameters": parameters}
    devices = {
        "results": [{**result, **(share if kind == "block" else {})}],
        "config": [{"source": "FromClaim", "requests": ["disk"], "opaque": opaque}],
    }
    reserved = [{"resource": "pods", "name": pod, "uid": f"uid-{pod}"}]
    return {
        "metadata": {"name": uid, "namespace": "default", "uid": uid},
        "status": {"allocation": {"devices": devices}, "reservedFor": reserved},
    }


@dataclass
class IoNode:
    """A node that confines containers and limits their I/O."""

    pins: PinNode
    made: list[Divided]
    """Of each agent."""
    leading: asyncio.Task[None] | None = None

    @property
    def divided(self) -> Divided:
        return self.made[-1]

    @property
    def manager(self) -> Any:
        return self.divided.managers[1]

    async def prepare(self, uid: str, pod: str, device: str = "block-a", kind: str = "block", **config: Any) -> str:
        """Kubelet has a claim prepared. Return why it was refused, or ""."""
        written = document(uid, device, pod, kind, **config)
        claim: Claim = wire.read(written, DRIVER)
        catalog = Catalog(driver=DRIVER, node_name=NODE, kinds=KINDS)
        batch = await self.pins.agent.prepare(catalog, [claim], "op")
        assert not batch.errors, batch.errors
        self.pins.claims[uid] = written
        sharing, _, _ = self.divided.with_parts(Nothing(), None, None)  # type: ignore[arg-type]
        return (await sharing.prepare({uid: list(batch.grants[uid])})).get(uid, "")

    async def unprepare(self, uid: str) -> None:
        await self.pins.agent.unprepare([uid], "it is over", "op", lambda done: None)

    async def create(self, pod: str, name: str, *uids: str) -> None:
        """The runtime makes a container, which has not begun."""
        env = [f"{variable(f'{uid}-0')}={uid}-0" for uid in uids]
        await self.pins.create(pod, name, env=env)

    async def start(self, pod: str, name: str) -> None:
        await self.pins.start(pod, name)

    def lines(self, pod: str, name: str = "", file: str = THROTTLE) -> dict[str, str]:
        """What a file of a container's cgroup, or of a pod's, says; {} where the controller is off."""
        path = self.pins.path(pod, name) if name else f"kubepods/poduid-{pod}"
        try:
            return parse(self.pins.tree.text(path, file))
        except FileNotFoundError:
            return {}

    async def configure(self, io: Mapping[str, Any] | None, **more: Any) -> None:
        """The configuration is reloaded."""
        found = msgspec.convert(io, IoConfig) if io is not None else None
        self.pins.config = msgspec.structs.replace(self.pins.config, io=found, **more)
        await self.manager.apply(Config(pinning=self.pins.config))
        self.pins.pins.revision.bump()

    def lead(self) -> None:
        self.leading = asyncio.create_task(self.manager.lead())

    async def end(self) -> None:
        if self.leading is not None:
            self.leading.cancel()
            await asyncio.gather(self.leading, return_exceptions=True)
        self.leading = None
        for one in self.divided.managers:
            await one.close()


class Nothing:
    """Prepares nothing."""

    async def prepare(self, claims: Mapping[str, Any]) -> Mapping[str, str]:
        return {}

    async def release(self, claims: Mapping[str, Any]) -> Mapping[str, str]:
        return {}


@contextlib.asynccontextmanager
async def io_node(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    io: Mapping[str, Any] | None = None,
    kernel: IoDisks | None = None,
    **pinning: Any,
) -> AsyncIterator[IoNode]:
    made: list[Divided] = []

    def divided(node: PinNode, table: ContainerTable) -> Divided:
        config, report = lambda: Config(pinning=node.config), node.reported.append
        made.append(Divided(node.agent, where(folder), config, table, lambda: node.pins, report))
        return made[-1]

    (folder / "state").mkdir()
    kernel = kernel or IoDisks(dict.fromkeys(DISKS.values(), ""))
    for name, number in DISKS.items():
        add_disk(folder / "root", name, number)
    async with pin_node(
        folder,
        monkeypatch,
        inventory=machine(devices=DEVICES),
        caches_of=divided,
        io=kernel,
        request_timeout_s=PATIENCE_S,
        **pinning,
    ) as pins:
        node = IoNode(pins, made)
        await node.configure(io)
        try:
            yield node
        finally:
            await node.end()


def annotate(node: IoNode, pod: str, annotations: Mapping[str, str]) -> None:
    sandbox = pb.PodSandbox(id=f"sandbox-{pod}", uid=f"uid-{pod}", name=pod, namespace="default")
    sandbox.annotations.update(annotations)
    node.pins.runtime.pods[sandbox.id] = sandbox


CLAMPED = msgspec.convert({"classes": [{"name": "fast", "min": 80}], "default": "fast"}, UclampConfig)
LIMITS: dict[str, Any] = {"readBytesPerSecond": "100Mi", "writeBytesPerSecond": 1000, "writeIOPS": 5}
LINE = f"rbps={100 << 20} wbps=1000 riops=max wiops=5"


# ---------------------------------------------------------------- claims


async def test_a_container_of_a_claim_is_limited_before_it_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", **LIMITS) == ""
        await node.create("db", "main", "c1")
        await node.create("db", "side")
        assert node.lines("db", "main") == {}
        await node.start("db", "main")
        await node.start("db", "side")
        assert node.lines("db", "main") == {"8:0": LINE}
        assert node.lines("db", "side") == node.lines("db") == {}


async def test_all_namespaces_of_a_drive_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", "0000-01-00-0", "nvme", **LIMITS) == ""
        await node.create("db", "main", "c1")
        await node.start("db", "main")
        assert node.lines("db", "main") == {"259:0": LINE, "259:1": LINE}


async def test_holders_of_one_disk_have_limits_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", writeIOPS=50) == await node.prepare("c2", "web", writeIOPS=70) == ""
        for pod, uid in (("db", "c1"), ("web", "c2")):
            await node.create(pod, "main", uid)
            await node.start(pod, "main")
        assert node.lines("db", "main")["8:0"].endswith("wiops=50")
        assert node.lines("web", "main")["8:0"].endswith("wiops=70")


async def test_weights_and_latencies_are_the_pods(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with io_node(folder, monkeypatch, kernel=IoDisks({"8:0": "iocost", "8:16": "bfq"})) as node:
        (node.pins.tree.mount / "io.cost.qos").write_text("8:0 enable=1 ctrl=user\n")
        (node.pins.tree.root / "sys/class/block/sdb/queue/scheduler").write_text("none [bfq]\n")
        assert await node.prepare("c1", "db", weight=200, latencyTargetMicroseconds=500) == ""
        assert await node.prepare("c2", "db", weight=300, latencyTargetMicroseconds=900) == ""
        assert await node.prepare("c3", "db", "block-b", weight=50) == ""
        await node.create("db", "main", "c1")
        await node.start("db", "main")
        assert node.lines("db", file=WEIGHT) == {"8:0": "200"}
        await node.create("db", "side", "c2", "c3")
        await node.start("db", "side")
        assert node.lines("db", file=WEIGHT) == {"8:0": "300"}
        assert node.lines("db", file=LATENCY) == {"8:0": "target=500"}
        assert node.lines("db", file=BFQ_WEIGHT) == {"8:16": "50"}
        assert node.lines("db", "main", WEIGHT) == node.lines("db", "side", LATENCY) == {}


NOTHING: Mapping[str, Any] = MappingProxyType({})


@pytest.mark.parametrize(
    ("kernel", "device", "config", "why"),
    [
        (None, "block-a", {"weight": 5}, "cannot weigh I/O on sda: its scheduler is mq-deadline, not bfq"),
        (None, "block-a", {"ioClass": "gold"}, "there are no I/O classes on this node (pinning.io is not set): 'gold'"),
        (
            IoDisks({"8:0": ""}, files=("io.max",)),
            "block-a",
            {"latencyTargetMicroseconds": 5},
            "cannot limit I/O: this kernel has no io.latency (CONFIG_BLK_CGROUP_IOLATENCY)",
        ),
        (
            IoDisks({"8:0": ""}, files=()),
            "block-a",
            {"readIOPS": 5},
            "cannot limit I/O: this kernel has no io.max (CONFIG_BLK_DEV_THROTTLING)",
        ),
        (None, "0000-02-00-0", {"readIOPS": 5}, "cannot limit I/O on 0000:02:00.0: it has no disk that this machine"),
    ],
)
async def test_a_claim_whose_limits_cannot_be_set_is_refused_with_the_reason(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: IoDisks | None,
    device: str,
    config: Mapping[str, Any],
    why: str,
) -> None:
    async with io_node(folder, monkeypatch, kernel=kernel) as node:
        kind = "block" if device.startswith("block") else "nvme"
        assert why in await node.prepare("c1", "db", device, kind, **config)
        assert await node.prepare("c2", "web") == ""


async def test_a_claim_is_refused_where_the_pods_have_no_controller(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch) as node:
        (node.pins.tree.mount / "kubepods/cgroup.controllers").write_text("cpuset cpu hugetlb\n")
        why = await node.prepare("c1", "db", **LIMITS)
        assert "cgroup.controllers of" in why and "kubepods has no io, only 'cpuset cpu hugetlb'" in why


@pytest.mark.parametrize("on_failure", ["refuse", "warn"])
async def test_a_container_that_cannot_be_limited_starts_only_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    async with io_node(folder, monkeypatch, onFailure=on_failure) as node:
        assert await node.prepare("c1", "db", **LIMITS) == ""
        await node.create("db", "main", "c1")
        node.pins.tree.refuses[f"{node.pins.path('db', 'main')}/io.max"] = 5
        if on_failure == "warn":
            await node.start("db", "main")
        else:
            with pytest.raises(PluginRefusedError, match=r"io.max: Input/output error, value '8:0 rbps="):
                await node.start("db", "main")
        node.pins.tree.refuses.clear()
        await node.create("db", "other")
        await node.start("db", "other")


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("container", ["main", "side"])
async def test_an_annotation_of_the_pod_chooses_a_class(
    folder: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    classes = [BATCH, {"name": "all", "disks": ["sd*", "/dev/sda", "xvd*"], "readIOPS": 7}]
    async with io_node(folder, monkeypatch, {"classes": classes}) as node:
        annotate(node, "job", {"nodeagent.dev/io-class": "batch", "nodeagent.dev/io-class.side": "all"})
        await node.create("job", container)
        await node.start("job", container)
        of_all = dict.fromkeys(("8:0", "8:16"), "rbps=max wbps=max riops=7 wiops=max")
        of_batch = {"8:0": f"rbps=max wbps={1 << 20} riops=100 wiops=max"}
        assert node.lines("job", container) == (of_all if container == "side" else of_batch)


async def test_a_claim_chooses_a_class_for_its_own_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with io_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        assert await node.prepare("c1", "db", "block-b", ioClass="batch") == ""
        assert "there is no I/O class 'bach'" in await node.prepare("c2", "web", ioClass="bach")
        await node.create("db", "main", "c1")
        await node.start("db", "main")
        assert node.lines("db", "main") == {"8:16": f"rbps=max wbps={1 << 20} riops=100 wiops=max"}


async def test_an_unknown_class_keeps_a_container_from_being_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        annotate(node, "job", {"nodeagent.dev/io-class": "gold"})
        with pytest.raises(PluginRefusedError, match="there is no I/O class 'gold' on this node"):
            await node.create("job", "main")


async def test_annotations_mean_nothing_on_a_node_without_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch) as node:
        annotate(node, "job", {"nodeagent.dev/io-class": "gold"})
        await node.create("job", "main")
        await node.start("job", "main")
        assert node.manager.loaded is None and node.lines("job", "main") == {}


# ---------------------------------------------------------------- between calls


async def test_the_leading_agent_repairs_at_once_and_follows_the_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch, {"classes": [BATCH]}) as node:
        annotate(node, "job", {"nodeagent.dev/io-class": "batch"})
        await node.create("job", "main")
        await node.start("job", "main")
        wanted = node.lines("job", "main")
        node.lead()
        await until(lambda: bool(node.divided.document()["io"].get("cgroups")))
        (shown,) = node.divided.document()["io"]["cgroups"]
        assert (shown["container"], shown["in_force"]) == ("default/job/main", True)
        assert shown["files"] == {THROTTLE: wanted}
        node.pins.tree.set(node.pins.path("job", "main"), THROTTLE, "8:0 wbps=max riops=max")
        await until(lambda: node.lines("job", "main") == wanted)
        await until(lambda: any("io.max" in one.note for one in node.pins.reported))
        await node.configure({"classes": [{**BATCH, "readIOPS": 50}]})
        await until(lambda: "riops=50" in node.lines("job", "main").get("8:0", ""))
        await node.configure(None)
        await until(lambda: node.lines("job", "main") == {} and not (folder / "state/io.json").exists())


async def test_a_reload_that_begins_to_limit_knows_the_classes_of_pods_that_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch) as node:
        annotate(node, "job", {"nodeagent.dev/io-class": "batch"})
        await node.create("job", "main")
        await node.start("job", "main")
        await node.configure({"classes": [BATCH]})
        node.lead()
        await until(lambda: "8:0" in node.lines("job", "main"))


async def test_limits_of_a_claim_stay_over_an_agents_death_and_end_with_the_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db", **LIMITS) == ""
        await node.create("db", "main", "c1")
        await node.start("db", "main")
        await node.end()
        await node.pins.end()
        node.pins.tree.writes.clear()
        node.pins.begin()
        await node.configure(None)
        node.lead()
        await node.pins.runtime.connected()
        await until(lambda: bool(node.divided.document()["io"].get("cgroups")))
        assert node.lines("db", "main") == {"8:0": LINE}
        assert not [one for one in node.pins.tree.writes if one[0].endswith("io.max")]
        await node.pins.remove("db", "main")
        await node.unprepare("c1")
        await until(lambda: not (folder / "state/io.json").exists())


async def test_a_claim_without_limits_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c1", "db") == ""
        await node.create("db", "main", "c1")
        await node.start("db", "main")
        assert node.manager.loaded is None
        assert not [one for one in node.pins.tree.writes if "io" in one[0] + one[1]]


# ---------------------------------------------------------------- time


async def test_all_that_a_container_waits_for_has_one_limit_and_a_late_clamp_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another agent keeps changing both."""
    async with io_node(folder, monkeypatch, uclamp=True) as node:
        await node.configure(None, uclamp=CLAMPED)
        assert await node.prepare("c1", "db", **LIMITS) == ""
        await node.pins.admit("db", "main", "cpu4", "cpu5")
        await node.create("db", "main", "c1")
        _, container = read(node, "db", "main")
        path, grants = node.pins.path("db", "main"), node.pins.pins.reconciler.pin("db_main").grants
        clamps: Any = node.divided.managers[2]
        start = mock.Mock(wraps=clamps.load().starting)
        monkeypatch.setattr(clamps.load(), "starting", start)
        with contextlib.ExitStack() as stack, capture_logs() as lines:
            for name in ("io.lock", "uclamp.lock"):
                assert stack.enter_context(contextlib.closing(FileLock(folder / "state" / name))).try_take()
            why = await node.divided.starting(container, path, grants, 0.3)
        assert why.startswith("cannot limit its I/O: ") and "clamp" not in why
        assert [one["container"] for one in lines if one["event"] == "started-unclamped"] == ["default/db/main"]
        assert start.call_args.args[-1] < 0.1, "the rest of it"


# ---------------------------------------------------------------- costs


async def test_a_container_without_limits_costs_nothing_and_one_with_limits_little(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with io_node(folder, monkeypatch) as node:
        assert await node.prepare("c0", "web") == ""
        await node.create("web", "main", "c0")
        pod, container = read(node, "web", "main")
        unused = await timed(lambda: node.divided.created(pod, container, ["c0-0"], PATIENCE_S))
        path = node.pins.path("web", "main")
        unused += await timed(lambda: node.divided.starting(container, path, ["c0-0"], PATIENCE_S))
        assert await node.prepare("c1", "db", **LIMITS) == ""
        await node.create("db", "main", "c1")
        manager: IoManager = node.manager.load()
        pod, container = read(node, "db", "main")
        created = await timed(lambda: manager.created(pod, container, ["c1-0"], PATIENCE_S))
        path = node.pins.path("db", "main")
        began = time.perf_counter()
        assert await manager.starting(container, path, ["c1-0"], PATIENCE_S) == ""
        first = time.perf_counter() - began
        again = await timed(lambda: manager.starting(container, path, ["c1-0"], PATIENCE_S))
        assert unused < 0.001 and created < 0.001
        with capsys.disabled():
            print(
                f"\nio: unused {unused * 1e6:.1f} us a container; CreateContainer {created * 1e6:.0f} us, "
                f"StartContainer {first * 1e3:.1f} ms more, {again * 1e3:.1f} ms if all is in force (median)"
            )


def read(node: IoNode, pod: str, name: str) -> tuple[Any, Any]:
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
