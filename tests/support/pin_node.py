"""A node whose containers are confined: an agent with its ledger, a made-up hierarchy of control groups, a runtime that
speaks NRI over a real socket, and what kubelet writes down. Kubelet's part is played by `admit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.config.isolation import PinningConfig
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Happening
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths, paths_of
from nodeagent.errors import PeerError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_cpus import pods_cgroup
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, NO_LISTING, Listing
from nodeagent.managers.pinning.cache_groups import NO_CACHE_GROUPS, CacheGroups
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from tests.builders.cgroup_tree import CgroupTree
from tests.builders.io_files import IoDisks
from tests.doubles.runtime import FakeRuntime
from tests.support.until import until
from tests.unit.state.test_agent import CPU, machine

RESERVED = "0"


@dataclass
class PinNode:
    """Entered by `pin_node`."""

    folder: Path
    agent: Agent
    tree: CgroupTree
    runtime: FakeRuntime
    config: PinningConfig
    pins: PinningManager = field(init=False)
    now_s: float = 0.0
    """What is added to the clock of what confines."""
    claims: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the API server has, by name."""
    entries: list[dict[str, Any]] = field(default_factory=list)
    listed: list[Holding] = field(default_factory=list)
    """What kubelet lists that containers have through claims."""
    kubelet_away: bool = False

    running: asyncio.Task[None] | None = None
    kubelet_confines: bool = False
    """Whether kubelet's own CPU manager confines all containers."""
    kubelet_cpus: CpuSet | None = None
    """To which CPUs; None: that is unknown."""
    reported: list[Happening] = field(default_factory=list)
    """What Events are made of."""
    kubelet_counts_claims: bool = False
    """Whether kubelet's limits of pages may include what claims hold."""
    caches_of: Callable[[PinNode, ContainerTable], CacheGroups] = lambda node, table: NO_CACHE_GROUPS
    """Who divides caches."""

    def begin(self) -> None:
        """An agent that confines containers starts, as far as that is concerned."""
        sysfs, config, table = SysFs(self.folder / "root"), lambda: self.config, ContainerTable(layouts())
        self.pins = PinningManager(
            self.agent,
            sysfs,
            table,
            self.folder,
            config,
            self.fetch,
            self.listing,
            self.rescan,
            kubelet_confines=lambda: self.kubelet_confines,
            kubelet_cpus=lambda: self.kubelet_cpus,
            kubelet_counts_claims=lambda: self.kubelet_counts_claims,
            clock=self.clock,
            report=self.reported.append,
            caches=self.caches_of(self, table),
        )
        self.running = asyncio.create_task(self._pin())

    async def _pin(self) -> None:
        await self.pins.apply(Config())
        await self.pins.lead()

    async def end(self) -> None:
        """It ends: from here on no agent confines anything."""
        task, self.running = self.running, None
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled() and task.exception() is not None:
            raise task.exception()  # type: ignore[misc]

    def clock(self) -> float:
        return time.monotonic() + self.now_s

    async def rescan(self) -> None:
        """Read the machine again, of which control groups alone may have changed."""
        pods = pods_cgroup(SysFs(self.folder / "root"))
        self.agent.see(replace(self.agent.inventory, pods_cgroup=pods))

    @property
    def shared(self) -> str:
        return str(self.pins.reconciler.plan().shared)

    async def fetch(self, ref: ClaimRef) -> Mapping[str, Any] | None:
        return self.claims.get(ref.name)

    async def listing(self, timeout_s: float) -> Listing:
        if self.kubelet_away:
            raise PeerError("cannot list pod resources: on purpose")
        return replace(NO_LISTING, claimed=tuple(self.listed))

    def pod(self, name: str) -> str:
        """The path of a pod's cgroup, made where there is none, as kubelet makes it."""
        path = f"kubepods/poduid-{name}"
        self.tree.make(path)
        return path

    def path(self, pod: str, name: str) -> str:
        return f"kubepods/poduid-{pod}/{pod}_{name}"

    async def admit(self, pod: str, name: str, *ids: str, offer: Offer = CPU) -> None:
        """Kubelet asks for a container's devices and writes them down."""
        await self.agent.allocate(offer.resource, [ids], offer.edits, "op")
        entry = {"PodUID": f"uid-{pod}", "ContainerName": name, "ResourceName": offer.name, "DeviceIDs": {"-1": ids}}
        self.entries = [one for one in self.entries if not set(ids) & set(one["DeviceIDs"]["-1"])]
        self.entries.append(entry)
        self.write_checkpoint()

    def write_checkpoint(self) -> None:
        draft = self.folder / "draft"
        draft.write_text(json.dumps({"Data": {"PodDeviceEntries": self.entries}, "Checksum": 0}))
        draft.rename(self.folder / CHECKPOINT)

    async def create(self, pod: str, name: str, **fields: Any) -> Any:
        """The runtime makes a container: asks, makes its cgroup as answered. The container does not run yet."""
        self.pod(pod)
        answer = await self.ask(pod, name, **fields)
        self.tree.make(self.path(pod, name), **self._files(answer.adjust.linux.resources))
        return answer

    async def ask(self, pod: str, name: str, **fields: Any) -> Any:
        """What the runtime is answered."""
        cgroup = f"/{self.path(pod, name)}"
        return await self.runtime.create(f"{pod}_{name}", pod=pod, called=name, cgroup=cgroup, **fields)

    async def run(self, pod: str, name: str, **fields: Any) -> Any:
        """A container is created and started."""
        answer = await self.create(pod, name, **fields)
        await self.start(pod, name)
        return answer

    async def start(self, pod: str, name: str) -> None:
        await self.runtime.start_container(f"{pod}_{name}")

    async def remove(self, pod: str, name: str) -> None:
        await self.runtime.stop_container(f"{pod}_{name}")
        self.tree.remove(self.path(pod, name))
        await self.runtime.remove_container(f"{pod}_{name}")

    def bundle(self, id: str, pod: str, name: str, *env: str) -> None:
        """What containerd leaves of a container."""
        said = {"container-name": name, "sandbox-name": pod, "sandbox-namespace": "default", "sandbox-id": "s"}
        annotations = {
            f"io.kubernetes.cri.{key}": value for key, value in {**said, "sandbox-uid": f"uid-{pod}"}.items()
        }
        path = self.folder / "root/run/containerd/io.containerd.runtime.v2.task/k8s.io" / id
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"process": {"env": env}, "annotations": annotations}))

    async def until(self, holds: Any) -> None:
        """Return once something holds: what is waited for are files."""
        await until(holds)

    def _files(self, resources: Any) -> dict[str, str]:
        said = {"cpuset__cpus": resources.cpu.cpus, "cpuset__mems": resources.cpu.mems}
        return {name: value for name, value in said.items() if value}


