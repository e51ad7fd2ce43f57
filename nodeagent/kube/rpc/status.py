"""How calls fail: the status codes of gRPC, and the errors that carry them.

Source: doc/statuscodes.md of github.com/grpc/grpc.
"""

from __future__ import annotations

import enum

from nodeagent.errors import PeerError


class Code(enum.IntEnum):
    """Status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class RpcError(PeerError):
    """A call that got no answer. Reads "CODE: details"."""

    def __init__(self, code: Code, details: str, *, sent: bool = True) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.sent = sent
        """Whether the peer may have received the request."""


class AbortedError(Exception):
    """Ends a call that is being served with a status other than OK."""

    def __init__(self, code: Code, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
