"""`nodeagent web` on real sockets: who gets through, what is passed on, and what is one clear line."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.admin.web.headers import STRICT
from nodeagent.cli.agent.web import browser
from nodeagent.core.model.cpuset import CpuSet
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pictures import pod_grant
from tests.doubles.status_socket import StatusSocket, status_socket
from tests.support.until import until
from tests.support.web import Web, web_of


@asynccontextmanager
async def shown(folder: Path) -> AsyncIterator[tuple[StatusSocket, Web]]:
    path = folder / "status.sock"
    one = StatusSocket(inventory_of(even_rows(1, 1, 1, 2, 1)), [pod_grant(1, CpuSet([0]))])
    async with status_socket(path, one), web_of(path) as web:
        yield one, web


async def test_the_token_opens_the_page_once_and_becomes_a_cookie(folder: Path) -> None:
    async with shown(folder) as (_, web):
        target = web.address.removeprefix(f"http://{web.host}")
        status, head, _ = await web.ask(target)
        (line,) = [one for one in head.splitlines() if one.lower().startswith("set-cookie")]
        assert status == 200 and line.endswith("; HttpOnly; SameSite=Strict; Path=/")
        cookie = f"Cookie: {line.partition(':')[2].partition(';')[0].strip()}"
        assert target.partition("=")[2] not in cookie, "the token itself is worth nothing any longer"
        status, head, body = await web.ask("/v1/map", cookie)
        assert (status, json.loads(body)["holders"][0]["name"]) == (200, "team/pod-1")
        assert all(f"{name}: {value}" in head for name, value in STRICT)
        status, _, body = await web.ask(target)
        assert (status, "has been used or is wrong" in body) == (403, True)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([], "the address has no token"),
        (["Cookie: nodeagent-1=x; a"], "the address has no token"),
        (["COOKIE", "Host: evil.example"], "it was asked for as 'evil.example'"),
        (["COOKIE", "Host: 127.0.0.1"], "it was asked for as '127.0.0.1'"),
        (["COOKIE", "Origin: http://evil.example"], "'http://evil.example' asks for it"),
        (["COOKIE", "Origin: null"], "'null' asks for it"),
        (["COOKIE", "Origin: http://127.0.0.1:1"], "'http://127.0.0.1:1' asks for it"),
        (["COOKIE", "Sec-Fetch-Site: cross-site"], "a page of another origin asks for it (cross-site)"),
        (["COOKIE", "Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors"], "a page of another origin asks for it"),
    ],
)
async def test_whoever_is_not_that_browser_gets_403(folder: Path, headers: list[str], said: str) -> None:
    """Without the cookie, from another origin, or under another name; the reason is one sentence."""
    async with shown(folder) as (_, web):
        cookie = await web.enter()
        status, head, body = await web.ask("/v1/status", *(cookie if one == "COOKIE" else one for one in headers))
        assert (status, said in json.loads(body)["error"]) == (403, True), body
        assert "content-security-policy" in head
        own = "Sec-Fetch-Site: same-origin", f"Origin: http://{web.host}", f"Host: localhost:{web.port}"
        assert (await web.ask("/v1/status", cookie, *own))[0] == 200


async def test_a_wrong_token_does_not_use_the_right_one_up(folder: Path) -> None:
    async with shown(folder) as (_, web):
        for wrong in ("/?token=", "/?token=x", "/?token=%ff", "/v1/status?token=x"):
            assert (await web.ask(wrong))[0] == 403
        assert (await web.enter()).startswith(f"Cookie: nodeagent-{web.port}=")


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "OPTIONS"])
async def test_nothing_can_be_changed_through_it(folder: Path, method: str) -> None:
    async with shown(folder) as (_, web):
        status, _, body = await web.ask("/v1/grants/g001", await web.enter(), method=method)
        assert (status, "it can only be read" in body) == (405, True)


async def test_events_are_passed_on_as_they_come_and_end_with_the_client(folder: Path) -> None:
    async with shown(folder) as (status, web):
        cookie = await web.enter()
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        writer.write(f"GET /v1/events HTTP/1.1\r\nHost: {web.host}\r\n{cookie}\r\n\r\n".encode())
        await reader.readuntil(b"event: changed\n")
        status.show([])
        await reader.readuntil(b'"ledger": 3')
        assert len(status.events.listeners) == 1
        writer.close()
        await until(lambda: not status.events.listeners)


async def test_an_agent_that_is_gone_is_502_and_the_next_one_is_found(folder: Path) -> None:
    path = folder / "status.sock"
    one = StatusSocket(inventory_of(even_rows(1, 1, 1, 1, 1)), [])
    async with status_socket(path, one):
        web_context = web_of(path)
        web = await web_context.__aenter__()
    cookie = await web.enter()
    status, _, body = await web.ask("/v1/status", cookie)
    assert (status, json.loads(body)["error"]) == (502, f"cannot ask the agent at {path}: No such file or directory")
    async with status_socket(path, one):
        assert (await web.ask("/v1/status", cookie))[0] == 200
    await web_context.__aexit__(None, None, None)


def refused(*words: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "nodeagent", "web", *words], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("port", ["x", "-1", "65536", "1e3", "٣"])
def test_a_bad_port_is_one_clear_line(port: str) -> None:
    code, out, (line,) = refused(f"--port={port}")
    assert (code, out, line.startswith(f"nodeagent: cannot use --port {port!r}: ")) == (2, "", True)


def test_without_an_agent_it_says_so_and_serves_nothing(tmp_path: Path) -> None:
    code, out, (line,) = refused("--socket", str(tmp_path / "none"))
    assert (code, out, line.startswith("nodeagent: cannot ask the agent at ")) == (1, "", True)


async def test_a_port_that_is_taken_is_one_clear_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with status_socket(folder / "s", StatusSocket(inventory_of(even_rows(1, 1, 1, 1, 1)), [])):
            code, out, lines = await asyncio.to_thread(refused, "--socket", str(folder / "s"), "--port", str(port))
    assert (code, out) == (1, "")
    assert lines == [f"nodeagent: cannot listen on 127.0.0.1:{port}: Address already in use"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, []),
        ({"BROWSER": "no-such-program:sh -x"}, ["sh", "-x", "ADDRESS"]),
        ({"BROWSER": "sh --url=%s --new"}, ["sh", "--url=ADDRESS", "--new"]),
        ({"BROWSER": ""}, []),
        ({"BROWSER": "no-such-program", "DISPLAY": ":0"}, ["xdg-open", "ADDRESS"]),
        ({"WAYLAND_DISPLAY": "wayland-0"}, ["xdg-open", "ADDRESS"]),
    ],
)
def test_the_browser_is_that_of_the_user_or_of_the_desktop_if_there_is_one(
    env: dict[str, str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = tmp_path / "xdg-open"
    opener.write_text("#!/bin/sh\n")
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wanted = [one.replace("ADDRESS", "http://x").replace("xdg-open", str(opener)) for one in words]
    assert browser("http://x", env) == wanted
