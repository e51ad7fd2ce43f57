"""Sets of NUMA nodes with enough of everything, in the order in which to try them: fewest packages, then fewest nodes.

The demand on a set is a vector (CPUs, pages of each size, bytes of memory, devices of each kind), and so is what a node
gives. A branch is abandoned as soon as the best remaining nodes cannot make up what is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nodeagent.core.model.topology import NodeId

MOST_STEPS = 20_000
"""Number of branches examined for one request before the best result so far is taken."""
MOST_SETS = 512
"""Highest number of equally small sets kept."""


@dataclass(slots=True)
class Steps:
    """The remaining search budget, shared by all parts of one request."""

    left: int = MOST_STEPS
    cut: bool = False
    """True if something was left out: the answer may not be the best."""

    def take(self) -> bool:
        """Count one step. Return whether any was left."""
        self.left -= 1
        if self.left < 0:
            self.cut = True
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class Unit:
    """Nodes that can only be used together: a NUMA node, or all nodes of a package."""

    nodes: tuple[NodeId, ...]
    gives: tuple[int, ...]
    packages: int
    """Mask of packages."""


@dataclass(slots=True)
class Cover:
    """Sets of units that give what is wanted."""

    units: Sequence[Unit]
    want: tuple[int, ...]
    steps: Steps
    _best: list[list[list[int]]] = field(default_factory=list)

    def least(self) -> int:
        """Return a lower bound on the size of a sufficient set; more than the number of units if none is sufficient."""
        ahead = zip(self._ahead()[0], self.want, strict=True)
        return max((next((r for r, most in enumerate(sums) if most >= w), len(sums)) for sums, w in ahead), default=0)

    def of_size(self, count: int, packages: int = 0) -> Iterator[tuple[Unit, ...]]:
        """Yield all sets of `count` units, in order of their members. packages: how many they span exactly (0: any)."""
        if count == 1:
            return ((u,) for u in self.units if _enough(u.gives, self.want) and _spans(u.packages, packages))
        return self._grow(0, count, packages, (), 0, self.want)

    def by_size(self) -> Iterator[list[tuple[Unit, ...]]]:
        """Yield all sets with the fewest packages and units, then the next fewest, until the steps are used up."""
        mask = 0
        for unit in self.units:
            mask |= unit.packages
        none = any(not unit.packages for unit in self.units)
        for packages in range(0 if none else 1, mask.bit_count() + 1):
            for count in range(max(1, packages, self.least() if packages > 1 else 1), len(self.units) + 1):
                found = self._level(count, packages)
                if found:
                    yield found
                if self.steps.left < 0:
                    return

    def _level(self, count: int, packages: int) -> list[tuple[Unit, ...]]:
        found = list(itertools.islice(self.of_size(count, packages or -1), MOST_SETS + 1))
        if len(found) > MOST_SETS:
            self.steps.cut = True
            found.pop()
        return found

    def _grow(
        self, at: int, count: int, packages: int, chosen: tuple[Unit, ...], mask: int, missing: Sequence[int]
    ) -> Iterator[tuple[Unit, ...]]:
        """Add `count` units, starting at position `at`."""
        if count == 0:
            if _spans(mask, packages) and max(missing, default=0) <= 0:
                yield chosen
            return
        best = self._ahead()
        for i in range(at, len(self.units) - count + 1):
            if not self.steps.take() or any(
                sums[count] < lacks for sums, lacks in zip(best[i], missing, strict=True) if lacks > 0
            ):
                return
            unit = self.units[i]
            both = mask | unit.packages
            if packages and both.bit_count() > max(packages, 0):
                continue
            rest = [lacks - gives for lacks, gives in zip(missing, unit.gives, strict=True)]
            yield from self._grow(i + 1, count - 1, packages, (*chosen, unit), both, rest)

    def _ahead(self) -> list[list[list[int]]]:
        """Return a table in which [i][d][r] is the most of component d that r units from position i on can give."""
        if not self._best:
            for i in range(len(self.units) + 1):
                columns = [sorted((u.gives[d] for u in self.units[i:]), reverse=True) for d in range(len(self.want))]
                self._best.append([[0, *itertools.accumulate(column)] for column in columns])
        return self._best


def _enough(gives: Sequence[int], want: Sequence[int]) -> bool:
    return all(one >= w for one, w in zip(gives, want, strict=True))


def _spans(mask: int, packages: int) -> bool:
    """Return whether a set spans the required number of packages (0: any; -1: none)."""
    return packages == 0 or mask.bit_count() == max(packages, 0)
