"""gRPC as the agent serves it: to grpcio's client, and to peers that speak HTTP/2 badly or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, PingFrame
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.kube.rpc import connection, server
from nodeagent.kube.rpc.deadline import Deadline
from nodeagent.kube.rpc.server import LARGEST_REQUEST_BYTES, Server
from nodeagent.kube.rpc.status import Code
from nodeagent.pb import deviceplugin_pb2 as pb
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels
from tests.support.http2 import ALLOCATE, WATCH, RawClient, framed, headers, raw_client
from tests.support.until import until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Desk:
    """A service whose calls do what the first id of the request says."""

    def __init__(self) -> None:
        self.entered = 0
        self.cancelled = 0
        self.written = 0
        self.go_on = asyncio.Event()
        self.answer = pb.AllocateResponse()

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:  # noqa: N802
        self.entered += 1
        wanted = request.container_requests[0].devices_ids[0] if request.container_requests else ""
        if wanted == "wait":
            await self._wait()
        elif wanted == "abort":
            await context.abort(Code.FAILED_PRECONDITION, "50 % of »7«\nfree")
        elif wanted == "abort at length":
            await context.abort(Code.FAILED_PRECONDITION, "»" * 100_000)
        elif wanted == "break":
            raise LookupError("nothing")
        elif wanted == "late":
            raise TimeoutError("its own")
        return self.answer

    async def ListAndWatch(self, request: pb.Empty, context: Any) -> None:  # noqa: N802
        self.entered += 1
        many = pb.ListAndWatchResponse(devices=[pb.Device(ID=f"{one:04}", health="Healthy") for one in range(2000)])
        while not self.go_on.is_set():
            try:
                await context.write(many)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            self.written += 1

    async def _wait(self) -> None:
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Server, Desk]]:
    it, desk = Server(folder / "s"), Desk()
    it.add(pb.DESCRIPTOR, "DevicePlugin", desk)
    await it.start()
    try:
        yield it, desk
    finally:
        await it.stop(0)


def asked(what: str) -> pb.AllocateRequest:
    return pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[what])])


def body(what: str) -> bytes:
    return framed(asked(what).SerializeToString())


async def works(path: Path) -> None:
    """Others are served."""
    async with channels.channel(path) as channel:
        await rpc.DevicePluginStub(channel).Allocate(pb.AllocateRequest(), timeout=20)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# ---------------------------------------------------------------- calls


async def test_each_call_ends_with_its_answer_or_its_status(folder: Path) -> None:
    """Texts arrive whatever characters they have; what a service did not foresee shows no more than its type."""
    async with served(folder) as (it, desk), channels.channel(it.path) as channel:
        stub = rpc.DevicePluginStub(channel)
        desk.answer = pb.AllocateResponse(container_responses=[pb.ContainerAllocateResponse(envs={"é": "%"})])
        assert await stub.Allocate(asked("")) == desk.answer
        code = grpc.StatusCode
        assert await failure(stub.Allocate(asked("abort"))) == (code.FAILED_PRECONDITION, "50 % of »7«\nfree")
        unforeseen = (code.UNKNOWN, "unexpected LookupError, see the agent's log")
        assert await failure(stub.Allocate(asked("break"))) == unforeseen
        assert await failure(stub.Allocate(asked("late"), timeout=30)) == (
            code.UNKNOWN,
            "unexpected TimeoutError, see the agent's log",
        )
        assert await failure(stub.PreStartContainer(pb.PreStartContainerRequest())) == (
            code.UNIMPLEMENTED,
            "Method not found!",
        )


async def test_a_status_of_any_length_arrives_cut_if_need_be(folder: Path) -> None:
    """grpc refuses headers that are too long: the call would fail with a status that says nothing."""
    async with served(folder) as (it, _), channels.channel(it.path) as channel:
        for _ in range(20):  # by default it refuses some at random, the more the longer they are
            code, text = await failure(rpc.DevicePluginStub(channel).Allocate(asked("abort at length")))
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert 1000 < len(text) < 2000 and set(text[:-1]) == {"»"} and text.endswith("…")


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 65_535, 65_536, 1 << 20, 8 << 20])
async def test_answers_of_any_size_arrive(size: int, folder: Path) -> None:
    """Beyond frames and windows of flow control."""
    async with served(folder) as (it, desk), channels.channel(it.path, largest_answer_bytes=16 << 20) as channel:
        desk.answer = pb.AllocateResponse(container_responses=[pb.ContainerAllocateResponse(envs={"a": "x" * size})])
        answer = await rpc.DevicePluginStub(channel).Allocate(asked(""))
        assert answer == desk.answer


@pytest.mark.parametrize("more", [0, 1])
async def test_requests_have_a_limit(more: int, folder: Path) -> None:
    async with served(folder) as (it, _), channels.channel(it.path) as channel:
        call = channel.unary_unary(ALLOCATE)
        # field 15, bytes: unknown to the message, which is as good as any other
        unknown = b"\x7a" + b"\xfb\xff\xff\x01" + bytes(LARGEST_REQUEST_BYTES - 5 + more)
        if more:
            text = f"message has {len(unknown)} bytes, the limit is {LARGEST_REQUEST_BYTES}"
            assert await failure(call(unknown)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        else:
            assert await call(unknown) == b""
        await rpc.DevicePluginStub(channel).Allocate(asked(""))


async def test_many_calls_run_at_once_on_one_connection(folder: Path) -> None:
    async with served(folder) as (it, desk), channels.channel(it.path) as channel:
        stub = rpc.DevicePluginStub(channel)
        calls = [asyncio.ensure_future(_answer(stub, "wait")) for _ in range(300)]
        await until(lambda: desk.entered == 300)
        await asyncio.wait_for(_answer(stub, ""), 20)
        desk.go_on.set()
        assert len(await asyncio.gather(*calls)) == 300


async def _answer(stub: Any, what: str) -> Any:
    return await stub.Allocate(asked(what))


async def test_a_call_that_its_peer_gives_up_is_cancelled_alone(folder: Path) -> None:
    async with served(folder) as (it, desk), channels.channel(it.path) as channel:
        stub = rpc.DevicePluginStub(channel)
        stays, goes = stub.Allocate(asked("wait")), stub.Allocate(asked("wait"))
        await until(lambda: desk.entered == 2)
        goes.cancel()
        await until(lambda: desk.cancelled == 1)
        desk.go_on.set()
        await stays
        assert desk.cancelled == 1


async def test_calls_of_a_connection_that_ends_are_cancelled(folder: Path) -> None:
    async with served(folder) as (it, desk):
        async with raw_client(it.path) as raw:
            raw.call(ALLOCATE, body("wait"))
            await until(lambda: desk.entered == 1)
        await until(lambda: desk.cancelled == 1)
        await works(it.path)


async def test_deadlines_are_the_server_s_too(folder: Path) -> None:
    """A peer that states one and never hangs up gets its status; a malformed one is refused."""
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        late = raw.call(ALLOCATE, body("wait"), ("grpc-timeout", "50m"))
        assert await raw.status(late) == (Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
        assert desk.cancelled == 1
        for text in ("", "5", "m", "-5m", "123456789S", "5 S"):
            assert (await raw.status(raw.call(ALLOCATE, body(""), ("grpc-timeout", text))))[0] == Code.INTERNAL
        assert (await raw.status(raw.call(ALLOCATE, body(""), ("grpc-timeout", "99999999H"))))[0] == Code.OK


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", Code.INTERNAL),
        (b"\0\0\0\0", Code.INTERNAL),
        (framed(b"", stated=1), Code.INTERNAL),
        (framed(b"\xff\xff"), Code.UNKNOWN),
        (framed(b"") + framed(b""), Code.INTERNAL),
        (framed(b"", compressed=True), Code.UNIMPLEMENTED),
        (framed(b"", stated=0xFFFFFFFF), Code.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_is_not_one_message_fails_its_call_only(sent: bytes, code: Code, folder: Path) -> None:
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        assert (await raw.status(raw.call(ALLOCATE, sent)))[0] == code
        assert desk.entered == 0
        assert (await raw.status(raw.call()))[0] == Code.OK


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (headers(method="GET"), "405"),
        ([*headers()[:-1], ("content-type", "text/html")], "415"),
        (headers()[:-1], "415"),
    ],
)
async def test_what_is_http_without_grpc_is_refused_as_http(
    sent: list[tuple[str, str]], status: str, folder: Path
) -> None:
    async with served(folder) as (it, _), raw_client(it.path) as raw:
        stream = raw.http.get_next_available_stream_id()
        raw.http.send_headers(stream, sent)
        raw.send()
        answer = await raw.until(h2.events.ResponseReceived, stream)
        assert dict(answer.headers)[":status"] == status
        assert (await raw.status(raw.call()))[0] == Code.OK


async def test_pings_are_answered_and_settings_acknowledged(folder: Path) -> None:
    """Keepalive, and a window of zero that opens later."""
    async with served(folder) as (it, _), raw_client(it.path) as raw:
        raw.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        raw.http.ping(b"12345678")
        stream = raw.call()
        answer = await raw.until(h2.events.PingAckReceived)
        assert answer.ping_data == b"12345678"
        await raw.until(h2.events.SettingsAcknowledged)
        await raw.until(h2.events.ResponseReceived, stream)
        assert not [one for one in raw.events if isinstance(one, h2.events.DataReceived)]
        raw.http.increment_flow_control_window(100, stream)
        raw.send()
        assert (await raw.status(stream))[0] == Code.OK


# ---------------------------------------------------------------- start and stop


async def test_a_stop_lets_calls_finish_and_takes_no_more(folder: Path) -> None:
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        stream = raw.call(ALLOCATE, body("wait"))
        await until(lambda: desk.entered == 1)
        stop = asyncio.ensure_future(it.stop(20))
        goaway = await raw.until(h2.events.ConnectionTerminated)
        assert (goaway.error_code, goaway.last_stream_id) == (ErrorCodes.NO_ERROR, stream)
        assert not it.path.exists()
        desk.go_on.set()
        await stop
        await raw.until_closed()
        assert desk.cancelled == 0


async def test_what_takes_longer_than_the_grace_is_cancelled(folder: Path) -> None:
    """Its service has ended when the stop returns; the peer is told that the server is away."""
    async with served(folder) as (it, desk), channels.channel(it.path) as channel:
        call = rpc.DevicePluginStub(channel).Allocate(asked("wait"))
        await until(lambda: desk.entered == 1)
        await it.stop(0.05)
        assert desk.cancelled == 1
        assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_stop_waits_for_calls_whose_peers_have_gone(folder: Path) -> None:
    """What they do about that, such as a write that is to be durable, does not go on in an agent that has stopped."""
    entered, cancelled, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ended = 0

    class Slow:
        async def Allocate(self, request: Any, context: Any) -> Any:  # noqa: N802
            nonlocal ended
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
                await go_on.wait()
                ended += 1

    it = Server(folder / "s")
    it.add(pb.DESCRIPTOR, "DevicePlugin", Slow())
    await it.start()
    async with raw_client(it.path) as raw:
        raw.call(ALLOCATE, body(""))
        await entered.wait()
    await cancelled.wait()
    await until(lambda: not it._peers)
    stop = asyncio.ensure_future(it.stop(20))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not stop.done()
    go_on.set()
    await stop
    assert ended == 1


async def test_a_call_that_does_not_end_when_it_is_cancelled_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CANCELLED_S", 0.05)
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Stubborn:
        async def Allocate(self, request: Any, context: Any) -> Any:  # noqa: N802
            entered.set()
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()
            await go_on.wait()

    it = Server(folder / "s")
    it.add(pb.DESCRIPTOR, "DevicePlugin", Stubborn())
    await it.start()
    async with raw_client(it.path) as raw:
        raw.call(ALLOCATE, body(""))
        await entered.wait()
        with capture_logs() as logs:
            await it.stop(0)
    assert [(one["event"], one["calls"]) for one in logs] == [("calls-not-ended", 1)]
    go_on.set()
    await until(lambda: not it._running)


async def test_a_stop_does_not_wait_for_idle_peers_nor_for_those_that_do_not_read(folder: Path) -> None:
    async with served(folder) as (it, desk), channels.channel(it.path) as channel, raw_client(it.path) as raw:
        await rpc.DevicePluginStub(channel).Allocate(asked(""))
        raw.call(WATCH)
        await until(lambda: desk.written > 0)
        await asyncio.wait_for(it.stop(0.2), 5)
        assert desk.cancelled == 1
        await raw.until_closed()


@pytest.mark.parametrize("turns", range(8))
async def test_what_connects_as_the_server_stops_is_ended_and_leaves_nothing(turns: int, folder: Path) -> None:
    """Whether it has been accepted by then, and however far; descriptors that are left fail the test."""
    server = Server(folder / "s")
    await server.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10.0)
        client.connect(str(server.path))
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.stop(0.0)
        with contextlib.suppress(ConnectionResetError):  # it was not accepted
            while client.recv(1 << 16):
                pass


async def test_a_stop_removes_its_own_socket_only(folder: Path) -> None:
    async with served(folder) as (it, _):
        it.path.rename(folder / "aside")
        it.path.write_text("of another")
        await it.stop(0)
        assert it.path.read_text() == "of another"


async def test_the_socket_is_made_with_the_process_s_umask(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        async with served(folder) as (it, _):
            assert it.path.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


async def test_peers_that_come_and_go_leave_nothing(folder: Path) -> None:
    """No descriptor, no task: whether they call, hang up midway, or say nothing."""
    async with served(folder) as (it, _):
        await works(it.path)
        await until(lambda: not it._peers)
        files, tasks = open_files(), len(asyncio.all_tasks())
        for turn in range(100):
            async with raw_client(it.path) as raw:
                if turn % 4 == 0:
                    await raw.status(raw.call())
                elif turn % 4 == 1:
                    raw.call(ALLOCATE, body("wait"))
                elif turn % 4 == 2:
                    raw.http.send_headers(1, headers())
                    raw.send()
        await until(lambda: not it._peers)
        await until(lambda: len(asyncio.all_tasks()) == tasks)
        assert open_files() <= files  # grpc's client, which has called before, may have closed its own meanwhile


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------- attacks


@given(st.booleans(), st.binary(max_size=200))
def test_garbage_ends_its_own_connection_at_most(greets: bool, garbage: bytes) -> None:
    asyncio.run(_survives((PREFACE if greets else b"") + garbage))


def session() -> bytes:
    """What an orderly client sends."""
    raw = RawClient(None, None)  # type: ignore[arg-type]
    for stream in (1, 3):
        raw.http.send_headers(stream, headers(ALLOCATE, ("grpc-timeout", "9S")))
        raw.http.send_data(stream, body(""), end_stream=True)
    raw.http.ping(b"12345678")
    raw.http.reset_stream(3)
    return raw.http.data_to_send()


@given(st.data())
def test_an_orderly_client_s_bytes_with_some_changed_hurt_nobody_else(data: st.DataObject) -> None:
    sent = bytearray(session())
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(sent)))
    end = data.draw(st.integers(start, len(sent)))
    asyncio.run(_survives(bytes(sent[:start] + sent[end:])))


async def _survives(sent: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="na-") as folder:
        async with served(Path(folder)) as (it, _):
            reader, writer = await asyncio.open_unix_connection(str(it.path))
            writer.write(sent)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            async with raw_client(it.path) as raw:
                assert (await raw.status(raw.call()))[0] == Code.OK
            await until(lambda: not it._peers)
            assert len(asyncio.all_tasks()) == 2, "this one, and the one that accepts"


def bomb(kind: str) -> bytes:
    """Frames that claim or need more than they may."""
    start = PREFACE + b"\0\0\0\x04\0\0\0\0\0"
    match kind:
        case "huge-frame":
            return start + (1 << 23).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big") + bytes(1 << 16)
        case "continuations":
            first = HeadersFrame(1, data=b"\0\1a\1b")
            more = [ContinuationFrame(1, data=b"\0\1a\1b").serialize() for _ in range(10_000)]
            return start + first.serialize() + b"".join(more)
        case "header-list":
            # an entry of the dynamic table, named again and again: a byte each on the wire
            once = b"\x40\1a" + b"\x7f\x81\x1e" + b"x" * 4000
            return start + HeadersFrame(1, data=once + b"\xbe" * 10_000, flags=["END_HEADERS"]).serialize()
        case "window":
            raw = RawClient(None, None)  # type: ignore[arg-type]
            raw.http.send_headers(1, headers())
            data = [DataFrame(1, data=bytes(16_384)).serialize() for _ in range(200)]
            return raw.http.data_to_send() + b"".join(data)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["huge-frame", "continuations", "header-list"])
async def test_frames_that_need_too_much_end_the_connection(kind: str, folder: Path) -> None:
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        raw.writer.write(bomb(kind))
        await raw.until_closed()
        await works(it.path)
        assert desk.entered == 1


async def test_a_peer_that_resets_what_it_asks_for_leaves_no_calls(folder: Path) -> None:
    async with served(folder) as (it, _), raw_client(it.path) as raw:
        for _ in range(5000):
            stream = raw.http.get_next_available_stream_id()
            raw.http.send_headers(stream, headers())
            raw.http.send_data(stream, body("wait"), end_stream=True)
            raw.http.reset_stream(stream)
            raw.send()
        assert (await raw.status(raw.call()))[0] == Code.OK
        await until(lambda: not next(iter(it._peers))._calls)
        assert len(asyncio.all_tasks()) < 5


async def test_a_peer_opens_a_bounded_number_of_streams(folder: Path) -> None:
    """The one that opens more than it was allowed is cut off; a peer that follows the settings waits."""
    async with served(folder) as (it, _), raw_client(it.path) as raw:
        raw.http.remote_settings._settings[SettingCodes.MAX_CONCURRENT_STREAMS] = deque([9999])
        for _ in range(connection.MOST_STREAMS + 1):
            raw.http.send_headers(raw.http.get_next_available_stream_id(), headers())
        raw.send()
        await raw.until_closed()
        await works(it.path)


async def test_unfinished_requests_hold_a_bounded_amount(folder: Path) -> None:
    """All together on one connection; the memory is free again once they are refused."""
    async with served(folder) as (it, _), raw_client(it.path) as raw:
        raw.send()
        await raw.until(h2.events.RemoteSettingsChanged)
        part = framed(bytes(3 << 20), stated=4 << 20)
        streams = []
        for _ in range(7):
            stream = raw.http.get_next_available_stream_id()
            streams.append(stream)
            raw.http.send_headers(stream, headers())
            at = 0
            while at < len(part) and stream in raw.http.streams and not raw.http.streams[stream].closed:
                room = min(raw.http.local_flow_control_window(stream), 16_384, len(part) - at)
                if room == 0:
                    raw.send()
                    await raw.read()
                    continue
                raw.http.send_data(stream, part[at : at + room])
                at += room
        raw.send()
        refused = await raw.until(h2.events.StreamReset)
        assert (await raw.status(refused.stream_id))[0] == Code.RESOURCE_EXHAUSTED
        assert it.held_bytes <= server.MOST_HELD_BYTES
        for stream in streams:
            if stream in raw.http.streams and not raw.http.streams[stream].closed:
                raw.http.reset_stream(stream)
        raw.send()
        await until(lambda: (it.held_bytes, it.incomplete) == (0, 0))


async def test_a_request_that_does_not_end_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is held then, and its connection still works."""
    monkeypatch.setattr(server, "REST_S", 0.2)
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        streams = []
        for sent in (b"", b"\0\0", framed(b"", stated=9)):
            streams.append(raw.http.get_next_available_stream_id())
            raw.http.send_headers(streams[-1], headers())
            raw.http.send_data(streams[-1], sent)
        raw.send()
        await until(lambda: it.incomplete == 3)
        for stream in streams:
            code, text = await raw.status(stream)
            assert (code, text) == (Code.DEADLINE_EXCEEDED, "the request has not ended within 20 s")
        assert (it.incomplete, it.held_bytes, desk.entered) == (0, 0, 0)
        assert (await raw.status(raw.call()))[0] == Code.OK


