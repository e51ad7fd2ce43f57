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

from nodeagent.admin.http import REQUEST_S, Handler, close, converse
from nodeagent.aio.accept import next_connection
from nodeagent.aio.supervise import cancel_all

MOST_CLIENTS = 64
BACKLOG = 256
Secure = Callable[[], ssl.SSLContext | None]
"""Returns what the next connection is secured with, or None if it is not."""


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
            connection = await next_connection(bound)
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
