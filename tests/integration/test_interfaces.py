"""Interfaces in pods by the whole agent as a real process, with real network namespaces, kubelet, an API server and a
runtime that speaks NRI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent.pb import nri_pb2 as pb
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import CLAIMS
from tests.doubles.dra_kubelet import ClaimId
from tests.doubles.rdma_kernel import RdmaKernel
from tests.doubles.runtime import FakeRuntime, PluginRefusedError
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.long_form import share_of
from tests.support.namespaces import FIRST_GROUP, Namespace, device_of, needs_namespaces
from tests.support.paths import CHECKOUT
from tests.support.until import until

GROUPS = {"ens7": FIRST_GROUP + 1, "ens8": FIRST_GROUP + 2}
RDMA = {"mlx5_7": "ens7", "mlx5_8": "ens8"}
MACS = {"ens7": "02:00:00:00:00:07", "ens8": "02:00:00:00:00:08"}
NICS = {"name": "nic", "kind": "nic", "serve": "dra"}
WANTED = {"name": "net1", "addresses": ["10.0.0.5/24"], "mtu": 1400}
LIVES, MOST_STEPS = share_of(120, 0.1), 24
pytestmark = needs_namespaces


@dataclass
class Node:
    """A node with two adapters, whose interfaces are in a namespace that stands for the host's."""

    node: DraNode
    runtime: FakeRuntime
    host: Namespace
    doom: Path
    kernel: RdmaKernel
    pods: dict[str, Namespace] = field(default_factory=dict)

    def claim(self, name: str, of: str = "ens7") -> ClaimId:
        parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", "interface": WANTED}
        config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
        device = device_of(GROUPS[of]).replace(":", "-").replace(".", "-")
        return self.node.claim(name, result("nic", device), config=[config], reserved_for=[f"uid-{name}"])

    def pod(self, name: str, *, host_network: bool = False) -> Namespace:
        """The runtime has a sandbox, which it has not told of yet."""
        own = [] if host_network else [pb.LinuxNamespace(type="network", path=self._made(name).path)]
        linux = pb.LinuxPodSandbox(namespaces=[pb.LinuxNamespace(type="pid"), *own])
        self.runtime.pods[f"sandbox-{name}"] = pb.PodSandbox(
            id=f"sandbox-{name}", uid=f"uid-{name}", name=name, namespace="default", linux=linux
        )
        return self.host if host_network else self.pods[name]

    def _made(self, name: str) -> Namespace:
        self.pods[name] = Namespace()
        return self.pods[name]

    async def run(self, name: str) -> None:
        await self.runtime.pod_event(pb.RUN_POD_SANDBOX, name)

    async def stop(self, name: str) -> None:
        """As containerd does: the plugin is told, then the namespace ends."""
        with contextlib.suppress(Exception):
            await self.runtime.pod_event(pb.STOP_POD_SANDBOX, name)
        self.vanish(name)

    def vanish(self, name: str) -> None:
        del self.runtime.pods[f"sandbox-{name}"]
        self.kernel.end(Path(self.pods[name].path))
        self.pods.pop(name).end(self.host)

    def is_as_before(self, name: str = "ens7") -> bool:
        if name not in self.host.names():
            return False
        shown = self.host.link(name)
        return (shown["address"], shown["mtu"], shown.get("ifalias")) == (MACS[name], 1500, None)

    @property
    def journal(self) -> Path:
        return self.node.folder / "state" / "interfaces.json"

    async def network_data(self, claim: str) -> Any:
        """What the claim's status says, once it is written."""

        def devices() -> list[Any]:
            found = self.node.api.find(CLAIMS, claim, "default")
            assert found is not None
            return [one.get("networkData") for one in found["status"].get("devices", ())]

        (data,) = await until(devices)
        return data


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """Eight CPUs, two adapters, and control groups that are read-only."""
    tree = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    mount = tmp_path / "root/sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    for name, group in GROUPS.items():
        tree.pci(device_of(group), driver="ice")
        tree.net(device_of(group), name, address=MACS[name])
    return tree


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as made:
        for name, group in GROUPS.items():
            made.veth(name, mac=MACS[name], group=group, up=True)
        yield made


@contextlib.asynccontextmanager
async def interface_node(
    folder: Path,
    tree: DeviceTree,
    host: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    *,
    on: bool = True,
    rdma: Sequence[str] = (),
) -> AsyncIterator[Node]:
    """rdma: names of RDMA devices, in order; those of RDMA are of adapters."""
    facts, doom, file = folder / "interfaces-node.json", folder / "doom", folder / "rdma.json"
    kernel = RdmaKernel(Path(host.path), root=tree.root, file=file)
    for name in rdma:
        kernel.add(name, device_of(GROUPS[RDMA[name]]) if name in RDMA else "")
    told = {"host": host.path, "doom": str(doom), **({"rdma": str(file), "root": str(tree.root)} if rdma else {})}
    facts.write_text(json.dumps(told))
    monkeypatch.setenv("INTERFACE_NODE", str(facts))
    async with FakeRuntime(folder) as runtime:
        more = {"pinning": {"nriSocket": str(runtime.socket)}, "network": {"moveInterfaces": on}}
        async with dra_node(folder, tree, [NICS], more=more, module="tests.support.interface_agent") as node:
            await node.published("nic")
            await runtime.connected()
            one = Node(node, runtime, host, doom, kernel)
            yield one
            for pod in one.pods.values():
                pod.close()


