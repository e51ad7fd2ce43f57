"""What is free and what is held on each NUMA node, as samples of gauges.

"Free" is what the ledger could grant now. CPUs and devices without a NUMA node are those of node "none".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from nodeagent.core.deviceplugin.devices import DeviceResource, illness
from nodeagent.core.ledger.exclusion import blocked
from nodeagent.core.ledger.free import grantable, memory_left
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import NodeId

Sample = tuple[tuple[str, ...], float]
FREE, HELD, RESERVED, OUTSIDE, UNHEALTHY, EXCLUDED = "free", "held", "reserved", "outside", "unhealthy", "excluded"
"""Values of the label `state`. Each CPU and each device is in exactly one."""


def cpus(inventory: Inventory, ledger: Ledger) -> Iterator[Sample]:
    """Yield the online CPUs, by (node, state)."""
    held, outside = frozenset(ledger.cpus_held), frozenset(inventory.cpus_outside)
    reserved = frozenset(ledger.reserved)
    counts = Counter[tuple[NodeId, str]]()
    for cpu in inventory.cpus:
        where = HELD if cpu.id in held else RESERVED if cpu.id in reserved else OUTSIDE if cpu.id in outside else FREE
        counts[cpu.numa_node, where] += 1
    for node in sorted({cpu.numa_node for cpu in inventory.cpus}):
        yield from (((_name(node), one), counts[node, one]) for one in (FREE, HELD, RESERVED, OUTSIDE))


def free_cpus(inventory: Inventory, ledger: Ledger) -> CpuSet:
    """Return the CPUs that can be granted."""
    return inventory.cpus_usable - ledger.cpus_held - ledger.reserved


def whole_cores(inventory: Inventory, ledger: Ledger) -> Iterator[Sample]:
    """Yield the cores of which every online thread is free, by node."""
    free = frozenset(free_cpus(inventory, ledger))
    cores = {cpu.core: cpu.numa_node for cpu in inventory.cpus}
    broken = {cpu.core for cpu in inventory.cpus if cpu.id not in free}
    counts = Counter(node for core, node in cores.items() if core not in broken)
    yield from (((_name(node),), counts[node]) for node in sorted(set(cores.values())))


def largest_l3(inventory: Inventory, ledger: Ledger) -> Iterator[Sample]:
    """Yield the most free CPUs that share an L3 cache, by node. CPUs without one share one."""
    free = frozenset(free_cpus(inventory, ledger))
    groups = Counter((cpu.numa_node, cpu.l3) for cpu in inventory.cpus if cpu.id in free)
    most: dict[NodeId, int] = dict.fromkeys(sorted({cpu.numa_node for cpu in inventory.cpus}), 0)
    for (node, _), count in groups.items():
        most[node] = max(most[node], count)
    yield from (((_name(node),), count) for node, count in most.items())


def hugepages(inventory: Inventory, ledger: Ledger) -> Iterator[Sample]:
    """Yield the pages of each pool, by (node, size, state)."""
    for pool in (pool for node in inventory.numa_nodes for pool in node.hugepages):
        where = _name(pool.node), format_size(pool.page_bytes)
        yield (*where, FREE), grantable(pool, ledger)
        yield (*where, HELD), ledger.pages_held.get((pool.node, pool.page_bytes), 0)


def memory(inventory: Inventory, ledger: Ledger) -> Iterator[Sample]:
    """Yield the bytes of memory of each node that has any, by (node, state)."""
    for node in (one for one in inventory.numa_nodes if one.memory_bytes):
        held = ledger.memory_held.get(node.id, 0)
        yield (_name(node.id), FREE), max(0, memory_left(node) - held)
        yield (_name(node.id), HELD), held


def devices(inventory: Inventory, ledger: Ledger, health: Health, served: Iterable[object]) -> Iterator[Sample]:
    """Yield the devices that any of the served resources has, by (node, kind, state)."""
    resources = defaultdict[str, list[DeviceResource]](list)
    for one in served:
        if isinstance(one, DeviceResource):
            resources[one.kind].append(one)
    taken, excluded = inventory.with_members(ledger.devices_taken), blocked(inventory, ledger)
    counts = Counter[tuple[NodeId, str, str]]()
    for device in (one for kind in resources for one in inventory.devices_by_kind.get(kind, ())):
        if not device.members and any(one.serves(device) for one in resources[device.kind]):
            where = _state(device, device.id in taken, device.id in excluded, health)
            counts[_node(device), device.kind, where] += 1
    for node, kind in sorted({(node, kind) for node, kind, _ in counts}):
        for one in (FREE, HELD, UNHEALTHY, EXCLUDED):
            yield (_name(node), kind, one), counts[node, kind, one]


def _state(device: Device, held: bool, excluded: bool, health: Health) -> str:
    if held:
        return HELD
    if illness(device, health) is not None:
        return UNHEALTHY
    return EXCLUDED if excluded else FREE


def _node(device: Device) -> NodeId:
    return -1 if device.numa_node is None else device.numa_node


def _name(node: NodeId) -> str:
    return str(node) if node >= 0 else "none"
