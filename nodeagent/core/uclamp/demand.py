"""What containers that hold exclusive CPUs ask of utilization clamps, from the ledger, the configuration and pods'
annotations. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.opaque.settings import known_settings
from nodeagent.core.pinning.pools import pool_of
from nodeagent.core.uclamp.clamps import NO_CLAMP, Clamp, both
from nodeagent.errors import InputError

ANNOTATION = "uclamp-class"
"""Of a pod, after the domain of the configuration; with .CONTAINER for one container."""


class Classes(msgspec.Struct, frozen=True, kw_only=True):
    """Clamps of the configuration that claims and pods name."""

    clamps: Mapping[str, Clamp]
    """By name."""
    default: str = ""
    """The class of containers whose claims and pods name none; "" if they are not clamped."""

    def clamp(self, name: str) -> Clamp:
        """Return the clamp of a class. Raise InputError if there is none of that name."""
        if name not in self.clamps:
            have = ", ".join(sorted(self.clamps)) or "none"
            raise InputError(f"there is no uclamp class {name[:64]!r} on this node (pinning.uclamp.classes has {have})")
        return self.clamps[name]


def concerned(grant: Grant) -> bool:
    """Return whether a claim asks for a clamp or for a class."""
    # Nearly all grants have no such settings: they are not decoded.
    return grant.holder.api == CLAIM and '"uclamp_' in grant.settings


def clamp_of_claims(grants: Iterable[Grant], classes: Classes | None) -> Clamp:
    """Return what claims ask for together; NO_CLAMP if none does. classes: None if the node has no configuration of
    clamps. Raise InputError for a class that there is not."""
    return both(_own(one, classes) for one in grants if concerned(one))


def _own(grant: Grant, classes: Classes | None) -> Clamp:
    settings = known_settings(grant.settings)
    if not settings.uclamp_class:
        return Clamp(min_hundredths=settings.uclamp_min_hundredths, max_hundredths=settings.uclamp_max_hundredths)
    if classes is None:
        name = settings.uclamp_class[:64]
        raise InputError(f"there are no uclamp classes on this node (pinning.uclamp is not set): {name!r}")
    return classes.clamp(settings.uclamp_class)


def clamp_of(
    grants: Sequence[Grant], annotations: Mapping[str, str], domain: str, container: str, classes: Classes | None
) -> Clamp:
    """Return the clamp of a container that has these grants; NO_CLAMP if it is not clamped.

    Only one with exclusive CPUs is. What its claims ask for comes before the annotations of its pod, of which the one
    for the container comes before the one for all, and these before the default class. Raise InputError for a class
    that there is not.
    """
    if not any(one.cpus and pool_of(one) is None for one in grants):
        return NO_CLAMP
    own = clamp_of_claims(grants, classes)
    if own != NO_CLAMP or classes is None:  # otherwise as on nodes that never had it: any pod may have annotations
        return own
    key = f"{domain}/{ANNOTATION}"
    name = annotations.get(f"{key}.{container}", annotations.get(key, "")) or classes.default
    return classes.clamp(name) if name else NO_CLAMP
