"""Which hugepage pools were grown for claims, and the size to restore: a small file, written before a pool grows.

After kill -9 between growing and deciding, only this file distinguishes the agent's own pages from those of others. An
unreadable file counts as empty, and this is logged: pages are then kept for good rather than taken from other users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import structlog

from nodeagent.core.model.topology import NodeId
from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.telemetry.once import Once

NAME = "hugepages.json"
"""In the state folder."""
_LARGEST_FILE_BYTES = 1 << 20
log = structlog.get_logger()
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


class GrowthJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / NAME
        self._boot_id = boot_id
        self._unreadable = Once("page-records-unreadable", level="error")

    def read(self) -> Mapping[Key, Grown]:
        """Return what was grown since boot, by pool."""
        try:
            with self.path.open("rb") as file:
                found = msgspec.json.decode(file.read(_LARGEST_FILE_BYTES), type=list[Grown])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "pools that were grown stay as they are"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {(one.node, one.page_bytes): one for one in found if one.boot_id == self._boot_id}

    def grow(self, key: Key, now_pages: int, pages: int) -> None:
        """Record that a pool of `now_pages` is about to grow to `pages`. Durable on return. Raise HostError if it
        cannot be written."""
        known = dict(self.read())
        before = known.get(key)
        base = before.floor(now_pages) if before is not None else now_pages
        known[key] = Grown(
            node=key[0], page_bytes=key[1], base_pages=min(base, now_pages), grown_pages=pages, boot_id=self._boot_id
        )
        self._write(known.values())

    def now(self, key: Key, pages: int) -> None:
        """Record the current size of a pool that was grown. Raise HostError if it cannot be written."""
        known = dict(self.read())
        if (one := known.pop(key, None)) is None:
            return
        if pages > one.base_pages:
            known[key] = msgspec.structs.replace(one, grown_pages=min(pages, one.grown_pages))
        self._write(known.values())

    def shrunk(self, key: Key, floor_pages: int, pages: int) -> None:
        """Record the current size of a pool that was to shrink to `floor_pages`, which includes pages added by others.
        Raise HostError if it cannot be written."""
        known = dict(self.read())
        one = known.pop(key)
        if pages > floor_pages:
            known[key] = msgspec.structs.replace(one, base_pages=floor_pages, grown_pages=pages)
        self._write(known.values())

    def forget(self, key: Key) -> None:
        """Record that a pool has its original size again. Raise HostError if it cannot be written."""
        self._write(one for other, one in self.read().items() if other != key)

    def _write(self, known: Iterable[Grown]) -> None:
        ours = [msgspec.structs.asdict(one) for one in sorted(known, key=lambda one: (one.node, one.page_bytes))]
        if ours:
            files.replace(self.path, msgspec.json.encode(ours) + b"\n", mode=0o600)
        else:
            files.remove(self.path)
