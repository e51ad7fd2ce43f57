"""One unary call on one connection: the process that serves the path now gets it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from nodeagent.kube.rpc.connection import Connection, Headers
from nodeagent.kube.rpc.status import AbortedError, Code, RpcError
from nodeagent.kube.rpc.wire import (
    CONTENT_TYPE,
    Inbox,
    Method,
    checked_response,
    framed,
    status_of,
    timeout_text,
)

LARGEST_ANSWER_BYTES = 4 << 20
_STREAM = 1


async def call(
    path: Path, method: Method, request: Any, timeout_s: float, *, largest_answer_bytes: int = LARGEST_ANSWER_BYTES
) -> Any:
    """Return the answer to a unary call at the socket `path`. Raise RpcError.

    The request is sent once the peer has begun HTTP/2: RpcError.sent is False if it never did.
    """
    connection = _Connection(path, largest_answer_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(path, connection)
            with contextlib.suppress(H2Error):  # the answer says why
                await _send(connection, method, request, timeout_s)
            answer = await connection.answer
    except TimeoutError:
        raise RpcError(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", sent=connection.begun) from None
    finally:
        connection.leave()
    try:
        return method.answer.FromString(answer)
    except DecodeError:
        raise RpcError(Code.INTERNAL, "the answer is no valid protobuf message") from None


async def _connect(path: Path, connection: _Connection) -> None:
    try:
        await asyncio.get_running_loop().create_unix_connection(lambda: connection, str(path))
    except OSError as error:
        raise RpcError(Code.UNAVAILABLE, f"cannot connect: {error.strerror or error}", sent=False) from None
    await connection.greeted


async def _send(connection: _Connection, method: Method, request: Any, timeout_s: float) -> None:
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", CONTENT_TYPE),
        (b"grpc-timeout", timeout_text(timeout_s)),
    ]
    connection.send_headers(_STREAM, headers)
    await connection.send_data(_STREAM, framed(request), end=True)
    connection.flush()


class _Connection(Connection):
    """A connection with one call."""

    def __init__(self, path: Path, largest_answer_bytes: int) -> None:
        super().__init__(path, client=True)
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.answer: asyncio.Future[bytes] = loop.create_future()
        self.begun = False
        """Whether the peer has begun HTTP/2, so that it may have the request."""
        self._inbox = Inbox(largest_answer_bytes)
        self._headers: dict[bytes, bytes] = {}

    def leave(self) -> None:
        """End the connection, whatever state it is in; a peer that still works on the call learns of it."""
        for one in (self.greeted, self.answer):
            if not one.cancel() and not one.cancelled():
                one.exception()  # else asyncio reports one that was not awaited
        self.abort()

    def on_greeted(self) -> None:
        self.begun = True
        if not self.greeted.done():
            self.greeted.set_result(None)

    def on_headers(self, stream: int, headers: Headers) -> None:
        fields = dict(headers)
        try:
            if not self._headers:
                checked_response(fields)
        except RpcError as error:
            self._fail(error)
        self._headers |= fields

    def on_data(self, stream: int, data: bytes) -> None:
        try:
            self._inbox.add(data)
        except AbortedError as error:
            self._fail(RpcError(error.code, error.details))

    def on_end(self, stream: int) -> None:
        code, details = status_of(self._headers)
        if code is not Code.OK:
            self._fail(RpcError(code, details))
        elif not self.answer.done():
            try:
                self.answer.set_result(self._inbox.message())
            except AbortedError as error:
                self._fail(RpcError(error.code, error.details))

    def on_reset(self, stream: int, code: int) -> None:
        unserved = code == ErrorCodes.REFUSED_STREAM
        found: dict[int, Code] = {ErrorCodes.REFUSED_STREAM: Code.UNAVAILABLE, ErrorCodes.CANCEL: Code.CANCELLED}
        self._fail(RpcError(found.get(code, Code.INTERNAL), "the peer reset the call", sent=not unserved))

    def on_goaway(self, last: int) -> None:
        self._fail(RpcError(Code.UNAVAILABLE, "the peer is stopping", sent=self.begun and last >= _STREAM))

    def on_lost(self) -> None:
        self._fail(RpcError(Code.UNAVAILABLE, "the peer closed the connection", sent=self.begun))

    def _fail(self, error: RpcError) -> None:
        """End what is waited for now with an error."""
        waited = self.answer if self.begun else self.greeted
        if not waited.done():
            waited.set_exception(error)
