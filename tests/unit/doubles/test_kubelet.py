"""The FakeKubelet is as strict as kubelet: these tests play the plugin, well and badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.kube.kubelet.registration import Registrar
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import podresources_pb2 as pods_pb
from tests.doubles.kubelet import CHECKPOINT, AdmissionError, ContractViolation, FakeKubelet
from tests.doubles.kubelet_plugins import Version
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.pb import podresources_pb2_grpc as pods_rpc
from tests.support import channels
from tests.support.shelf import CPU, GPU, Shelf


@contextlib.asynccontextmanager
async def node(folder: Path, *shelves: Shelf) -> AsyncIterator[FakeKubelet]:
    """A kubelet with these resources."""
    async with FakeKubelet(folder) as kubelet:
        registrar = Registrar(shelves, kubelet.plugins_folder)
        task = asyncio.create_task(registrar.run())
        for shelf in shelves:
            await kubelet.wait_allocatable(shelf.name, len(shelf.advertised()))
        try:
            yield kubelet
        finally:
            task.cancel()
            await asyncio.wait({task})


class Plugin(rpc.DevicePluginServicer):
    """A plugin by hand: it shows these devices, and gives an answer to Allocate or none."""

    def __init__(self, devices: Sequence[pb.Device] = (), answers: int = 1) -> None:
        self.devices = devices
        self.answers = answers

    async def GetDevicePluginOptions(self, request: Any, context: Any) -> pb.DevicePluginOptions:  # noqa: N802
        return pb.DevicePluginOptions()

    async def ListAndWatch(self, request: Any, context: Any) -> None:  # noqa: N802
        await context.write(pb.ListAndWatchResponse(devices=self.devices))
        await asyncio.Event().wait()

    async def Allocate(self, request: Any, context: Any) -> pb.AllocateResponse:  # noqa: N802
        answers = [pb.ContainerAllocateResponse(envs={"N": str(number)}) for number in range(self.answers)]
        return pb.AllocateResponse(container_responses=answers)


@contextlib.asynccontextmanager
async def plugged(kubelet: FakeKubelet, plugin: Plugin, name: str = "p.sock") -> AsyncIterator[None]:
    """The plugin, served and registered as CPU."""
    path = kubelet.plugins_folder / name
    server = await channels.serve(path, lambda one: rpc.add_DevicePluginServicer_to_server(plugin, one))
    try:
        await register(kubelet, endpoint=name)
        yield
    finally:
        await server.stop(0)


async def register(kubelet: FakeKubelet, *, timeout_s: float = 1.0, **changes: str) -> None:
    request = {"version": "v1beta1", "endpoint": "p.sock", "resource_name": CPU, **changes}
    async with channels.channel(kubelet.socket) as channel:
        await rpc.RegistrationStub(channel).Register(pb.RegisterRequest(**request), timeout=timeout_s)


def devices(*ids: str, health: str = "Healthy") -> list[pb.Device]:
    return [pb.Device(ID=one, health=health) for one in ids]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"version": "v1"}, "version 'v1', expected 'v1beta1'"),
        ({"endpoint": ""}, "endpoint '' is not a plain file name"),
        ({"endpoint": "/tmp/p.sock"}, "endpoint '/tmp/p.sock' is not a plain file name"),
        ({"endpoint": "kubelet.sock"}, "endpoint 'kubelet.sock' is not a plain file name"),
        ({"resource_name": "cpu"}, "'cpu' is no extended resource name"),
        ({"resource_name": "Upper.dev/cpu"}, "'Upper.dev/cpu' is no extended resource name"),
        ({"resource_name": "a.dev/b/c"}, "'a.dev/b/c' is no extended resource name"),
        ({"resource_name": f"a.dev/{'x' * 64}"}, f"'a.dev/{'x' * 64}' is no extended resource name"),
        ({"resource_name": "kubernetes.io/cpu"}, "'kubernetes.io/cpu' is in kubelet's own domain"),
        ({"resource_name": "x.kubernetes.io/cpu"}, "'x.kubernetes.io/cpu' is in kubelet's own domain"),
        ({}, "cannot dial p.sock back inside Register: "),
    ],
)
async def test_a_bad_registration_is_refused_and_raised_at_the_end(
    changes: dict[str, str], cause: str, folder: Path
) -> None:
    """The plugin sees INVALID_ARGUMENT; the test that did not look fails when it leaves the kubelet."""
    kubelet = FakeKubelet(folder)
    with pytest.raises(ExceptionGroup) as raised:
        async with kubelet:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await register(kubelet, **changes)
    (violation,) = raised.value.exceptions
    assert isinstance(violation, ContractViolation)
    assert str(violation).startswith(cause)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert kubelet.registrations == {}


@pytest.mark.parametrize(
    ("shown", "cause"),
    [
        (devices("x" * 64), "the id has 64 characters, expected 1 to 63"),
        (devices(""), "the id has 0 characters, expected 1 to 63"),
        (devices("1", "2", "1"), "the id stands twice"),
        (devices("1", health="healthy"), "health 'healthy'"),
        (
            [pb.Device(ID="1", health="Healthy", topology=pb.TopologyInfo(nodes=[pb.NUMANode(ID=-1)]))],
            "NUMA nodes [-1]",
        ),
    ],
)
async def test_a_bad_device_is_a_violation(shown: list[pb.Device], cause: str, folder: Path) -> None:
    """Each with the id and what is wrong with it."""
    kubelet = FakeKubelet(folder)
    await kubelet.start()
    async with plugged(kubelet, Plugin(shown)):
        await kubelet.until(lambda: bool(kubelet.violations))
    await kubelet.stop()
    with pytest.raises(ExceptionGroup) as raised:
        kubelet.check()
    assert str(raised.value.exceptions[0]).endswith(cause)


async def test_a_start_deletes_everything_but_the_checkpoint(folder: Path) -> None:
    """Sockets, files, links; the pods' devices stay."""
    async with node(folder, Shelf()) as kubelet:
        pod = await kubelet.admit_pod("a", "b", {"main": {CPU: 2}})
        held = pod.held(CPU)
        await kubelet.stop()
        (kubelet.plugins_folder / "left.sock").touch()
        await kubelet.start()
        assert {path.name for path in kubelet.plugins_folder.glob("left*")} == set()
        assert pod.held(CPU) == held
        await kubelet.wait_allocatable(CPU, 4)
        other = await kubelet.admit_pod("a", "c", {"main": {CPU: 2}})
        assert not other.held(CPU) & held