async def test_an_interface_is_in_the_pod_from_its_sandbox_to_its_end(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        claim, pod = one.claim("web"), one.pod("web")
        (answer,) = await one.node.prepare(claim)
        assert answer.error == "" and "ens7" in host.names()
        await one.run("web")
        assert (pod.names(), pod.addresses("net1"), pod.link("net1")["mtu"]) == ({"net1"}, {"10.0.0.5/24"}, 1400)
        assert host.names() == {"ens7-far", "ens8", "ens8-far"}
        data = {"interfaceName": "net1", "ips": ["10.0.0.5/24"], "hardwareAddress": MACS["ens7"]}
        assert await one.network_data("web") == data
        await one.runtime.create("main", pod="web")
        await one.runtime.stop_container("main")
        await one.runtime.remove_container("main")
        await one.stop("web")
        assert one.is_as_before() and not one.journal.exists()
        assert await one.node.unprepare(claim) == [""]


async def test_an_rdma_device_goes_along_and_is_handed_over_under_the_name_that_its_node_has_there(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the exclusive mode. The kernel gives the node a new number when the device moves: the first try is
    refused, and the files of the claim follow. Then the agent is killed."""
    async with interface_node(folder, tree, host, monkeypatch, rdma=["gone", "mlx5_7"]) as one:
        one.kernel.remove("gone")
        claim, pod = one.claim("web"), one.pod("web")
        await one.node.prepare(claim)
        with pytest.raises(PluginRefusedError, match=r"mlx5_7: its nodes became /dev/infiniband/uverbs0"):
            await one.run("web")
        await until(lambda: "/dev/infiniband/uverbs0" in json.dumps(one.node.spec(claim)))
        await one.run("web")
        assert pod.names() == {"net1"} and one.kernel.where("mlx5_7", Path(pod.path))
        await one.node.agent.stop(signal.SIGKILL)
        await one.node.agent.start()
        await one.node.dra.wait_registered(DRIVER, 2)
        await one.runtime.connected(2)
        assert one.node.devices("nic")["0000-5e-00-1"]["attributes"]["rdma"] == {"bool": True}
        await one.runtime.create("main", pod="web")
        await one.runtime.stop_container("main")
        await one.runtime.remove_container("main")
        await one.stop("web")
        assert one.is_as_before() and one.kernel.where("mlx5_7", Path(host.path))
        assert await one.node.unprepare(claim) == [""]


async def test_a_pod_on_the_hosts_network_does_not_start(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        claim = one.claim("web")
        one.pod("web", host_network=True)
        await one.node.prepare(claim)
        with pytest.raises(PluginRefusedError, match=r"cannot move interface ens7 into pod default/web: .*hostNetwork"):
            await one.run("web")
        with pytest.raises(PluginRefusedError, match="hostNetwork"):
            await one.runtime.create("main", pod="web")
        assert one.is_as_before()
        assert await one.node.unprepare(claim) == [""]


async def test_pods_without_such_claims_start_and_end_as_ever(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        one.pod("web", host_network=True)
        await one.run("web")
        await one.runtime.create("main", pod="web")
        await one.runtime.pod_event(pb.STOP_POD_SANDBOX, "web")
        await one.runtime.pod_event(pb.REMOVE_POD_SANDBOX, "web")
        assert not one.journal.exists()


async def test_a_pod_that_started_while_the_agent_was_away_is_completed(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        claim = one.claim("web")
        await one.node.prepare(claim)
        await one.node.agent.stop(signal.SIGKILL)
        pod = one.pod("web")
        await one.node.agent.start()
        await until(lambda: pod.names() == {"net1"} and bool(pod.addresses("net1")))
        await one.node.agent.stop(signal.SIGKILL)
        one.vanish("web")
        assert one.journal.exists()
        await one.node.agent.start()
        await until(lambda: one.is_as_before() and not one.journal.exists())
        await one.node.dra.wait_registered(DRIVER, 3)
        assert await one.node.unprepare(claim) == [""]


async def test_unprepare_gives_back_what_the_runtime_did_not_tell(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        claim, pod = one.claim("web"), one.pod("web")
        await one.node.prepare(claim)
        await one.run("web")
        assert pod.names() == {"net1"}
        assert await one.node.unprepare(claim) == [""]
        assert one.is_as_before() and pod.names() == set()


async def test_uninstalling_gives_back_what_is_in_pods(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interface_node(folder, tree, host, monkeypatch) as one:
        pod = one.pod("web")
        await one.node.prepare(one.claim("web"))
        await one.run("web")
        await one.node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(one.node.agent.config_file), "--root", str(tree.root)]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        module = "tests.support.interface_agent"
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *words, stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        said, _ = await done.communicate()
        assert f"interface of {device_of(GROUPS['ens7'])}: default/web -> ens7" in said.decode()
        assert one.is_as_before() and pod.names() == set() and not one.journal.exists()


async def test_a_claim_keeps_its_interface_although_the_node_allows_none_any_longer(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a sandbox that is made again; other claims are refused."""
    async with interface_node(folder, tree, host, monkeypatch) as one:
        claim = one.claim("web")
        await one.node.prepare(claim)
        await one.node.agent.stop()
        agent, options = one.node.agent, one.node.options
        agent.configure(**{**options, "network": {"moveInterfaces": False}})
        await agent.start()
        await one.node.dra.wait_registered(DRIVER, 2)
        await agent.until("/v1/status", lambda status: status["pinning"]["connected"])
        (answer,) = await one.node.prepare(claim)
        assert answer.error == ""
        for _ in range(2):
            pod = one.pod("web")
            await one.run("web")
            assert pod.names() == {"net1"}
            await one.stop("web")
            assert one.is_as_before()
        other = one.claim("other", "ens8")
        (answer,) = await one.node.prepare(other)
        assert "network.moveInterfaces of this node does not allow it" in answer.error
        assert await one.node.unprepare(claim) == [""]


@pytest.mark.parametrize("on", [False, True], ids=["not-allowed", "no-runtime"])
async def test_a_claim_whose_interface_cannot_be_moved_is_refused(
    folder: Path, tree: DeviceTree, host: Namespace, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    async with interface_node(folder, tree, host, monkeypatch, on=on) as one:
        if on:
            await one.runtime.stop()
            await one.node.agent.until("/v1/status", lambda status: not status["pinning"]["connected"])
        (answer,) = await one.node.prepare(one.claim("web"))
        forbidden = "network.moveInterfaces of this node does not allow it"
        assert ("the container runtime does not call the agent (NRI)" if on else forbidden) in answer.error
        (plain,) = await one.node.prepare(one.node.claim("plain", result("nic", "0000-5e-00-2")))
        assert plain.error == ""


async def test_kill_9_before_or_after_any_change_leaves_what_the_ledger_grants(
    folder: Path,
    tree: DeviceTree,
    host: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pods come and go; agents die at random steps of it, begin again, and complete or undo it."""
    drawn, deaths = random.Random(7), 0
    async with interface_node(folder, tree, host, monkeypatch, rdma=list(RDMA)) as one:
        one.runtime.forgives_late = True
        claims = {name: one.claim(name, of) for name, of in (("a", "ens7"), ("b", "ens8"))}
        for life in range(LIVES):
            one.doom.with_suffix(".new").write_text(f"life-{life} {drawn.randint(1, MOST_STEPS)}")
            one.doom.with_suffix(".new").rename(one.doom)
            for name in drawn.sample(sorted(claims), 2):
                await _turn(one, name, claims[name], vanishes=drawn.random() < 0.3)
            try:
                one.doom.unlink()
            except FileNotFoundError:
                await one.node.agent.end()
                deaths += 1
                await one.node.agent.start()
                await one.node.dra.wait_registered(DRIVER, deaths + 1)
                await one.runtime.connected(deaths + 1)
        held = {grant["uid"] for grant in await one.node.grants()}
        for name, claim in claims.items():
            if name in one.pods and claim.uid in held:
                await until(lambda name=name: one.pods[name].names() == {"net1"})  # type: ignore[misc]
            if name in one.pods:
                await one.stop(name)
            assert await one.node.unprepare(claim) == [""]
        await until(lambda: one.is_as_before("ens7") and one.is_as_before("ens8") and not one.journal.exists())
        assert all(one.kernel.where(name, Path(host.path)) for name in RDMA)
    with capsys.disabled():
        print(f"\ninterfaces: {deaths} of {LIVES} agents killed at a change")
    assert deaths >= LIVES // 4


async def _turn(one: Node, name: str, claim: ClaimId, *, vanishes: bool) -> None:
    """What kubelet and the runtime do for a pod that starts or ends; the agent may die meanwhile, or be dead."""
    try:
        async with asyncio.timeout(20):
            if name not in one.pods:
                (answer,) = await one.node.prepare(claim)
                if answer.error:
                    return
                one.pod(name)
                await one.run(name)
                return
    except Exception:
        return  # kubelet ends a sandbox that could not be started, in its next turn
    if vanishes:
        one.vanish(name)
    else:
        await one.stop(name)
    with contextlib.suppress(Exception):
        async with asyncio.timeout(20):
            await one.node.unprepare(claim)
