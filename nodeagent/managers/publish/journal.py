"""Which objects the agent has written to the API server, in a file that outlives it.

What is switched off while no agent runs is removed by the next one, and one that never wrote anything asks nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.host.sysfs.atomic_file import READABLE
from nodeagent.host.sysfs.record_file import RecordFile

FILE = "published.json"
"""In the state folder."""


class _Document(msgspec.Struct, frozen=True):
    published: tuple[str, ...] = ()
    version: int = 1


class PublishJournal:
    """Keys of what was written. Its methods block, and may be called from several threads and agents."""

    def __init__(self, path: Path) -> None:
        self._file = RecordFile(path, _Document, mode=READABLE)

    def read(self) -> frozenset[str]:
        """Return the keys. Raise HostError if the file cannot be read."""
        found = self._file.load()
        return frozenset(found.published) if found is not None else frozenset()

    def note(self, key: str, *, published: bool) -> None:
        """Record that something is about to be written, or was removed. Raise HostError if that cannot be saved."""
        with self._file.alone() as save:
            before = self.read()
            after = before | {key} if published else before - {key}
            save(_Document(published=tuple(sorted(after))) if after else None)
