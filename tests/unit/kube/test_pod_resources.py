"""What kubelet says that pods hold, over a real socket, and the watch of its checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.model.grant import Holding
from nodeagent.errors import ConfigError, PeerError
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, CheckpointWatch, PodResources
from nodeagent.kube.kubelet.registration import Registrar
from nodeagent.pb import podresources_pb2 as pb
from tests.doubles.kubelet import FakeKubelet
from tests.pb import podresources_pb2_grpc as rpc
from tests.support import channels
from tests.support.shelf import CPU, GPU, Shelf


@contextlib.asynccontextmanager
async def node(folder: Path) -> AsyncIterator[FakeKubelet]:
    """A kubelet with four CPUs and two GPUs."""
    async with FakeKubelet(folder) as kubelet:
        registrar = Registrar([Shelf(CPU, 4), Shelf(GPU, 2)], kubelet.plugins_folder)
        task = asyncio.create_task(registrar.run())
        await registrar.wait_ready()
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.wait_allocatable(GPU, 2)
        try:
            yield kubelet
        finally:
            task.cancel()
            await asyncio.wait({task})


class Canned(rpc.PodResourcesListerServicer):
    """Answers List with one message."""

    def __init__(self, answer: pb.ListPodResourcesResponse) -> None:
        self.answer = answer

    async def List(self, request: Any, context: Any) -> pb.ListPodResourcesResponse:  # noqa: N802
        return self.answer


@contextlib.asynccontextmanager
async def canned(path: Path, answer: pb.ListPodResourcesResponse) -> AsyncIterator[PodResources]:
    """A lister that gives this answer."""
    server = await channels.serve(path, lambda one: rpc.add_PodResourcesListerServicer_to_server(Canned(answer), one))
    try:
        yield PodResources(path)
    finally:
        await server.stop(0)


async def test_holdings_come_in_order_of_their_names_with_ids_in_order(folder: Path) -> None:
    """Whatever the order of admission."""
    async with node(folder) as kubelet:
        for namespace, name in (("b", "x"), ("a", "z"), ("a", "y")):
            await kubelet.admit_pod(namespace, name, {"main": {CPU: 1}})
        found = await PodResources(kubelet.pod_resources_socket).list()
    assert [(one.namespace, one.pod, one.container, one.ids) for one in found] == [
        ("a", "y", "main", ("002",)),
        ("a", "z", "main", ("001",)),
        ("b", "x", "main", ("000",)),
    ]


async def test_one_resource_in_several_entries_is_one_holding(folder: Path) -> None:
    """Kubelet splits by NUMA node; the shelf's devices lie on two."""
    async with node(folder) as kubelet:
        pod = await kubelet.admit_pod("a", "y", {"main": {CPU: 4, GPU: 2}, "idle": {}})
        assert len(kubelet.pod_resources(pod).containers[0].devices) == 4
        found = await PodResources(kubelet.pod_resources_socket).list()
    assert found == (
        Holding(namespace="a", pod="y", container="main", resource=CPU, ids=("000", "001", "002", "003")),
        Holding(namespace="a", pod="y", container="main", resource=GPU, ids=("000", "001")),
    )


async def test_a_pod_that_is_gone_holds_nothing(folder: Path) -> None:
    """No pods, no holdings."""
    async with node(folder) as kubelet:
        resources = PodResources(kubelet.pod_resources_socket)
        await kubelet.admit_pod("a", "y", {"main": {CPU: 1}})
        assert len(await resources.list()) == 1
        await kubelet.delete_pod("a", "y")
        assert await resources.list() == ()


async def test_claims_and_empty_entries_are_no_holdings(folder: Path) -> None:
    """What came through a resource claim is not a device-plugin holding."""
    container = pb.ContainerResources(
        name="c",
        devices=[pb.ContainerDevices(resource_name=CPU)],
        dynamic_resources=[pb.DynamicResource(claim_name="claim")],
    )
    answer = pb.ListPodResourcesResponse(
        pod_resources=[pb.PodResources(name="p", namespace="n", containers=[container])]
    )
    async with canned(folder / "s", answer) as resources:
        assert await resources.list() == ()


async def test_claims_are_those_that_containers_use_each_once(folder: Path) -> None:
    """With their namespace; an init container's are not shown, and a pod that is gone uses none."""
    async with node(folder) as kubelet:
        resources = PodResources(kubelet.pod_resources_socket)
        assert await resources.claims() == frozenset()
        one = await kubelet.admit_pod("a", "y", {"main": {CPU: 1}, "side": {}}, {"init": {}})
        other = await kubelet.admit_pod("b", "y", {"main": {}})
        one.claims = {"main": ["c", "d"], "side": ["c"], "init": ["hidden"]}
        other.claims = {"main": ["c"]}
        assert await resources.claims() == {("a", "c"), ("a", "d"), ("b", "c")}
        await kubelet.delete_pod("a", "y")
        assert await resources.claims() == {("b", "c")}
        assert await resources.list() == ()


