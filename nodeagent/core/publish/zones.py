"""The NUMA nodes of a machine with what is allocatable and available on each, for schedulers that are aware of them.

Source: the API topology.node.k8s.io/v1alpha2, whose objects NodeResourceTopology the scheduler plugin of the same name
reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger.free import grantable, memory_left
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Advertised
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import NumaNode


class Amount(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one resource a zone has, in CPUs, bytes or ids."""

    name: str
    capacity: int
    allocatable: int
    available: int


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """One NUMA node."""

    node: int
    distances: Mapping[int, int]
    """To each NUMA node, as in the SLIT; empty if the kernel reports none."""
    amounts: tuple[Amount, ...] = ()


class NodeTopology(msgspec.Struct, frozen=True, kw_only=True):
    """All zones, and kubelet's topology manager."""

    zones: tuple[Zone, ...] = ()
    attributes: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))


Shown = Mapping[str, Sequence[Advertised]]
"""What is advertised to kubelet, by resource."""


def zones(inventory: Inventory, ledger: Ledger, reserved: CpuSet, shown: Shown) -> tuple[Zone, ...]:
    """Return the zones in order of NUMA node. reserved: CPUs that are never granted.

    Of `cpu`, what is held exclusively is not available, as with kubelet's static CPU manager; which CPUs all other pods
    use is not known by NUMA node.
    """
    return tuple(
        Zone(
            node=node.id,
            distances=node.distances,
            amounts=(*_own(node, inventory, ledger, reserved), *_advertised(node.id, ledger, shown)),
        )
        for node in inventory.numa_nodes
    )


def _own(node: NumaNode, inventory: Inventory, ledger: Ledger, reserved: CpuSet) -> Iterator[Amount]:
    if cpus := node.cpus & inventory.cpus_online:
        usable = (cpus & inventory.cpus_usable) - reserved
        yield Amount(name="cpu", capacity=len(cpus), allocatable=len(usable), available=len(usable - ledger.cpus_held))
    if node.memory_bytes and node.serves():
        usable_bytes = memory_left(node)
        left = max(0, usable_bytes - ledger.memory_held.get(node.id, 0))
        yield Amount(name="memory", capacity=node.memory_bytes, allocatable=usable_bytes, available=left)
    for pool in (one for one in node.hugepages if one.total_pages and node.serves()):
        size = pool.page_bytes
        name, total = f"hugepages-{format_size(size)}", size * pool.total_pages
        yield Amount(name=name, capacity=total, allocatable=total, available=size * grantable(pool, ledger))


def _advertised(node: int, ledger: Ledger, shown: Shown) -> Iterator[Amount]:
    """Yield the resources of the device plugin. Ids that no NUMA node or several are near to are in no zone."""
    for name, every in sorted(shown.items()):
        if here := [one for one in every if one.numa_nodes == (node,)]:
            healthy = sum(one.healthy or one.held for one in here)
            free = sum(one.healthy and (name, one.id) not in ledger.by_id for one in here)
            yield Amount(name=name, capacity=len(here), allocatable=healthy, available=free)
