"""Sets of devices without two that exclude each other: what a choice of devices may draw from.

Most machines have one such set, all devices. Where a whole and its parts, or several ways to one thing, are there, each
set leaves some out; together they lose nothing: every choice that can be granted lies in one of them. If there are too
many, a few are taken that give what is wanted if any set does: then the answer may not be the best, and is marked so.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MOST_SETS, FEW_SETS = 32, 4
"""How many sets are searched exactly, and how many if there are more."""
MOST_OPTIONS = 64
"""How many maximal sets of one group of devices that exclude each other are looked at."""
Excluded = Mapping[str, frozenset[str]]
_Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a choice is made of."""

    kinds: Mapping[str, str]
    """Kind of each candidate, by id."""
    classes: Mapping[str, int]
    """Equal for candidates that placement cannot distinguish."""
    excluded: Excluded
    """The devices that exclude a device."""
    things: Mapping[str, frozenset[str]]
    """What each device hands over."""
    must: frozenset[str]
    """Those that have to be in the choice."""
    want: Mapping[str, int]
    """How many of each kind are wanted."""


def without_conflicts(some: Candidates) -> tuple[list[frozenset[str]], bool]:
    """Return the sets of candidates to leave out, each on its own, and whether that is all of them.

    No device of `must` is left out; if two of them exclude each other there is no set. The set that keeps most devices
    comes first, and of equally large ones the one that hands over least: parts are preferred to their whole."""
    barred = frozenset().union(*(some.excluded.get(one, frozenset()) for one in some.must))
    if barred & some.must:
        return [], True
    out = barred & some.kinds.keys()
    every = frozenset(some.kinds.keys() - out)
    groups = list(_groups(every, some.excluded))
    complete, options = True, list[list[frozenset[str]]]()
    for group in groups:
        kept = list(itertools.islice(_independent(group, some.excluded), MOST_OPTIONS + 1))
        complete &= len(kept) <= MOST_OPTIONS
        options.append(_undominated(kept[:MOST_OPTIONS], some))
    if math.prod(map(len, options)) <= MOST_SETS:
        chosen = [frozenset().union(*parts) for parts in itertools.product(*options)]
        return [out | (frozenset().union(*groups) - one) for one in chosen], complete
    free = Counter(some.kinds[one] for one in every.difference(*groups))
    chosen = list(_enough(some, options, free))
    return [out | (frozenset().union(*groups) - one) for one in chosen], False


def _groups(every: frozenset[str], excluded: Excluded) -> Iterator[frozenset[str]]:
    """Yield the devices that exclude each other, directly or through others, in order of their first."""
    left = {one for one in every if excluded.get(one, frozenset()) & every}
    for first in sorted(left):
        if first not in left:
            continue
        group, ahead = {first}, [first]
        while ahead:
            new = (excluded[ahead.pop()] & every) - group
            group |= new
            ahead += new
        left -= group
        yield frozenset(group)


def _independent(group: frozenset[str], excluded: Excluded) -> Iterator[frozenset[str]]:
    """Yield all maximal sets of a group without two that exclude each other (Bron and Kerbosch, 1973, with a pivot)."""

    def grow(chosen: tuple[str, ...], ahead: frozenset[str], done: frozenset[str]) -> Iterator[frozenset[str]]:
        if not ahead:
            if not done:
                yield frozenset(chosen)
            return
        # Every set that can still grow has the pivot or one that the pivot excludes.
        pivot = min(ahead | done, key=lambda one: (len(excluded[one] & ahead), one))
        for one in sorted(ahead & (excluded[pivot] | {pivot}), key=lambda one: (len(excluded[one]), one)):
            keep = group - excluded[one] - {one}
            yield from grow((*chosen, one), ahead & keep, done & keep)
            ahead, done = ahead - {one}, done | {one}

    return grow((), group, frozenset())


def _undominated(sets: Sequence[frozenset[str]], some: Candidates) -> list[frozenset[str]]:
    """Return the sets without those that give no more of any class than another one; the largest first."""
    useful: list[tuple[Counter[int], frozenset[str]]] = []
    for one in sorted(sets, key=lambda one: (-len(one), sum(len(some.things[id]) for id in one), sorted(one))):
        mine = Counter(some.classes[device] for device in one)
        if not any(mine <= theirs and not (some.must & one) - other for theirs, other in useful):
            useful.append((mine, one))
    return [one for _, one in useful]


# ---------------------------------------------------------------- where there are too many


def _enough(
    some: Candidates, options: Sequence[Sequence[frozenset[str]]], free: Mapping[str, int]
) -> Iterator[frozenset[str]]:
    """Yield a few sets that give what is wanted of each kind, if there are any: each prefers other options."""
    kinds = sorted(some.want)
    wanted = tuple(some.want[kind] for kind in kinds)
    for turn in range(FEW_SETS):
        found: dict[_Counts, tuple[frozenset[str], ...]] = {_least(wanted, [free.get(kind, 0) for kind in kinds]): ()}
        for number, group in enumerate(options):
            after: dict[_Counts, tuple[frozenset[str], ...]] = {}
            shift = (turn * (number + 1)) % len(group)
            for counts, chosen in found.items():
                for option in (*group[shift:], *group[:shift]):
                    more = [have + _count(some, option, kind) for have, kind in zip(counts, kinds, strict=True)]
                    after.setdefault(_least(wanted, more), (*chosen, option))
            found = after
        if wanted not in found:
            return
        yield frozenset().union(*found[wanted])


def _count(some: Candidates, devices: Iterable[str], kind: str) -> int:
    return sum(some.kinds[one] == kind for one in devices)


def _least(wanted: _Counts, have: Sequence[int]) -> _Counts:
    """Return the counts, no more than is wanted: more makes no difference."""
    return tuple(min(want, count) for want, count in zip(wanted, have, strict=True))
