"""Looking again after each change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import after_each
from nodeagent.errors import HostError

NEVER_S, LIMIT_S = 1000.0, 5.0


class Looks:
    """What looks, and how often it has."""

    def __init__(self) -> None:
        self.count = 0
        self.during: Callable[[], None] = lambda: None
        self._news = asyncio.Condition()

    async def look(self) -> None:
        self.during()
        async with self._news:
            self.count += 1
            self._news.notify_all()

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(LIMIT_S), self._news:
            await self._news.wait_for(lambda: self.count >= count)

    async def rests(self) -> None:
        """Give it every chance to look once more."""
        before = self.count
        for _ in range(20):
            await asyncio.sleep(0)
        assert self.count == before


@contextlib.asynccontextmanager
async def looking(news: Revision, looks: Looks, every_s: float = NEVER_S) -> AsyncIterator[None]:
    task = asyncio.create_task(after_each(news, looks.look, every_s=every_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_looks_at_once_and_after_each_change() -> None:
    news, looks = Revision(), Looks()
    async with looking(news, looks):
        for count in (1, 2, 3):
            await looks.reach(count)
            await looks.rests()
            news.bump()


async def test_a_change_during_a_look_is_looked_at_again() -> None:
    news, looks = Revision(), Looks()
    looks.during = lambda: news.bump() if looks.count == 0 else None
    async with looking(news, looks):
        await looks.reach(2)
        await looks.rests()


async def test_it_looks_periodically_without_a_change() -> None:
    looks = Looks()
    async with looking(Revision(), looks, every_s=0.01):
        await looks.reach(3)


async def test_an_error_of_a_look_ends_it() -> None:
    async def fails() -> None:
        raise HostError("cannot look: on purpose")

    with pytest.raises(HostError, match="on purpose"):
        await after_each(Revision(), fails, every_s=NEVER_S)
