"""Registration status of a resource with kubelet, and the timing of its repair."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any, Self

import msgspec
from msgspec.structs import replace


class RegistrationState(StrEnum):
    """Registration state of a resource or driver."""

    WAITING = "waiting"
    """Kubelet is not there yet."""
    REGISTERED = "registered"
    """Kubelet has accepted it."""
    FAILED = "failed"
    """The last attempt failed and is being retried."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Registration status with kubelet, and since when."""

    state: RegistrationState = RegistrationState.WAITING
    since_unix_s: float
    """When the state began."""
    reason: str = ""
    """What is being waited for, or why the last attempt failed."""

    def to(self, state: RegistrationState, reason: str, **changes: Any) -> Self:
        """Return the status after a change; since_unix_s is kept if the state stays the same."""
        since_unix_s = self.since_unix_s if state == self.state else time.time()
        return replace(self, state=state, since_unix_s=since_unix_s, reason=reason, **changes)


class Registration(Standing, frozen=True, kw_only=True):
    """Registration status of one resource."""

    resource: str
    kubelet_inode: int | None = None
    """Inode of the kubelet.sock that accepted the last registration."""
    watched: bool = False
    """Whether kubelet is watching the device list now."""

    @property
    def ready(self) -> bool:
        """Return whether kubelet has accepted and watches the resource."""
        return self.state == RegistrationState.REGISTERED and self.watched


class RegistrationTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Timing of registration and retries, in seconds."""

    poll_s: float = 5.0
    """Fallback poll interval in addition to the folder watch."""
    register_s: float = 12.0
    """Deadline of one Register call; kubelet itself takes up to 10 s to dial back."""
    clean_up_s: float = 0.2
    """How long kubelet gets to notice the end of a stream or Register before the next Register: up to 1.36 it would
    otherwise end the new registration along with the old one."""
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    unwatched_s: float = 1.0
    """How long an offered path may go unwatched before another is tried. After an accepted Register it is doubled, up
    to unwatched_most_s, as long as kubelet does not watch."""
    unwatched_most_s: float = 30.0


DEFAULT_PACE = RegistrationTiming()
