"""Which instances are the agent's own, and what has to become of them: records, the driver and the ledger compared.

Pure. An instance is ours if it lies where a record says that one was to be made: the record was written while nothing
lay there, before the driver was asked. Everything else was made by the admin or another program and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from nodeagent.core.partitions.geometry import Place


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that the agent makes, has made, or is destroying."""

    partition: str
    """Id of the device that stands for it."""
    gpu: str
    """UUID of its GPU."""
    profile: int
    start: int
    size: int
    boot_id: str
    """No instance outlives a boot."""
    gi: int | None = None
    """Its number, once it is known to exist."""
    ci: int | None = None
    uuid: str = ""

    @property
    def place(self) -> Place:
        """Return where it lies."""
        return Place(self.profile, self.start, self.size)


class Lying(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that the driver shows on one GPU."""

    gi: int
    place: Place


class Fate(StrEnum):
    """What is to become of a recorded instance."""

    KEEP = "keep"
    """It exists and is held."""
    DESTROY = "destroy"
    """It exists and no grant holds it."""
    FORGET = "forget"
    """It does not exist, or what lies there is not ours."""


def found(record: Record, lying: Iterable[Lying]) -> Lying | None:
    """Return the instance of a record among those of its GPU, or None if it does not exist. An instance of another
    number than recorded was made by another program after ours was gone."""
    there = next((one for one in lying if one.place == record.place), None)
    return there if there is None or record.gi in (None, there.gi) else None


def fate(record: Record, lying: Iterable[Lying], *, held: bool) -> Fate:
    """Return what is to become of a recorded instance. held: whether the ledger grants it."""
    if found(record, lying) is None:
        return Fate.FORGET
    return Fate.KEEP if held else Fate.DESTROY