# A second Register


async def test_up_to_1_36_the_newer_plugin_wins_and_ends_with_the_older_one(folder: Path) -> None:
    """Kubelet cleans up by the resource's name; that the two overlapped is a violation."""
    kubelet = FakeKubelet(folder, version=Version.V1_36)
    await kubelet.start()
    async with contextlib.AsyncExitStack() as older:
        await older.enter_async_context(plugged(kubelet, Plugin(devices("1", "2")), "older.sock"))
        await kubelet.wait_allocatable(CPU, 2)
        async with plugged(kubelet, Plugin(devices("3")), "newer.sock"):
            await kubelet.wait_allocatable(CPU, 1)
            assert kubelet.endpoints[CPU].path.name == "newer.sock"
            assert len(kubelet.streams(CPU)) == 2
            await older.aclose()
            await kubelet.until(lambda: not kubelet.connections(CPU))
            assert kubelet.allocatable(CPU) == 0
            assert kubelet.endpoints[CPU].stopped
    await kubelet.stop()
    assert [str(one) for one in kubelet.violations] == [f"{CPU}: Register of newer.sock while older.sock is watched"]


async def test_from_1_37_the_end_of_a_plugin_concerns_its_path_alone(folder: Path) -> None:
    """The other one serves on; that the two overlapped is a violation all the same."""
    kubelet = FakeKubelet(folder, version=Version.V1_37)
    await kubelet.start()
    async with contextlib.AsyncExitStack() as older:
        await older.enter_async_context(plugged(kubelet, Plugin(devices("1", "2")), "older.sock"))
        async with plugged(kubelet, Plugin(devices("3")), "newer.sock"):
            await kubelet.wait_allocatable(CPU, 1)
            await older.aclose()
            await kubelet.until(lambda: len(kubelet.connections(CPU)) == 1)
            assert kubelet.allocatable(CPU) == 1
            assert kubelet.endpoints[CPU].path.name == "newer.sock"
        await kubelet.wait_allocatable(CPU, 0)
    await kubelet.stop()
    assert len(kubelet.violations) == 1


