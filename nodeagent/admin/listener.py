"""Accepts the connections of one listening socket and serves each, with TLS where wanted.

At most MOST_CLIENTS connections are open at a time, TLS handshakes included: further clients wait in the kernel's
queue and cost the agent neither memory nor descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

import h11
import structlog

from nodeagent.admin.http import REQUEST_S, Handler, close, converse
from nodeagent.aio.supervise import cancel_all

MOST_CLIENTS = 64
BACKLOG = 256
ACCEPT_RETRY_S = 0.5
"""Rest after a connection could not be accepted, as when there are too many open files."""
Secure = Callable[[], ssl.SSLContext | None]
"""Returns what the next connection is secured with, or None if it is not."""
log = structlog.get_logger()


class HttpListener:
    """Serves one listening socket. Building it starts nothing; it can be started again after a stop."""

    def __init__(self, handler: Handler, secure: Secure = lambda: None) -> None:
        self._handler = handler
        self._secure = secure
        self._bound: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self.clients: set[asyncio.Task[None]] = set()
        """The connections being served."""
        self._unattended: set[socket.socket] = set()
        """Those of which that has not begun."""

    @property
    def serving(self) -> bool:
        """Return whether a socket is served."""
        return self._bound is not None

    def start(self, bound: socket.socket) -> None:
        """Serve a bound stream socket, which is closed by `stop`."""
        bound.setblocking(False)
        bound.listen(BACKLOG)
        self._bound = bound
        self._accepting = asyncio.create_task(self._accept(bound), name="accepting")

    async def stop(self) -> None:
        """Stop listening and disconnect every client."""
        bound, self._bound = self._bound, None
        if bound is None or self._accepting is None:
            return
        try:
            await cancel_all([self._accepting])
        finally:
            bound.close()
        await cancel_all(self.clients)
        for one in self._unattended:
            one.close()
        self._unattended.clear()

    async def _accept(self, bound: socket.socket) -> None:
        slots = asyncio.Semaphore(MOST_CLIENTS)
        while True:
            await slots.acquire()
            connection = await _next(bound)
            self._unattended.add(connection)
            task = asyncio.create_task(self._attend(connection))
            self.clients.add(task)
            task.add_done_callback(self.clients.discard)
            task.add_done_callback(lambda _: slots.release())

    async def _attend(self, connection: socket.socket) -> None:
        self._unattended.discard(connection)
        with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
            reader, writer = await _open(connection, self._secure())
            try:
                await converse(reader, writer, self._handler)
                await close(writer)
            finally:
                writer.transport.abort()


async def _next(bound: socket.socket) -> socket.socket:
    """Return the next connection. What hinders one, such as too many open files, is logged and tried again. A caller
    that is cancelled loses none: asyncio's own sock_accept may have taken it by then."""
    while True:
        try:
            connection, _ = bound.accept()
            connection.setblocking(False)
            return connection
        except BlockingIOError:
            await _readable(bound)
        except OSError as error:
            log.warning("connection-not-accepted", error=error.strerror or str(error))
            await asyncio.sleep(ACCEPT_RETRY_S)


async def _readable(bound: socket.socket) -> None:
    """Return once a socket has something to take."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(bound, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(bound)


async def _open(
    connection: socket.socket, secure: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return the two ends of an accepted connection. Raise OSError or TimeoutError if TLS does not come about."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    limits = {"ssl_handshake_timeout": REQUEST_S, "ssl_shutdown_timeout": REQUEST_S} if secure is not None else {}
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=secure, **limits)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
