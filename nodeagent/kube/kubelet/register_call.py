"""The Register call, and what its result means for the path it named: the only place that interprets kubelet's
errors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import grpc

from nodeagent.kube.kubelet import sockets
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import deviceplugin_pb2_grpc as rpc

_UNSENT = "failed to connect to all addresses"
"""How gRPC's text starts when the call found no server: the only failure that cannot have reached kubelet."""
_UNANSWERED = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


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
    async with sockets.channel(kubelet) as channel:
        try:
            stub = rpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]
            await stub.Register(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            reason = f"cannot register {request.resource_name} at {kubelet}: {sockets.cause(error)}"
            return RegisterOutcome(outcome_of(error.code(), error.details() or ""), reason)
    return RegisterOutcome(Outcome.TAKEN)


def outcome_of(code: grpc.StatusCode, details: str) -> Outcome:
    """Return what a failed Register means for the path. Only a certain failure to send counts as UNSENT."""
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_UNSENT):
        return Outcome.UNSENT
    return Outcome.UNANSWERED if code in _UNANSWERED else Outcome.REFUSED
