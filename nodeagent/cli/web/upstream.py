"""The status socket as the source of a web page: each request is passed on to the agent, its answer as it comes."""

from __future__ import annotations

import asyncio
import http.client

import h11

from nodeagent.admin.http import HttpAnswer, HttpRequest, problem
from nodeagent.admin.web.headers import STRICT
from nodeagent.errors import cause_of

ANSWER_S = 10.0
"""How long the agent may take to begin an answer."""
SILENCE_S = 60.0
"""How long it may say nothing in the middle of one; events come at least every 15 s."""


class Upstream:
    """The agent behind a status socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def pass_on(self, request: HttpRequest) -> HttpAnswer:
        """Return the agent's answer, or 502 if it gives none."""
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._path)
                return await _ask(_Body(reader, writer), request)
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else cause_of(error)
            return problem(http.client.BAD_GATEWAY, f"cannot ask the agent at {self._path}: {why}", *STRICT)


async def _ask(body: _Body, request: HttpRequest) -> HttpAnswer:
    """Send a request. Return the answer with what is to come of it."""
    try:
        head = await body.head(request)
    except BaseException:
        await body.aclose()
        raise
    kind = next((value.decode("latin-1") for name, value in head.headers if name == b"content-type"), "text/plain")
    return HttpAnswer(head.status_code, b"", kind, STRICT, body)


class _Body:
    """One connection to the agent, and what follows the head of its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._talk = h11.Connection(h11.CLIENT)

    async def head(self, request: HttpRequest) -> h11.Response:
        """Ask. Raise h11.ProtocolError if what comes back is no answer."""
        headers = [("host", "agent"), ("connection", "close")]
        ask = h11.Request(method=request.method, target=request.target.encode("latin-1"), headers=headers)
        self._writer.write((self._talk.send(ask) or b"") + (self._talk.send(h11.EndOfMessage()) or b""))
        event = await self._next()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("it does not speak HTTP")
        return event

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        async with asyncio.timeout(SILENCE_S):
            event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Hang up."""
        self._writer.transport.abort()

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._talk.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            self._talk.receive_data(await self._reader.read(1 << 16))
