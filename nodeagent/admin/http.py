"""HTTP/1.1 with one client: h11 handles the protocol, this file the order of requests and answers, and their limits.

Where connections come from is in `listener.py`. A client may be anything: garbage and slowness end its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import h11
import msgspec
import structlog

from nodeagent.aio.supervise import race

REQUEST_S = 5.0
"""How long a client may take to send a request, and how long to receive its answer."""
LARGEST_REQUEST_BYTES = 64 << 10
TEXT = "text/plain"
log = structlog.get_logger()


class Peer(msgspec.Struct, frozen=True):
    """The process that sends a request (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, without its body, which no page needs."""

    method: str
    target: str
    peer: Peer | None
    """The process that sends it, or None if it came over a network."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Names in lower case, and values."""

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]

    @property
    def is_from_web_page(self) -> bool:
        """Return whether a browser sends it for a page, of whatever origin (Fetch standard, 3.1; Fetch Metadata)."""
        return any(name in (b"origin", b"sec-fetch-site") for name, _ in self.headers)

    def header(self, name: str) -> str:
        """Return a header by its name in lower case; "" if there is none, or more than one."""
        given = [value.decode("latin-1") for one, value in self.headers if one == name.encode()]
        return given[0] if len(given) == 1 else ""


class Stream(Protocol):
    """What follows the head of an answer, part by part."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def aclose(self) -> None:
        """End it; called once, whether anything was taken from it or not."""
        ...


class HttpAnswer(msgspec.Struct, frozen=True):
    """One answer: status, body, content type, and headers besides it and the length."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    stream: Stream | None = None
    """What follows the body, for as long as the client listens; it is closed as soon as the client is gone."""


Handler = Callable[[HttpRequest], Awaitable[HttpAnswer]]


def problem(status: int, text: str, *headers: tuple[str, str]) -> HttpAnswer:
    """Return an answer that states the problem in one sentence."""
    return HttpAnswer(status, json.dumps({"error": text}).encode() + b"\n", headers=headers)


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
    """Serve requests one after another until the client has no more. Raise TimeoutError, OSError or
    h11.ProtocolError if the client ends it in any other way."""
    peer = _peer(writer)
    talk = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_REQUEST_BYTES)
    while True:
        try:
            request = await _request(reader, talk)
        except h11.RemoteProtocolError as error:
            await _reply(writer, talk, None, problem(error.error_status_hint, f"cannot read the request: {error}"))
            return
        if request is None:
            return
        answer = await _answer(handler, request, peer)
        if answer.stream is not None:
            await _stream(reader, writer, talk, request, answer, answer.stream)
            return
        await _reply(writer, talk, request, answer)
        if talk.our_state is not h11.DONE or talk.their_state is not h11.DONE:
            return
        talk.start_next_cycle()


async def _answer(handler: Handler, request: h11.Request, peer: Peer | None) -> HttpAnswer:
    """Return the handler's answer, or 500 for an unexpected error, which is logged."""
    asked = _read(request, peer)
    try:
        return await handler(asked)
    except Exception as error:
        log.error("request-failed", method=asked.method, target=asked.target, exc_info=error)
        what = f"cannot {asked.method} {asked.target}: unexpected {type(error).__name__}"
        return problem(500, f"{what}, see the agent's log")


def _read(request: h11.Request, peer: Peer | None) -> HttpRequest:
    return HttpRequest(
        method=request.method.decode(),
        target=request.target.decode("latin-1"),
        peer=peer,
        headers=tuple((bytes(name), bytes(value)) for name, value in request.headers),
    )


async def _request(reader: asyncio.StreamReader, talk: h11.Connection) -> h11.Request | None:
    """Return the next whole request, or None if the client is done."""
    found: h11.Request | None = None
    read = 0
    async with asyncio.timeout(REQUEST_S):
        while True:
            event = talk.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(16 << 10)
                read += len(data)
                if read > LARGEST_REQUEST_BYTES:
                    raise h11.RemoteProtocolError("it is too large", error_status_hint=413)
                talk.receive_data(data)
            elif isinstance(event, h11.Request):
                found = event
            elif isinstance(event, h11.EndOfMessage):
                return found
            elif not isinstance(event, h11.Data):
                return None


async def _reply(
    writer: asyncio.StreamWriter, talk: h11.Connection, request: h11.Request | None, answer: HttpAnswer
) -> None:
    """Send an answer; `request` is None if none could be read."""
    headers = [("content-type", answer.content_type), ("content-length", str(len(answer.body))), *answer.headers]
    if request is None:
        headers.append(("connection", "close"))
    writer.write(talk.send(h11.Response(status_code=answer.status, headers=headers)) or b"")
    if request is None or request.method != b"HEAD":
        writer.write(talk.send(h11.Data(data=answer.body)) or b"")
    writer.write(talk.send(h11.EndOfMessage()) or b"")
    async with asyncio.timeout(REQUEST_S):
        await writer.drain()


async def _stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    talk: h11.Connection,
    request: h11.Request,
    answer: HttpAnswer,
    stream: Stream,
) -> None:
    """Send an answer without an end; it is the last of its connection."""
    async with contextlib.aclosing(stream):
        headers = [("content-type", answer.content_type), ("connection", "close"), *answer.headers]
        await _send(writer, talk, h11.Response(status_code=answer.status, headers=headers))
        if request.method == b"HEAD":
            return
        await _send(writer, talk, h11.Data(data=answer.body))
        await race(_pass_on(stream, writer, talk), _gone(reader))


async def _pass_on(stream: Stream, writer: asyncio.StreamWriter, talk: h11.Connection) -> None:
    async for data in stream:
        await _send(writer, talk, h11.Data(data=data))
    await _send(writer, talk, h11.EndOfMessage())


async def _send(writer: asyncio.StreamWriter, talk: h11.Connection, event: h11.Event) -> None:
    """Send a part of an answer. Raise TimeoutError if the client does not take it."""
    writer.write(talk.send(event) or b"")
    async with asyncio.timeout(REQUEST_S):
        await writer.drain()


async def _gone(reader: asyncio.StreamReader) -> None:
    """Return once the client has closed its end; whatever else it sends is ignored."""
    while await reader.read(1 << 10):
        pass


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection in order. Raise TimeoutError or OSError if the client does not let it."""
    writer.close()
    async with asyncio.timeout(REQUEST_S):
        await writer.wait_closed()


def _peer(writer: asyncio.StreamWriter) -> Peer | None:
    connection = writer.get_extra_info("socket")
    if connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", raw))
