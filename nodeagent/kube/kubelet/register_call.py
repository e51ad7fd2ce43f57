"""The Register call, and what its result means for the path it named: the only place that interprets kubelet's
errors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from nodeagent.kube.rpc import client
from nodeagent.kube.rpc.status import Code, RpcError
from nodeagent.kube.rpc.wire import method_of
from nodeagent.pb import deviceplugin_pb2 as pb

_REGISTER = method_of(pb.DESCRIPTOR, "Registration", "Register")
_UNANSWERED = (Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.UNAVAILABLE)


class Outcome(StrEnum):
    """What is known about a path after a Register."""

    TAKEN = "taken"
    """Kubelet accepted it and is about to watch."""
    UNANSWERED = "unanswered"
    """Kubelet may have accepted it, or may be about to."""
    REFUSED = "refused"
    """Kubelet refused, including with "already connected" (1.37); what it now knows of the path is unknown."""
    UNSENT = "unsent"
    """The call never reached kubelet."""


class RegisterOutcome(NamedTuple):
    """Result of a Register call."""

    outcome: Outcome
    reason: str = ""
    """Why it was not accepted, on one line."""


async def register(kubelet: Path, request: pb.RegisterRequest, timeout_s: float) -> RegisterOutcome:
    """Call Register at kubelet's socket and return the result."""
    try:
        await client.call(kubelet, _REGISTER, request, timeout_s)
    except RpcError as error:
        return RegisterOutcome(outcome_of(error), f"cannot register {request.resource_name} at {kubelet}: {error}")
    return RegisterOutcome(Outcome.TAKEN)


def outcome_of(error: RpcError) -> Outcome:
    """Return what a failed Register means for the path. Only a certain failure to send counts as UNSENT."""
    if not error.sent:
        return Outcome.UNSENT
    return Outcome.UNANSWERED if error.code in _UNANSWERED else Outcome.REFUSED
