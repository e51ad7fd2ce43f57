"""A call as the agent makes it: to grpcio's server, and to peers that break off at every step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from nodeagent.kube.rpc import client
from nodeagent.kube.rpc.status import RpcError
from nodeagent.kube.rpc.wire import method_of
from nodeagent.pb import podresources_pb2 as pb
from tests.pb import podresources_pb2_grpc as rpc
from tests.support import channels
from tests.support.http2 import REFUSED, framed
from tests.support.until import until

LIST = method_of(pb.DESCRIPTOR, "PodResourcesLister", "List")
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
Reply = Callable[[H2Connection, int], object]


async def failure(path: Path, timeout_s: float = 20.0, **more: int) -> tuple[str, str, bool]:
    with pytest.raises(RpcError) as caught:
        await client.call(path, LIST, pb.ListPodResourcesRequest(), timeout_s, **more)
    return caught.value.code.name, caught.value.details, caught.value.sent


class Lister(rpc.PodResourcesListerServicer):
    """grpcio's server of the answer, or of a failure."""

    def __init__(self, answer: pb.ListPodResourcesResponse, code: grpc.StatusCode | None = None) -> None:
        self.answer = answer
        self.code = code
        self.left = asyncio.Event()
        self.remaining_s = 0.0
        self.waits = False

    async def List(self, request: Any, context: Any) -> pb.ListPodResourcesResponse:  # noqa: N802
        self.remaining_s = context.time_remaining()
        if self.waits:
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()
        if self.code is not None:
            await context.abort(self.code, "50 % of »7«\nfree")
        return self.answer


@contextlib.asynccontextmanager
async def listing(folder: Path, lister: Lister) -> AsyncIterator[Path]:
    server = await channels.serve(folder / "s", lambda one: rpc.add_PodResourcesListerServicer_to_server(lister, one))
    try:
        yield folder / "s"
    finally:
        await server.stop(0)


def pods(count: int) -> pb.ListPodResourcesResponse:
    return pb.ListPodResourcesResponse(pod_resources=[pb.PodResources(name=f"p{one:0100}") for one in range(count)])


@pytest.mark.parametrize("count", [0, 1, 1000, 140_000])
async def test_answers_of_any_size_up_to_the_limit_arrive(count: int, folder: Path) -> None:
    answer = pods(count)
    async with listing(folder, Lister(answer)) as path:
        got = await client.call(path, LIST, pb.ListPodResourcesRequest(), 60.0, largest_answer_bytes=16 << 20)
        assert got == answer
        size = answer.ByteSize()
        if size:
            expected = ("RESOURCE_EXHAUSTED", f"message has {size} bytes, the limit is {size - 1}", True)
            assert await failure(path, largest_answer_bytes=size - 1) == expected


@pytest.mark.parametrize("code", [one for one in grpc.StatusCode if one is not grpc.StatusCode.OK])
async def test_a_status_arrives_with_its_text(code: grpc.StatusCode, folder: Path) -> None:
    async with listing(folder, Lister(pods(0), code)) as path:
        assert await failure(path) == (code.name, "50 % of »7«\nfree", True)


