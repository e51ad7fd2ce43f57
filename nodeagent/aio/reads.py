"""Blocking reads of things that may hang, in a thread of their own: one that hangs delays no other read and no caller.

A thread that hangs in the kernel cannot be stopped. It is left behind, and what it reads is not read again before it
has ended: there are never more such threads than things that hang. They are daemon threads, so that the agent can end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")
DEADLINE_S = 5.0


class _Pass(Generic[K, T]):
    """A thread that makes some reads, one after another."""

    def __init__(self, reads: Mapping[K, Callable[[], T]]) -> None:
        self.done: dict[K, T] = {}
        self.now: K | None = None
        """What is being read; None after the last."""
        self.ended = asyncio.Event()
        self._reads = reads
        self._abandoned = False
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="reads", daemon=True).start()

    def abandon(self) -> None:
        """Let the thread end after the read that it is in."""
        self._abandoned = True

    def _run(self) -> None:
        for key, read in self._reads.items():
            if self._abandoned:
                break
            self.now = key
            self.done[key] = read()
        self.now = None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.ended.set)


class Reads(Generic[K, T]):
    """Makes reads of which each has a deadline. A read must not raise."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._hanging: dict[K, _Pass[K, T]] = {}

    async def run(self, reads: Mapping[K, Callable[[], T]]) -> tuple[dict[K, T], frozenset[K]]:
        """Return what was read, by key, and the keys of the reads that hang. Only one call may run at a time."""
        self._hanging = {key: one for key, one in self._hanging.items() if not one.ended.is_set()}
        found: dict[K, T] = {}
        left = {key: read for key, read in reads.items() if key not in self._hanging}
        while left:
            found |= await self._pass(left)
            left = {key: read for key, read in left.items() if key not in found and key not in self._hanging}
        return found, frozenset(self._hanging.keys() & reads.keys())

    async def _pass(self, reads: Mapping[K, Callable[[], T]]) -> dict[K, T]:
        """Read until the end, or until one read makes no progress for the deadline."""
        one, before = _Pass(reads), object()
        try:
            while not await self._ends(one):
                if (now := one.now) is not None and now is before:
                    self._hanging[now] = one
                    break
                before = now
            return {key: said for key, said in one.done.copy().items() if key not in self._hanging}
        finally:
            one.abandon()

    async def _ends(self, one: _Pass[K, T]) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._deadline_s):
                await one.ended.wait()
        return one.ended.is_set()
