"""How scattered what is free lies over the NUMA nodes.

The figure of CPUs, or of a kind of devices, is 1 - L / P. L is the most that is free on any one node. P is the most
that could be free on one node if what is held were moved together: as much as is free on the whole machine, but no more
than the node with most can grant if nothing is held. It is 0 where as much is free on one node as can be, also where
nothing is free, and comes near to 1 where the free rest is spread thinly over many nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from nodeagent.core.ledger.exclusion import blocked
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory

CPU = "cpu"


def fragmentation(inventory: Inventory, ledger: Ledger, kinds: Iterable[str] = ()) -> Iterator[tuple[str, float]]:
    """Yield the figure of the CPUs, and of each kind of devices in order, with its name."""
    ours = inventory.cpus_usable - ledger.reserved
    free = ours - ledger.cpus_held
    nodes = [node.cpus for node in inventory.numa_nodes]
    yield CPU, _scattered([len(free & one) for one in nodes], [len(ours & one) for one in nodes])
    taken = blocked(inventory, ledger)
    for kind in kinds:
        every_one = inventory.devices_by_kind.get(kind, ())
        devices = [one for one in every_one if one.numa_node is not None and not (one.members or one.withheld_for)]
        every = Counter(one.numa_node for one in devices)
        left = Counter(one.numa_node for one in devices if one.id not in taken)
        yield kind, _scattered(left.values(), every.values())


def _scattered(free: Iterable[int], most: Iterable[int]) -> float:
    amounts = list(free)
    possible = min(sum(amounts), max(most, default=0))
    return 1 - max(amounts) / possible if possible else 0.0
