"""Records by key of what a manager changes for holders, one journal for each subject.

What becomes of them with a damaged file, a full disk or a killed agent is in `host/sysfs/record_file.py`. Here a
damaged file counts as empty, and this is logged; the next change sets it aside. One that cannot be read for the moment
may have records: who grants or releases what they are about asks for certainty, everybody else sees none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from nodeagent.core.model.grant import Grant
from nodeagent.errors import HostError
from nodeagent.host.sysfs.record_file import RecordFile, UnreadableError
from nodeagent.telemetry.once import Once

Form = TypeVar("Form")
Key = TypeVar("Key", bound="str | tuple[Any, ...]")
Record = TypeVar("Record")


class OfClaim(Protocol):
    """A record of what was changed for a claim."""

    @property
    def claim(self) -> str:
        """Return its UID."""
        ...


Claimed = TypeVar("Claimed", bound=OfClaim)


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

    def read(self, *, certain: bool = False) -> Mapping[Key, Record]:
        """Return the records that count. certain: raise HostError, instead of returning none, if there may be some that
        cannot be read for the moment."""
        found = self._found(certain=certain)
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
            found = self._found(certain=True)
            after = change(self._unpack(found) if found is not None else {})
            save(self._pack({key: after[key] for key in sorted(after)}) if after else None)

    def _found(self, *, certain: bool) -> Form | None:
        """certain: whether to raise for a good file that cannot be read for the moment: it must not be replaced."""
        try:
            return self._file.load()
        except UnreadableError as error:
            self._unreadable.report(str(error), left=self._left)
            if certain and error.passes:
                raise
            return None


def recorded_for_others(
    read: Callable[..., Mapping[str, Claimed]], uid: str, grants: Sequence[Grant]
) -> dict[str, Claimed]:
    """Return, by device, what is recorded of the devices of a claim's grants for other claims, which hold them no
    longer. read: returns the records, or raises HostError if that cannot be told for the moment; so does this then.
    """
    ids = [id for one in grants for id in (*one.devices, *one.shares)]
    records = read(certain=True) if ids else {}
    return {id: records[id] for id in ids if id in records and records[id].claim != uid}


def may_be_recorded(read: Callable[..., Mapping[Any, OfClaim]]) -> bool:
    """Return whether something is recorded, as far as can be told: a record that cannot be read may have anything."""
    try:
        return bool(read(certain=True))
    except HostError:
        return True


def recorded_claims(records: Mapping[Any, OfClaim], uids: Sequence[str]) -> list[str]:
    """Return those of some claims for which something is recorded."""
    mine = {one.claim for one in records.values()}
    return [uid for uid in uids if uid in mine]