async def test_a_kubelet_that_cannot_be_asked_uses_no_claims_by_nobodys_word(folder: Path) -> None:
    """Silence is no answer."""
    async with FakeKubelet(folder) as kubelet:
        resources = PodResources(kubelet.pod_resources_socket)
        await kubelet.stop()
        with pytest.raises(PeerError, match=f"^cannot list pod resources at {resources.path}: UNAVAILABLE: "):
            await resources.claims()
        await kubelet.start()
        assert await resources.claims(timeout_s=0.5) == frozenset()


async def test_an_answer_of_eight_mebibytes_is_read(folder: Path) -> None:
    """Beyond gRPC's usual 4 MiB: a large node has many pods."""
    ids = [f"{number:08}" + "x" * 55 for number in range(130_000)]
    devices = pb.ContainerDevices(resource_name=CPU, device_ids=ids)
    pod = pb.PodResources(name="p", namespace="n", containers=[pb.ContainerResources(name="c", devices=[devices])])
    answer = pb.ListPodResourcesResponse(pod_resources=[pod])
    assert answer.ByteSize() > 8 << 20
    async with canned(folder / "s", answer) as resources:
        (holding,) = await resources.list(timeout_s=30)
    assert len(holding.ids) == 130_000


async def test_allocatable_is_what_is_healthy_by_resource(folder: Path) -> None:
    """In order; whether a pod holds it does not matter."""
    async with node(folder) as kubelet:
        await kubelet.admit_pod("a", "y", {"main": {CPU: 1}})
        found = await PodResources(kubelet.pod_resources_socket).allocatable()
    assert [*found.items()] == [(CPU, ("000", "001", "002", "003")), (GPU, ("000", "001"))]


async def test_a_restarted_kubelet_is_found_at_once(folder: Path) -> None:
    """The failure in between leaves no back-off behind."""
    async with FakeKubelet(folder) as kubelet:
        resources = PodResources(kubelet.pod_resources_socket)
        await kubelet.stop()
        with pytest.raises(PeerError, match=f"^cannot list pod resources at {resources.path}: UNAVAILABLE: "):
            await resources.list()
        with pytest.raises(PeerError, match=f"^cannot read allocatable resources at {resources.path}: "):
            await resources.allocatable()
        await kubelet.start()
        assert await resources.list(timeout_s=0.5) == ()


async def test_a_kubelet_that_never_answers_is_left_after_the_time_limit(folder: Path) -> None:
    """A socket that accepts and says nothing."""
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(folder / "s"))
        mute.listen()
        with pytest.raises(PeerError, match="DEADLINE_EXCEEDED"):
            await PodResources(folder / "s").list(timeout_s=0.1)


def test_a_socket_path_that_is_too_long_is_refused_at_once() -> None:
    """With its length and the limit."""
    with pytest.raises(ConfigError, match="the path has 121 bytes, the limit is 107"):
        PodResources(Path("/") / ("x" * 120))


async def test_each_admission_wakes_the_checkpoint_watch(folder: Path) -> None:
    """Three changes while no caller waits are one."""
    async with node(folder) as kubelet:
        with CheckpointWatch(kubelet.plugins_folder, poll_s=30) as watch:
            for name in ("one", "two", "three"):
                await kubelet.admit_pod("a", name, {"main": {CPU: 1}})
            assert await watch.wait()
            waiting = asyncio.create_task(watch.wait())
            (kubelet.plugins_folder / "noise").touch()
            await asyncio.wait({waiting}, timeout=0.1)
            assert not waiting.done()
            await kubelet.delete_pod("a", "one")
            await asyncio.wait({waiting}, timeout=0.1)
            assert not waiting.done(), "kubelet's checkpoint does not tell of a pod's end"
            await kubelet.admit_pod("a", "four", {"main": {CPU: 1}})
            assert await waiting


async def test_the_slow_poll_says_that_nothing_changed(folder: Path) -> None:
    """Also where the folder does not exist; the file's first appearance is a change."""
    with CheckpointWatch(folder / "later", poll_s=0.05) as watch:
        assert not await watch.wait()
        (folder / "later").mkdir()
        (folder / "later" / CHECKPOINT).touch()
        assert await watch.wait()
        assert not await watch.wait()
