"""The small HTTP server, on real sockets: what clients may do to it costs them their own connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import http.client
import os
import socket
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeagent.admin import http as http_of
from nodeagent.admin.http import LARGEST_REQUEST_BYTES, HttpAnswer, HttpRequest
from nodeagent.admin.listener import MOST_CLIENTS, HttpListener
from nodeagent.admin.unix_server import UnixHttpServer
from nodeagent.errors import HostError
from tests.support.until import until

BIG = b"x" * (8 << 20)


async def echo(request: HttpRequest) -> HttpAnswer:
    """Says what it received; /big is more than any buffer, /broken is not foreseen."""
    if request.target == "/broken":
        raise ZeroDivisionError("by zero")
    assert request.peer is not None
    heard = f"{request.method} {request.target} {request.peer.uid}".encode()
    return HttpAnswer(200, BIG if request.target == "/big" else heard, "text/plain")


@contextlib.asynccontextmanager
async def served(path: Path) -> AsyncIterator[UnixHttpServer]:
    server = UnixHttpServer(path, echo)
    server.start()
    try:
        yield server
    finally:
        await server.stop()


async def talk(path: Path, data: bytes) -> bytes:
    """Everything that comes back for these bytes, the write side closed behind them."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            writer.write_eof()
            return await reader.read()
        return b""
    finally:
        writer.close()


