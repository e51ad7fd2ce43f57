"""Unary ttrpc calls in both directions on one stream: methods served on one trunk id, calls made on another.

Promises: whatever a peer sends, other calls continue; only an unreadable stream ends the connection. Every call ends:
with its answer, its deadline or the connection. Answers are sent as they are ready, in any order. The time of each
answer is reported, because a peer that has stopped waiting gives no notice.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeAlias

import structlog
from google.protobuf.message import DecodeError

from nodeagent.errors import NodeagentError, PeerError
from nodeagent.nri import frames
from nodeagent.nri.frames import LARGEST_DATA_BYTES, FrameParser, Message, Oversized, Received, Stray
from nodeagent.pb import ttrpc_pb2 as pb

Method: TypeAlias = Callable[[bytes, float | None], Awaitable[bytes]]
"""Takes the request and the seconds that the caller waits (None: indefinitely). Returns the answer or raises."""
Services: TypeAlias = Mapping[str, Mapping[str, Method]]
"""Methods by service and name."""

MOST_SERVED = 128
"""Most calls served at once; one more is refused. A runtime sends its plugins one call at a time."""
_READ_BYTES = 1 << 16
log = structlog.get_logger()


class Code(enum.IntEnum):
    """Status codes, as in gRPC; only those used here."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class RpcError(PeerError):
    """A failed call with its status: one made here, or one served here, which is then answered with this status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class ServedCall(NamedTuple):
    """One completed call of the peer."""

    service: str
    method: str
    took_s: float
    """From the arrival of the request until the answer was handed to the kernel, or until the connection ended."""
    waits_s: float | None
    """How long the peer waits for the answer, from its request."""
    answered: bool
    """False if the connection ended first."""


def _pass_over(_: ServedCall) -> None:
    """Ignore how long a call took."""


class TtrpcConnection:
    """Both ends of one stream. Building it starts nothing; run() may be called once."""

    def __init__(
        self,
        stream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        services: Services,
        *,
        serves: int,
        calls: int,
        on_served: Callable[[ServedCall], None] = _pass_over,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`serves` and `calls`: the trunk ids of the services here and of the peer's. `on_served` is called after each
        call that was served. `clock`: in seconds."""
        self._reader, self._writer = stream
        self._ended = False
        self._services = services
        self._serves = serves
        self._calls = calls
        self._on_served = on_served
        self._clock = clock
        self._serving: set[asyncio.Task[None]] = set()
        self._last_served = 0
        self._pending: dict[int, asyncio.Future[pb.Response]] = {}
        self._next_stream = 1

    async def run(self) -> None:
        """Serve until the peer closes the stream between two messages. At the end, close the stream and end all calls.

        Raise FrameError if the stream is malformed, OSError if it fails."""
        parser = FrameParser((self._serves, self._calls))
        try:
            while data := await self._reader.read(_READ_BYTES):
                for one in parser.feed(data):
                    self._receive(one)
                    await self._room()
            parser.end()
        finally:
            self._ended = True
            await self._end()

    async def call(self, service: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Return the answer of the peer's method. Raise RpcError with its status, or for the
        deadline or the connection's end."""
        if self._ended:
            raise _failed(service, method, Code.UNAVAILABLE, "the connection has ended")
        request = pb.Request(service=service, method=method, payload=payload, timeout_nano=int(timeout_s * 1e9))
        stream, answer = self._next_stream, asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self._send_call(stream, answer, request)
                response: pb.Response = await answer
        except TimeoutError:
            raise _failed(service, method, Code.DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise _failed(service, method, Code.UNAVAILABLE, error.strerror or str(error)) from None
        finally:
            self._pending.pop(stream, None)
        if response.status.code != Code.OK:
            raise _failed(service, method, response.status.code, response.status.message)
        return response.payload

    async def _send_call(self, stream: int, answer: asyncio.Future[pb.Response], request: pb.Request) -> None:
        data = request.SerializeToString()
        if len(data) > LARGEST_DATA_BYTES:
            raise _failed(request.service, request.method, Code.RESOURCE_EXHAUSTED, _too_much(len(data)))
        self._next_stream += 2
        self._pending[stream] = answer
        await self._send(Message(self._calls, stream, frames.REQUEST, 0, data))

    async def _send(self, message: Message) -> None:
        self._writer.write(frames.encode(message))
        await self._writer.drain()

    def _receive(self, one: Received) -> None:
        if isinstance(one, Stray):
            log.warning("frame-unclaimed", connection=one.connection, payload_bytes=one.payload_bytes)
        elif one.connection == self._serves:
            self._receive_call(one)
        else:
            self._receive_answer(one)

    # Serving

    def _receive_call(self, one: Message | Oversized) -> None:
        if one.type == frames.REQUEST:
            self._start(self._serve(one.stream, self._request(one), self._clock()))
        elif one.type == frames.DATA:
            why = f"cannot take message on stream {one.stream}: data for a call that is not open"
            self._start(self._serve(one.stream, RpcError(Code.INVALID_ARGUMENT, why), self._clock()))
        else:
            log.warning("message-passed-over", connection=one.connection, stream=one.stream, type=one.type)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _room(self) -> None:
        """Pause reading while the peer takes no answers: all calls beyond MOST_SERVED only wait
        for their answers to be sent."""
        while len(self._serving) >= 2 * MOST_SERVED:
            await asyncio.wait(self._serving, return_when=asyncio.FIRST_COMPLETED)

    def _request(self, one: Message | Oversized) -> pb.Request | RpcError:
        try:
            return self._checked(one)
        except RpcError as error:
            return error

    def _checked(self, one: Message | Oversized) -> pb.Request:
        if isinstance(one, Oversized):
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"cannot serve call: {_too_much(one.data_bytes)}")
        if one.stream % 2 != 1 or one.stream <= self._last_served:
            why = f"stream {one.stream} is not odd and larger than {self._last_served}, the last one opened"
            raise RpcError(Code.INVALID_ARGUMENT, f"cannot serve call: {why}")
        self._last_served = one.stream
        if len(self._serving) >= MOST_SERVED:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"cannot serve call: {MOST_SERVED} are being served")
        try:
            return pb.Request.FromString(one.data)
        except DecodeError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"cannot read request on stream {one.stream}: {error}") from None

    async def _serve(self, stream: int, request: pb.Request | RpcError, arrived: float) -> None:
        """Answer a request, or report what is wrong with it, and report how long that took."""
        answered = False
        try:
            answered = await self._answer(stream, await self._answer_to(stream, request))
        finally:
            if not isinstance(request, RpcError):
                took_s, waits_s = self._clock() - arrived, _waits_s(request)
                self._on_served(ServedCall(request.service, request.method, took_s, waits_s, answered))

    async def _answer_to(self, stream: int, request: pb.Request | RpcError) -> bytes:
        try:
            if isinstance(request, RpcError):
                raise request
            answer = pb.Response(payload=await self._served(request)).SerializeToString()
            if len(answer) > LARGEST_DATA_BYTES:
                raise RpcError(Code.RESOURCE_EXHAUSTED, f"cannot answer: {_too_much(len(answer))}")
        except RpcError as error:
            return _status(error.code, str(error))
        except NodeagentError as error:
            return _status(Code.UNKNOWN, str(error))
        except Exception as error:
            log.error("call-failed", stream=stream, exc_info=error)
            return _status(Code.UNKNOWN, f"{type(error).__name__}: {error}")
        return answer

    async def _served(self, request: pb.Request) -> bytes:
        """Return the answer of the requested method, within the time that the caller waits."""
        methods = self._services.get(request.service)
        method = methods.get(request.method) if methods is not None else None
        if method is None:
            missing = f"service {request.service}" if methods is None else f"method {request.service}/{request.method}"
            raise RpcError(Code.UNIMPLEMENTED, f"cannot serve call: there is no {missing[:200]}")
        return await _in_time(method, request)

    async def _answer(self, stream: int, data: bytes) -> bool:
        """Send an answer. Return whether it was handed to the kernel."""
        try:
            await self._send(Message(self._serves, stream, frames.RESPONSE, 0, data))
        except OSError as error:
            log.warning("answer-not-sent", stream=stream, error=error.strerror or str(error))
            return False
        return True

    # Calling

    def _receive_answer(self, one: Message | Oversized) -> None:
        answer = self._pending.pop(one.stream, None)
        if answer is None or answer.done():
            log.warning("answer-to-nothing", connection=one.connection, stream=one.stream, type=one.type)
            return
        try:
            answer.set_result(_read_answer(one))
        except (RpcError, DecodeError) as error:
            code = error.code if isinstance(error, RpcError) else Code.INTERNAL
            answer.set_result(pb.Response(status=pb.Status(code=code, message=str(error))))

    async def _end(self) -> None:
        gone = pb.Response(status=pb.Status(code=Code.UNAVAILABLE, message="the connection ended"))
        for answer in self._pending.values():
            if not answer.done():
                answer.set_result(gone)
        for task in self._serving:
            task.cancel()
        try:
            await asyncio.gather(*self._serving, return_exceptions=True)
        finally:
            self._writer.transport.abort()


