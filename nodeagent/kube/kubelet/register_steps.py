"""What to do next to have one resource registered, as a table. Pure.

What the table goes by, of kubelet's device manager (Kubernetes 1.36 and 1.37):

- kubelet empties the folder when it starts and dials back inside Register: serve after it has started, and before.
- Up to 1.36 the end of a stream ends whichever registration its resource has by then; from 1.37 a Register for a path
  whose stream is open is refused, and that path is lost. So nothing is registered while a stream is open, and no path
  is offered twice.
- A stream on a path can only come from the kubelet that the path was offered to: it proves that kubelet took it,
  whatever became of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OfferedTo(StrEnum):
    """The kubelet that the current path was named to in a Register."""

    NONE = "none"
    ANOTHER = "another"
    """One whose socket no longer lies in the folder."""
    CURRENT = "current"


class Step(StrEnum):
    """What a resource needs next."""

    REST = "rest"
    AWAIT_KUBELET = "await-kubelet"
    SERVE = "serve"
    """End the server there is, with its streams, and serve on a new path."""
    GIVE_UP = "give-up"
    """The same, because kubelet does not watch the path that it was offered."""
    OFFER = "offer"
    """Call Register with the path."""
    COUNT = "count"
    """Kubelet watches: that counts as registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the next step depends on."""

    kubelet: bool
    """Whether kubelet's socket is there."""
    served: bool
    """Whether the socket that is served lies at its path."""
    offered_to: OfferedTo
    watched: bool
    """Whether a ListAndWatch stream is open."""
    due: bool
    """Whether the time is over that the last step was given to take effect."""


def next_step(facts: Facts) -> Step:
    """Return the step for these facts: the first line that matches."""
    match facts:
        # Where nobody could register again, a stream that works is kept.
        case Facts(kubelet=False, watched=True):
            return Step.REST
        case Facts(kubelet=False):
            return Step.AWAIT_KUBELET
        case Facts(served=False, due=True):
            return Step.SERVE
        case Facts(served=False):
            return Step.REST
        case Facts(offered_to=OfferedTo.ANOTHER):
            return Step.SERVE
        case Facts(offered_to=OfferedTo.NONE, due=True):
            return Step.OFFER
        case Facts(offered_to=OfferedTo.CURRENT, watched=True):
            return Step.COUNT
        case Facts(offered_to=OfferedTo.CURRENT, due=True):
            return Step.GIVE_UP
    return Step.REST
