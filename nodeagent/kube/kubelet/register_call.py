"""The Register call, and what its end says of the path that it named: the one place that reads kubelet's errors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import grpc

from nodeagent.kube.kubelet import sockets
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import deviceplugin_pb2_grpc as rpc

_UNSENT = "failed to connect to all addresses"
"""How gRPC's text begins where the call found no server: the one failure that kubelet cannot have heard of."""
_UNANSWERED = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


class Outcome(StrEnum):
    """What is known of a path after a Register."""

    TAKEN = "taken"
    """Kubelet said yes: it is about to watch."""
    UNANSWERED = "unanswered"
    """Kubelet may have taken it, or may be about to."""
    REFUSED = "refused"
    """Kubelet said no, also "already connected" (1.37): what it knows of the path by now is not known."""
    UNSENT = "unsent"
    """Kubelet has not heard of the path."""


class RegisterOutcome(NamedTuple):
    """What came of a Register, and why."""

    outcome: Outcome
    reason: str = ""
    """Why it was not taken, on one line."""


async def register(kubelet: Path, request: pb.RegisterRequest, timeout_s: float) -> RegisterOutcome:
    """Call Register at kubelet's socket, and return what came of it."""
    async with sockets.channel(kubelet) as channel:
        try:
            stub = rpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]
            await stub.Register(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            reason = f"cannot register {request.resource_name} at {kubelet}: {sockets.cause(error)}"
            return RegisterOutcome(outcome_of(error.code(), error.details() or ""), reason)
    return RegisterOutcome(Outcome.TAKEN)


def outcome_of(code: grpc.StatusCode, details: str) -> Outcome:
    """What a failed Register says of the path. What is not known for certain to be UNSENT is not."""
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_UNSENT):
        return Outcome.UNSENT
    return Outcome.UNANSWERED if code in _UNANSWERED else Outcome.REFUSED
