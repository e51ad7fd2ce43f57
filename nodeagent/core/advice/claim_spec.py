"""What a ResourceClaim asks for, as frozen values; names follow resource.k8s.io/v1. Parsed in kube/claim_spec.py."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.advice.cel import Selector
from nodeagent.core.model.claim import Opaque


class Toleration(msgspec.Struct, frozen=True, kw_only=True):
    """A toleration of taints of devices (DeviceToleration)."""

    key: str = ""
    """"" with `exists`: every key."""
    exists: bool = False
    value: str = ""
    effect: str = ""
    """"" for every effect."""


class DeviceAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of one class: an exact request, or one alternative of several (DeviceSubRequest)."""

    name: str
    """REQUEST, or REQUEST/SUBREQUEST."""
    selectors: tuple[Selector, ...] = ()
    """Those of the class, then its own. All must match."""
    count: int = 1
    """0: every device that matches (allocationMode All)."""
    admin: bool = False
    tolerations: tuple[Toleration, ...] = ()
    capacity: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Amounts by qualified name."""
    configs: tuple[Opaque, ...] = ()
    """Those of the class."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint over the devices of some requests (DeviceConstraint)."""

    attribute: str
    """Qualified name."""
    requests: tuple[str, ...] = ()
    """Empty: of all requests."""
    distinct: bool = False
    """True: no two have the same value; False: all have the same one."""


class ClaimSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one claim asks for. Each request is a tuple of alternatives, the best first."""

    requests: tuple[tuple[DeviceAsk, ...], ...]
    constraints: tuple[Constraint, ...] = ()
    configs: tuple[Opaque, ...] = ()