async def test_from_1_37_a_second_register_is_refused_and_loses_the_path(folder: Path) -> None:
    """Its devices are shown after its end, it is refused again and again; another path is taken at once, and the same
    one by the next kubelet."""
    kubelet, refused = FakeKubelet(folder, version=Version.V1_37), "device plugin already connected: .*/p.sock"
    await kubelet.start()
    async with plugged(kubelet, Plugin(devices("1"))):
        await kubelet.wait_allocatable(CPU, 1)
        with pytest.raises(grpc.aio.AioRpcError, match=refused) as error:
            await register(kubelet)
        assert error.value.code() is grpc.StatusCode.UNKNOWN
        assert kubelet.stranded() == [str(kubelet.plugins_folder / "p.sock")]
    await kubelet.until(lambda: not kubelet.connections(CPU))
    assert kubelet.allocatable(CPU) == 1
    with pytest.raises(grpc.aio.AioRpcError, match=refused):
        async with plugged(kubelet, Plugin(devices("2"))):
            pass
    async with plugged(kubelet, Plugin(devices("3", "4")), "other.sock"):
        await kubelet.wait_allocatable(CPU, 2)
    await kubelet.restart()
    assert kubelet.stranded() == []
    async with plugged(kubelet, Plugin(devices("5"))):
        await kubelet.wait_allocatable(CPU, 1)
    await kubelet.stop()
    assert [str(one) for one in kubelet.violations] == [f"{CPU}: Register of p.sock while p.sock is watched"]


@pytest.mark.parametrize("version", [*Version])
async def test_a_plugin_may_end_and_another_one_begin(folder: Path, version: Version) -> None:
    """On the same path too, once kubelet has cleaned up."""
    async with FakeKubelet(folder, version=version) as kubelet:
        for turn in range(1, 4):
            async with plugged(kubelet, Plugin(devices(*map(str, range(turn))))):
                await kubelet.wait_allocatable(CPU, turn)
            await kubelet.until(lambda: not kubelet.connections(CPU))
            assert (kubelet.allocatable(CPU), kubelet.stranded()) == (0, [])


async def test_up_to_1_36_a_failed_register_lets_the_end_of_the_older_plugin_pass_unnoticed(folder: Path) -> None:
    """Its devices stay until the next plugin."""
    kubelet = FakeKubelet(folder, version=Version.V1_36)
    await kubelet.start()
    async with plugged(kubelet, Plugin(devices("1"))):
        await kubelet.wait_allocatable(CPU, 1)
        with pytest.raises(grpc.aio.AioRpcError, match=r"cannot dial gone\.sock back"):
            await register(kubelet, endpoint="gone.sock")
        assert kubelet.stranded() == [str(kubelet.plugins_folder / "p.sock")]
    await kubelet.until(lambda: not kubelet.connections(CPU))
    assert kubelet.allocatable(CPU) == 1
    async with plugged(kubelet, Plugin(devices("2", "3"))):
        await kubelet.wait_allocatable(CPU, 2)
    await kubelet.wait_allocatable(CPU, 0)
    await kubelet.stop()


async def test_a_kubelet_that_stands_still_goes_on_with_what_came_meanwhile(folder: Path) -> None:
    """A Register, and the end of a stream."""
    async with FakeKubelet(folder) as kubelet:
        async with plugged(kubelet, Plugin(devices("1"))):
            await kubelet.wait_allocatable(CPU, 1)
            kubelet.pause()
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await register(kubelet, timeout_s=0.1, resource_name=GPU)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert kubelet.allocatable(CPU) == 1
        kubelet.resume()
        await kubelet.wait_allocatable(CPU, 0)
        assert GPU not in kubelet.registrations