def where(folder: Path) -> Paths:
    """The paths of an agent on such a node."""
    config = Config(state_dir=str(folder / "state"))
    return paths_of(config, config_file=None, root=str(folder / "root"), kubelet_dir=str(folder))


@contextlib.asynccontextmanager
async def pin_node(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    inventory: Inventory | None = None,
    connected: bool = True,
    writable: bool = True,
    request_timeout_s: float = 2.0,
    caches_of: Callable[[PinNode, ContainerTable], CacheGroups] = lambda node, table: NO_CACHE_GROUPS,
    io: IoDisks | None = None,
    uclamp: bool = False,
    runtime_name: str = "containerd",
    **pinning: Any,
) -> AsyncIterator[PinNode]:
    """16 CPUs on two NUMA nodes, CPU 0 reserved. connected: whether the runtime is there. request_timeout_s: how long
    it waits for an answer. caches_of: who divides caches. io: the disks on which the kernel limits I/O. uclamp:
    whether it has utilization clamps. pinning: configuration."""
    inventory = inventory or machine()
    tree = CgroupTree(folder / "root", cpus=str(inventory.cpus_online), mems="0-1", io=io, uclamp=uclamp)
    monkeypatch.setattr(cgroupset, "put", tree.put)
    tree.make("kubepods")
    if not writable:
        (tree.mount / "cgroup.procs").unlink()
    socket = folder / "nri.sock"
    config = msgspec.convert({"nriSocket": str(socket), "verifySeconds": 3600, **pinning}, PinningConfig)
    agent = Agent(Store(folder), inventory, AgentSettings(reserved=CpuSet.parse(RESERVED)), _nothing)
    runtime = FakeRuntime(folder, name=runtime_name, request_timeout_s=request_timeout_s)
    runtime.prefix = ""
    node = PinNode(folder, agent, tree, runtime, config, caches_of=caches_of)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(agent.close)
        if connected:
            await stack.enter_async_context(runtime)
        node.begin()
        stack.push_async_callback(node.end)
        if connected:
            await runtime.connected()
        yield node


async def _nothing() -> tuple[Holding, ...]:
    return ()
