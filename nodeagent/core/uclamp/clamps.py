"""Utilization clamps of a cgroup, and the texts by which the kernel has them. Pure.

Of two cgroups above each other, the lower one has no more in effect than the upper one (cpu_util_update_eff in
kernel/sched/core.c), and a new cgroup has 0.00 and max: a minimum has no effect unless every cgroup above has one too.
Sources: Documentation/admin-guide/cgroup-v2.rst (CPU Interface Files), Documentation/scheduler/sched-util-clamp.rst;
capacity_from_percent and cpu_uclamp_print in kernel/sched/core.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.quantity import WHOLE_HUNDREDTHS, parse_percent
from nodeagent.errors import InputError

MIN, MAX = "cpu.uclamp.min", "cpu.uclamp.max"
FILES = (MIN, MAX)
UNLIMITED = "max"
INITIAL: Mapping[str, str] = MappingProxyType({MIN: "0.00", MAX: UNLIMITED})
"""What the files of a new cgroup say."""
CAPACITY = 1024
"""Of the largest CPU at its highest frequency (SCHED_CAPACITY_SCALE)."""


class Clamp(msgspec.Struct, frozen=True, kw_only=True):
    """The range of the utilization that frequencies and CPUs are chosen for. What is None is not clamped."""

    min_hundredths: int | None = None
    """In hundredths of a percent of CAPACITY, 0 to 10000."""
    max_hundredths: int | None = None

    def with_both(self, other: Clamp) -> Clamp:
        """Return what satisfies both: the higher minimum and the lower maximum."""
        lows = [one for one in (self.min_hundredths, other.min_hundredths) if one is not None]
        highs = [one for one in (self.max_hundredths, other.max_hundredths) if one is not None]
        return Clamp(min_hundredths=max(lows, default=None), max_hundredths=min(highs, default=None))

    @property
    def values(self) -> dict[str, str]:
        """Return what each file has to say, without those that need not say anything."""
        pairs = zip(FILES, (self.min_hundredths, self.max_hundredths), strict=True)
        return {file: text_of(value) for file, value in pairs if value is not None}


NO_CLAMP = Clamp()


def both(clamps: Iterable[Clamp]) -> Clamp:
    """Return what satisfies all."""
    found = NO_CLAMP
    for one in clamps:
        found = found.with_both(one)
    return found


def text_of(hundredths: int) -> str:
    """Return the text that the kernel shows of a value: it keeps a share of CAPACITY, and what rounds to all of it is
    max."""
    rounded = (hundredths * CAPACITY + WHOLE_HUNDREDTHS // 2) // WHOLE_HUNDREDTHS
    return UNLIMITED if rounded == CAPACITY else f"{hundredths // 100}.{hundredths % 100:02}"


def hundredths_of(text: str) -> int:
    """Return the value that a text of the kernel's stands for. Raise InputError for anything else."""
    return parse_percent(text.strip())


def alike(one: str, other: str) -> bool:
    """Return whether two texts of one file say the same."""
    try:
        return text_of(hundredths_of(one)) == text_of(hundredths_of(other))
    except InputError:
        return one == other
