"""How a resource stands with kubelet, and how fast that is put right."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self


class RegistrationState(StrEnum):
    """Of a resource or a driver, with kubelet."""

    WAITING = "waiting"
    """There is no kubelet yet."""
    REGISTERED = "registered"
    """Kubelet took it."""
    FAILED = "failed"
    """The last try failed and is repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How something stands with kubelet, and since when."""

    state: RegistrationState = RegistrationState.WAITING
    since_unix_s: float
    """When the state began."""
    reason: str = ""
    """What is waited for, or why the last try failed."""

    def to(self, state: RegistrationState, reason: str, **changes: Any) -> Self:
        """Return what it is from now on."""
        since_unix_s = self.since_unix_s if state == self.state else time.time()
        return replace(self, state=state, since_unix_s=since_unix_s, reason=reason, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration(Standing):
    """How one resource stands with kubelet."""

    resource: str
    kubelet_inode: int | None = None
    """The kubelet.sock that took the last registration."""
    watched: bool = False
    """Whether kubelet listens to the list of devices at this moment."""

    @property
    def ready(self) -> bool:
        """Return whether kubelet has taken the resource and watches it."""
        return self.state == RegistrationState.REGISTERED and self.watched


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationTiming:
    """How fast things are tried again, in seconds."""

    poll_s: float = 5.0
    """The safety net below the folder's watch."""
    register_s: float = 12.0
    """Deadline of one Register call; kubelet itself takes up to 10 s to dial back."""
    clean_up_s: float = 0.2
    """How long kubelet has to notice that a stream or a Register was ended, before the next Register: up to 1.36 it
    would end the new registration with the old one."""
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    unwatched_s: float = 1.0
    """How long a path that was offered may go unwatched, before another one is tried; after an answered Register
    doubled up to unwatched_most_s while that does not help."""
    unwatched_most_s: float = 30.0


DEFAULT_PACE = RegistrationTiming()
