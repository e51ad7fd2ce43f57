"""The cost of a placement in words, part by part; docs/placement.md explains the order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.options import DISTRIBUTING
from nodeagent.core.model.request import Placement, PlacementCost, Request

SPAN = 6
"""The leading parts of a cost that say how far a placement lies apart: all up to numa_distance. Two placements that are
equal in them are equally well aligned."""


class CostPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a cost. on_empty is what it would be on the machine with nothing held, or None if it cannot be had
    there either."""

    name: str
    value: int
    on_empty: int | None
    words: str


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


_WORDS: Mapping[str, Callable[[int], str]] = MappingProxyType(
    {
        "device_links": lambda n: f"how far apart the devices are linked, over their pairs: {n or 'none closer here'}",
        "near": lambda n: f"distance of the CPUs to the devices, added up: {n or 'all local'}",
        "preference": lambda n: f"{_count(n, 'CPU')} that the options would rather avoid",
        "packages": lambda n: _count(n, "socket"),
        "numa_nodes": lambda n: _count(n, "NUMA node"),
        "numa_distance": lambda n: f"distance between the NUMA nodes, both ways: {n or 'one node alone'}",
        "l3": lambda n: _count(n, "L3 group"),
        "split_cores": lambda n: _count(n, "core") + " used only in part" if n else "whole cores only",
        "nodes_broken": lambda n: _count(n, "NUMA node") + " that would no longer be wholly free",
        "l3_broken": lambda n: _count(n, "L3 group") + " that would no longer be wholly free",
        "cores_broken": lambda n: _count(n, "core") + " that would no longer be wholly free",
        "links_cut": lambda n: f"link weight to free devices that lose a partner: {n}",
        "cpu_ids": lambda n: f"sum of the CPU numbers, which decides between equals: {n}",
    }
)
_OF_DEVICES = frozenset({"device_links", "links_cut"})
_OF_CPUS = frozenset({"l3", "split_cores", "nodes_broken", "l3_broken", "cores_broken", "cpu_ids"})


def cost_parts(request: Request, placement: Placement, on_empty: Placement | None) -> tuple[CostPart, ...]:
    """Return the parts of a cost that apply to the request, the most significant first.

    on_empty: where the same request would go if nothing were held, or None if it would be refused.
    """
    empty = on_empty.cost if on_empty is not None else None
    return tuple(
        CostPart(
            name=name,
            value=value,
            on_empty=getattr(empty, name) if empty is not None else None,
            words=_words(name, value, request),
        )
        for name, value in placement.cost._asdict().items()
        if _applies(name, request)
    )


def _words(name: str, value: int, request: Request) -> str:
    if name == "split_cores" and not request.options.isdisjoint(DISTRIBUTING[1:]):
        return _count(value, "CPU") + " that share a core with another one"
    if name == "near" and not request.cpus:
        return f"distance of the pages and the memory to the devices: {value or 'all local'}"
    return _WORDS[name](value)


def _applies(name: str, request: Request) -> bool:
    if name in _OF_DEVICES:
        return bool(request.devices)
    if name == "near":
        return bool(request.devices or request.near or request.near_nodes or request.near_cpus)
    if name == "preference":
        return any(one.startswith(("prefer-", "avoid-")) for one in request.options)
    if name in _OF_CPUS:
        return bool(request.cpus)
    return bool(request.cpus or request.hugepages or request.memory_bytes)


def as_well_as(placement: Placement, best: Placement) -> bool:
    """Return whether a placement lies no farther apart than another one of the same request."""
    return span_of(placement.cost) <= span_of(best.cost)


def span_of(cost: PlacementCost) -> tuple[int, ...]:
    """Return how far a placement lies apart; compared like the cost itself, smaller is better."""
    return tuple(cost[:SPAN])