@pytest.mark.parametrize(("read_s", "unread_s"), [(1.5, 60.0), (60.0, 0.2)])
async def test_what_a_peer_has_sent_while_it_was_not_read_is_in_time_unless_that_lasts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read_s: float, unread_s: float
) -> None:
    """It is not read because it does not read: that may pass, or not."""
    monkeypatch.setattr(server, "REST_S", read_s)
    monkeypatch.setattr(server, "UNREAD_S", unread_s)
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        raw.http.increment_flow_control_window(1 << 30)
        raw.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
        late = raw.http.get_next_available_stream_id()
        raw.http.send_headers(late, headers())
        raw.http.send_data(late, framed(b"")[:2])
        raw.send()
        await until(lambda: it.incomplete == 1)
        raw.call(WATCH)
        await until(lambda: next(iter(it._peers))._paused)
        raw.http.send_data(late, framed(b"")[2:], end_stream=True)
        raw.send()
        if unread_s < read_s:
            await until(lambda: it.incomplete == 0)
            await works(it.path)
            return
        await asyncio.sleep(read_s + 0.1)
        assert it.incomplete == 1
        desk.go_on.set()
        assert (await raw.status(late))[0] == Code.OK


@given(turns=st.lists(st.integers(0, 4), max_size=6))
def test_a_deadline_counts_the_time_of_each_kind_apart(turns: list[int]) -> None:
    """The peer is read, is not read, is read again, … for so many seconds each."""
    clock, ended = Clock(), list[float]()
    with mock.patch.object(asyncio, "get_running_loop", lambda: clock):
        deadline = Deadline(lambda: ended.append(clock.now_s), read_s=5.0, unread_s=7.0, is_read=True)
    spent = {True: 0, False: 0}
    for number, turn_s in enumerate(turns):
        is_read = number % 2 == 0
        clock.go_on(turn_s)
        spent[is_read] += turn_s
        assert len(ended) == (spent[True] >= 5 or spent[False] >= 7)
        if ended:
            return
        deadline.turn(is_read=not is_read)
    deadline.cancel()
    clock.go_on(20)
    assert not ended


