"""A client that speaks HTTP/2 by hand, so that it can also speak it badly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import h2.events
from h2.config import H2Configuration
from h2.connection import H2Connection

ALLOCATE, WATCH = "/v1beta1.DevicePlugin/Allocate", "/v1beta1.DevicePlugin/ListAndWatch"

REFUSED = {
    "a ping of seven bytes": b"\0\0\7\6\0\0\0\0\0" + bytes(7),
    "data of no stream": b"\0\0\1\0\0\0\0\0\0x",
    "a frame that is too large": (1 << 20).to_bytes(3, "big") + b"\0\0\0\0\0\1",
    "settings that are none": b"\0\0\6\4\0\0\0\0\0\0\5\0\0\0\0",
    "no HTTP/2": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
"""Frames that end a connection."""


def headers(path: str = ALLOCATE, *more: tuple[str, str], method: str = "POST") -> list[tuple[str, str]]:
    """The headers of a call."""
    fixed = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    return [*fixed, ("te", "trailers"), ("content-type", "application/grpc"), *more]


def framed(body: bytes, *, stated: int | None = None, compressed: bool = False) -> bytes:
    """A message with its prefix, which may lie."""
    return bytes([compressed]) + (len(body) if stated is None else stated).to_bytes(4, "big") + body


class RawClient:
    """One connection. `http` builds frames; nothing is checked."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.http = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.events: list[h2.events.Event] = []
        self.closed = False
        """Whether the server has ended the connection."""
        self.http.initiate_connection()

    def send(self) -> None:
        """Send what was built."""
        self.writer.write(self.http.data_to_send())

    def call(self, path: str = ALLOCATE, body: bytes = framed(b""), *more: tuple[str, str]) -> int:
        """Send a whole request; its stream."""
        stream = self.http.get_next_available_stream_id()
        self.http.send_headers(stream, headers(path, *more))
        self.http.send_data(stream, body, end_stream=True)
        self.send()
        return stream

    async def read(self) -> None:
        """Read once, and answer what HTTP/2 wants answered."""
        try:
            data = await self.reader.read(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return
        found = self.http.receive_data(data)
        self.events += found
        for one in found:
            if isinstance(one, h2.events.DataReceived):
                self.http.acknowledge_received_data(one.flow_controlled_length or 0, one.stream_id)
        if not self.writer.is_closing():
            self.send()

    async def until(self, kind: type[Any], stream: int | None = None) -> Any:
        """The first event of a kind, of one stream if given."""
        while True:
            for one in self.events:
                if isinstance(one, kind) and stream in (None, getattr(one, "stream_id", None)):
                    return one
            assert not self.closed, f"the connection ended before {kind.__name__}"
            await self.read()

    async def status(self, stream: int) -> tuple[int, str]:
        """gRPC's status of a call, with its text as it is on the wire."""
        await self.until(h2.events.StreamEnded, stream)
        ends: Sequence[Any] = [
            one
            for one in self.events
            if isinstance(one, h2.events.ResponseReceived | h2.events.TrailersReceived) and one.stream_id == stream
        ]
        last = dict(ends[-1].headers)
        return int(last["grpc-status"]), last.get("grpc-message", "")

    async def until_closed(self) -> None:
        """Wait for the server to end the connection."""
        with contextlib.suppress(Exception):  # of h2, for what follows a GOAWAY
            while not self.closed:
                await self.read()
        while not self.closed:
            try:
                self.closed = not await self.reader.read(1 << 16)
            except ConnectionError:
                self.closed = True


@contextlib.asynccontextmanager
async def raw_client(path: Path) -> AsyncIterator[RawClient]:
    """A client of the server at `path`; its preface is built and not sent."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        yield RawClient(reader, writer)
    finally:
        if writer.transport.get_write_buffer_size():
            writer.transport.abort()  # it would wait for a server that does not read
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
