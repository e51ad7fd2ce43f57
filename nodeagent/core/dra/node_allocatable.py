"""Which resources of the Node the scheduler counts claims against (DRANodeAllocatableResources, Kubernetes 1.37).

Pure. A device always says what an allocation of it takes (`PoolDevice.costs`). Whether that is published depends on the
Node object: the API server refuses a slice with it unless the Node declares the feature, and the scheduler compares
hugepages with what kubelet saw when it started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.dra.pool import Pool

FEATURE = "DRANodeAllocatableResources"
"""In Node.status.declaredFeatures: kubelet counts what claims take."""
PAGES = "hugepages-"


class NodeBooks(msgspec.Struct, frozen=True, kw_only=True):
    """What the Node object says of the scheduler's books."""

    declared: bool = False
    """Whether the Node declares the feature."""
    pages: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Bytes of hugepages that kubelet has allocatable, by resource ("hugepages-2Mi")."""


NO_BOOKS = NodeBooks()


def counted(pool: Pool, books: NodeBooks) -> Pool:
    """Return the pool with the resources that are counted for its claims.

    Pages of a size are counted if kubelet has at least as many as the pool can give. Otherwise claims for the rest
    would never be scheduled, although the pages are there.
    """
    if not books.declared:
        return pool
    names = {name for device in pool.devices for name in device.costs}
    return replace(pool, counted=frozenset(names - {name for name, _, _ in _beyond(pool, books)}))


def uncounted(pools: Iterable[Pool], books: NodeBooks) -> list[str]:
    """Return which pages are not counted although the Node declares the feature, one sentence each."""
    return [
        f"claims for {name} are not counted by the scheduler: they can take {largest} bytes, kubelet has {known} "
        "allocatable, as it saw when it started"
        for pool in pools
        for name, largest, known in (_beyond(pool, books) if books.declared else ())
    ]


def _beyond(pool: Pool, books: NodeBooks) -> Iterator[tuple[str, int, int]]:
    """Yield (resource, bytes that claims can take, bytes that kubelet has) for pages of which kubelet has too few."""
    sums: dict[str, int] = {}
    for device in pool.devices:
        for name, cost in device.costs.items():
            if cost.mapped and name.startswith(PAGES):
                sums[name] = sums.get(name, 0) + cost.largest
    for name, largest in sums.items():
        if largest > books.pages.get(name, 0):
            yield name, largest, books.pages.get(name, 0)
