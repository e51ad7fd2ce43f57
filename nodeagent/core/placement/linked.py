"""Groups of devices that are linked each with each. Pure and deterministic.

Nodes have at most MOST_MEMBERS linked devices; of more, none are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import msgspec

MOST_MEMBERS = 16
SIZES = (8, 4, 2)
"""Sizes of ready-made sets, the largest first: of smaller ones, several lie in a larger one."""
Pair = tuple[str, str]
Weight = tuple[int, int]
"""Of the link between two devices, and of their places if there were no link. A larger one is nearer."""


def complete_groups(pairs: Iterable[Pair]) -> tuple[tuple[str, ...], ...]:
    """Return disjoint groups of two and more in which every two are linked: the largest first, and of equally large
    ones that with the first members in order of id."""
    linked = _linked(pairs)
    left, found = sorted(linked), list[tuple[str, ...]]()
    while len(left) > 1 and len(left) <= MOST_MEMBERS:
        group = _largest(left, linked)
        if len(group) < 2:
            break
        found.append(group)
        left = [one for one in left if one not in group]
    return tuple(found)


def _linked(pairs: Iterable[Pair]) -> dict[str, set[str]]:
    linked: dict[str, set[str]] = {}
    for a, b in pairs:
        linked.setdefault(a, set()).add(b)
        linked.setdefault(b, set()).add(a)
    return linked


def _largest(ids: Sequence[str], linked: Mapping[str, set[str]]) -> tuple[str, ...]:
    """Return the first of the largest complete groups: members are tried in order, so no later one is smaller in order
    of id."""
    best: tuple[str, ...] = ()
    stack: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), tuple(ids))]
    while stack:
        group, rest = stack.pop()
        if len(group) > len(best) or (len(group) == len(best) and group < best):
            best = group
        if len(group) + len(rest) < len(best):
            continue
        for at in range(len(rest) - 1, -1, -1):
            joined = (*group, rest[at])
            stack.append((joined, tuple(one for one in rest[at + 1 :] if one in linked[rest[at]])))
    return best


def linked_sets(weights: Mapping[Pair, Weight]) -> Mapping[int, tuple[tuple[str, ...], ...]]:
    """Return disjoint sets of each of SIZES whose members are linked each with each, by size.

    weights: by linked pair, in order of id. Of each size as many as possible are formed, with the heaviest links
    inside, then the nearest places; and within those of the next larger size, or of what these leave.
    """
    return _linked_sets(tuple(sorted(weights.items())))


@lru_cache(maxsize=8)
def _linked_sets(weights: tuple[tuple[Pair, Weight], ...]) -> Mapping[int, tuple[tuple[str, ...], ...]]:
    known = dict(weights)
    areas, found = _areas(known), dict[int, tuple[tuple[str, ...], ...]]()
    for size in SIZES:
        smaller: list[tuple[str, ...]] = []
        for area in areas:
            sets = best_sets(area, size, known)
            taken = {one for some in sets for one in some}
            smaller += [*sets, tuple(one for one in area if one not in taken)]
            found[size] = (*found.get(size, ()), *sets)
        areas = smaller
    return {size: tuple(sorted(sets)) for size, sets in found.items() if sets}


def best_sets(ids: Sequence[str], size: int, weights: Mapping[Pair, Weight]) -> tuple[tuple[str, ...], ...]:
    """Return disjoint sets of a size, linked each with each: as many as possible, of these with the heaviest links,
    then the nearest places, then the first in order of id. Exact."""
    return _Search(size, weights).best(tuple(sorted(ids))).sets


def _areas(weights: Mapping[Pair, Weight]) -> list[tuple[str, ...]]:
    """Return the devices that links connect, directly or not, in order; without areas that are too large."""
    linked, seen, found = _linked(weights), set[str](), list[tuple[str, ...]]()
    for first in sorted(linked):
        area, left = set[str](), [first]
        while left:
            one = left.pop()
            if one not in area:
                area.add(one)
                left += linked[one]
        if first not in seen and len(area) <= MOST_MEMBERS:
            found.append(tuple(sorted(area)))
        seen |= area
    return found


class _Sets(msgspec.Struct, frozen=True):
    sets: tuple[tuple[str, ...], ...] = ()
    links: int = 0
    places: int = 0

    @property
    def value(self) -> tuple[int, int, int]:
        return len(self.sets), self.links, self.places


class _Search(msgspec.Struct):
    """The best sets of what is left, by what is left."""

    size: int
    weights: Mapping[Pair, Weight]
    known: dict[tuple[str, ...], _Sets] = msgspec.field(default_factory=dict)

    def best(self, left: tuple[str, ...]) -> _Sets:
        if len(left) < self.size:
            return _Sets()
        if left not in self.known:
            self.known[left] = self._best(left)
        return self.known[left]

    def _best(self, left: tuple[str, ...]) -> _Sets:
        """The first device is in a set, or in none."""
        first, rest = left[0], left[1:]
        best = _Sets()
        near = [one for one in rest if (first, one) in self.weights]
        for others in combinations(near, self.size - 1):
            pairs = [*combinations((first, *others), 2)]
            if all(pair in self.weights for pair in pairs):
                after = self.best(tuple(one for one in rest if one not in others))
                links, places = (sum(self.weights[pair][i] for pair in pairs) for i in (0, 1))
                sets = ((first, *others), *after.sets)
                best = _better(best, _Sets(sets, links + after.links, places + after.places))
        without = len(rest) // self.size >= len(best.sets)
        return _better(best, self.best(rest)) if without else best


def _better(a: _Sets, b: _Sets) -> _Sets:
    if a.value == b.value:
        return min(a, b, key=lambda one: one.sets)
    return max(a, b, key=lambda one: one.value)
