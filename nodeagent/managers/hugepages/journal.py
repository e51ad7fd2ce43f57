"""Which hugepage pools were grown for claims, and what they are to go back to: a small file, written before one grows.

After kill -9 between growing and deciding this is all that tells the agent's own pages from everybody's. What cannot be
read is nothing, and is said: pages are then kept for good rather than taken from somebody.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """A pool that is larger than it was found; in pages, surplus ones not counted."""

    node: NodeId
    page_bytes: int
    base_pages: int
    """What it was."""
    grown_pages: int
    """What it was made; what is beyond is somebody else's."""
    boot_id: str
    """Pools begin anew with the machine."""

    def floor(self, now_pages: int) -> int:
        """What a pool of so many pages is to go back to."""
        return self.base_pages + max(0, now_pages - self.grown_pages)


class GrowthJournal:
    """The file. Every call reads or writes it: another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / NAME
        self._boot_id = boot_id
        self._unreadable = Once("page-records-unreadable", level="error")

    def read(self) -> Mapping[Key, Grown]:
        """What this boot grew, by pool."""
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
        """A pool that has now_pages is about to be made larger; durable on return. HostError where it cannot be."""
        known = dict(self.read())
        before = known.get(key)
        base = before.floor(now_pages) if before is not None else now_pages
        known[key] = Grown(
            node=key[0], page_bytes=key[1], base_pages=min(base, now_pages), grown_pages=pages, boot_id=self._boot_id
        )
        self._write(known.values())

    def now(self, key: Key, pages: int) -> None:
        """A pool that was grown has this many pages now; HostError where that cannot be written."""
        known = dict(self.read())
        if (one := known.pop(key, None)) is None:
            return
        if pages > one.base_pages:
            known[key] = dataclasses.replace(one, grown_pages=min(pages, one.grown_pages))
        self._write(known.values())

    def shrunk(self, key: Key, floor_pages: int, pages: int) -> None:
        """A pool that was to go back to floor_pages, what others added among them, has this many now."""
        known = dict(self.read())
        one = known.pop(key)
        if pages > floor_pages:
            known[key] = dataclasses.replace(one, base_pages=floor_pages, grown_pages=pages)
        self._write(known.values())

    def forget(self, key: Key) -> None:
        """A pool is what it was; HostError where that cannot be written."""
        self._write(one for other, one in self.read().items() if other != key)

    def _write(self, known: Iterable[Grown]) -> None:
        ours = [dataclasses.asdict(one) for one in sorted(known, key=lambda one: (one.node, one.page_bytes))]
        if ours:
            files.replace(self.path, msgspec.json.encode(ours) + b"\n", mode=0o600)
        else:
            files.remove(self.path)
