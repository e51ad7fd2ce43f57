"""A small HTTP/1.1 server on a Unix socket: h11 handles the protocol, this file the I/O.

Garbage, a request that never ends or a client that never reads affects only its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import h11
import structlog

from nodeagent.errors import HostError

REQUEST_S = 5.0
"""How long a client may take to send a request, and how long to receive its answer."""
LARGEST_REQUEST_BYTES = 64 << 10
MOST_CLIENTS = 64
_BACKLOG = 256
_ACCESS_LIST, _ACCESS_LIST_VERSION = "system.posix_acl_access", 2
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that sends a request (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer: status, body and content type."""

    status: int
    body: bytes
    content_type: str = "application/json"


Handler = Callable[[str, str, Peer], Awaitable[HttpAnswer]]
"""(method, path, peer) -> answer."""


def problem(status: int, text: str) -> HttpAnswer:
    """Return an answer that states the problem in one sentence."""
    return HttpAnswer(status, json.dumps({"error": text}).encode() + b"\n")


class UnixHttpServer:
    """Serves one socket. Building it binds nothing; it can be started again after a stop."""

    def __init__(self, path: Path, handler: Handler, *, group_id: int | None = None) -> None:
        """group_id: members of this group may connect, in addition to root and the agent's own user."""
        self.path = path
        self._handler = handler
        self._group_id = group_id
        self._server: asyncio.Server | None = None
        self._bound: tuple[int, int] | None = None
        self._slots = asyncio.Semaphore(MOST_CLIENTS)
        self._clients: set[asyncio.Task[None]] = set()

    @property
    def lost(self) -> bool:
        """Return whether the file at the path is not the socket being served."""
        return self._server is None or _inode(self.path) != self._bound

    async def start(self) -> None:
        """Serve. Raise HostError if the socket cannot be created."""
        bound = _bind(self.path, self._group_id)
        self._bound = _inode(self.path)
        self._server = await asyncio.start_unix_server(self._connected, sock=bound, backlog=_BACKLOG)

    async def stop(self) -> None:
        """Disconnect every client and remove the socket."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        clients = list(self._clients)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if _inode(self.path) == self._bound:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._attend(reader, writer))
        self._clients.add(task)
        task.add_done_callback(lambda task: self._part(task, writer))

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._slots:
            with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
                await _converse(reader, writer, self._handler)
                await _close(writer)

    def _part(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        """End a client, even one that was never served; unsent data is dropped."""
        self._clients.discard(task)
        writer.transport.abort()


def _bind(path: Path, group_id: int | None) -> socket.socket:
    """Bind next to the path and rename, so that no half-made socket is visible and a stale one is never in the way."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        bound.bind(str(draft))
        draft.chmod(0o600)
        if group_id is not None:
            _allow(draft, group_id)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # a container's mount of a socket that does not exist yet leaves an empty folder
        draft.rename(path)
    except OSError as error:
        bound.close()
        with contextlib.suppress(OSError):
            draft.unlink()
        raise HostError(f"cannot serve {path}: {error.strerror or error}") from None
    return bound


def _allow(path: Path, group_id: int) -> None:
    """Let the members of a group connect to a socket, by an access list (acl(5)): the owner of a file needs no
    capability for that, as for changing its group. On a file system without access lists, change the group; if that is
    not allowed either, the socket stays the owner's alone, which is logged."""
    try:
        os.setxattr(path, _ACCESS_LIST, _access_list(group_id))
    except OSError as without_lists:
        try:
            os.chown(path, -1, group_id)
            path.chmod(0o660)
        except OSError as error:
            reasons = f"{without_lists.strerror}; {error.strerror}"
            log.warning("status-group-not-let-in", group_id=group_id, reason=reasons)


def _access_list(group_id: int) -> bytes:
    """Return an access list by which the owner and one group may read and write, as the kernel stores it
    (include/uapi/linux/posix_acl_xattr.h, posix_acl.h)."""
    user, owning_group, group, mask, other, none = 0x01, 0x04, 0x08, 0x10, 0x20, 0xFFFFFFFF
    entries = ((user, 6, none), (owning_group, 0, none), (group, 6, group_id), (mask, 6, none), (other, 0, none))
    return struct.pack("<I", _ACCESS_LIST_VERSION) + b"".join(struct.pack("<HHI", *one) for one in entries)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
    """Serve requests one after another until the client has no more."""
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
        await _reply(writer, talk, request, await _answer(handler, request, peer))
        if talk.our_state is not h11.DONE or talk.their_state is not h11.DONE:
            return
        talk.start_next_cycle()


async def _answer(handler: Handler, request: h11.Request, peer: Peer) -> HttpAnswer:
    """Return the handler's answer, or 500 for an unexpected error, which is logged."""
    method, target = request.method.decode(), request.target.decode("latin-1")
    try:
        return await handler(method, target, peer)
    except Exception as error:
        log.error("request-failed", method=method, target=target, exc_info=error)
        return problem(500, f"cannot {method} {target}: unexpected {type(error).__name__}, see the agent's log")


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
    headers = [("content-type", answer.content_type), ("content-length", str(len(answer.body)))]
    if request is None:
        headers.append(("connection", "close"))
    writer.write(talk.send(h11.Response(status_code=answer.status, headers=headers)) or b"")
    if request is None or request.method != b"HEAD":
        writer.write(talk.send(h11.Data(data=answer.body)) or b"")
    writer.write(talk.send(h11.EndOfMessage()) or b"")
    async with asyncio.timeout(REQUEST_S):
        await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    async with asyncio.timeout(REQUEST_S):
        await writer.wait_closed()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", raw))
