"""Which objects the agent has written to the API server, in a file that outlives it.

What is switched off while no agent runs is removed by the next one, and one that never wrote anything asks nothing.
"""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from nodeagent.errors import HostError, cause_of
from nodeagent.host.sysfs import atomic_file

FILE = "published.json"
"""In the state folder."""


class _Document(msgspec.Struct, frozen=True):
    published: tuple[str, ...] = ()
    version: int = 1


class PublishJournal:
    """Keys of what was written. Its methods block, and may be called from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()

    def read(self) -> frozenset[str]:
        """Return the keys. Raise HostError if the file cannot be read."""
        try:
            return frozenset(msgspec.json.decode(self._path.read_bytes(), type=_Document).published)
        except FileNotFoundError:
            return frozenset()
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"cannot read {self._path}: {cause_of(error)}") from None

    def note(self, key: str, *, published: bool) -> None:
        """Record that something is about to be written, or was removed. Raise HostError if that cannot be saved."""
        with self._turn:
            before = self.read()
            after = before | {key} if published else before - {key}
            if not after:
                atomic_file.remove(self._path)
            elif after != before:
                atomic_file.replace(self._path, msgspec.json.encode(_Document(published=tuple(sorted(after)))))