async def test_a_register_may_be_served_and_not_be_answered(folder: Path) -> None:
    """Until it is released."""
    async with FakeKubelet(folder) as kubelet:
        kubelet.hold_answers(CPU)
        with pytest.raises(grpc.aio.AioRpcError):
            async with plugged(kubelet, Plugin(devices("1"))):
                pass
        assert kubelet.registrations == {CPU: 1}
        await kubelet.until(lambda: not kubelet.connections(CPU))
        kubelet.release(CPU)
        async with plugged(kubelet, Plugin(devices("1"))):
            await kubelet.wait_allocatable(CPU, 1)


async def test_the_end_of_the_stream_takes_the_devices_away(folder: Path) -> None:
    """And a pod that wants one is not admitted."""
    async with FakeKubelet(folder) as kubelet:
        async with plugged(kubelet, Plugin(devices("1"))):
            await kubelet.wait_allocatable(CPU, 1)
        await kubelet.wait_allocatable(CPU, 0)
        with pytest.raises(AdmissionError, match=f"cannot allocate unregistered device {CPU}"):
            await kubelet.admit_pod("a", "b", {"main": {CPU: 1}})


async def test_pods_get_different_devices_until_none_is_left(folder: Path) -> None:
    """The refusal counts; a deleted pod makes room; what is unhealthy is not given."""
    shelf = Shelf(count=5)
    shelf.unhealthy = {"004"}
    async with FakeKubelet(folder) as kubelet:
        task = asyncio.create_task(Registrar([shelf], kubelet.plugins_folder).run())
        await kubelet.wait_allocatable(CPU, 4)
        first = await kubelet.admit_pod("a", "1", {"main": {CPU: 3}})
        with pytest.raises(AdmissionError, match="Requested: 2, Available: 1"):
            await kubelet.admit_pod("a", "2", {"main": {CPU: 2}})
        second = await kubelet.admit_pod("a", "2", {"main": {CPU: 1}})
        assert first.held(CPU) | second.held(CPU) == {"000", "001", "002", "003"}
        await kubelet.delete_pod("a", "1")
        assert (await kubelet.admit_pod("a", "3", {"main": {CPU: 3}})).held(CPU) == first.held(CPU)
        task.cancel()
        await asyncio.wait({task})


async def test_the_preference_is_asked_only_where_there_is_a_choice_and_then_followed(folder: Path) -> None:
    """All of what is free is no choice."""
    shelf = Shelf(count=4)
    async with node(folder, shelf) as kubelet:
        shelf.preference = ["003", "001"]
        assert (await kubelet.admit_pod("a", "1", {"main": {CPU: 2}})).held(CPU) == {"001", "003"}
        assert [(sorted(available), must, size) for available, must, size in shelf.prefers] == [
            (["000", "001", "002", "003"], [], 2)
        ]
        assert (await kubelet.admit_pod("a", "2", {"main": {CPU: 2}})).held(CPU) == {"000", "002"}
        assert len(shelf.prefers) == 1


async def test_devices_of_init_containers_are_used_again_and_must_be_included(folder: Path) -> None:
    """The application container starts from what the init container had."""
    shelf = Shelf(count=4)
    async with node(folder, shelf) as kubelet:
        pod = await kubelet.admit_pod("a", "1", {"main": {CPU: 2}, "side": {CPU: 1}}, {"init": {CPU: 1}})
        (reused,) = pod.devices["init"][CPU]
        assert reused in pod.devices["main"][CPU]
        assert reused not in pod.devices["side"][CPU]
        assert len(pod.held(CPU)) == 3
        assert shelf.prefers[1][1] == [reused]
        assert reused in shelf.prefers[1][0]


async def test_each_container_and_resource_is_one_allocate(folder: Path) -> None:
    """With the ids in an order that means nothing."""
    cpu, gpu = Shelf(CPU, 8), Shelf(GPU, 2)
    async with node(folder, cpu, gpu) as kubelet:
        pod = await kubelet.admit_pod("a", "1", {"x": {CPU: 4, GPU: 1}, "y": {CPU: 4}})
        assert pod.responses["x"][GPU].envs == {"IDS": "000"}
        assert pod.responses["y"][CPU].envs == {"IDS": "004,005,006,007"}
    assert [len(containers) for containers in cpu.allocations] == [1, 1]
    assert [ids for (ids,) in cpu.allocations] != [sorted(ids) for (ids,) in cpu.allocations]
    assert gpu.allocations == [[["000"]]]


