"""One request to the API server and its response, under one deadline; every fault becomes an ApiError.

Nothing is retried here. When the server rejects a credential, the credential and its connections are dropped, so the
next call starts with what is on disk then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import h11
import msgspec

from nodeagent.errors import PeerError
from nodeagent.kube.apiserver.connection import FAULTS, ConnectionPool, HttpConnection, cause
from nodeagent.kube.apiserver.credentials import Access, bearer
from nodeagent.kube.apiserver.exec_plugin import Credential, Runner
from nodeagent.version import VERSION

MOST_CALLS = 4
"""Maximum number of concurrent calls of each of two classes, not counting watches: those that a pod's start waits for,
and all others."""
LARGEST_ANSWER_BYTES = 64 << 20
USER_AGENT = f"nodeagent/{VERSION}"
JSON, APPLY, MERGE = "application/json", "application/apply-patch+yaml", "application/merge-patch+json"

_LASTING = (400, 403, 404, 405, 422)
_SAID_BYTES = 300
"""How much of a response that is not a Status is included in the error."""


class ApiError(PeerError):
    """A failed API call."""

    def __init__(self, text: str, *, status: int = 0, reason: str = "", retry_after_s: float = 0.0) -> None:
        """Create the error from its message, HTTP status and Status.reason.

        `status` is 0 if no complete response arrived. `reason` is Kubernetes' own term (Status.reason), and
        `retry_after_s` what the server asked for, 0 if nothing.
        """
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.lasting = status in _LASTING


class Expired(ApiError):  # noqa: N818 - a watch or a list that must begin again, not a fault
    """410 Gone: the server no longer has the requested revision."""


class Ask(msgspec.Struct, frozen=True):
    """One request. `what` is its "VERB OBJECT" for messages; `name` is the object whose absence (404) counts as an
    answer rather than an error. `urgent`: a pod's start waits for it, so it never waits for a slot behind calls of
    which that is not true."""

    method: str
    target: str
    what: str
    name: str = ""
    body: bytes = b""
    content_type: str = JSON
    urgent: bool = False


class Caller:
    """Sends requests to one API server. Construction opens no connection."""

    def __init__(self, access: Access, timeout_s: float) -> None:
        self._access = access
        self._timeout_s = timeout_s
        self._pool = ConnectionPool(access)
        self._plugin = Runner(access.plugin) if access.plugin else None
        self._slots = {urgent: asyncio.Semaphore(MOST_CALLS) for urgent in (False, True)}

    async def call(self, ask: Ask) -> dict[str, Any] | None:
        """Return the response as an object, or None if the server has no object named `ask.name`. Raise ApiError."""
        try:
            async with asyncio.timeout(self._timeout_s), self._slots[ask.urgent]:
                head, raw = await self._exchange(ask)
        except FAULTS as error:
            raise self._failed(ask, error) from None
        if head.status_code < 300:
            return self.decoded(ask, raw)
        refusal = self._refusal(ask, head, raw)
        if refusal.status == 404 and ask.name and _missing(raw) == ask.name:
            return None
        raise refusal

    async def warm(self) -> None:
        """Have a connection ready for the next call. Raise ApiError."""
        ask = Ask("GET", "/", "reach the API server")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.warm((await self._credential()).certificate)
        except FAULTS as error:
            raise self._failed(ask, error) from None

    async def lines(self, ask: Ask, within_s: float) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a response as they arrive, for up to `within_s` seconds. Raise ApiError."""
        clock = asyncio.get_running_loop().time
        deadline_s, buffer = clock() + within_s, bytearray()
        connection = await self._begin(ask)
        try:
            while (piece := await self._piece(ask, connection, deadline_s, bool(buffer))) is not None:
                buffer += piece
                *whole, rest = buffer.split(b"\n")
                buffer = rest
                for line in whole:
                    yield bytes(line)
                if len(buffer) > LARGEST_ANSWER_BYTES:
                    raise self.error(ask, f"a line of more than {LARGEST_ANSWER_BYTES} bytes")
            if buffer:
                yield bytes(buffer)
        finally:
            connection.close()

    def error(self, ask: Ask, why: str) -> ApiError:
        """Return the error for a failure other than a refusal by the server."""
        return ApiError(f"cannot {ask.what} at {self._access.authority}: {why}")

    def refused(self, ask: Ask, code: int, said: dict[str, Any], retry_after_s: float | None = None) -> ApiError:
        """Return the error for a refusal, from the HTTP code and the Status object (meta/v1) in `said`."""
        reason, message = (str(said.get(key) or "") for key in ("reason", "message"))
        if retry_after_s is None and isinstance(details := said.get("details"), dict):
            retry_after_s = _seconds(str(details.get("retryAfterSeconds") or ""))
        why = ": ".join(part for part in (f"{code} {reason}".strip(), message) if part)
        text = f"cannot {ask.what} at {self._access.authority}: {why}"
        return (Expired if code == 410 else ApiError)(
            text, status=code, reason=reason, retry_after_s=retry_after_s or 0.0
        )

    def decoded(self, ask: Ask, raw: bytes) -> dict[str, Any]:
        """Return a response, or one line of it, as an object. Raise ApiError showing the start of anything else."""
        try:
            return msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.error(ask, f"the answer is no JSON object: {error}: {_start(raw)!r}") from None

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()

    async def _begin(self, ask: Ask) -> HttpConnection:
        """Return a connection on which a successful response has begun. Raise ApiError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                connection, head = await self._sent(ask)
                if head.status_code < 300:
                    return connection
                with contextlib.closing(connection):
                    raw = await _whole(connection)
        except FAULTS as error:
            raise self._failed(ask, error) from None
        raise self._refusal(ask, head, raw)

    async def _piece(self, ask: Ask, connection: HttpConnection, deadline_s: float, within_line: bool) -> bytes | None:
        """Return the next bytes, or None at the end. If the peer hangs up between two lines, as load balancers do, that
        is a normal end."""
        try:
            async with asyncio.timeout_at(deadline_s):
                return await connection.more()
        except TimeoutError as error:
            raise self.error(ask, cause(error) if error.errno else "the peer is silent past the end") from None
        except FAULTS as error:
            if isinstance(error, h11.RemoteProtocolError) and connection.hung_up and not within_line:
                return None
            raise self.error(ask, cause(error)) from None

    async def _exchange(self, ask: Ask) -> tuple[h11.Response, bytes]:
        connection, head = await self._sent(ask)
        try:
            raw = await _whole(connection)
        except BaseException:
            connection.close()
            raise
        self._pool.give(connection)
        return head, raw

    async def _sent(self, ask: Ask) -> tuple[HttpConnection, h11.Response]:
        """Send the request and return the connection and the head of the response. Raise one of FAULTS."""
        who = await self._credential()
        connection = await self._pool.take(who.certificate)
        try:
            headers = self._headers(ask, who.token)
            return connection, await connection.ask(ask.method, self._access.path + ask.target, headers, ask.body)
        except BaseException:
            connection.close()
            raise

    async def _credential(self) -> Credential:
        if self._plugin is not None:
            return await self._plugin.credential()
        return Credential(token=bearer(self._access))

    def _headers(self, ask: Ask, token: str) -> list[tuple[str, str]]:
        headers = [("Host", self._access.authority), ("User-Agent", USER_AGENT), ("Accept", JSON)]
        if token:
            headers.append(("Authorization", f"Bearer {token}"))
        if ask.body:
            headers += [("Content-Type", ask.content_type), ("Content-Length", str(len(ask.body)))]
        return headers

    def _forget(self) -> None:
        self._pool.clear()
        if self._plugin is not None:
            self._plugin.forget()

    def _refusal(self, ask: Ask, head: h11.Response, raw: bytes) -> ApiError:
        if head.status_code == 401:
            self._forget()
        said = _status(raw) or {"message": f"{bytes(head.reason).decode('latin-1')} {_start(raw)!r}".strip()}
        retry_after = {bytes(name): value for name, value in head.headers}.get(b"retry-after", b"")
        return self.refused(ask, head.status_code, said, _seconds(bytes(retry_after).decode("latin-1")))

    def _failed(self, ask: Ask, error: Exception) -> ApiError:
        late = isinstance(error, TimeoutError) and error.errno is None
        return self.error(ask, f"no whole answer within {self._timeout_s:g} s" if late else cause(error))


async def _whole(connection: HttpConnection) -> bytes:
    raw = bytearray()
    while (piece := await connection.more()) is not None:
        raw += piece
        if len(raw) > LARGEST_ANSWER_BYTES:
            raise PeerError(f"the answer has more than {LARGEST_ANSWER_BYTES} bytes")
    return bytes(raw)


def _status(raw: bytes) -> dict[str, Any]:
    """Return the Status object in a response, or {} if the response is something else."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(raw, type=dict[str, Any])
        return found if found.get("kind") == "Status" else {}
    return {}


def _missing(raw: bytes) -> str:
    """Return the name of the object that a 404 is about, or "" if the path itself is unknown, as on an older server."""
    details = _status(raw).get("details")
    return str(details.get("name") or "") if isinstance(details, dict) else ""


def _seconds(text: str) -> float | None:
    """Return Retry-After in seconds (RFC 9110, 10.2.3), or None if absent; a date is treated as absent."""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else None


def _start(raw: bytes) -> str:
    return raw[:_SAID_BYTES].decode(errors="replace").strip()
