"""Values as tables show them: ages, folded names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.*?)(\d{1,18})", re.DOTALL)
_UNITS = ((2 * 86400, 86400, "d"), (3 * 3600, 3600, "h"), (120, 60, "m"), (0, 1, "s"))
"""From how many seconds on an age is counted in which unit."""


def age(since_s: float, now_s: float) -> str:
    """Return how long ago something was, such as 5m; "" for 0. Both are in seconds since the epoch."""
    if not since_s:
        return ""
    seconds = max(0, int(now_s - since_s))
    return next(f"{seconds // size}{unit}" for least, size, unit in _UNITS if seconds >= least)


def folded(names: Iterable[str]) -> str:
    """Return names with runs of numbers at their end folded: cpu0, cpu1, cpu2, cpu8 are cpu0-2,8."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for one in names:
        stem, number = _split(one)
        groups.setdefault((stem, number is None), []).extend([] if number is None else [number])
    return " ".join(f"{stem}{_ranges(sorted(set(numbers)))}" for (stem, _), numbers in groups.items())


def _split(name: str) -> tuple[str, int | None]:
    """Return a name without the number at its end, and that number, if it is written as numbers are."""
    found = _NUMBERED.fullmatch(name)
    if found is None or (found[2][0] == "0" and len(found[2]) > 1):
        return name, None
    return found[1], int(found[2])


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers in the kernel's list syntax."""
    runs: list[list[int]] = []
    for one in numbers:
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
