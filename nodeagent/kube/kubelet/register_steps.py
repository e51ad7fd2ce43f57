"""The next step in registering a resource, as a table. Pure.

The table relies on these properties of kubelet's device manager (Kubernetes 1.36 and 1.37):

- Kubelet empties the folder when it starts and dials back inside Register: serve after it has started, and before
  Register.
- Up to 1.36 the end of a stream ends the current registration of its resource, whichever that is; from 1.37 a Register
  for a path whose stream is open is refused, and that path is lost. So nothing is registered while a stream is open,
  and no path is offered twice.
- A stream on a path can only come from the kubelet that was offered the path: it proves that kubelet accepted it,
  whatever became of the response.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class OfferedTo(StrEnum):
    """The kubelet that was given the current path in a Register."""

    NONE = "none"
    ANOTHER = "another"
    """One whose socket is no longer in the folder."""
    CURRENT = "current"


class Step(StrEnum):
    """The next step for a resource."""

    REST = "rest"
    AWAIT_KUBELET = "await-kubelet"
    SERVE = "serve"
    """Stop the current server, ending its streams, and serve on a new path."""
    GIVE_UP = "give-up"
    """The same, because kubelet does not watch the path it was offered."""
    OFFER = "offer"
    """Call Register with the path."""
    COUNT = "count"
    """Kubelet watches: count the resource as registered."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All inputs of the decision."""

    kubelet: bool
    """Whether kubelet's socket exists."""
    served: bool
    """Whether the socket being served is still at its path."""
    offered_to: OfferedTo
    watched: bool
    """Whether a ListAndWatch stream is open."""
    due: bool
    """Whether the last step has had its allotted time to take effect."""


def next_step(facts: Facts) -> Step:
    """Return the step for these facts: the first case that matches."""
    match facts:
        # Without kubelet's socket nothing can be registered again, so a working stream is kept.
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
