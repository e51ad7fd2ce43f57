"""The plain oracle: what the compiled core must find, by trying everything. Written from docs/placement.md alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Row = tuple[int, int, int, int, int]
"""cpu, package, node, l3, core."""


@dataclass(frozen=True)
class Case:
    """One question to the compiled core."""

    rows: tuple[Row, ...]
    distances: tuple[int, ...]
    free: frozenset[int]
    want: int
    must: frozenset[int] = frozenset()
    whole_cores: bool = False
    spread_cores: bool = False
    spread_nodes: bool = False
    groups_first: bool = False
    most_packages: int = 0
    most_nodes: int = 0
    near: tuple[tuple[int, int], ...] = ()
    taste: tuple[tuple[int, int], ...] = ()
    places: dict[int, Row] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {row[0]: row for row in self.rows})

    @property
    def nodes(self) -> int:
        return max(row[2] for row in self.rows) + 1

    def members(self, depth: int) -> dict[Row, set[int]]:
        """CPUs by (package, node, l3, core), by its first `depth` parts."""
        out: dict[Row, set[int]] = {}
        for row in self.rows:
            out.setdefault(row[1 : 1 + depth], set()).add(row[0])  # type: ignore[arg-type]
        return out


class Parts(NamedTuple):
    """The parts of the cost of a choice, in the order without options."""

    near: int
    taste: int
    packages: int
    nodes: int
    distance: int
    l3: int
    split: int
    nodes_broken: int
    l3_broken: int
    cores_broken: int
    ids: int
    uneven: int
    """With spread_nodes: how many CPUs the largest share of a node is above the smallest, if more than a step."""


def ordered(case: Case, parts: Parts) -> tuple[int, ...]:
    """The parts as the options rank them, most important first."""
    cores = (parts.split, parts.l3) if case.spread_cores else (parts.l3, parts.split)
    nodes = (parts.packages, parts.nodes, parts.uneven, parts.distance)
    order = (parts.uneven > 0, parts.near, parts.taste, *nodes, *cores, *parts[7:11])
    return (parts.l3, *order) if case.groups_first else order


def cost(case: Case, chosen: Sequence[int]) -> tuple[int, ...] | None:
    """The whole cost of a choice, most important part first; None where it is not allowed."""
    parts = parts_of(case, chosen)
    return None if parts is None else ordered(case, parts)


def parts_of(case: Case, chosen: Sequence[int]) -> Parts | None:
    """The parts of the cost of a choice; None where it is not allowed."""
    rows = [case.places[cpu] for cpu in chosen]
    packages, nodes = {row[1] for row in rows}, {row[2] for row in rows}
    if not case.must <= set(chosen) or not set(chosen) <= case.free:
        return None
    if (case.most_nodes and len(nodes) > case.most_nodes) or (
        case.most_packages and len(packages) > case.most_packages
    ):
        return None
    cores, groups = case.members(4), case.members(3)
    touched = {row[1:5] for row in rows}
    used = {row[1:4] for row in rows}
    partly = sum(1 for core in touched if not cores[core] <= set(chosen))
    if case.whole_cores and partly:
        return None
    on_node = {node: {row[0] for row in case.rows if row[2] == node} for node in nodes}
    return Parts(
        _weigh(case.near, chosen),
        _weigh(case.taste, chosen),
        len(packages),
        len(nodes),
        sum(case.distances[a * case.nodes + b] for a in nodes for b in nodes if a != b),
        len(used),
        len(chosen) - len(touched) if case.spread_cores else partly,
        sum(1 for node in nodes if on_node[node] <= case.free),
        sum(1 for group in used if groups[group] <= case.free),
        sum(1 for core in touched if cores[core] <= case.free),
        sum(chosen),
        _uneven(case, rows) if case.spread_nodes else 0,
    )


def best(case: Case) -> tuple[int, ...] | None:
    """The least cost of all choices; None where there is no choice."""
    found = (cost(case, chosen) for chosen in itertools.combinations(sorted(case.free), case.want))
    return min((one for one in found if one is not None), default=None)


def _weigh(pairs: Iterable[tuple[int, int]], chosen: Iterable[int]) -> int:
    return sum(weight for mask, weight in pairs for cpu in chosen if mask >> cpu & 1)


def _uneven(case: Case, rows: Sequence[Row]) -> int:
    """By how many CPUs the shares of the nodes used differ; 0 for a core (a CPU, where cores may be split) or less."""
    counts = [sum(1 for row in rows if row[2] == node) for node in {row[2] for row in rows}]
    step = max(len(core) for core in case.members(4).values()) if case.whole_cores else 1
    difference = max(counts) - min(counts)
    return difference if difference > step else 0
