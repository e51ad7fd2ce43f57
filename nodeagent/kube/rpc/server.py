"""Serves gRPC on a Unix socket. Each call runs as a task; a peer that hangs up or resets a stream cancels it.

Bounds on all connections together: MOST_PEERS; MOST_INCOMPLETE requests that have begun and not ended, each for REST_S
at most, and UNREAD_S besides in which its peer is not read; MOST_HELD_BYTES of requests. Those of one connection are in
`connection.py`.

A service is any object with a coroutine method per call: `await service.Name(request, context)`. It returns the answer,
or, if the call streams, writes any number with `context.write`. `context.abort` ends a call with a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import structlog
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from nodeagent.aio.accept import next_connection
from nodeagent.aio.supervise import cancel_all
from nodeagent.kube.rpc.connection import REST_S, Connection, Headers
from nodeagent.kube.rpc.deadline import Deadline
from nodeagent.kube.rpc.status import AbortedError, Code
from nodeagent.kube.rpc.wire import CONTENT_TYPE, Inbox, Method, framed, methods_of, status_text, timeout_s

LARGEST_REQUEST_BYTES = 4 << 20
MOST_HELD_BYTES = 16 << 20
"""Of requests on all connections, until their calls have ended."""
MOST_INCOMPLETE = 1000
"""Requests that have begun and not ended, on all connections."""
MOST_PEERS = 64
"""Connections at once. Kubelet has one or two to each server."""
UNREAD_S = 60.0
"""How long a request may stay incomplete in addition while its peer is not read, because it does not read answers:
longer than kubelet waits for any answer."""
CANCELLED_S = 1.0
"""How long a stop waits for calls to end that it has cancelled."""

_NOT_COMPLETE = f"the request has not ended within {REST_S:g} s"
_HEAD: Headers = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]
log = structlog.get_logger()


class _Handler(NamedTuple):
    method: Method
    serve: Callable[[Any, Call], Awaitable[Any]]


class Server:
    """A server at one path, with one start and one stop. Building it binds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handlers: dict[bytes, _Handler] = {}
        self._listening: tuple[socket.socket, asyncio.Task[None]] | None = None
        self._bound: tuple[int, int] | None = None
        self._peers: set[_Peer] = set()
        self._left = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        """Tasks of calls, also of those whose peers have gone."""
        self.incomplete = 0
        """Requests that have begun and not ended."""
        self.held_bytes = 0
        """Of requests, until their calls have ended."""

    def add(self, file: FileDescriptor, name: str, service: Any) -> None:
        """Serve the service `name` of a generated file; calls that `service` lacks are answered UNIMPLEMENTED."""
        for method in methods_of(file, name):
            if serve := getattr(service, method.name, None):
                self._handlers[method.path] = _Handler(method, serve)

    async def start(self) -> None:
        """Bind and listen. Raise OSError. A start that fails leaves nothing."""
        bound = socket.socket(socket.AF_UNIX)
        try:
            bound.setblocking(False)
            bound.bind(str(self.path))
            self._bound = _identity(self.path)
            bound.listen(socket.SOMAXCONN)
        except BaseException:
            self._remove()
            bound.close()
            raise
        self._listening = bound, asyncio.create_task(self._accept(bound), name=f"accepting at {self.path.name}")

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, let those in progress finish for up to `grace_s`, and remove the socket. What is still
        running then is cancelled, and gets CANCELLED_S to end; so do calls whose peers have gone."""
        self._remove()
        await self._unlisten()
        for peer in tuple(self._peers):
            peer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._peers:
                    self._left.clear()
                    await self._left.wait()
                while self._running:
                    await asyncio.wait(self._running)
        await self._end_all()
        if self._running:
            _, running = await asyncio.wait(self._running, timeout=CANCELLED_S)
            if running:
                log.warning("calls-not-ended", socket=str(self.path), calls=len(running), waited_s=CANCELLED_S)

    def handler(self, path: bytes) -> _Handler | None:
        """Return what serves a path."""
        return self._handlers.get(path)

    def joined(self, peer: _Peer) -> None:
        """Count a connection; one that was accepted as the server stopped ends at once, and so does one too many."""
        self._peers.add(peer)
        if self._bound is None:
            peer.drain()
        elif len(self._peers) > MOST_PEERS:
            log.warning("connection-dropped", socket=str(self.path), error=f"there are {MOST_PEERS} already")
            peer.abort()

    def began(self, task: asyncio.Task[None]) -> None:
        """Count the task of a call until it ends."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def left(self, peer: _Peer) -> None:
        """Forget a connection."""
        self._peers.discard(peer)
        self._left.set()

    async def _end_all(self) -> None:
        """End all connections now, and return once they have ended."""
        for peer in tuple(self._peers):
            peer.end()
        while self._peers:
            self._left.clear()
            await self._left.wait()

    async def _accept(self, bound: socket.socket) -> None:
        """Serve what connects, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await loop.connect_accepted_socket(lambda: _Peer(self), await next_connection(bound))

    async def _unlisten(self) -> None:
        """Refuse what connects from now on. What has been accepted is among the peers."""
        if self._listening is None:
            return
        (bound, accepting), self._listening = self._listening, None
        try:
            await cancel_all([accepting])
        finally:
            bound.close()

    def _remove(self) -> None:
        """Remove the socket's file if it is still the one that was bound."""
        if self._bound is not None and _identity(self.path) == self._bound:
            self.path.unlink(missing_ok=True)
        self._bound = None


