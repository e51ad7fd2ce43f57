"""Resizes one hugepage pool: the pages of one size on one NUMA node.

What the kernel provides is read back. If it is less than requested, memory is compacted and the request is repeated, as
long as that helps. A pool grows in steps, so that a caller can stop it. It shrinks only by free pages: if a pool is
made smaller than its use, the kernel turns pages into surplus pages, which is not intended.
Source: Documentation/admin-guide/mm/hugetlbpage.rst. Everything blocks; growing blocks for as long as the kernel
searches for memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from nodeagent.core.model.topology import NodeId
from nodeagent.errors import HostError
from nodeagent.host.cgroup.write import put as put_value
from nodeagent.host.sysfs.sysfs import SysFs

STEP_BYTES = 1 << 30
"""Most bytes requested from the kernel at once."""
TRIES = 4
"""How often memory is compacted while a pool grows."""
Put = Callable[[str, str], None]
"""Writes a value to a kernel file, by its full path; raises HostError if that is refused."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The current page counts of a pool."""

    total_pages: int
    free_pages: int
    surplus_pages: int = 0

    @property
    def persistent_pages(self) -> int:
        """Return the pages that remain when they are freed: the configured size of the pool."""
        return self.total_pages - self.surplus_pages


def counts(sysfs: SysFs, node: NodeId, page_bytes: int) -> Counts:
    """Return a pool's pages. Raise HostError if there is no such pool or a file holds no count."""
    return _counts(sysfs, _folder(node, page_bytes))


def totals(sysfs: SysFs, node: NodeId) -> dict[int, int]:
    """Return the total pages by page_bytes of a node's readable pools: the minimum that
    shows whether a pool changed."""
    folder, found = f"sys/devices/system/node/node{node}/hugepages", {}
    for name in sysfs.names(folder):
        kib = name.removeprefix("hugepages-").removesuffix("kB")
        with contextlib.suppress(HostError, ValueError):
            found[int(kib) << 10] = _count(sysfs, f"{folder}/{name}/nr_hugepages")
    return found


def set_pages(
    sysfs: SysFs,
    node: NodeId,
    page_bytes: int,
    pages: int,
    *,
    put: Put = put_value,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Set the number of pages of a pool, without surplus pages. Return how many it has then: fewer if the kernel finds
    no memory or `go_on` returns False before a step, more if pages are in use or reserved. Raise HostError if the pool
    cannot be read or written."""
    pool = _Pool(sysfs, node, page_bytes, put)
    now = pool.counts().persistent_pages
    return pool.grow(now, pages, go_on) if now < pages else pool.shrink(pages)


class _Pool:
    def __init__(self, sysfs: SysFs, node: NodeId, page_bytes: int, put: Put) -> None:
        self._sysfs = sysfs
        self._folder = _folder(node, page_bytes)
        self._machine = f"sys/kernel/mm/hugepages/{_name(page_bytes)}"
        self._compact = sysfs.path(f"sys/devices/system/node/node{node}/compact")
        self._step = max(1, STEP_BYTES // page_bytes)
        self._put = put

    def counts(self) -> Counts:
        """Return the pool's current page counts. Raise HostError if they cannot be read."""
        return _counts(self._sysfs, self._folder)

    def grow(self, now: int, pages: int, go_on: Callable[[], bool]) -> int:
        """Grow the pool from `now` to `pages` pages in steps while `go_on()`. Return the pages that it has then. Raise
        HostError if it cannot be read or written."""
        tries = 0
        while now < pages and go_on():
            want = min(pages, now + self._step)
            got = self._ask(want)
            if got < want:
                # A first shortfall may be fragmentation; one that compaction did not help is a lack of memory.
                if tries == TRIES or (tries and got <= now):
                    return got
                tries += 1
                self._compact_memory()
            now = got
        return now

    def shrink(self, pages: int) -> int:
        """Shrink the pool to `pages`, or as far as possible without losing a used page. Return the pages that it has
        then. Raise HostError if it cannot be read or written."""
        before = self.counts()
        target = max(pages, before.persistent_pages - self._removable(before))
        if target >= before.persistent_pages:
            return before.persistent_pages
        self._ask(target)
        after = self.counts()
        if (taken := after.surplus_pages - before.surplus_pages) > 0:  # mapped between the read and the write
            return self._ask(after.persistent_pages + taken)
        return after.persistent_pages

    def _removable(self, here: Counts) -> int:
        """Return the free pages that are not reserved by a mapping of the machine."""
        free = _count(self._sysfs, f"{self._machine}/free_hugepages")
        reserved = _count(self._sysfs, f"{self._machine}/resv_hugepages")
        return max(0, min(here.free_pages, free - reserved))

    def _ask(self, pages: int) -> int:
        self._put(self._sysfs.path(f"{self._folder}/nr_hugepages"), str(pages))
        return self.counts().persistent_pages

    def _compact_memory(self) -> None:
        """Request compaction; ignore the failure of a kernel without it, or of a container without permission."""
        with contextlib.suppress(HostError):
            self._put(self._compact, "1")


def _folder(node: NodeId, page_bytes: int) -> str:
    return f"sys/devices/system/node/node{node}/hugepages/{_name(page_bytes)}"


def _name(page_bytes: int) -> str:
    return f"hugepages-{page_bytes >> 10}kB"


def _counts(sysfs: SysFs, folder: str) -> Counts:
    total, free, surplus = (_count(sysfs, f"{folder}/{what}_hugepages") for what in ("nr", "free", "surplus"))
    return Counts(total_pages=total, free_pages=free, surplus_pages=min(surplus, total))


def _count(sysfs: SysFs, path: str) -> int:
    text = sysfs.text(path)
    if not (text.isascii() and text.isdigit()):
        raise HostError(f"cannot read {sysfs.path(path)}: {text[:80]!r} is not a count of pages")
    return int(text)
