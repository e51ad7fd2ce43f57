"""The device-plugin calls over a real socket: what kubelet may ask, in order and out of order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.core.model.device import ContainerEdits, DeviceNode, Mount
from nodeagent.errors import ConfigError, HostError, InputError, PeerError, Refused, StateError
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.device_plugin import DevicePluginServer
from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.pb import deviceplugin_pb2 as pb
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels
from tests.support.shelf import CPU, Shelf
from tests.support.until import until


@contextlib.asynccontextmanager
async def served(shelf: Shelf, folder: Path) -> AsyncIterator[tuple[DevicePluginServer, Any]]:
    """The shelf behind its socket, and a client of it."""
    server = DevicePluginServer(shelf, folder)
    await server.start()
    try:
        async with channels.channel(server.path) as channel:
            yield server, rpc.DevicePluginStub(channel)
    finally:
        await server.stop()


def asked(*containers: list[str]) -> pb.AllocateRequest:
    return pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids) for ids in containers])


def wish(available: list[str], must: list[str], size: int) -> pb.PreferredAllocationRequest:
    one = pb.ContainerPreferredAllocationRequest(
        available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
    )
    return pb.PreferredAllocationRequest(container_requests=[one])


async def preferred(stub: Any, request: pb.PreferredAllocationRequest) -> list[str]:
    answer = await stub.GetPreferredAllocation(request)
    (one,) = answer.container_responses
    return [*one.deviceIDs]


async def error_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# ListAndWatch


async def test_the_full_list_comes_at_once_with_health_and_topology(folder: Path) -> None:
    """Every device in the resource's order."""
    shelf = Shelf(count=3)
    shelf.unhealthy = {"001"}
    async with served(shelf, folder) as (_, stub):
        first = await stub.ListAndWatch(pb.Empty()).read()
    shown = [(one.ID, one.health, [node.ID for node in one.topology.nodes]) for one in first.devices]
    assert shown == [("000", "Healthy", [0]), ("001", "Unhealthy", [1]), ("002", "Healthy", [0])]


async def test_each_change_sends_the_newest_list_alone(folder: Path) -> None:
    """A hundred changes in one go are one message; a change back to what was sent is none."""
    shelf = Shelf(count=1)
    async with served(shelf, folder) as (_, stub):
        stream = stub.ListAndWatch(pb.Empty())
        assert len((await stream.read()).devices) == 1
        for count in range(2, 102):
            shelf.show(count)
        assert len((await stream.read()).devices) == 101
        shelf.show(5)
        shelf.show(101)
        await stub.GetDevicePluginOptions(pb.Empty())
        shelf.show(102)
        assert len((await stream.read()).devices) == 102
        # The first list replaces none; what kubelet knows already is no news. It is noted once a list is on its way.
        await until(lambda: shelf.news.count(True) == 2)
        assert shelf.news[0] is False


async def test_every_watcher_gets_every_change(folder: Path) -> None:
    """Two streams at once, as while kubelet registers the same plugin again."""
    shelf = Shelf(count=1)
    async with served(shelf, folder) as (_, stub):
        streams = [stub.ListAndWatch(pb.Empty()) for _ in range(2)]
        assert [len((await stream.read()).devices) for stream in streams] == [1, 1]
        shelf.show(2)
        assert [len((await stream.read()).devices) for stream in streams] == [2, 2]


async def test_a_stop_ends_the_stream_in_order(folder: Path) -> None:
    """Kubelet sees the end of the stream, not an error, and the socket is gone."""
    async with served(Shelf(), folder) as (server, stub):
        stream = stub.ListAndWatch(pb.Empty())
        await stream.read()
        assert server.watched
        path = server.path
        assert await server.stop()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        assert not server.watched
        assert not path.exists()
        assert not await server.stop()