class Call:
    """One call in progress; its service's context."""

    def __init__(self, peer: _Peer, stream: int, handler: _Handler, due_s: float | None) -> None:
        self._peer = peer
        self._stream = stream
        self._handler = handler
        self._due_s = due_s
        self._begun = False
        self._midway = False
        """Whether a message was only partly sent."""
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._limit: asyncio.Timeout | None = None
        self.inbox = Inbox(LARGEST_REQUEST_BYTES)
        self.received_bytes = 0
        self.overdue: Deadline | None = None
        """Ends the call if its request does not; None once that is complete, or has ended otherwise."""

    @property
    def task(self) -> asyncio.Task[None] | None:
        """Return the task that serves the call, or None while its request is incomplete."""
        return self._task

    def begin(self) -> asyncio.Task[None]:
        """Serve the call: its request is complete."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def cancel(self) -> None:
        """Cancel the task, once, whether by this or by its deadline: a second time would interrupt what it does about
        the first."""
        if self._task is None or self._cancelled or (self._limit is not None and self._limit.expired()):
            return
        self._cancelled = True
        if self._limit is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._limit.reschedule(None)
        self._task.cancel()

    async def write(self, message: Any) -> None:
        """Send one answer of a stream, as fast as the peer takes it."""
        await self._write(message)
        self._peer.flush()

    async def abort(self, code: Code, details: str) -> NoReturn:
        """End the call with a status."""
        raise AbortedError(code, details)

    async def _run(self) -> None:
        """Serve the call and send its end."""
        try:
            code, details = await self._served()
        except asyncio.CancelledError:
            self._peer.reset(self._stream, ErrorCodes.CANCEL)
            self._peer.flush()
            raise
        if self._midway:
            self._peer.reset(self._stream, ErrorCodes.CANCEL)
        else:
            self.finish(code, details)
        self._peer.flush()

    async def _served(self) -> tuple[Code, str]:
        try:
            async with asyncio.timeout_at(self._due_s) as self._limit:
                request = self._handler.method.request.FromString(self.inbox.message())
                answer = await self._handler.serve(request, self)
                if not self._handler.method.streams:
                    await self._write(answer)
        except AbortedError as error:
            return error.code, error.details
        except DecodeError:
            return Code.UNKNOWN, "the request is no valid protobuf message"
        except H2Error:
            return Code.CANCELLED, ""  # the peer has given it up, and nothing reaches it
        except Exception as error:
            if isinstance(error, TimeoutError) and self._limit is not None and self._limit.expired():
                return Code.DEADLINE_EXCEEDED, "Deadline Exceeded"
            log.error("call-broken", method=self._handler.method.name, error=str(error), exc_info=error)
            return Code.UNKNOWN, f"unexpected {type(error).__name__}, see the agent's log"
        return Code.OK, ""

    async def _write(self, message: Any) -> None:
        data = framed(message)
        if not self._begun:
            self._begun = True
            self._peer.send_headers(self._stream, _HEAD)
        self._midway = True
        await self._peer.send_data(self._stream, data)
        self._midway = False

    def finish(self, code: Code, details: str) -> None:
        """Queue the status that ends the call."""
        end = [] if self._begun else [*_HEAD]
        end.append((b"grpc-status", b"%d" % code))
        if details:
            end.append((b"grpc-message", status_text(details)))
        with contextlib.suppress(H2Error):  # the peer has given it up
            self._peer.send_headers(self._stream, end, end=True)


class _Peer(Connection):
    """One client's connection."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.path, client=False)
        self._server = server
        self._calls: dict[int, Call] = {}
        self._draining = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.joined(self)

    def drain(self) -> None:
        """Take no more calls, and end the connection with the last one."""
        if not self._draining:
            self._draining = True
            self.send_goaway()
        if not self._calls:
            self.close()

    def end(self) -> None:
        """Cancel the calls in progress and end the connection."""
        for one in self._calls.values():
            one.cancel()
        self.abort()

    def on_headers(self, stream: int, headers: Headers) -> None:
        if stream in self._calls:
            return  # trailers: a request has none that matter
        fields = dict(headers)
        if self._draining:
            self.reset(stream, ErrorCodes.REFUSED_STREAM)
        elif fields.get(b":method") != b"POST":
            self._refuse(stream, [(b":status", b"405")])
        elif not fields.get(b"content-type", b"").startswith(CONTENT_TYPE):
            self._refuse(stream, [(b":status", b"415")])
        else:
            self._begin(stream, fields)

    def _begin(self, stream: int, fields: dict[bytes, bytes]) -> None:
        handler, loop = self._server.handler(fields.get(b":path", b"")), asyncio.get_running_loop()
        try:
            if handler is None:
                raise AbortedError(Code.UNIMPLEMENTED, "Method not found!")
            wait = fields.get(b"grpc-timeout")
            due_s = None if wait is None else loop.time() + timeout_s(wait)
            if self._server.incomplete >= MOST_INCOMPLETE:
                raise AbortedError(Code.RESOURCE_EXHAUSTED, f"{MOST_INCOMPLETE} requests are incomplete")
        except AbortedError as error:
            status = [(b"grpc-status", b"%d" % error.code), (b"grpc-message", status_text(error.details))]
            self._refuse(stream, [*_HEAD, *status])
            return
        call = self._calls[stream] = Call(self, stream, handler, due_s)
        self._server.incomplete += 1
        expire = functools.partial(self._end_early, stream, Code.DEADLINE_EXCEEDED, _NOT_COMPLETE)
        call.overdue = Deadline(expire, read_s=REST_S, unread_s=UNREAD_S, is_read=self.is_read)

    def _refuse(self, stream: int, headers: Headers) -> None:
        """Answer with headers alone, and take nothing more of the request."""
        with contextlib.suppress(H2Error):
            self.send_headers(stream, headers, end=True)
        self.reset(stream, ErrorCodes.NO_ERROR)

    def on_data(self, stream: int, data: bytes) -> None:
        call = self._calls.get(stream)
        if call is None or call.task is not None:
            return
        try:
            self._server.held_bytes += len(data)
            call.received_bytes += len(data)
            call.inbox.add(data)
            if self._server.held_bytes > MOST_HELD_BYTES:
                raise AbortedError(Code.RESOURCE_EXHAUSTED, f"requests have more than {MOST_HELD_BYTES} bytes")
        except AbortedError as error:
            self._end_early(stream, error.code, error.details)

    def _end_early(self, stream: int, code: Code, details: str) -> None:
        """End a call whose request is incomplete."""
        self._calls[stream].finish(code, details)
        self.reset(stream, ErrorCodes.NO_ERROR)
        self.flush()
        self._drop(stream)

    def on_end(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is not None and call.task is None:
            self._completed(call)
            task = call.begin()
            self._server.began(task)
            task.add_done_callback(lambda _: self._drop(stream))

    def _completed(self, call: Call) -> None:
        """Count a request as incomplete no longer."""
        if call.overdue is not None:
            call.overdue.cancel()
            call.overdue = None
            self._server.incomplete -= 1

    def on_reset(self, stream: int, code: int) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if call.task is None:
            self._drop(stream)
        else:
            call.cancel()

    def on_turn(self, *, is_read: bool) -> None:
        for one in self._calls.values():
            if one.overdue is not None:
                one.overdue.turn(is_read=is_read)

    def on_goaway(self, last: int) -> None:
        for one in tuple(self._calls.values()):
            one.cancel()
        self.close()

    def on_lost(self) -> None:
        for stream, one in tuple(self._calls.items()):
            if one.task is None:
                self._drop(stream)
            one.cancel()
        self._server.left(self)

    def _drop(self, stream: int) -> None:
        call = self._calls.pop(stream, None)
        if call is not None:
            self._completed(call)
            self._server.held_bytes -= call.received_bytes
        if self._draining and not self._calls:
            self.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
