"""Masks of cache ways: which ones the hardware takes, and which to give. Pure.

Source: cbm_validate in fs/resctrl/ctrlmondata.c: without gaps unless sparse_masks says otherwise, and the lowest run of
ways is at least min_cbm_bits long, with gaps too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nodeagent.core.resctrl.model import Cache


class Run(NamedTuple):
    """Consecutive ways."""

    first: int
    length: int

    @property
    def mask(self) -> int:
        """Return its mask."""
        return ((1 << self.length) - 1) << self.first


def runs(mask: int) -> Iterator[Run]:
    """Yield the runs of a mask, the lowest first."""
    first = 0
    while mask:
        skipped = (mask & -mask).bit_length() - 1
        mask >>= skipped
        length = (mask ^ (mask + 1)).bit_length() - 1
        yield Run(first + skipped, length)
        mask >>= length
        first += skipped + length


def fault(cache: Cache, mask: int) -> str:
    """Return why the hardware does not take a mask, or "" if it does."""
    if not mask:
        return "a mask of no ways"
    if mask & ~cache.full:
        return f"{mask:#x} has ways beyond {cache.full:#x}"
    lowest, *more = runs(mask)
    if more and not cache.sparse:
        return f"{mask:#x} has gaps"
    if lowest.length < cache.least_ways:
        return f"{mask:#x} has fewer than {cache.least_ways} consecutive ways"
    return ""


def choose(cache: Cache, free: int, ways: int) -> int:
    """Return a mask of so many free ways, or 0 if there is none: of the smallest run that is long enough, the lowest;
    with gaps only if no run is and the hardware takes them."""
    if ways < cache.least_ways or ways < 1:
        return 0
    every = list(runs(free))
    if fitting := [one for one in every if one.length >= ways]:
        best = min(fitting, key=lambda one: (one.length, one.first))
        return Run(best.first, ways).mask
    begins = [one.first for one in every if one.length >= cache.least_ways]
    if not cache.sparse or not begins:
        return 0
    return lowest_of(free >> begins[0] << begins[0], ways)


def lowest_of(mask: int, ways: int) -> int:
    """Return the lowest ways of a mask, or 0 if it has fewer."""
    found = 0
    for _ in range(ways):
        if not mask:
            return 0
        found |= mask & -mask
        mask &= mask - 1
    return found


def highest_of(mask: int, ways: int) -> int:
    """Return the highest ways of a mask, or 0 if it has fewer."""
    over = mask.bit_count() - ways
    return mask & ~lowest_of(mask, over) if over > 0 else (mask if not over else 0)


def longest(free: int) -> int:
    """Return how many consecutive ways are free."""
    return max((one.length for one in runs(free)), default=0)


def set_aside(caches: Iterable[Cache], roots: Iterable[int], foreign: int, ways: int) -> int:
    """Return which consecutive ways of a cache are set aside for exclusive use, or 0 if none can be.

    caches, roots: its resources (two where code and data are apart) and the default group's mask of each, which must
    stay valid without them. Devices use none of them. Where there is a choice, they are those that the default group
    and the groups of others (their masks in `foreign`) have fewest of, and then the lowest.
    """
    every = [(cache, root) for cache, root in zip(caches, roots, strict=True)]
    full = every[0][0].full
    found: list[tuple[int, int, int]] = []
    for first in range(full.bit_length() - ways + 1):
        mask = Run(first, ways).mask
        if any(mask & (cache.hardware | ~cache.full) or fault(cache, root & ~mask) for cache, root in every):
            continue
        taken = max((root & mask).bit_count() for _, root in every)
        found.append(((foreign & mask).bit_count(), taken, mask))
    return min(found, default=(0, 0, 0))[2]
