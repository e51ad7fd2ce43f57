"""Whether kubelet shows what was sent to it: like compared with like, and not at once.

Kubelet needs a moment to show a new list. So what changed while it was asked does not count, and a resource that it has
shown before may differ for GRACE_S before that is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set

GRACE_S = 5.0
Pairs = Set[tuple[str, str]]
"""(resource, id) of healthy devices."""


class ShownCheck:
    """The comparison with kubelet's newest answer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds."""
        self._clock = clock
        self._differs_since: dict[str, float] = {}
        self._shown_once: set[str] = set()

    def compare(self, names: Set[str], before: Pairs, after: Pairs, shown: Pairs) -> None:
        """Take an answer of kubelet.

        names: the resources that are served. before, after: what was sent when kubelet was asked, and when it had
        answered."""
        mine = {(name, one) for name, one in shown if name in names}
        differing = {name for name, _ in (before ^ mine) - (before ^ after)}
        now = self._clock()
        self._differs_since = {name: self._differs_since.get(name, now) for name in differing}
        self._shown_once |= names - differing

    def forget(self) -> None:
        """Kubelet cannot answer: nothing is known against it."""
        self._differs_since = {}

    @property
    def differing(self) -> list[str]:
        """Return the resources that kubelet did not show as they were sent when it was last asked."""
        return sorted(self._differs_since)

    @property
    def unshown(self) -> list[str]:
        """Return those among them that it never showed so, or not for longer than it may take."""
        late = self._clock() - GRACE_S
        return [name for name in self.differing if name not in self._shown_once or self._differs_since[name] < late]