def get(target: str = "/x", method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join((f"{method} {target} HTTP/1.1", "Host: x", *headers, "", "")).encode()


class Unix(http.client.HTTPConnection):
    """The standard library's client on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.path))


async def test_one_connection_serves_several_requests(folder: Path) -> None:
    path = folder / "s"

    def ask() -> list[tuple[int, bytes]]:
        client, found = Unix(path), []
        for method in ("GET", "POST", "DELETE"):
            client.request(method, "/a?b", body=b"body" if method == "POST" else None)
            answer = client.getresponse()
            found.append((answer.status, answer.read()))
        client.close()
        return found

    async with served(path):
        found = await asyncio.to_thread(ask)
    assert found == [(200, f"{method} /a?b {os.getuid()}".encode()) for method in ("GET", "POST", "DELETE")]


async def test_requests_may_come_at_once_and_in_pieces(folder: Path) -> None:
    path = folder / "s"
    async with served(path):
        assert (await talk(path, get("/1") + get("/2"))).count(b"200") == 2
        reader, writer = await asyncio.open_unix_connection(path)
        for byte in get("/piece", "GET", "Connection: close"):
            writer.write(bytes([byte]))
            await writer.drain()
        assert b"GET /piece" in await reader.read()
        writer.close()


async def test_head_has_the_length_and_no_body(folder: Path) -> None:
    path = folder / "s"
    async with served(path):
        head, _, body = (await talk(path, get("/x", "HEAD"))).partition(b"\r\n\r\n")
    assert f"content-length: {len(f'HEAD /x {os.getuid()}')}".encode() in head
    assert body == b""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\xff\x16\x03\x01garbage\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (get("/" + "x" * (2 * LARGEST_REQUEST_BYTES)), b"413"),
        (get("/x", "POST", f"Content-Length: {4 * LARGEST_REQUEST_BYTES}") + BIG[: 2 * LARGEST_REQUEST_BYTES], b"413"),
        (b"x" * 1000, b""),
        (b"", b""),
        (b"GET /x HTTP/1.1\r\nHost:", b""),
    ],
)
async def test_garbage_costs_its_own_connection(folder: Path, data: bytes, status: bytes) -> None:
    """It is told what is wrong where there is anybody to tell; others are served on."""
    path = folder / "s"
    async with served(path):
        answer = await talk(path, data)
        assert status in answer.split(b"\r\n")[0]
        assert b"200 " in await talk(path, get())


async def test_what_the_handler_did_not_foresee_is_a_500_with_a_reason(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "s"
    async with served(path):
        answer = await talk(path, get("/broken"))
        assert b"500 " in answer and b"ZeroDivisionError" in answer
        assert b"200 " in await talk(path, get())
    assert "request-failed" in capfd.readouterr().out


async def test_a_client_that_never_ends_its_request_is_hung_up_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_of, "REQUEST_S", 0.1)
    path = folder / "s"
    async with served(path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /x HT")
        assert await reader.read() == b""
        writer.close()


async def test_a_client_that_never_reads_is_hung_up_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left behind: no task, no descriptor."""
    monkeypatch.setattr(http_of, "REQUEST_S", 0.1)
    path = folder / "s"
    async with served(path) as server:
        handles = len(os.listdir("/proc/self/fd"))
        with socket.socket(socket.AF_UNIX) as lazy:
            lazy.setblocking(False)
            await asyncio.get_running_loop().sock_connect(lazy, str(path))
            await asyncio.get_running_loop().sock_sendall(lazy, get("/big"))
            await until(lambda: server.listener.clients, poll_s=0)
            await asyncio.gather(*server.listener.clients, return_exceptions=True)
            await asyncio.sleep(0)  # the transport closes in the loop's next turn
            assert len(os.listdir("/proc/self/fd")) == handles + 1


async def test_more_clients_than_slots_are_all_served(folder: Path) -> None:
    path = folder / "s"
    async with served(path):
        answers = await asyncio.gather(*(talk(path, get(f"/{n}")) for n in range(3 * MOST_CLIENTS)))
    assert [f"GET /{n} ".encode() in answer for n, answer in enumerate(answers)] == [True] * len(answers)


async def test_stopping_does_not_wait_for_idle_clients(folder: Path) -> None:
    path = folder / "s"
    async with served(path) as server:
        idle = [await asyncio.open_unix_connection(path) for _ in range(5)]
        while len(server.listener.clients) < len(idle):  # noqa: ASYNC110
            await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await server.stop()
        for reader, writer in idle:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
    assert not path.exists()


@pytest.mark.parametrize("lists", [True, False], ids=["with-access-lists", "without"])
async def test_the_socket_is_for_its_owner_alone_unless_a_group_is_named(
    lists: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has access lists, no privilege is used: neither owner nor group changes."""
    async with served(folder / "s"):
        assert (folder / "s").stat().st_mode & 0o777 == 0o600
    changed: list[int] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: changed.append(gid))
    if not lists:
        monkeypatch.setattr(os, "setxattr", refuse_access_lists)
    server = UnixHttpServer(folder / "g", echo, group_id=12345)
    server.start()
    assert (folder / "g").stat().st_mode & 0o777 == 0o660
    assert changed == ([] if lists else [12345])
    await server.stop()


async def test_a_group_that_cannot_be_let_in_leaves_the_socket_to_its_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither access lists nor the right to change the group: the status is served all the same, as the log says."""

    def not_permitted(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "setxattr", refuse_access_lists)
    monkeypatch.setattr(os, "chown", not_permitted)
    server = UnixHttpServer(folder / "g", echo, group_id=12345)
    with capture_logs() as said:
        server.start()
    assert (folder / "g").stat().st_mode & 0o777 == 0o600
    assert [(one["event"], one["reason"]) for one in said] == [
        ("status-group-not-let-in", "Operation not supported; Operation not permitted")
    ]
    await server.stop()


def refuse_access_lists(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


async def test_a_removed_socket_is_noticed_and_a_strange_one_left_alone(folder: Path) -> None:
    path = folder / "s"
    async with served(path) as server:
        assert not server.lost
        path.unlink()
        assert server.lost
        path.write_text("another program's")
        assert server.lost
        await server.stop()
        assert path.read_text() == "another program's"


async def test_a_full_folder_in_its_place_is_named(folder: Path) -> None:
    (folder / "s" / "more").mkdir(parents=True)
    server = UnixHttpServer(folder / "s", echo)
    with pytest.raises(HostError, match=f"cannot serve {folder}/s: "):
        server.start()
    assert os.listdir(folder) == ["s"]
    await server.stop()


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_closes_what_has_just_been_accepted(turns: int) -> None:
    """Whatever the loop has done with it by then; a socket that is left open is reported by Python itself."""
    bound = socket.create_server(("127.0.0.1", 0))
    listener, reported = HttpListener(echo), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        listener.start(bound)
        await asyncio.sleep(0)
        with socket.create_connection(bound.getsockname()):
            for _ in range(turns):
                await asyncio.sleep(0)
            await listener.stop()
        gc.collect()
    assert (unclosed, reported) == ([], [])
