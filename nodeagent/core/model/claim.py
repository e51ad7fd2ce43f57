"""A ResourceClaim as frozen values: what the scheduler allocated to it, and what was prepared for it.

Names follow resource.k8s.io/v1. Nothing here reads or decides; core/dra/prepare.py does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nodeagent.core.model.health import DeviceState

FROM_CLASS, FROM_CLAIM = "FromClass", "FromClaim"
"""Opaque.source, in the order in which they are applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRef:
    """A claim as kubelet names it."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One device that the scheduler allocated (DeviceRequestAllocationResult)."""

    request: str
    """Name of the request, or "request/subrequest"."""
    driver: str
    pool: str
    device: str
    share_id: str = ""
    """Set where the device is shared."""
    admin: bool = False
    """adminAccess: sees the device without holding it."""
    consumed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What it takes of a shared device's capacity, by qualified name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """Configuration of some requests (DeviceAllocationConfiguration), not decoded yet."""

    source: str
    driver: str
    requests: tuple[str, ...] = ()
    """Names of requests; none: all."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim as the API server has it."""

    ref: ClaimRef
    allocated: bool = False
    results: tuple[Result, ...] = ()
    """Of every driver, in the order of the allocation."""
    configs: tuple[Opaque, ...] = ()
    reserved_for: tuple[str, ...] = ()
    """UIDs of the pods (or other users) that may use it."""
    pods: tuple[str, ...] = ()
    """Names of the pods among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDevice:
    """One device of a prepared claim, as kubelet is told of it."""

    requests: tuple[str, ...]
    pool: str
    device: str
    cdi_ids: tuple[str, ...] = ()
    share_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The answer for one claim: its devices, or why it cannot be prepared."""

    devices: tuple[PreparedDevice, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHealth:
    """Health of one device of a pool, as kubelet is told of it."""

    pool: str
    device: str
    state: DeviceState
    since_unix_s: float
    message: str = ""
