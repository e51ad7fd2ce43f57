"""A ResourceClaim as frozen values: what the scheduler allocated to it and what was prepared for it.

Names follow resource.k8s.io/v1. This module only holds values; core/dra/prepare.py makes the decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.model.health import DeviceState

FROM_CLASS, FROM_CLAIM = "FromClass", "FromClaim"
"""Values of Opaque.source, in the order in which they are applied."""


class ClaimRef(msgspec.Struct, frozen=True, kw_only=True):
    """A reference to a claim, as kubelet names it."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One device that the scheduler allocated (DeviceRequestAllocationResult)."""

    request: str
    """Name of the request, or "request/subrequest"."""
    driver: str
    pool: str
    device: str
    share_id: str = ""
    """Set if the device is shared."""
    admin: bool = False
    """adminAccess: the claim can access the device without holding it."""
    consumed: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Amounts consumed of a shared device's capacity, by qualified name."""

    def __str__(self) -> str:
        amounts = ", ".join(f"{name}={amount}" for name, amount in self.consumed.items())
        return f"{self.pool}/{self.device}" + (f" ({amounts})" if amounts else "")


class Opaque(msgspec.Struct, frozen=True, kw_only=True):
    """Opaque configuration of some requests (DeviceAllocationConfiguration), not decoded yet."""

    source: str
    driver: str
    requests: tuple[str, ...] = ()
    """Names of the requests it applies to; empty means all requests."""
    parameters: Mapping[str, Any] = msgspec.field(default_factory=lambda: MappingProxyType({}))


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A claim as stored in the API server."""

    ref: ClaimRef
    allocated: bool = False
    results: tuple[Result, ...] = ()
    """Results of all drivers, in allocation order."""
    configs: tuple[Opaque, ...] = ()
    reserved_for: tuple[str, ...] = ()
    """UIDs of the pods and groups of pods that may use it."""
    groups: tuple[str, ...] = ()
    """UIDs of those among them that are not pods, such as PodGroups (DRAWorkloadResourceClaims): which pods may use it
    through them is known to kubelet alone."""
    pods: tuple[str, ...] = ()
    """Names of the pods among them."""
    pod_claim: str = ""
    """Its name in the pod for which it was made from a template, or ""."""

    def pods_with(self, known: Iterable[str]) -> tuple[str, ...]:
        """Return the UIDs of its pods. Those `known` so far count only while it is reserved for a group of pods."""
        others = known if self.groups else ()
        return tuple(one for one in dict.fromkeys((*self.reserved_for, *others)) if one not in self.groups)


class PreparedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a prepared claim, as reported to kubelet."""

    requests: tuple[str, ...]
    pool: str
    device: str
    cdi_ids: tuple[str, ...] = ()
    share_id: str = ""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one claim: its devices, or why it cannot be prepared."""

    devices: tuple[PreparedDevice, ...] = ()
    error: str = ""


class DeviceHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Health of one device of a pool, as reported to kubelet."""

    pool: str
    device: str
    state: DeviceState
    since_unix_s: float
    message: str = ""
