"""The inventory: one immutable snapshot of the machine."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import Device, DriverFiles, Link
from nodeagent.core.model.topology import CacheGroup, Cpu, NodeId, NumaNode

PRESENT, ABSENT, DEGRADED = "present", "absent", "degraded"
"""Values of KindState.state: the kind was discovered; this machine cannot have such devices; discovery failed."""


class KindState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether devices of one kind could be discovered on this machine and, if not, why."""

    kind: str
    state: str
    reason: str = ""


class PodsCgroup(msgspec.Struct, frozen=True, kw_only=True):
    """The cgroup of all pods. Nothing below it can run on other CPUs, whatever its descendants' cpuset files
    contain."""

    path: str
    """Relative to the root of the hierarchy."""
    cpus: CpuSet
    """CPUs that are effective in this cgroup, and CPUs that it passes on to partitions below it."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """One snapshot of the machine. A change is a new snapshot with a higher generation.

    Compare two snapshots with `same_machine`. `==` is identity, so that values derived from a snapshot can be cached on
    it.
    """

    generation: int = 0
    cpus: tuple[Cpu, ...] = ()
    """Online CPUs in order of id."""
    cpus_possible: CpuSet = EMPTY
    cpus_online: CpuSet = EMPTY
    cpus_offline: CpuSet = EMPTY
    cpus_isolated: CpuSet = EMPTY
    cpus_nohz_full: CpuSet = EMPTY
    numa_nodes: tuple[NumaNode, ...] = ()
    """In order of id."""
    caches: tuple[CacheGroup, ...] = ()
    """In order of level, then index."""
    devices: tuple[Device, ...] = ()
    """In order of kind, then id."""
    links: tuple[Link, ...] = ()
    kinds: tuple[KindState, ...] = ()
    warnings: tuple[str, ...] = ()
    """Values that could not be read, each with its file and value."""
    pods_cgroup: PodsCgroup | None = None
    """None if there is none, or if nothing in it shows which CPUs it has."""
    nvidia_driver: DriverFiles | None = None
    """None if NVIDIA's driver has no GPU here, or if its files were not searched."""

    @functools.cached_property
    def cpus_outside(self) -> CpuSet:
        """Return the online CPUs on which no pod can run."""
        return self.cpus_online - self.pods_cgroup.cpus if self.pods_cgroup is not None else EMPTY

    @functools.cached_property
    def cpus_usable(self) -> CpuSet:
        """Return the online CPUs on which pods can run. Only these are offered, granted or shared."""
        return self.cpus_online - self.cpus_outside

    @functools.cached_property
    def device_by_id(self) -> Mapping[str, Device]:
        """Return all devices by id."""
        return MappingProxyType({device.id: device for device in self.devices})

    @functools.cached_property
    def devices_by_kind(self) -> Mapping[str, tuple[Device, ...]]:
        """Devices in order of id, by kind."""
        found: dict[str, list[Device]] = {}
        for device in self.devices:
            found.setdefault(device.kind, []).append(device)
        return MappingProxyType({kind: tuple(devices) for kind, devices in found.items()})

    def with_members(self, ids: Iterable[str]) -> frozenset[str]:
        """Return some ids, and the members of those that stand for several devices."""
        known = self.device_by_id
        return frozenset(one for id in ids for one in (id, *(known[id].members if id in known else ())))

    def wholes_of(self, id: str) -> tuple[str, ...]:
        """Return what a device is a part of, the nearest first; the last may be no device of the inventory."""
        found: list[str] = []
        device = self.device_by_id.get(id)
        while device is not None and device.parent is not None and device.parent not in (id, *found):
            found.append(device.parent)
            device = self.device_by_id.get(device.parent)
        return tuple(found)

    @functools.cached_property
    def parts_of(self) -> Mapping[str, tuple[str, ...]]:
        """Return the ids of each device's direct and indirect parts, by the device's id."""
        parts: dict[str, list[str]] = {}
        for device in self.devices:
            parent = device.parent
            while parent is not None and device.id not in parts.get(parent, ()):
                parts.setdefault(parent, []).append(device.id)
                above = self.device_by_id.get(parent)
                parent = above.parent if above is not None else None
        return MappingProxyType({one: tuple(found) for one, found in parts.items()})

    @functools.cached_property
    def things_of(self) -> Mapping[str, frozenset[str]]:
        """What each device hands over, by its id: itself, its exclusive parts, and what its parts hand over."""
        own = {device.id: {device.id, *device.exclusive_parts} for device in self.devices}
        whole = {
            one: frozenset(things.union(*(own[part] for part in self.parts_of.get(one, ()))))
            for one, things in own.items()
        }
        return MappingProxyType(whole)

    @functools.cached_property
    def devices_by_thing(self) -> Mapping[str, frozenset[str]]:
        """Devices that hand over a thing, by the thing."""
        found: dict[str, set[str]] = {}
        for device, things in self.things_of.items():
            for thing in things:
                found.setdefault(thing, set()).add(device)
        return MappingProxyType({thing: frozenset(devices) for thing, devices in found.items()})

    @functools.cached_property
    def excluded_by(self) -> Mapping[str, frozenset[str]]:
        """Other devices that cannot be given away together with a device, by its id; only devices that have any."""
        found: dict[str, set[str]] = {}
        for devices in self.devices_by_thing.values():
            for one in devices if len(devices) > 1 else ():
                found.setdefault(one, set()).update(devices - {one})
        return MappingProxyType({one: frozenset(others) for one, others in found.items()})

    @functools.cached_property
    def cpu_by_id(self) -> Mapping[int, Cpu]:
        """Return all online CPUs by number."""
        return MappingProxyType({cpu.id: cpu for cpu in self.cpus})

    @functools.cached_property
    def node_order(self) -> tuple[NodeId, ...]:
        """Return all NUMA nodes in order of number: NO_NODE first, if any CPU has none."""
        return tuple(sorted({*(node.id for node in self.numa_nodes), *(cpu.numa_node for cpu in self.cpus)}))

    @functools.cached_property
    def node_by_id(self) -> Mapping[NodeId, NumaNode]:
        """Return all NUMA nodes by number."""
        return MappingProxyType({node.id: node for node in self.numa_nodes})


def same_machine(a: Inventory, b: Inventory) -> bool:
    """Return whether two snapshots are equal apart from their generations."""
    return all(getattr(a, name) == getattr(b, name) for name in Inventory.__struct_fields__ if name != "generation")
