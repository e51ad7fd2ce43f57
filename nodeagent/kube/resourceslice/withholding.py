"""Whether slices leave out what claims take of the Node's resources, because the API server refused it.

The server answers 403 to every slice that says it, unless the Node declares the feature (Kubernetes 1.37 and 1.38,
plugin/pkg/admission/nodedeclaredfeatures). That is no refusal of the pool: the same pool without it is taken.
"""

from __future__ import annotations

from nodeagent.kube.resourceslice.pool_writer import PublishPace

_NEVER = object()


class Withholding:
    """Holds back from a refusal until the Node has changed, or some time has passed. Times are from a monotonic clock,
    in seconds."""

    def __init__(self, pace: PublishPace) -> None:
        self.reason = ""
        """Why the server refused it last."""
        self._pace = pace
        self._node: object = _NEVER
        self._until_s = 0.0
        self._times = 0

    def refused(self, node: object, now_s: float, reason: str) -> None:
        """Record a refusal. node: what was known of the Node by then."""
        self._times = self._times + 1 if node == self._node else 0
        wait_s = min(self._pace.refused_s * 2.0 ** min(self._times, 64), self._pace.most_s)
        self._node, self._until_s, self.reason = node, now_s + wait_s, reason

    def left_s(self, node: object, now_s: float) -> float:
        """Return for how many seconds it is still left out, or 0 if it may be published."""
        return max(0.0, self._until_s - now_s) if node == self._node else 0.0
