"""Tasks that run as long as the agent: restarting them, waiting for them, ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.errors import NodeagentError

T = TypeVar("T")
RETRY_S = 5.0
log = structlog.get_logger()


async def supervise(what: str, part: Callable[[], Awaitable[None]], *, retry_s: float = RETRY_S) -> None:
    """Run a part, restarting it retry_s seconds after each failure; the failure is logged and affects no other part."""
    while True:
        try:
            return await part()
        except Exception as error:
            unforeseen = None if isinstance(error, NodeagentError) else error
            log.error("part-failed", part=what, error=str(error), retry_s=retry_s, exc_info=unforeseen)
        await asyncio.sleep(retry_s)


async def race(*works: Awaitable[object]) -> None:
    """Return when one is done and cancel the others. Raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(tasks)
    for task in done:
        task.result()


async def after_each(news: Revision, look: Callable[[], Awaitable[None]], *, every_s: float) -> None:
    """Look at once, then after each change that `news` counts, and periodically even without one, until cancelled. What
    changes during a look is looked at again."""
    while True:
        seen = news.value
        await look()
        await race(news.changed(seen), asyncio.sleep(every_s))


async def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run work to its end even if the caller is cancelled: a lock that it holds is not released while a thread still
    works under it. Return its result."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    some = list(tasks)
    for task in some:
        task.cancel()
    await asyncio.gather(*some, return_exceptions=True)