class Clock:
    """A loop whose time a test makes pass."""

    def __init__(self) -> None:
        self.now_s: float = 0
        self._timers: list[Timer] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        self._timers.append(Timer(self.now_s + delay_s, call))
        return self._timers[-1]

    def go_on(self, for_s: int) -> None:
        self.now_s += for_s
        for one in [one for one in self._timers if one.due_s <= self.now_s and not one.cancelled]:
            one.cancel()
            one.call()


class Timer:
    def __init__(self, due_s: float, call: Callable[[], None]) -> None:
        self.due_s, self.call, self.cancelled = due_s, call, False

    def when(self) -> float:
        return self.due_s

    def cancel(self) -> None:
        self.cancelled = True


async def test_a_frame_that_does_not_end_ends_its_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a list of headers; a peer that has sent whole frames may be silent."""
    monkeypatch.setattr(connection, "REST_S", 0.2)
    async with (
        served(folder) as (it, _),
        raw_client(it.path) as half,
        raw_client(it.path) as headers_alone,
        raw_client(it.path) as idle,
    ):
        idle.send()
        half.call()
        half.writer.write(PingFrame(0, opaque_data=b"12345678").serialize()[:-1])
        headers_alone.send()
        headers_alone.writer.write(HeadersFrame(1, data=b"\x83").serialize())
        for one in (half, headers_alone):
            await one.until_closed()
        assert (await idle.status(idle.call()))[0] == Code.OK


async def test_incomplete_requests_are_bounded_over_all_connections(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_INCOMPLETE", 5)
    async with served(folder) as (it, _), raw_client(it.path) as one, raw_client(it.path) as other:
        for raw, count in ((one, 3), (other, 2)):
            for _ in range(count):
                raw.http.send_headers(raw.http.get_next_available_stream_id(), headers())
            raw.send()
        await until(lambda: it.incomplete == 5)
        for raw in (one, other):
            stream = raw.http.get_next_available_stream_id()
            raw.http.send_headers(stream, headers())
            raw.send()
            assert await raw.status(stream) == (Code.RESOURCE_EXHAUSTED, "5 requests are incomplete")
        one.http.reset_stream(1)
        one.send()
        await until(lambda: it.incomplete == 4)
        assert (await other.status(other.call()))[0] == Code.OK
        one.writer.close()
        await until(lambda: it.incomplete == 2)


async def test_connections_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed at once, whatever those do that are there; once one of them ends, another may come."""
    monkeypatch.setattr(server, "MOST_PEERS", 2)
    async with served(folder) as (it, _), raw_client(it.path) as one, raw_client(it.path):
        await until(lambda: len(it._peers) == 2)
        async with raw_client(it.path) as third:
            await third.until_closed()
        assert (await one.status(one.call()))[0] == Code.OK
        one.writer.close()
        await until(lambda: len(it._peers) == 1)
        await works(it.path)


