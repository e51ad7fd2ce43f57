"""What claims and containers ask of resctrl, from the ledger and the configuration. Pure."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.opaque.settings import OpaqueConfig, from_json
from nodeagent.core.resctrl.model import Partition
from nodeagent.errors import InputError

PREFIX = "nodeagent-"
"""Begins the name of every group of the agent."""
ANNOTATION = "cache-class"
"""Of a pod, after the domain of the configuration; with .CONTAINER for one container."""
_KEPT_SETTINGS = 4096


def class_group(name: str) -> str:
    """Return the group of a shared class."""
    return f"{PREFIX}class-{name}"


def claim_group(uid: str) -> str:
    """Return the group of a claim that has ways or bandwidth of its own."""
    return f"{PREFIX}{uid}"


@functools.lru_cache(_KEPT_SETTINGS)
def _settings(text: str) -> OpaqueConfig:
    return from_json(text)


def concerns(grant: Grant) -> bool:
    """Return whether a claim asks for ways, for a limit of bandwidth, or for a shared class."""
    # Nearly all grants have no such settings: they are not decoded.
    if grant.holder.api != CLAIM or not ("cache_" in grant.settings or "memory_bandwidth_" in grant.settings):
        return False
    return _is_own(settings := _settings(grant.settings)) or bool(settings.cache_class)


def _is_own(settings: OpaqueConfig) -> bool:
    own = settings.cache_ways, settings.memory_bandwidth_percent, settings.memory_bandwidth_mbps
    return any(one is not None for one in own)


def cpus_of(grants: Iterable[Grant]) -> CpuSet:
    """Return the CPUs of all claims with ways or bandwidth of their own."""
    return union(one.cpus for one in grants if concerns(one) and _is_own(_settings(one.settings))) or EMPTY


def partitions(grants: Iterable[Grant], domain_of: Mapping[int, int]) -> list[Partition]:
    """Return what claims have for themselves, in the order of the ledger. domain_of: the L3 cache of each CPU.

    Of several grants of a claim on one L3 cache, the largest number of ways and the lowest limit apply.
    """
    claims: dict[str, list[Grant]] = {}
    for one in grants:
        if concerns(one) and _is_own(_settings(one.settings)):
            claims.setdefault(one.holder.uid, []).append(one)
    return [_partition(uid, some, domain_of) for uid, some in claims.items()]


def _partition(uid: str, grants: Iterable[Grant], domain_of: Mapping[int, int]) -> Partition:
    ways: dict[int, int] = {}
    domains: set[int] = set()
    percents, rates, holder = list[int](), list[int](), ""
    for one in grants:
        settings, holder = _settings(one.settings), str(one.holder)
        mine = {domain_of[cpu] for cpu in one.cpus if cpu in domain_of}
        domains |= mine
        for domain in mine if settings.cache_ways is not None else ():
            ways[domain] = max(ways.get(domain, 0), settings.cache_ways or 0)
        percents += [] if settings.memory_bandwidth_percent is None else [settings.memory_bandwidth_percent]
        rates += [] if settings.memory_bandwidth_mbps is None else [settings.memory_bandwidth_mbps]
    return Partition(
        group=claim_group(uid),
        holder=holder,
        ways=MappingProxyType(dict(sorted(ways.items()))),
        domains=frozenset(domains),
        percent=min(percents, default=None),
        mbps=min(rates, default=None),
    )


def missing_class(grants: Iterable[Grant], classes: Collection[str]) -> str:
    """Return why a claim cannot have the class that it names, or ""."""
    for one in grants:
        name = _settings(one.settings).cache_class if concerns(one) else ""
        if name and name not in classes:
            return _unknown(name, classes)
    return ""


def group_of(grants: Iterable[Grant], annotations: Mapping[str, str], domain: str, container: str) -> str:
    """Return the group that a container belongs to, or "" if that is none of the agent's.

    What its claims ask for comes before the annotations of its pod, of which the one for the container comes before the
    one for all. Raise InputError if claims ask for different groups: a task is in one.
    """
    found: dict[str, str] = {}
    for one in grants:
        if concerns(one):
            settings = _settings(one.settings)
            own = claim_group(one.holder.uid) if _is_own(settings) else class_group(settings.cache_class)
            found.setdefault(own, str(one.holder))
    if len(found) > 1:
        raise InputError(f"its claims ask for different cache ways or bandwidth: {', '.join(found.values())}")
    key = f"{domain}/{ANNOTATION}"
    annotated = annotations.get(f"{key}.{container}", annotations.get(key, ""))
    return next(iter(found), class_group(annotated) if annotated else "")


def unknown_group(group: str, classes: Collection[str]) -> str:
    """Return why there can be no such group, or "" if it is a claim's or a configured class's."""
    name = group.removeprefix(class_group(""))
    return _unknown(name, classes) if name != group and name not in classes else ""


def _unknown(name: str, classes: Collection[str]) -> str:
    have = ", ".join(sorted(classes)) or "none"
    return f"there is no cache class {name[:64]!r} on this node (pinning.resctrl.classes has {have})"