async def test_a_watcher_that_hangs_up_is_noticed(folder: Path) -> None:
    """on_watch is called at both ends of a stream."""
    news = asyncio.Queue[bool]()
    server = DevicePluginServer(Shelf(), folder, on_watch=lambda: news.put_nowait(server.watched))
    await server.start()
    async with channels.channel(server.path) as channel:
        stream = rpc.DevicePluginStub(channel).ListAndWatch(pb.Empty())
        await stream.read()
        assert await news.get()
        stream.cancel()
        assert not await news.get()
    await server.stop()


# GetPreferredAllocation


async def test_the_preference_of_the_resource_is_the_answer(folder: Path) -> None:
    """The resource sees exactly what kubelet sent."""
    shelf = Shelf()
    shelf.preference = ["003", "001"]
    async with served(shelf, folder) as (_, stub):
        assert await preferred(stub, wish(["003", "002", "001"], ["001"], 2)) == ["003", "001"]
    assert shelf.prefers == [(["003", "002", "001"], ["001"], 2)]


@pytest.mark.parametrize(
    "preference",
    [
        RuntimeError("out of order"),
        Refused("nothing fits", want=2, free=0, unit="CPUs"),
        ["001"],
        ["001", "002", "003"],
        ["002", "003"],
        ["001", "001"],
        ["001", "999"],
        [],
    ],
    ids=["raises", "refuses", "short", "long", "without-must", "repeats", "foreign", "empty"],
)
async def test_a_useless_preference_falls_back_to_the_first_available(preference: Any, folder: Path) -> None:
    """must_include first, then what is available in kubelet's order; never an error."""
    shelf = Shelf()
    shelf.preference = preference
    async with served(shelf, folder) as (_, stub):
        assert await preferred(stub, wish(["003", "002", "001"], ["001"], 2)) == ["001", "003"]


async def test_the_fallback_takes_repeated_and_missing_ids_in_its_stride(folder: Path) -> None:
    """available repeats an id and lacks the one that must be included."""
    shelf = Shelf()
    shelf.preference = RuntimeError("no idea")
    async with served(shelf, folder) as (_, stub):
        assert await preferred(stub, wish(["003", "003", "002"], ["001"], 3)) == ["001", "003", "002"]
        assert await preferred(stub, wish(["003", "002"], ["002", "003"], 1)) == ["002"]
        assert await preferred(stub, wish([], [], 0)) == []


@pytest.mark.parametrize("size", [4, -1])
async def test_more_than_is_available_cannot_be_preferred(size: int, folder: Path) -> None:
    """Not a fallback: there is no right answer."""
    async with served(Shelf(), folder) as (_, stub):
        code, text = await error_of(stub.GetPreferredAllocation(wish(["003", "002", "001"], [], size)))
    assert (code, text) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"cannot prefer {size} devices of {CPU}: 3 are available",
    )


# Allocate


async def test_everything_in_the_edits_reaches_the_container(folder: Path) -> None:
    """Environment, annotations, mounts, device nodes, CDI names; one answer for each container, in order."""
    full = ContainerEdits(
        env={"A": "1"},
        annotations={"b": "2"},
        mounts=(Mount(host_path="/h", container_path="/c", read_only=True),),
        device_nodes=(DeviceNode(host_path="/dev/x", container_path="/dev/y", permissions="rwm"),),
        cdi_devices=("nodeagent.dev/cpu=0",),
    )
    shelf = Shelf()
    shelf.edits = [full, ContainerEdits()]
    async with served(shelf, folder) as (_, stub):
        answer = await stub.Allocate(asked(["001"], ["002"]))
    assert answer == pb.AllocateResponse(
        container_responses=[
            pb.ContainerAllocateResponse(
                envs={"A": "1"},
                annotations={"b": "2"},
                mounts=[pb.Mount(host_path="/h", container_path="/c", read_only=True)],
                devices=[pb.DeviceSpec(host_path="/dev/x", container_path="/dev/y", permissions="rwm")],
                cdi_devices=[pb.CDIDevice(name="nodeagent.dev/cpu=0")],
            ),
            pb.ContainerAllocateResponse(),
        ]
    )
    assert shelf.allocations == [[["001"], ["002"]]]


