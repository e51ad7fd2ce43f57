"""Which hugepage pools were grown for claims, and the size to restore: a small file, written before a pool grows.

After kill -9 between growing and deciding, only this file distinguishes the agent's own pages from those of others.
Where it is unreadable, pages are kept for good rather than taken from other users.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.topology import NodeId
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal

NAME = "hugepages.json"
"""In the state folder."""
Key = tuple[NodeId, int]
"""A pool: its node and page_bytes."""


class Grown(msgspec.Struct, frozen=True, kw_only=True):
    """A pool larger than it was found. Sizes are in pages, without surplus pages."""

    node: NodeId
    page_bytes: int
    base_pages: int
    """Its original size."""
    grown_pages: int
    """The size it was grown to; anything beyond that was added by others."""
    boot_id: str
    """Pools are reset at boot."""

    def floor(self, now_pages: int) -> int:
        """Return the size to restore for a pool that now has `now_pages`."""
        return self.base_pages + max(0, now_pages - self.grown_pages)


class GrowthJournal(Journal[list[Grown], Key, Grown]):
    """What was grown since boot, by pool."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / NAME, list[Grown]),
            lambda file: {(one.node, one.page_bytes): one for one in file if one.boot_id == boot_id},
            lambda records: list(records.values()),
            unreadable="page-records-unreadable",
            left="pools that were grown stay as they are",
        )
        self._boot_id = boot_id

    def grow(self, key: Key, now_pages: int, pages: int) -> None:
        """Record that a pool of `now_pages` is about to grow to `pages`. Durable on return. Raise HostError if it
        cannot be written."""

        def grown(known: Mapping[Key, Grown]) -> Mapping[Key, Grown]:
            before = known.get(key)
            base = min(before.floor(now_pages) if before is not None else now_pages, now_pages)
            one = Grown(node=key[0], page_bytes=key[1], base_pages=base, grown_pages=pages, boot_id=self._boot_id)
            return {**known, key: one}

        self.change(grown)

    def now(self, key: Key, pages: int) -> None:
        """Record the current size of a pool that was grown. Raise HostError if it cannot be written."""
        if (one := self.read().get(key)) is None:
            return
        if pages > one.base_pages:
            self.keep({key: replace(one, grown_pages=min(pages, one.grown_pages))})
        else:
            self.forget(key)

    def shrunk(self, key: Key, floor_pages: int, pages: int) -> None:
        """Record the current size of a pool that was to shrink to `floor_pages`, which includes pages added by others.
        Raise HostError if it cannot be written."""
        if pages > floor_pages:
            self.keep({key: replace(self.read()[key], base_pages=floor_pages, grown_pages=pages)})
        else:
            self.forget(key)
