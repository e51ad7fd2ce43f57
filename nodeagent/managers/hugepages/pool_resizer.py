"""Resizes hugepage pools: one agent of the node at a time, in one thread, with a record of what was grown for claims.
The locks may be held across several changes if nothing must interfere in between."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

from nodeagent.host.cgroup.write import put as put_value
from nodeagent.host.hugepages.available import available_bytes
from nodeagent.host.hugepages.resize import STEP_BYTES, Put, counts, set_pages
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.hugepages.journal import Grown, GrowthJournal, Key
from nodeagent.managers.turns import Turns

LOCK = "hugepages.lock"
"""In the state folder."""


class Growth(NamedTuple):
    """How a pool grew for claims."""

    pages: int
    available_bytes: int
    """Memory of its node that is available afterwards."""


class PoolResizer:
    """Reads and resizes pools. Every change raises HostError if the kernel or the disk refuses it."""

    def __init__(self, sysfs: SysFs, state_dir: Path, boot_id: str, *, put: Put = put_value) -> None:
        self._sysfs = sysfs
        self._put = put
        self._records = GrowthJournal(state_dir, boot_id)
        self._turns = Turns(state_dir / LOCK, "cannot change hugepage pools")

    async def close(self) -> None:
        """Wait for a step in progress."""
        await self._turns.close()

    def alone(self, patience_s: float) -> AbstractAsyncContextManager[None]:
        """Hold the right to change pools exclusively. Entering raises StateError if another holder keeps it for longer
        than `patience_s`."""
        return self._turns.alone(patience_s)

    async def grown(self) -> Mapping[Key, Grown]:
        """Return the pools that were grown for claims."""
        return await self._turns.in_thread(self._records.read)

    async def step(self, key: Key, pages: int) -> tuple[int, int]:
        """Grow a pool one step towards `pages`; return (size before, size now), without surplus pages."""
        return await self._turns.in_thread(self._step, key, pages)

    async def grow(self, key: Key, pages: int, patience_s: float, keep_bytes: int) -> Growth:
        """Grow a pool by up to `pages` for claims, as long as `keep_bytes` stay available on its node. Its original
        size is durable before it grows."""
        return await self._turns.in_thread(self._grow, key, pages, patience_s, keep_bytes)

    async def shrink(self, key: Key, pages: int, least: int) -> int:
        """Remove up to `pages` free pages that were added for claims, leaving at least `least`; return how many were
        removed."""
        return await self._turns.in_thread(self._shrink, key, pages, least)

    async def forget(self, key: Key) -> None:
        """Record that nothing of a pool was added for claims any longer."""
        await self._turns.in_thread(self._records.forget, key)

    def _now(self, key: Key) -> int:
        return counts(self._sysfs, *key).persistent_pages

    def _step(self, key: Key, pages: int) -> tuple[int, int]:
        now = self._now(key)
        target = min(pages, now + max(1, STEP_BYTES // key[1]))
        return now, set_pages(self._sysfs, *key, target, put=self._put) if now < target else now

    def _grow(self, key: Key, pages: int, patience_s: float, keep_bytes: int) -> Growth:
        before, until_s = self._now(key), time.monotonic() + patience_s
        left = available_bytes(self._sysfs, key[0])
        if left - keep_bytes < key[1]:
            return Growth(0, left)
        self._records.grow(key, before, before + pages)
        now = want = before
        try:
            while now == want < before + pages and time.monotonic() < until_s:
                want = self._next(key, now, before + pages, left - keep_bytes)
                now = set_pages(self._sysfs, *key, want, put=self._put) if want > now else now
                left = available_bytes(self._sysfs, key[0])
                if left - keep_bytes < key[1]:
                    break
        finally:
            self._records.now(key, self._now(key))
        return Growth(max(0, now - before), left)

    def _next(self, key: Key, now: int, target: int, spare_bytes: int) -> int:
        """Return the size after one more step towards a target."""
        return min(target, now + max(1, STEP_BYTES // key[1]), now + spare_bytes // key[1])

    def _shrink(self, key: Key, pages: int, least: int) -> int:
        before = self._now(key)
        record = self._records.read().get(key)
        if record is None:
            return 0
        floor = record.floor(before)
        target = max(least, floor, before - pages)
        now = set_pages(self._sysfs, *key, target, put=self._put) if target < before else before
        self._records.shrunk(key, floor, now)
        return before - now
