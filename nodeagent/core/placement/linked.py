"""Groups of devices that are linked each with each. Pure and deterministic.

Nodes have at most MOST_MEMBERS linked devices; of more, none are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MOST_MEMBERS = 16
Pair = tuple[str, str]


def complete_groups(pairs: Iterable[Pair]) -> tuple[tuple[str, ...], ...]:
    """Return disjoint groups of two and more in which every two are linked: the largest first, and of equally large ones
    that with the first members in order of id."""
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
