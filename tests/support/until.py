"""Waiting in tests: for something to hold, with a deadline, and an error that says what was waited for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
LIMIT_S, POLL_S = 120.0, 0.01
"""The longest that anything may take on a busy machine; how often what has no event is looked at."""


async def until(
    look: Callable[[], T | Awaitable[T]],
    *,
    limit_s: float = LIMIT_S,
    poll_s: float = POLL_S,
    otherwise: Callable[[], object] | str = "",
) -> T:
    """What `look` finds, as soon as that is neither None nor False nor empty. For files and what else has no event.

    otherwise: what is wrong when the time is up."""

    async def poll() -> T:
        while True:
            found = look()
            result: Any = await found if inspect.isawaitable(found) else found
            if result:
                return result
            await asyncio.sleep(poll_s)

    return await _within(limit_s, poll(), otherwise or (lambda: inspect.getsource(look).strip()))


class News:
    """Something that changes, and can be waited for. `tell` after every change."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, holds: Callable[[], object], *, limit_s: float = LIMIT_S) -> None:
        """Return once that holds; it is asked after every change."""

        async def wait() -> None:
            while not holds():
                await self._changed.wait()

        await _within(limit_s, wait(), lambda: inspect.getsource(holds).strip())


async def _within(limit_s: float, work: Awaitable[T], otherwise: Callable[[], object] | str) -> T:
    try:
        async with asyncio.timeout(limit_s) as deadline:
            return await work
    except TimeoutError:
        if not deadline.expired():
            raise
        why = otherwise if isinstance(otherwise, str) else otherwise()
        raise AssertionError(f"not within {limit_s:g} s: {why}") from None