@pytest.mark.parametrize("watches", [False, True])
async def test_a_peer_that_does_not_read_is_not_read_from(watches: bool, folder: Path) -> None:
    """Answers to pings do not pile up, nor lists to a watch; each blocks its own connection alone."""
    async with served(folder) as (it, desk), raw_client(it.path) as raw:
        raw.http.increment_flow_control_window(1 << 30)
        raw.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
        raw.send()
        await until(lambda: it._peers)
        peer = next(iter(it._peers))
        if watches:
            raw.call(WATCH)
            await until(lambda: peer._paused)
        pings = PingFrame(0, opaque_data=b"12345678").serialize() * 1000
        raw.writer.transport.set_write_buffer_limits(high=1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 if watches else None):
                while sent < 8 << 20 and not (peer._paused and not watches):
                    raw.writer.write(pings)
                    await raw.writer.drain()
                    sent += len(pings)
        assert peer._paused and sent < 8 << 20
        written = desk.written
        await works(it.path)
        assert desk.written == written
        assert peer._transport is not None and peer._transport.get_write_buffer_size() < 1 << 20


async def test_a_peer_that_does_not_begin_is_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a preface, or none; one that has begun may be silent."""
    monkeypatch.setattr(connection, "GREETING_S", 0.2)
    async with (
        served(folder) as (it, _),
        raw_client(it.path) as silent,
        raw_client(it.path) as half,
        raw_client(it.path) as idle,
    ):
        idle.send()
        half.writer.write(PREFACE[:10])
        for one in (silent, half):
            with contextlib.suppress(ConnectionError):
                await one.reader.read()
        assert (await idle.status(idle.call()))[0] == Code.OK


async def test_streams_that_have_ended_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubelet keeps its connection for as long as it watches."""
    monkeypatch.setattr(connection._Http, "MAX_CLOSED_STREAMS", 20)
    async with served(folder) as (it, _), channels.channel(it.path) as channel:
        for _ in range(60):
            await rpc.DevicePluginStub(channel).Allocate(pb.AllocateRequest())
        assert len(next(iter(it._peers))._http._closed_streams) <= 20