async def test_each_call_has_an_op_id_of_its_own(folder: Path) -> None:
    """Eight hexadecimal digits."""
    shelf = Shelf()
    async with served(shelf, folder) as (_, stub):
        for _ in range(2):
            await stub.Allocate(asked(["001"]))
    first, second = shelf.ops
    assert first != second
    assert {len(first), len(second)} == {8}


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        (InputError("cannot allocate: no such id: 9"), "INVALID_ARGUMENT", "cannot allocate: no such id: 9"),
        (
            Refused("8 CPUs wanted, 4 free", want=8, free=4, unit="CPUs", would_admit="free 4 CPUs"),
            "RESOURCE_EXHAUSTED",
            f"cannot allocate {CPU}: 8 CPUs wanted, 4 free; free 4 CPUs",
        ),
        (
            Refused("001 is unhealthy", want=1, free=3, unit="CPUs"),
            "FAILED_PRECONDITION",
            f"cannot allocate {CPU}: 001 is unhealthy",
        ),
        (StateError("cannot save /s: locked"), "UNAVAILABLE", "cannot save /s: locked"),
        (PeerError("cannot list: gone"), "UNAVAILABLE", "cannot list: gone"),
        (HostError("cannot write /cdi: denied"), "INTERNAL", "cannot write /cdi: denied"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/s"),
            "UNAVAILABLE",
            f"cannot allocate {CPU}: [Errno 28] No space left on device: '/s'",
        ),
        (OSError(errno.EIO, "I/O error"), "INTERNAL", f"cannot allocate {CPU}: [Errno 5] I/O error"),
    ],
)
async def test_an_error_has_its_status_and_its_text(fault: Exception, code: str, text: str, folder: Path) -> None:
    """What the owner of the devices raised is what the pod's event will say."""
    shelf = Shelf()
    shelf.fault = fault
    async with served(shelf, folder) as (_, stub):
        assert await error_of(stub.Allocate(asked(["001"]))) == (grpc.StatusCode[code], text)


async def test_an_unforeseen_error_shows_its_type_but_no_inside(folder: Path) -> None:
    """The trace is in the log under the same op id, not on the wire; the next call works."""
    shelf = Shelf()
    shelf.fault = KeyError("secret")
    async with served(shelf, folder) as (_, stub):
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
            code, text = await error_of(stub.Allocate(asked(["001"])))
        shelf.fault = None
        await stub.Allocate(asked(["001"]))
    (line,) = logged
    assert code is grpc.StatusCode.INTERNAL
    assert text == f"cannot allocate {CPU}: unexpected KeyError, see op {line['op']} in the agent's log"
    assert (line["event"], line["resource"], str(line["exc_info"])) == ("call-failed", CPU, "'secret'")


@pytest.mark.parametrize(
    ("request_", "cause"),
    [
        (asked(), "the request names no container"),
        (asked(["001"], []), "the request of a container names no id"),
        (asked(["001", "002", "001"]), "asked for twice: 001"),
        (asked(["001", "003"], ["003", "001"]), "asked for twice: 001, 003"),
    ],
    ids=["no-container", "no-id", "repeated", "in-two-containers"],
)
async def test_an_impossible_request_never_reaches_the_resource(
    request_: pb.AllocateRequest, cause: str, folder: Path
) -> None:
    """INVALID_ARGUMENT with the cause; nothing is allocated."""
    shelf = Shelf()
    async with served(shelf, folder) as (_, stub):
        error = await error_of(stub.Allocate(request_))
    assert error == (grpc.StatusCode.INVALID_ARGUMENT, f"cannot allocate {CPU}: {cause}")
    assert shelf.allocations == []


