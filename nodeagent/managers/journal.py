"""Records by key of what a manager changes for holders, one journal for each subject.

What becomes of them with a damaged file, a full disk or a killed agent is in `host/sysfs/record_file.py`. Here an
unreadable file counts as empty, and this is logged; the next change sets it aside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from nodeagent.host.sysfs.record_file import RecordFile, UnreadableError
from nodeagent.telemetry.once import Once

Form = TypeVar("Form")
Key = TypeVar("Key", bound="str | tuple[Any, ...]")
Record = TypeVar("Record")


class Journal(Generic[Form, Key, Record]):
    """Records in a file. Every call reads or writes it, because another agent may do so too; changes take turns.
    Blocks."""

    def __init__(
        self,
        file: RecordFile[Form],
        unpack: Callable[[Form], Mapping[Key, Record]],
        pack: Callable[[Mapping[Key, Record]], Form],
        *,
        unreadable: str,
        left: str,
    ) -> None:
        """unpack: returns the records of a file that count, without those of an earlier boot if they ended with it.
        pack: returns the file of some records, which are in order of key. unreadable: the log event of an unreadable
        file. left: what is left as it is then."""
        self.path = file.path
        self._file = file
        self._unpack = unpack
        self._pack = pack
        self._unreadable = Once(unreadable, level="error")
        self._left = left

    def read(self) -> Mapping[Key, Record]:
        """Return the records that count."""
        found = self._found()
        return self._unpack(found) if found is not None else {}

    def keep(self, records: Mapping[Key, Record]) -> None:
        """Record these, in place of what was recorded under their keys. Durable on return. Raise HostError if it cannot
        be written."""
        self.change(lambda known: {**known, **records})

    def forget(self, *keys: Key) -> None:
        """Record that nothing is left of these. Raise HostError if it cannot be written."""
        self.change(lambda known: {key: one for key, one in known.items() if key not in keys})

    def change(self, change: Callable[[Mapping[Key, Record]], Mapping[Key, Record]]) -> None:
        """Record what a function makes of the records. Durable on return. Raise HostError if it cannot be written."""
        with self._file.alone() as save:
            found = self._found(acting=True)
            after = change(self._unpack(found) if found is not None else {})
            save(self._pack({key: after[key] for key in sorted(after)}) if after else None)

    def _found(self, *, acting: bool = False) -> Form | None:
        """acting: whether the file is about to be replaced, which must not happen to a good one that cannot be read for
        the moment."""
        try:
            return self._file.load()
        except UnreadableError as error:
            self._unreadable.report(str(error), left=self._left)
            if acting and error.passes:
                raise
            return None
