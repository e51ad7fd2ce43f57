"""Which virtual functions the agent made: a small file, written before they are made.

What an earlier boot recorded is gone with it, as the functions are. An unreadable file counts as empty, and this is
logged: no function is removed then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent.errors import cause_of
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.telemetry.once import Once


class _File(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    made: dict[str, int] = {}


class VfJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        self._unreadable = Once("virtual-functions-records-unreadable", level="error")

    def read(self) -> Mapping[str, int]:
        """Return how many virtual functions were made since boot, by physical function."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            self._unreadable.report(f"cannot read {self._path}: {cause_of(error)}", left="virtual functions stay")
            return {}
        return found.made if found.boot_id == self._boot_id else {}

    def write(self, pf: str, count: int) -> None:
        """Record that a physical function is about to have so many, 0 for none of the agent's. Durable on return. Raise
        HostError if it cannot be written."""
        before = self.read()
        after = {**before, pf: count} if count else {key: value for key, value in before.items() if key != pf}
        if not after:
            files.remove(self._path)
        elif after != before:
            file = _File(boot_id=self._boot_id, made=dict(sorted(after.items())))
            files.replace(self._path, msgspec.json.encode(file) + b"\n", mode=0o600)
