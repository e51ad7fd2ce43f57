"""What claims and containers ask of disk I/O, from the ledger, the configuration and pods' annotations. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from nodeagent.core.blockio.limits import NO_LIMITS, IoLimits
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.opaque.settings import OpaqueConfig, from_json
from nodeagent.errors import InputError

ANNOTATION = "io-class"
"""Of a pod, after the domain of the configuration; with .CONTAINER for one container."""
_KEPT_SETTINGS = 4096


class IoClass(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the configuration that claims and pods name."""

    name: str
    limits: IoLimits
    disks: tuple[str, ...] = ()
    """On which disks it limits pods that name it: shell patterns of the kernel's names, or paths below /dev."""


Classes = Mapping[str, IoClass]
"""By name."""


class IoAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that apply to some disks."""

    limits: IoLimits
    devices: tuple[str, ...] = ()
    """Ids of devices of the inventory."""
    disks: tuple[str, ...] = ()
    """As of a class."""


@functools.lru_cache(_KEPT_SETTINGS)
def _settings(text: str) -> OpaqueConfig:
    return from_json(text)


def concerned(grant: Grant) -> bool:
    """Return whether a claim asks for limits or for a class."""
    # Nearly all grants have no such settings: they are not decoded.
    if grant.holder.api != CLAIM or '"io_' not in grant.settings:
        return False
    settings = _settings(grant.settings)
    return bool(settings.io_class) or _own(settings) != NO_LIMITS


def _own(settings: OpaqueConfig) -> IoLimits:
    return IoLimits(
        read_bps=settings.io_read_bps,
        write_bps=settings.io_write_bps,
        read_iops=settings.io_read_iops,
        write_iops=settings.io_write_iops,
        weight=settings.io_weight,
        latency_us=settings.io_latency_us,
    )


def asks_of_claims(grants: Iterable[Grant], classes: Classes | None) -> Iterator[IoAsk]:
    """Yield what claims ask for their own devices. classes: None if the node has no configuration of I/O. Raise
    InputError for a class that there is not."""
    for one in grants:
        if concerned(one):
            settings = _settings(one.settings)
            limits = _class(settings.io_class, classes).limits if settings.io_class else _own(settings)
            yield IoAsk(limits=limits, devices=(*one.devices, *one.shares))


def asks_of_pod(annotations: Mapping[str, str], domain: str, container: str, classes: Classes) -> Iterator[IoAsk]:
    """Yield what a container of a pod is limited to by the pod's annotations, of which the one for the container comes
    before the one for all. Raise InputError for a class that there is not, or that names no disks."""
    key = f"{domain}/{ANNOTATION}"
    if not (name := annotations.get(f"{key}.{container}", annotations.get(key, ""))):
        return
    found = _class(name, classes)
    if not found.disks:
        raise InputError(f"the I/O class {name!r} of its pod's annotation names no disks (pinning.io.classes)")
    yield IoAsk(limits=found.limits, disks=found.disks)


def _class(name: str, classes: Classes | None) -> IoClass:
    if classes is None:
        raise InputError(f"there are no I/O classes on this node (pinning.io is not set): {name[:64]!r}")
    if name not in classes:
        have = ", ".join(sorted(classes)) or "none"
        raise InputError(f"there is no I/O class {name[:64]!r} on this node (pinning.io.classes has {have})")
    return classes[name]