async def test_a_wrong_number_of_answers_is_not_passed_on(folder: Path) -> None:
    """Kubelet would read the first for every container."""
    shelf = Shelf()
    shelf.edits = []
    async with served(shelf, folder) as (_, stub):
        code, _ = await error_of(stub.Allocate(asked(["001"])))
    assert code is grpc.StatusCode.INTERNAL


async def test_allocate_under_way_finishes_while_the_server_stops(folder: Path) -> None:
    """The answer still reaches kubelet, within the grace."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Shelf):
        async def allocate(self, containers: Any, op: str) -> list[ContainerEdits]:
            reached.set()
            await go_on.wait()
            return await super().allocate(containers, op)

    async with served(Slow(), folder) as (server, stub):
        call = asyncio.ensure_future(stub.Allocate(asked(["001"])))
        await reached.wait()
        stop = asyncio.create_task(server.stop())
        go_on.set()
        answer = await call
        await stop
    assert answer.container_responses[0].envs == {"IDS": "001"}


async def test_pre_start_reaches_the_resource_and_its_error_comes_back(folder: Path) -> None:
    """And the options say whether it is wanted."""
    shelf = Shelf(pre_start_required=True)
    async with served(shelf, folder) as (_, stub):
        options = await stub.GetDevicePluginOptions(pb.Empty())
        assert (options.pre_start_required, options.get_preferred_allocation_available) == (True, True)
        await stub.PreStartContainer(pb.PreStartContainerRequest(devices_ids=["001"]))
        assert shelf.started == [["001"]]
        shelf.fault = HostError("cannot reset 001: busy")
        code, text = await error_of(stub.PreStartContainer(pb.PreStartContainerRequest(devices_ids=["001"])))
    assert (code, text) == (grpc.StatusCode.INTERNAL, "cannot reset 001: busy")


# The socket


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, bytes(range(256)) * 20, b""])
async def test_garbage_hurts_its_own_connection_only(garbage: bytes, folder: Path) -> None:
    """A watcher goes on while another connection talks nonsense."""
    shelf = Shelf(count=1)
    async with served(shelf, folder) as (server, stub):
        stream = stub.ListAndWatch(pb.Empty())
        await stream.read()
        reader, writer = await asyncio.open_unix_connection(str(server.path))
        writer.write(garbage)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        writer.close()
        shelf.show(2)
        assert len((await stream.read()).devices) == 2


async def test_a_message_that_is_no_protobuf_hurts_its_own_call_only(folder: Path) -> None:
    """The call fails with a status; the next one on the same connection works."""
    async with served(Shelf(), folder) as (server, _), channels.channel(server.path) as channel:
        code, _ = await error_of(channel.unary_unary("/v1beta1.DevicePlugin/Allocate")(b"\xff\xff\xff"))
        assert code is grpc.StatusCode.UNKNOWN
        assert await rpc.DevicePluginStub(channel).Allocate(asked(["001"]))


@pytest.mark.parametrize("kind", ["socket", "file", "dangling-link"])
async def test_what_is_left_at_the_path_is_no_obstacle(kind: str, folder: Path) -> None:
    """A dead process left its socket, or someone else a file."""
    server = DevicePluginServer(Shelf(), folder)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(server.path))
    elif kind == "file":
        server.path.write_text("x")
    else:
        server.path.symlink_to(folder / "nowhere")
    await server.start()
    async with channels.channel(server.path) as channel:
        assert await rpc.DevicePluginStub(channel).GetDevicePluginOptions(pb.Empty())
    await server.stop()


async def test_a_missing_folder_is_named(folder: Path) -> None:
    """The path and the kernel's words."""
    server = DevicePluginServer(Shelf(), folder / "none")
    with pytest.raises(HostError, match=f"cannot serve {server.path}: No such file or directory"):
        await server.start()


async def test_a_folder_with_odd_characters_serves(folder: Path) -> None:
    """Per cent, blank, hash and question mark mean nothing in a path."""
    odd = folder / "a b%41#?é"
    odd.mkdir()
    async with served(Shelf(), odd) as (server, stub):
        assert await stub.GetDevicePluginOptions(pb.Empty())
        assert server.path.is_socket()


