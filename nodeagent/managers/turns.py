"""Changes to the machine that only one agent of a node makes at a time: a lock, and one thread for what blocks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from nodeagent.errors import StateError
from nodeagent.state.lock import FileLock

T = TypeVar("T")
P = ParamSpec("P")
LOCK_POLL_S = 0.05


class Turns:
    """Takes turns with other callers and other agents. The lock may be held across several changes if nothing must
    interfere in between."""

    def __init__(self, lock_path: Path, error: str) -> None:
        """error: how errors begin, such as "cannot change hugepage pools"."""
        self._lock_path = lock_path
        self._error = error
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, lock_path.stem)

    async def close(self) -> None:
        """Wait for a step in progress."""
        await asyncio.to_thread(self._thread.shutdown)

    @contextlib.asynccontextmanager
    async def alone(self, patience_s: float) -> AsyncIterator[None]:
        """Hold the right to change it exclusively. Raise StateError if another holder keeps it for longer than
        `patience_s`."""
        until_s = time.monotonic() + patience_s
        try:
            async with asyncio.timeout(patience_s):
                await self._turn.acquire()
        except TimeoutError:
            raise StateError(f"{self._error}: busy for more than {patience_s:g} s") from None
        lock: FileLock | None = None
        try:
            lock = FileLock(self._lock_path)
            while not lock.try_take():
                if time.monotonic() > until_s:
                    raise StateError(f"{self._error}: another agent has {self._lock_path}")
                await asyncio.sleep(LOCK_POLL_S)
            yield
        finally:
            if lock is not None:
                lock.close()
            self._turn.release()

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in the single thread. A cancelled caller still waits for it, so the locks are not released
        early."""
        future = asyncio.ensure_future(asyncio.wrap_future(self._thread.submit(work, *args, **kwargs)))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            future.exception()  # retrieved, so that asyncio does not log it: no caller is left
            raise
