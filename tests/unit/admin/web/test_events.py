"""The events of the status socket: who listens is told of each change, gets a beat, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from nodeagent.admin.web.events import MOST_LISTENERS
from nodeagent.admin.web.headers import STRICT
from tests.builders.inventories import even_rows, inventory_of
from tests.doubles.status_socket import StatusSocket, status_socket
from tests.support.until import until

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def small(beat_s: float = 60.0) -> StatusSocket:
    return StatusSocket(inventory_of(even_rows(1, 1, 1, 1, 1)), [], beat_s)


async def listen(path: Path, method: str = "GET") -> Ends:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"{method} /v1/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return reader, writer


async def next_event(reader: asyncio.StreamReader) -> tuple[str, dict[str, int]]:
    await reader.readuntil(b"event: ")
    name = (await reader.readline()).decode().strip()
    return name, json.loads((await reader.readline()).removeprefix(b"data: "))


async def test_an_event_comes_at_once_and_after_each_change(folder: Path) -> None:
    async with status_socket(folder / "s", small()) as shown:
        reader, writer = await listen(folder / "s")
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "content-type: text/event-stream" in head
        assert all(f"{name}: {value}" in head for name, value in STRICT)
        name, first = await next_event(reader)
        for part in ("inventory", "ledger", "health"):
            getattr(shown.agent.revisions, part).bump()
            assert (await next_event(reader)) == (name, first := {**first, part: first[part] + 1})
        writer.close()


async def test_what_changes_while_the_client_is_slow_is_one_event(folder: Path) -> None:
    async with status_socket(folder / "s", small()) as shown:
        reader, writer = await listen(folder / "s")
        _, before = await next_event(reader)
        for _ in range(1000):
            shown.agent.revisions.ledger.bump()
        assert (await next_event(reader))[1]["ledger"] == before["ledger"] + 1000
        writer.close()


async def test_a_listener_gets_a_beat_although_nothing_changes(folder: Path) -> None:
    async with status_socket(folder / "s", small(beat_s=0.01)):
        reader, writer = await listen(folder / "s")
        assert [(await next_event(reader))[0] for _ in range(3)] == ["changed", "beat", "beat"]
        writer.close()


async def test_no_more_than_a_bounded_number_listens_and_who_leaves_makes_room(folder: Path) -> None:
    """However a client leaves, and whatever it asked."""
    async with status_socket(folder / "s", small()) as shown:
        reader, writer = await listen(folder / "s", "HEAD")
        await reader.read()
        writer.close()
        assert not shown.events.listeners
        some = [await listen(folder / "s") for _ in range(MOST_LISTENERS)]
        for reader, _ in some:
            await next_event(reader)
        reader, writer = await listen(folder / "s")
        assert (await reader.readline()).split()[1] == b"503"
        writer.close()
        some[0][1].transport.abort()
        some[1][1].write_eof()
        await until(lambda: len(shown.events.listeners) == MOST_LISTENERS - 2)
        reader, writer = await listen(folder / "s")
        assert (await next_event(reader))[0] == "changed"
        for _, one in (*some, (reader, writer)):
            one.close()
        await until(lambda: not shown.events.listeners)


async def test_the_end_of_the_agent_ends_the_events(folder: Path) -> None:
    async with status_socket(folder / "s", small()) as shown:
        reader, writer = await listen(folder / "s")
        await next_event(reader)
    await reader.read()
    assert not shown.events.listeners
    writer.close()