async def test_a_failed_allocate_keeps_nothing_and_shows_the_plugin_s_text(folder: Path) -> None:
    """The code is there too; what an earlier container got is free again."""
    cpu, gpu = Shelf(CPU, 2), Shelf(GPU, 2)
    gpu.fault = RuntimeError("boom")
    async with node(folder, cpu, gpu) as kubelet:
        with pytest.raises(AdmissionError, match=f"cannot allocate {GPU}: unexpected RuntimeError") as refused:
            await kubelet.admit_pod("a", "1", {"x": {CPU: 2, GPU: 1}})
        assert refused.value.code is grpc.StatusCode.INTERNAL
        assert kubelet.pods == {}
        assert len((await kubelet.admit_pod("a", "1", {"x": {CPU: 2}})).held(CPU)) == 2


@pytest.mark.parametrize(("answers", "read"), [(2, {"N": "0"}), (0, None)])
async def test_only_the_first_answer_is_read_and_none_is_an_error(
    answers: int, read: dict[str, str] | None, folder: Path
) -> None:
    """Two answers for one container: the second is lost, as with kubelet."""
    async with FakeKubelet(folder) as kubelet, plugged(kubelet, Plugin(devices("1"), answers)):
        await kubelet.wait_allocatable(CPU, 1)
        if read is None:
            with pytest.raises(AdmissionError, match=f"no containers in the answer to Allocate of {CPU}"):
                await kubelet.admit_pod("a", "1", {"x": {CPU: 1}})
        else:
            pod = await kubelet.admit_pod("a", "1", {"x": {CPU: 1}})
            assert pod.responses["x"][CPU].envs == read


@pytest.mark.parametrize("required", [True, False])
async def test_pre_start_is_called_only_where_it_was_asked_for(required: bool, folder: Path) -> None:
    """With the ids of the container."""
    shelf = Shelf(count=1, pre_start_required=required)
    async with node(folder, shelf) as kubelet:
        await kubelet.admit_pod("a", "1", {"x": {CPU: 1}})
    assert shelf.started == ([["000"]] if required else [])


async def test_a_pod_is_in_the_list_only_when_all_of_it_succeeded(folder: Path) -> None:
    """While Allocate runs, pod-resources does not show it; Get of a stranger is NOT_FOUND."""
    seen: list[int] = []

    class Curious(Shelf):
        look: Callable[[], Any]

        async def allocate(self, containers: Any, op: str) -> Any:
            seen.append(len((await self.look()).pod_resources))
            return await super().allocate(containers, op)

    shelf = Curious(count=1)
    async with node(folder, shelf) as kubelet, channels.channel(kubelet.pod_resources_socket) as channel:
        stub = pods_rpc.PodResourcesListerStub(channel)
        shelf.look = lambda: stub.List(pods_pb.ListPodResourcesRequest())
        await kubelet.admit_pod("a", "1", {"x": {CPU: 1}})
        assert seen == [0]
        got = await stub.Get(pods_pb.GetPodResourcesRequest(pod_name="1", pod_namespace="a"))
        assert got.pod_resources.containers[0].devices[0].device_ids == ["000"]
        with pytest.raises(grpc.aio.AioRpcError, match="pod 2 in namespace a not found"):
            await stub.Get(pods_pb.GetPodResourcesRequest(pod_name="2", pod_namespace="a"))


async def test_the_checkpoint_says_what_pods_hold(folder: Path) -> None:
    """In kubelet's own shape, whole at every moment."""
    async with node(folder, Shelf(count=2)) as kubelet:
        pod = await kubelet.admit_pod("a", "1", {"x": {CPU: 2}})
        data = json.loads((kubelet.plugins_folder / CHECKPOINT).read_text())["Data"]
    assert data == {
        "PodDeviceEntries": [
            {"PodUID": pod.uid, "ContainerName": "x", "ResourceName": CPU, "DeviceIDs": {"-1": ["000", "001"]}}
        ],
        "RegisteredDevices": {CPU: ["000", "001"]},
    }
