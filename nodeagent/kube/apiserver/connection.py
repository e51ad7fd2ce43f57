"""HTTP/1.1 connections to the API server: h11 speaks the protocol, this file moves the bytes and keeps a few for reuse.

Nothing here has a deadline of its own: every caller sets one. A connection is opened with the credentials as they are
on disk at that moment; the kernel tells of a peer that died without a word.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import time

import h11

from nodeagent.errors import NodeagentError
from nodeagent.kube.apiserver.credentials import Access, Pem, tls_context

MOST_IDLE = 4
IDLE_S = 30.0
"""A connection unused for longer is not trusted: load balancers forget it without telling."""
_READ_BYTES = 64 << 10
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50_000),
)
"""A dead peer is noticed within about 50 s (tcp(7))."""

FAULTS = (OSError, h11.ProtocolError, NodeagentError)
"""What a call here may raise; `cause` says it in words."""


def cause(error: BaseException) -> str:
    """A fault as one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, h11.ProtocolError):
        return f"not a whole HTTP answer: {error}"
    return str(error) or type(error).__name__


class HttpConnection:
    """One connection and at most one request on it at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._talk = h11.Connection(h11.CLIENT)
        self._used_at_s = time.monotonic()

    @property
    def fresh(self) -> bool:
        """Whether it can be asked something, as far as can be known."""
        alive = self._talk.our_state is h11.IDLE and not self._reader.at_eof() and not self._writer.is_closing()
        return alive and time.monotonic() - self._used_at_s < IDLE_S and not self._spoke()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has ended the connection."""
        return self._reader.at_eof()

    async def ask(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> h11.Response:
        """Send one request; the head of its answer. FAULTS."""
        parts = (h11.Request(method=method, target=target, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self._writer.write(b"".join(self._talk.send(part) or b"" for part in parts))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event

    async def more(self) -> bytes | None:
        """The next piece of the answer's body; None at its end. FAULTS."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return None

    def finish(self) -> None:
        """Make ready for the next request, where the peer allows one."""
        if self._talk.our_state is h11.DONE and self._talk.their_state is h11.DONE:
            self._talk.start_next_cycle()
            self._used_at_s = time.monotonic()

    def close(self) -> None:
        """Hang up at once."""
        self._writer.transport.abort()

    def _spoke(self) -> bool:
        """Whether the peer said something unasked that the loop has not read yet: as a rule that it hung up."""
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def _next(self) -> h11.Event:
        while True:
            event = self._talk.next_event()
            if event is h11.PAUSED:
                raise h11.RemoteProtocolError("more than was asked for")
            if event is not h11.NEED_DATA:
                assert isinstance(event, h11.Event)
                if isinstance(event, h11.ConnectionClosed):
                    raise h11.RemoteProtocolError("the peer hung up")
                return event
            data = await self._reader.read(_READ_BYTES)
            if not data and self._talk.their_state is h11.SEND_RESPONSE:
                raise h11.RemoteProtocolError("the peer hung up before it answered")
            self._talk.receive_data(data)


class ConnectionPool:
    """The connections to one API server."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._idle: list[HttpConnection] = []

    async def take(self, certificate: tuple[Pem, Pem] | None = None) -> HttpConnection:
        """A connection for one request: one kept, or a new one. FAULTS."""
        while self._idle:
            kept = self._idle.pop()
            if kept.fresh:
                return kept
            kept.close()
        return await self._open(certificate)

    def give(self, connection: HttpConnection) -> None:
        """Take back a connection; it is kept where it can be of use."""
        connection.finish()
        if connection.fresh and len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def clear(self) -> None:
        """Close what is kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _open(self, certificate: tuple[Pem, Pem] | None) -> HttpConnection:
        context = tls_context(self._access, certificate)
        name = (self._access.server_name or self._access.host) if context is not None else None
        reader, writer = await asyncio.open_connection(
            self._access.host, self._access.port, ssl=context, server_hostname=name
        )
        for option in _KEEPALIVE:
            writer.get_extra_info("socket").setsockopt(*option)
        return HttpConnection(reader, writer)
