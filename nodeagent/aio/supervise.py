"""Parts that run for as long as the agent does: kept going, waited for, ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import structlog

from nodeagent.errors import NodeagentError

T = TypeVar("T")
RETRY_S = 5.0
log = structlog.get_logger()


async def supervise(what: str, part: Callable[[], Awaitable[None]], *, retry_s: float = RETRY_S) -> None:
    """Begin a part again whenever it fails: the failure is said and costs no other part anything."""
    while True:
        try:
            return await part()
        except Exception as error:
            unforeseen = None if isinstance(error, NodeagentError) else error
            log.error("part-failed", part=what, error=str(error), retry_s=retry_s, exc_info=unforeseen)
        await asyncio.sleep(retry_s)


async def race(*works: Awaitable[object]) -> None:
    """Return when one is done; the others are cancelled. What the one raised is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(tasks)
    for task in done:
        task.result()


async def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Have something done to its end, also where nobody waits for it any more: a lock that it holds is not let go while
    a thread still works under it."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait for their ends."""
    some = list(tasks)
    for task in some:
        task.cancel()
    await asyncio.gather(*some, return_exceptions=True)