async def test_a_peer_that_leaves_during_a_stream_ends_it_without_an_error(folder: Path) -> None:
    with capture_logs() as logs:
        async with served(folder) as (it, desk), raw_client(it.path) as raw:
            raw.call(WATCH)
            await until(lambda: desk.written)
            raw.http.close_connection()
            raw.send()
            await until(lambda: not it._peers)
            desk.go_on.set()
    assert [one["event"] for one in logs] == []


async def test_requests_of_calls_in_progress_hold_a_bounded_amount(folder: Path) -> None:
    async with served(folder) as (it, desk), channels.channel(it.path) as channel:
        stub = rpc.DevicePluginStub(channel)
        large = asked("wait")
        large.container_requests[0].devices_ids.append("x" * (7 << 19))
        waiting = [asyncio.ensure_future(stub.Allocate(large)) for _ in range(4)]
        await until(lambda: desk.entered == 4)
        code, text = await failure(stub.Allocate(large))
        assert (code, text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, f"requests have more than {16 << 20} bytes")
        desk.go_on.set()
        await asyncio.gather(*waiting)
        assert await stub.Allocate(large) == pb.AllocateResponse()


@pytest.mark.parametrize("patience_s", [0.05, 5.0])
async def test_a_call_is_cancelled_once_by_its_deadline_and_its_peer(folder: Path, patience_s: float) -> None:
    """What it does about that is not interrupted: kubelet gives a call up at the moment of its deadline."""
    entered, ended = asyncio.Event(), asyncio.Event()

    class Slow:
        interrupted = False

        async def Allocate(self, request: Any, context: Any) -> Any:  # noqa: N802
            entered.set()
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                try:
                    await asyncio.sleep(0.2)
                except asyncio.CancelledError:
                    self.interrupted = True
                ended.set()
                raise

    it, slow = Server(folder / "s"), Slow()
    it.add(pb.DESCRIPTOR, "DevicePlugin", slow)
    await it.start()
    async with channels.channel(it.path) as channel:
        call = rpc.DevicePluginStub(channel).Allocate(pb.AllocateRequest(), timeout=patience_s)
        await entered.wait()
        if patience_s > 1:
            call.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await call
        await ended.wait()
        assert not slow.interrupted
    await it.stop(0)


def test_frames_of_the_tests_are_what_they_seem() -> None:
    """A test whose attack is malformed in another way than it says would prove nothing."""
    for kind in ("huge-frame", "continuations", "header-list"):
        sent = memoryview(bomb(kind))[len(PREFACE) :]
        settings, _ = Frame.parse_frame_header(sent[:9])
        frame, length = Frame.parse_frame_header(sent[9:18])
        assert (settings.type, frame.stream_id) == (4, 1)
        assert length == 1 << 23 if kind == "huge-frame" else length < 1 << 14
