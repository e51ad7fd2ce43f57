"""What systemd is told, read from a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.host.systemd.notify import Notifier
from tests.support.running import running


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[socket.socket, str]]:
    """systemd's end, and NOTIFY_SOCKET."""
    name = str(folder / "notify") if request.param == "path" else f"@na-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(name if request.param == "path" else "\0" + name[1:])
        ours.settimeout(10)
        yield ours, name


def test_each_word_is_one_datagram(listener: tuple[socket.socket, str]) -> None:
    ours, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name})
    before_us = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.reloading()
    notifier.status("2 resources")
    notifier.stopping()
    assert ours.recv(100) == b"READY=1"
    reloading, at = ours.recv(100).split(b"\n")
    assert reloading == b"RELOADING=1"
    assert before_us <= int(at.removeprefix(b"MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert ours.recv(100) == b"STATUS=2 resources"
    assert ours.recv(100) == b"STOPPING=1"


def test_a_line_end_in_the_status_is_not_another_word(listener: tuple[socket.socket, str]) -> None:
    ours, name = listener
    Notifier({"NOTIFY_SOCKET": name}).status("one\nMAINPID=1")
    assert b"\n" not in ours.recv(100)


async def test_the_watchdog_is_fed_twice_as_often_as_it_asks(listener: tuple[socket.socket, str]) -> None:
    ours, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())})
    assert notifier.watchdog_s == 0.05
    ours.setblocking(False)
    alive = asyncio.create_task(notifier.keep_alive())
    for _ in range(3):
        assert await asyncio.get_running_loop().sock_recv(ours, 100) == b"WATCHDOG=1"
    alive.cancel()


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}],
)
async def test_a_watchdog_that_is_not_ours_is_not_fed(environment: dict[str, str]) -> None:
    """Nor does feeding it take indefinitely."""
    notifier = Notifier(environment)
    assert notifier.watchdog_s is None
    await asyncio.wait_for(notifier.keep_alive(), 5)


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "@na-nobody-listens"])
def test_without_systemd_nothing_happens(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address} if address else {}).ready()


async def test_the_agent_tells_its_whole_life(listener: tuple[socket.socket, str], folder: Path) -> None:
    """READY without any kubelet, RELOADING and READY around a reload, STOPPING before the end."""
    ours, name = listener
    ours.setblocking(False)
    loop = asyncio.get_running_loop()

    async def heard(*words: bytes) -> None:
        """In any order."""
        awaited = {*words}
        while awaited:
            said = await loop.sock_recv(ours, 1000)
            awaited -= {one for one in awaited if said.startswith(one)}

    async with running(folder, resources=[]) as agent:
        assert await agent.stop(signal.SIGKILL) == -signal.SIGKILL
        await agent.start(env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"})
        await heard(b"READY=1", b"WATCHDOG=1", b"STATUS=0 resources, 0 grants")
        agent.signal(signal.SIGHUP)
        await heard(b"RELOADING=1\nMONOTONIC_USEC=")
        await heard(b"READY=1")
        agent.signal(signal.SIGTERM)
        await heard(b"STOPPING=1")
        assert await agent.end() == 0
