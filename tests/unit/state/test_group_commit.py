"""Many decisions in one transaction: each is answered only once it and all that it was based on is durable."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.model.claim import Prepared
from nodeagent.errors import StateError
from nodeagent.state.store import Entry, Store, read_only
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import CPUS, consumed
from tests.support.long_form import share_of
from tests.support.until import until

CALLS = 20
BURSTS = share_of(400, 0.1)


class Disk:
    """A store whose transactions wait, fail and are counted."""

    def __init__(self, store: Store) -> None:
        self._save = store.save_all
        self.opened = threading.Event()
        self.opened.set()
        self.transactions: list[int] = []
        """How many decisions each transaction had."""
        self.fail = 0
        """How many of the next transactions fail."""

    def save_all(self, entries: Sequence[Entry], **more: Any) -> None:
        assert self.opened.wait(60)
        changed = [one for one in entries if one.changes]
        if changed and self.fail:
            self.fail -= 1
            raise StateError("cannot save ledger.db: database or disk is full")
        self._save(entries, **more)
        self.transactions += [len(changed)] if changed else []


@contextmanager
def disk_of(room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(room.agent._store)
    with monkeypatch.context() as patch:
        patch.setattr(room.agent._store, "save_all", disk.save_all)
        yield disk


def same_on_disk(room: Room) -> bool:
    return dict(room.agent.ledger.grants) == {one.id: one for one in read_only(room.folder / "state")}


async def test_what_waits_for_the_disk_is_written_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty pods that start at once cost two transactions at most: the first one's, and one for all others."""
    async with claim_room(folder, CPUS, shape="2s8n128c-smt") as room:
        claims = [room.claim(f"c{n}", consumed("cpu", f"numa{n % 8}", cpus="2")) for n in range(CALLS)]
        with disk_of(room, monkeypatch) as disk:
            disk.opened.clear()
            calls = [asyncio.create_task(room.prepare(one)) for one in claims]
            await until(lambda: len(room.agent.newest.grants) == CALLS)
            assert not room.agent.ledger.grants and not any(one.done() for one in calls)
            disk.opened.set()
            answers = [(await one)[0] for one in calls]
            assert [one.error for one in answers] == [""] * CALLS
            assert sum(disk.transactions) == CALLS and len(disk.transactions) <= 2
            disk.transactions.clear()
            assert same_on_disk(room)
            disk.opened.clear()
            calls = [asyncio.create_task(room.unprepare(one)) for one in claims]
            await until(lambda: not room.agent.newest.grants)
            assert len(room.agent.ledger.grants) == CALLS
            disk.opened.set()
            assert [(await one)[0] for one in calls] == [""] * CALLS
        assert sum(disk.transactions) == CALLS and len(disk.transactions) <= 2
        assert same_on_disk(room) and not room.files()


async def test_a_retry_is_not_answered_before_the_first_call_is_durable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing itself, but what it tells of could still be lost."""
    async with claim_room(folder) as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        with disk_of(room, monkeypatch) as disk:
            disk.opened.clear()
            first = asyncio.create_task(room.prepare(claim))
            await until(lambda: bool(room.agent.newest.grants))
            again = asyncio.create_task(room.prepare(claim))
            refreshed = asyncio.create_task(room.agent.refresh())
            for _ in range(50):
                await asyncio.sleep(0)
            assert not (first.done() or again.done() or refreshed.done())
            disk.opened.set()
            (one,), (other,) = await first, await again
            assert one == other and not one.error
            await refreshed
            assert same_on_disk(room)


async def test_a_transaction_that_fails_takes_with_it_what_was_based_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caller is answered that it has what the ledger does not say; the next calls are good."""
    async with claim_room(folder) as room:
        claims = [room.claim(f"c{n}", consumed("cpu", "numa0", cpus="2")) for n in range(2)]
        with disk_of(room, monkeypatch) as disk:
            disk.opened.clear()
            disk.fail = 1
            calls = [asyncio.create_task(room.prepare(one)) for one in (*claims, claims[0])]
            await until(lambda: len(room.agent.newest.grants) == 2)
            disk.opened.set()
            for call in calls:
                with pytest.raises(StateError, match="disk is full"):
                    await call
            assert not room.agent.ledger.grants and room.agent.newest is room.agent.ledger
            assert same_on_disk(room) and not room.files()
        assert [(await room.prepare(one))[0].error for one in claims] == ["", ""]


async def test_random_calls_at_once_on_a_disk_that_fails_now_and_then_agree_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each burst: memory is what is on disk, callers have what they were given, and files are those of claims."""
    dice = random.Random(2026)
    async with claim_room(folder, CPUS) as room:
        names = [f"c{n}" for n in range(6)]
        claims = {one: room.claim(one, consumed("cpu", f"numa{int(one[1:]) % 2}", cpus="1")) for one in names}
        with disk_of(room, monkeypatch) as disk:
            for _ in range(BURSTS):
                disk.fail = dice.choice((0, 0, 1, 2))
                burst = [(dice.choice((room.prepare, room.unprepare)), dice.choice(names)) for _ in range(12)]
                done = await asyncio.gather(*(verb(claims[one]) for verb, one in burst), return_exceptions=True)
                assert all(isinstance(one, list | StateError) for one in done)
                assert same_on_disk(room) and room.agent.newest is room.agent.ledger
                disk.fail = 0
                await room.rendering.restore()
                held = {claims[one].uid for one in names if f"{claims[one].uid}-0" in room.agent.ledger.grants}
                assert {
                    name.removeprefix("nodeagent.dev-claim_").removesuffix(".json") for name in room.files()
                } == held
                _each_has_what_it_was_told(room, burst, done)


def _each_has_what_it_was_told(room: Room, burst: Sequence[tuple[Any, str]], done: Sequence[Any]) -> None:
    """The last answer about a claim, if all calls about it were answered, is the ledger's."""
    for name in {name for _, name in burst}:
        own = [(verb, answer) for (verb, one), answer in zip(burst, done, strict=True) if one == name]
        if len(own) == 1 and not isinstance(own[0][1], StateError):
            ((_, (answer,)),) = own
            held = f"{room.objects['default', name]['metadata']['uid']}-0" in room.agent.ledger.grants
            assert held == (isinstance(answer, Prepared) and not answer.error)
