"""In which order possible instances are offered: a scheduler takes the first that fits, so the first ones leave most
room for others.

Pure. The order is fixed: it does not depend on what is held, so slices in the API server do not change with grants.
"""

from __future__ import annotations

import functools

from nodeagent.core.partitions.geometry import Profile, Profiles, things


@functools.cache
def offered(profiles: Profiles) -> tuple[tuple[Profile, int], ...]:
    """Return every possible instance as (profile, start): small profiles first, each profile's positions in their best
    order."""
    by_size = sorted(profiles, key=lambda one: (one.memory_bytes, one.multiprocessors, one.ofa_engines, one.name))
    return tuple((one, start) for one in by_size for start in best_positions(profiles, one))


@functools.cache
def best_positions(profiles: Profiles, profile: Profile) -> tuple[int, ...]:
    """Return the starts of a profile such that the first leaves the most other instances possible, the first two leave
    the most of all orders that begin like this, and so on. Among equals the highest start comes first."""
    taken = {(one.id, start): frozenset(things("", profiles, one, start)) for one in profiles for start in one.starts}
    mine = [taken[profile.id, start] for start in profile.starts]

    def left(chosen: tuple[int, ...]) -> int:
        used = frozenset().union(*(mine[index] for index in chosen))
        return sum(used.isdisjoint(one) for one in taken.values())

    @functools.cache
    def best(chosen: frozenset[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (numbers left possible after each step, indexes) for the rest of the positions."""
        rest = [index for index in reversed(range(len(mine))) if index not in chosen]
        if not rest:
            return (), ()
        found = []
        for index in rest:
            after, order = best(chosen | {index})
            found.append(((left((*chosen, index)), *after), (index, *order)))
        return max(found, key=lambda one: one[0])

    return tuple(profile.starts[index] for index in best(frozenset())[1])