async def test_the_deadline_is_sent_and_kept_and_the_peer_learns_of_the_end(folder: Path) -> None:
    lister = Lister(pods(0))
    lister.waits = True
    async with listing(folder, lister) as path:
        assert await failure(path, 0.3) == ("DEADLINE_EXCEEDED", "Deadline Exceeded", True)
        await until(lister.left.is_set)
        assert 0 < lister.remaining_s <= 0.3
        lister.left.clear()
        task = asyncio.ensure_future(client.call(path, LIST, pb.ListPodResourcesRequest(), 60.0))
        await until(lambda: lister.remaining_s > 1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await until(lister.left.is_set)


async def test_a_call_that_nobody_took_was_not_sent(folder: Path) -> None:
    """No socket, no listener behind it, one that never accepts, or one that accepts and says nothing."""
    path = folder / "s"
    assert await failure(path) == ("UNAVAILABLE", "cannot connect: No such file or directory", False)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        assert await failure(path) == ("UNAVAILABLE", "cannot connect: Connection refused", False)
        one.listen(5)
        assert await failure(path, 0.2) == ("DEADLINE_EXCEEDED", "Deadline Exceeded", False)


async def test_a_peer_that_hangs_up_before_http_2_took_nothing(folder: Path) -> None:
    for said in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        async with peer(folder / "s", said=said):
            assert await failure(folder / "s") == ("UNAVAILABLE", "the peer closed the connection", False)


@contextlib.asynccontextmanager
async def peer(path: Path, reply: Reply | None = None, *, said: bytes = b"", then: bytes = b"") -> AsyncIterator[None]:
    """A server by hand: it says the bytes and hangs up, or sends what `reply` builds for a whole request, with the
    bytes `then` in the same write, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        with contextlib.suppress(ConnectionError):
            if reply is not None:
                await answer(reader, writer, reply, then)
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        server.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply: Reply, then: bytes) -> None:
    http = H2Connection(H2Configuration(client_side=False, validate_outbound_headers=False))
    http.initiate_connection()
    writer.write(http.data_to_send())
    while data := await reader.read(1 << 16):
        for event in http.receive_data(data):
            if isinstance(event, h2.events.StreamEnded):
                reply(http, event.stream_id)
                writer.write(http.data_to_send() + then)
                return
        writer.write(http.data_to_send())


def ends(*messages: bytes, head: Any = HEAD, **status: str) -> Reply:
    def reply(http: H2Connection, stream: int) -> None:
        http.send_headers(stream, head)
        for one in messages:
            http.send_data(stream, one)
        http.send_headers(stream, [(f"grpc-{name}", value) for name, value in status.items()], end_stream=True)

    return reply


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (lambda http, stream: None, ("UNAVAILABLE", "the peer closed the connection", True)),
        (lambda http, stream: http.send_headers(stream, HEAD), ("UNAVAILABLE", "the peer closed the connection", True)),
        (
            lambda http, stream: http.reset_stream(stream, ErrorCodes.REFUSED_STREAM),
            ("UNAVAILABLE", "the peer reset the call", False),
        ),
        (
            lambda http, stream: http.reset_stream(stream, ErrorCodes.CANCEL),
            ("CANCELLED", "the peer reset the call", True),
        ),
        (lambda http, stream: http.reset_stream(stream, 999), ("INTERNAL", "the peer reset the call", True)),
        (
            lambda http, stream: http.close_connection(last_stream_id=0),
            ("UNAVAILABLE", "the peer is stopping", False),
        ),
        (
            lambda http, stream: http.close_connection(last_stream_id=stream),
            ("UNAVAILABLE", "the peer is stopping", True),
        ),
        (ends(framed(b""), status="x"), ("UNKNOWN", "the answer has no valid status: b'x'", True)),
        (ends(framed(b""), status="77"), ("UNKNOWN", "the answer has no valid status: b'77'", True)),
        (ends(framed(b""), other="1"), ("UNKNOWN", "the answer has no valid status: None", True)),
        (ends(status="0"), ("INTERNAL", "0 bytes are not exactly one message", True)),
        (ends(framed(b"") * 2, status="0"), ("INTERNAL", "10 bytes are not exactly one message", True)),
        (ends(framed(b"\xff"), status="0"), ("INTERNAL", "the answer is no valid protobuf message", True)),
        (
            ends(framed(b"", compressed=True), status="0"),
            ("UNIMPLEMENTED", "compressed messages are not supported", True),
        ),
        (
            ends(framed(b"", stated=1 << 31), status="0"),
            ("RESOURCE_EXHAUSTED", f"message has {1 << 31} bytes, the limit is {4 << 20}", True),
        ),
        (
            ends(head=[(":status", "404"), ("content-type", "text/plain")], status="0"),
            ("UNKNOWN", "the answer is not gRPC: HTTP status b'404', content type b'text/plain'", True),
        ),
        (ends(status="5", message="%e2%ff"), ("NOT_FOUND", "\ufffd\ufffd", True)),
    ],
)
async def test_each_way_to_fail_has_its_status(reply: Reply, error: tuple[str, str, bool], folder: Path) -> None:
    files = open_files()
    async with peer(folder / "s", reply):
        assert await failure(folder / "s") == error
    await until(lambda: open_files() == files)


@pytest.mark.parametrize("then", REFUSED.values(), ids=REFUSED)
async def test_an_answer_counts_whatever_follows_it(then: bytes, folder: Path) -> None:
    """Also in the same read: what the peer has answered, it has done."""
    one = pods(1)
    async with peer(folder / "s", ends(framed(one.SerializeToString()), status="0"), then=then):
        assert await client.call(folder / "s", LIST, pb.ListPodResourcesRequest(), 20.0) == one
    async with peer(folder / "s", ends(status="5", message="no"), then=then):
        assert await failure(folder / "s") == ("NOT_FOUND", "no", True)


async def test_calls_leave_no_descriptor(folder: Path) -> None:
    async with listing(folder, Lister(pods(3))) as path:
        await client.call(path, LIST, pb.ListPodResourcesRequest(), 20.0)
        files = open_files()
        for _ in range(50):
            await client.call(path, LIST, pb.ListPodResourcesRequest(), 20.0)
        await until(lambda: open_files() <= files)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