def test_the_socket_is_named_after_the_resource() -> None:
    """With a token that is another one each time; a hash where the name would be too long; refused where even that does
    not fit."""
    folder = Path("/var/lib/kubelet/device-plugins")
    names = [PluginPaths(folder, CPU).fresh().name for _ in range(50)]
    assert all(re.fullmatch(r"nodeagent-nodeagent\.dev_cpu-[0-9a-f]{8}\.sock", name) for name in names)
    assert len({*names}) == 50
    long, longer = PluginPaths(folder, f"nodeagent.dev/{'x' * 63}"), PluginPaths(folder, f"nodeagent.dev/{'x' * 62}y")
    assert len(str(long.fresh())) <= 107
    assert long.fresh().name[:-14] == long.fresh().name[:-14] != longer.fresh().name[:-14]
    with pytest.raises(ConfigError, match="the limit is 107"):
        PluginPaths(Path("/") / ("f" * 81), CPU)


@given(
    st.lists(st.from_regex(r"[a-z.]{1,8}/[A-Za-z0-9._-]{1,80}", fullmatch=True), unique=True, max_size=5),
    st.integers(1, 69),
)
def test_the_sockets_of_one_resource_are_never_taken_for_those_of_another(names: list[str], deep: int) -> None:
    """However alike their names are, and however deep the folder lies: each path fits, and is the resource's alone."""
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as parent:
        folder = Path(parent) / ("d" * max(1, deep - len(parent)))
        folder.mkdir()
        made = {name: PluginPaths(folder, name).fresh() for name in (*names, *[f"{name}-0123abcd" for name in names])}
        for path in made.values():
            path.touch()
            assert len(os.fsencode(path)) <= sockets.LONGEST_PATH_BYTES
        assert {name: [*PluginPaths(folder, name).existing()] for name in made} == {n: [p] for n, p in made.items()}


def test_a_path_at_which_something_lies_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one where a link leads nowhere."""
    paths, tokens = PluginPaths(folder, CPU), iter(["00000001", "00000002", "00000003"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    (folder / "nodeagent-nodeagent.dev_cpu-00000001.sock").touch()
    (folder / "nodeagent-nodeagent.dev_cpu-00000002.sock").symlink_to("nowhere")
    assert paths.fresh().name == "nodeagent-nodeagent.dev_cpu-00000003.sock"


async def test_a_server_knows_when_its_socket_is_gone_or_replaced(folder: Path) -> None:
    """What is done to its times or its mode is no loss."""
    async with served(Shelf(), folder) as (server, _):
        os.utime(server.path)
        server.path.chmod(0o600)
        assert not server.lost
        server.path.unlink()
        assert server.lost
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(server.path))
            assert server.lost


async def test_a_server_may_start_again(folder: Path) -> None:
    """Each time at another path; nothing is left at the older ones."""
    async with served(Shelf(), folder) as (server, _):
        paths = {server.path}
        for _ in range(20):
            await server.stop()
            await server.start()
            paths.add(server.path)
        assert len(paths) == 21
        assert [path for path in paths if path.exists()] == [server.path]
        async with channels.channel(server.path) as channel:
            assert len((await rpc.DevicePluginStub(channel).ListAndWatch(pb.Empty()).read()).devices) == 4


async def test_a_server_that_is_cancelled_at_any_moment_can_be_stopped(folder: Path) -> None:
    """While it starts and while it stops: the cancellation is not lost, nothing serves on, the socket is gone."""
    dice = random.Random(1)
    server = DevicePluginServer(Shelf(), folder)

    async def up_and_down() -> None:
        while True:
            await server.start()
            await server.stop()

    for _ in range(300):
        task = asyncio.create_task(up_and_down())
        for _ in range(dice.randrange(40)):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.stop()
        assert os.listdir(folder) == []
