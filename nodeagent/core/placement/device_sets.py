"""Sets of devices without two that exclude each other: what a choice of devices may draw from.

Most machines have one such set, all devices. Where a whole and its parts, or several ways to one thing, are there, each
set leaves some out; together they lose nothing: every choice that can be given away lies in one of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

MOST_SETS = 128
"""So many sets are searched, and found in one group of devices that exclude each other; beyond, the answer is marked
as not exact."""
Excluded = Mapping[str, frozenset[str]]


def without_conflicts(
    candidates: Iterable[str],
    excluded: Excluded,
    things: Mapping[str, frozenset[str]],
    classes: Mapping[str, int],
    must: frozenset[str],
) -> tuple[list[frozenset[str]], bool]:
    """Return the sets of candidates to leave out, each on its own, and whether that is all of them.

    excluded: the devices that exclude a device, by id. things: what each hands over. classes: equal for devices that
    placement cannot distinguish.
    must: devices that have to be in the choice; none is left out. The set that keeps most devices comes first, and of
    equally large ones that which hands over least: parts are preferred to their whole."""
    every = frozenset(candidates)
    groups = list(_groups(every, excluded))
    if not groups:
        return [frozenset()], True
    complete = True
    options: list[list[frozenset[str]]] = []
    for group in groups:
        kept = list(itertools.islice(_independent(group, excluded), MOST_SETS + 1))
        complete &= len(kept) <= MOST_SETS
        useful = _undominated([one for one in kept[:MOST_SETS] if must & group <= one], things, classes)
        if not useful:
            return [], complete  # two that have to be in it exclude each other
        options.append([group - one for one in useful])
    products = itertools.islice(itertools.product(*options), MOST_SETS + 1)
    sets = [frozenset().union(*parts) for parts in products]
    return sets[:MOST_SETS], complete and len(sets) <= MOST_SETS


def _groups(every: frozenset[str], excluded: Excluded) -> Iterator[frozenset[str]]:
    """Devices that exclude each other, directly or through others; in order of their first."""
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
    """All maximal sets of a group without two that exclude each other (Bron and Kerbosch, 1973, with a pivot)."""

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


def _undominated(
    sets: Sequence[frozenset[str]], things: Mapping[str, frozenset[str]], classes: Mapping[str, int]
) -> list[frozenset[str]]:
    """The sets without those that give no more of any class than another one; the largest first."""
    useful: list[tuple[Counter[int], frozenset[str]]] = []
    for one in sorted(sets, key=lambda one: (-len(one), sum(len(things[id]) for id in one), sorted(one))):
        mine = Counter(classes[device] for device in one)
        if not any(mine <= theirs for theirs, _ in useful):
            useful.append((mine, one))
    return [one for _, one in useful]