def _read_answer(one: Message | Oversized) -> pb.Response:
    if isinstance(one, Oversized):
        raise RpcError(Code.RESOURCE_EXHAUSTED, _too_much(one.data_bytes))
    if one.type != frames.RESPONSE:
        raise RpcError(Code.INTERNAL, f"a message of type {one.type} instead of an answer")
    return pb.Response.FromString(one.data)


def _waits_s(request: pb.Request) -> float | None:
    return request.timeout_nano / 1e9 if request.timeout_nano > 0 else None


async def _in_time(method: Method, request: pb.Request) -> bytes:
    timeout_s = _waits_s(request)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await method(request.payload, timeout_s)
    except TimeoutError:
        if not deadline.expired():
            raise
        why = f"cannot serve {request.service}/{request.method}: not done within {timeout_s:.3g} s"
        raise RpcError(Code.DEADLINE_EXCEEDED, why) from None


def _status(code: int, text: str) -> bytes:
    """Return a failed answer; a very long text is truncated."""
    return pb.Response(status=pb.Status(code=code, message=text[:4096])).SerializeToString()


def _failed(service: str, method: str, code: int, why: str) -> RpcError:
    name = Code(code).name if code in Code.__members__.values() else f"status {code}"
    return RpcError(code, f"cannot call {service}/{method}: {name}: {why}")


def _too_much(data_bytes: int) -> str:
    return f"{data_bytes} bytes in one message, the limit is {LARGEST_DATA_BYTES}"
