"""HTTP/1.1 connections to the API server: h11 implements the protocol; this file moves the bytes and pools connections.

Nothing here has its own deadline: every caller sets one. A connection is opened with the credentials that are on disk
at that moment, and reused for as long as they stay and its peer is known to be there: the kernel asks it every 20 s.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import struct

import h11

from nodeagent.errors import NodeagentError
from nodeagent.kube.apiserver.credentials import Access, Pem, TlsContexts

MOST_IDLE = 4
SILENT_S = 25.0
"""A connection whose peer has acknowledged nothing for longer, not even a probe of the kernel, is not reused: load
balancers and firewalls drop idle connections silently."""
_LAST_ACK_AT, _TCP_INFO_BYTES = 56, 60
"""Where tcpi_last_ack_recv, in milliseconds, is in struct tcp_info (linux/tcp.h), and how much of that is read."""
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
"""What a call here may raise; `cause` renders it as text."""


def cause(error: BaseException) -> str:
    """Return an error as one line of text."""
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
    """One connection with at most one request in progress."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._talk = h11.Connection(h11.CLIENT)

    @property
    def fresh(self) -> bool:
        """Return whether the connection can take a request, as far as can be determined."""
        alive = self._talk.our_state is h11.IDLE and not self._reader.at_eof() and not self._writer.is_closing()
        return alive and not self._spoke() and self._silent_s() < SILENT_S

    @property
    def hung_up(self) -> bool:
        """Return whether the peer has closed the connection."""
        return self._reader.at_eof()

    async def ask(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> h11.Response:
        """Send one request and return the head of the response. Raise one of FAULTS."""
        parts = (h11.Request(method=method, target=target, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self._writer.write(b"".join(self._talk.send(part) or b"" for part in parts))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event

    async def more(self) -> bytes | None:
        """Return the next piece of the response body, or None at its end. Raise one of FAULTS."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return None

    def finish(self) -> None:
        """Prepare for the next request if the peer allows one."""
        if self._talk.our_state is h11.DONE and self._talk.their_state is h11.DONE:
            self._talk.start_next_cycle()

    def close(self) -> None:
        """Close the connection immediately."""
        self._writer.transport.abort()

    def _spoke(self) -> bool:
        """Return whether the peer has sent something unsolicited that the event loop has not read yet: usually that it
        has hung up."""
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _silent_s(self) -> float:
        """Return how long ago the peer's kernel last answered anything."""
        info = self._writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (last_ack_ms,) = struct.unpack_from("=I", info, _LAST_ACK_AT)
        return float(last_ack_ms) / 1e3

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
    """Idle connections to one API server."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._contexts = TlsContexts(access)
        self._idle: list[HttpConnection] = []
        self._sources: object = None
        """The version of the credentials that idle connections were opened with."""

    async def take(self, certificate: tuple[Pem, Pem] | None = None) -> HttpConnection:
        """Return a connection for one request, reused or new. Raise one of FAULTS."""
        self._drop_outdated(certificate)
        while self._idle:
            kept = self._idle.pop()
            if kept.fresh:
                return kept
            kept.close()
        return await self._open(certificate)

    async def warm(self, certificate: tuple[Pem, Pem] | None = None) -> None:
        """Have a connection ready for the next request. Raise one of FAULTS."""
        self.give(await self.take(certificate))

    def give(self, connection: HttpConnection) -> None:
        """Take back a connection: keep it if it is reusable, close it otherwise."""
        connection.finish()
        if connection.fresh and len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def clear(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _drop_outdated(self, certificate: tuple[Pem, Pem] | None) -> None:
        """Close idle connections if a certificate or an authority was replaced since they were opened."""
        sources = self._contexts.sources(certificate)
        if sources is not None and sources != self._sources:
            self.clear()
            self._sources = sources

    async def _open(self, certificate: tuple[Pem, Pem] | None) -> HttpConnection:
        context = self._contexts.get(certificate)
        name = (self._access.server_name or self._access.host) if context is not None else None
        reader, writer = await asyncio.open_connection(
            self._access.host, self._access.port, ssl=context, server_hostname=name
        )
        for option in _KEEPALIVE:
            writer.get_extra_info("socket").setsockopt(*option)
        return HttpConnection(reader, writer)
