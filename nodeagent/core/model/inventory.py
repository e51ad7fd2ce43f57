"""The inventory: one immutable snapshot of the machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.topology import CacheGroup, Cpu, NodeId, NumaNode

PRESENT, ABSENT, DEGRADED = "present", "absent", "degraded"
"""KindState.state: devices could be looked for; nothing here can have any; looking for them failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindState:
    """Whether devices of one kind could be looked for on this machine, and if not, why."""

    kind: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodsCgroup:
    """The control group of all pods. Nothing in it runs on other CPUs, whatever is written below."""

    path: str
    """Below the root of the hierarchy."""
    cpus: CpuSet
    """Those in effect there, and those that it lets through to partitions below it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """One snapshot of the machine. A change is a new snapshot with a higher generation.

    Two snapshots are compared with `same_machine`; == is identity, so that what is worked out of one can be kept by it.
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
    """What could not be read, each with file and value."""
    pods_cgroup: PodsCgroup | None = None
    """None: there is none, or nothing in it says which CPUs it has."""

    @functools.cached_property
    def cpus_outside(self) -> CpuSet:
        """Online CPUs on which no pod can run."""
        return self.cpus_online - self.pods_cgroup.cpus if self.pods_cgroup is not None else EMPTY

    @functools.cached_property
    def cpus_usable(self) -> CpuSet:
        """Online CPUs on which pods can run: what is offered, granted and shared is among them."""
        return self.cpus_online - self.cpus_outside

    @functools.cached_property
    def device_by_id(self) -> Mapping[str, Device]:
        """Return all devices by their id."""
        return MappingProxyType({device.id: device for device in self.devices})

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
        """What is a part of a device, directly or not, by the device's id."""
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
        """Return all online CPUs by their number."""
        return MappingProxyType({cpu.id: cpu for cpu in self.cpus})

    @functools.cached_property
    def node_by_id(self) -> Mapping[NodeId, NumaNode]:
        """Return all NUMA nodes by their number."""
        return MappingProxyType({node.id: node for node in self.numa_nodes})


def same_machine(a: Inventory, b: Inventory) -> bool:
    """Whether two snapshots show the same, their generations left aside."""
    return all(getattr(a, one.name) == getattr(b, one.name) for one in fields(Inventory) if one.name != "generation")
