"""A machine and its grants as a picture. Pure: the same inventory, grants and health give the same picture."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import HEALTHY, NO_HEALTH, Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement
from nodeagent.core.model.topology import NO_NODE, Cpu, HugepagePool, NodeId, NumaNode
from nodeagent.core.picture.holders import holders_of, placed_holder
from nodeagent.core.picture.values import (
    EXCLUDED,
    FREE,
    HELD,
    OUTSIDE,
    PLACED,
    RESERVED,
    PartState,
    Picture,
    PictureCore,
    PictureCpu,
    PictureDevice,
    PictureGroup,
    PictureNode,
    PicturePackage,
    PicturePool,
)

NOT_DRAWN = "bridge"
"""A kind of device that is never granted."""
_NAMES = ("name", "netdevs")
"""Attributes with the kernel's name of a device."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def draw(
    inventory: Inventory,
    grants: Iterable[Grant],
    *,
    reserved: CpuSet = EMPTY,
    health: Health = NO_HEALTH,
    placement: Placement | None = None,
) -> Picture:
    """Return the picture of a machine.

    grants: in the order in which their holders get their letters. reserved: CPUs of the system. placement: what to show
    in addition as if it were held."""
    return _Drawing(inventory, tuple(grants), reserved, health, placement).picture()


class _Drawing:
    """One picture in the making."""

    def __init__(
        self,
        inventory: Inventory,
        grants: Sequence[Grant],
        reserved: CpuSet,
        health: Health,
        placement: Placement | None,
    ) -> None:
        self._inventory = inventory
        self._reserved = reserved
        self._health = health
        self._ledger = Ledger(grants=MappingProxyType({one.id: one for one in grants}))
        holders, self._by_grant = holders_of(grants)
        self._placed = len(holders) if placement is not None else None
        self._holders = (*holders, placed_holder(placement)) if placement is not None else holders

    def picture(self) -> Picture:
        packages = [self._package(some) for some in _packages_together(self._inventory.cpus)]
        drawn = {cpu.numa_node for cpu in self._inventory.cpus} - {NO_NODE}
        others = [self._node(one, ()) for one in self._inventory.node_order if one not in drawn and one != NO_NODE]
        if NO_NODE in self._devices:
            others.append(self._node(NO_NODE, ()))
        if others:
            packages.append(PicturePackage(packages=(), nodes=tuple(others)))
        return Picture(
            generation=self._inventory.generation,
            packages=tuple(packages),
            offline=self._inventory.cpus_offline,
            holders=self._holders,
        )

    def _package(self, packages: Sequence[int]) -> PicturePackage:
        cpus = [cpu for package in packages for cpu in self._cpus[package]]
        nodes = sorted(_grouped(cpus, lambda cpu: cpu.numa_node).items())
        return PicturePackage(packages=tuple(packages), nodes=tuple(self._node(node, some) for node, some in nodes))

    def _node(self, node: NodeId, cpus: Sequence[Cpu]) -> PictureNode:
        found = self._inventory.node_by_id.get(node, NumaNode(id=node, kind="none"))
        whole = node != NO_NODE or not cpus
        return PictureNode(
            node=node,
            kind=found.kind,
            memory_bytes=found.memory_bytes,
            memory_held=self._memory_held.get(node, ()),
            hugepages=tuple(self._pool(pool) for pool in found.hugepages),
            devices=tuple(self._device(one) for one in self._devices.get(node, ())) if whole else (),
            groups=self._groups(cpus),
        )

    def _groups(self, cpus: Sequence[Cpu]) -> tuple[PictureGroup, ...]:
        groups = _grouped(cpus, lambda cpu: (cpu.package, cpu.l3 is None, cpu.l3 or 0))
        return tuple(
            PictureGroup(package=package, l3=None if alone else l3, cores=self._cores(some))
            for (package, alone, l3), some in sorted(groups.items())
        )

    def _cores(self, cpus: Sequence[Cpu]) -> tuple[PictureCore, ...]:
        cores = sorted(_grouped(cpus, lambda cpu: cpu.core).items())
        return tuple(
            PictureCore(core=core, kind=some[0].kind, cpus=tuple(self._cpu(cpu) for cpu in some))
            for core, some in cores
        )

    def _cpu(self, cpu: Cpu) -> PictureCpu:
        held = tuple(self._cpus_held.get(cpu.id, ()))
        return PictureCpu(id=cpu.id, state=self._cpu_state(cpu.id, held), holders=held, isolated=cpu.isolated)

    def _cpu_state(self, cpu: int, held: Sequence[int]) -> PartState:
        if held:
            return self._held_state(held)
        if cpu in self._reserved:
            return RESERVED
        return OUTSIDE if cpu in self._inventory.cpus_outside else FREE

    def _held_state(self, held: Sequence[int]) -> PartState:
        return PLACED if tuple(held) == (self._placed,) else HELD

    def _pool(self, pool: HugepagePool) -> PicturePool:
        return PicturePool(
            page_bytes=pool.page_bytes,
            total_pages=pool.total_pages,
            free_pages=pool.free_pages,
            held=self._pages_held.get((pool.node, pool.page_bytes), ()),
        )

    def _device(self, device: Device) -> PictureDevice:
        held = tuple(self._devices_held.get(device.id, ()))
        ill = illness(device, self._health)
        return PictureDevice(
            id=device.id,
            kind=device.kind,
            name=next((str(device.attributes[key]) for key in _NAMES if device.attributes.get(key)), ""),
            state=self._held_state(held) if held else EXCLUDED if device.id in self._excluded else FREE,
            holders=held,
            health=ill.state if ill is not None else HEALTHY,
            reason=ill.reason if ill is not None else "",
        )

    # ---------------------------------------------------------------- who holds what, by part

    @functools.cached_property
    def _cpus(self) -> Mapping[int, Sequence[Cpu]]:
        return _grouped(self._inventory.cpus, lambda cpu: cpu.package)

    @functools.cached_property
    def _cpus_held(self) -> Mapping[int, Sequence[int]]:
        return _lists((cpu, index) for index, holder in enumerate(self._holders) for cpu in holder.cpus)

    @functools.cached_property
    def _devices_held(self) -> Mapping[str, Sequence[int]]:
        """Return the holders of each device; who holds a set of devices holds its members."""
        expanded = self._inventory.with_members
        return _lists(
            (one, index) for index, holder in enumerate(self._holders) for one in sorted(expanded(holder.devices))
        )

    @functools.cached_property
    def _pages_held(self) -> Mapping[tuple[NodeId, int], tuple[tuple[int, int], ...]]:
        return _sums(
            ((one.node, one.page_bytes), index, one.pages)
            for index, holder in enumerate(self._holders)
            for one in holder.hugepages
        )

    @functools.cached_property
    def _memory_held(self) -> Mapping[NodeId, tuple[tuple[int, int], ...]]:
        return _sums((node, index, size) for index, holder in enumerate(self._holders) for node, size in holder.memory)

    @functools.cached_property
    def _excluded(self) -> frozenset[str]:
        return excluded_with(self._inventory, self._ledger, self._devices_held)

    @functools.cached_property
    def _devices(self) -> Mapping[NodeId, Sequence[Device]]:
        """Return the devices to draw by node; NO_NODE for those whose node is unknown or not there."""
        known = set(self._inventory.node_order)
        shown = (one for one in self._inventory.devices if one.kind != NOT_DRAWN and not one.members)
        return _grouped(shown, lambda one: one.numa_node if one.numa_node in known else NO_NODE)


def _packages_together(cpus: Iterable[Cpu]) -> list[list[int]]:
    """Return the packages of a machine; those that have CPUs of a NUMA node in common stand together."""
    together: list[set[int]] = []
    for node, some in _grouped(cpus, lambda cpu: cpu.numa_node).items():
        packages = {cpu.package for cpu in some}
        new = [packages] if node != NO_NODE else [{one} for one in packages]
        for one in new:
            met = [other for other in together if not one.isdisjoint(other)]
            together = [other for other in together if other not in met] + [one.union(*met)]
    return sorted(sorted(one) for one in together)


def _grouped(some: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    found: dict[K, list[T]] = defaultdict(list)
    for one in some:
        found[key(one)].append(one)
    return dict(found)


def _lists(pairs: Iterable[tuple[K, int]]) -> Mapping[K, list[int]]:
    found: dict[K, list[int]] = defaultdict(list)
    for key, index in pairs:
        found[key].append(index)
    return found


def _sums(amounts: Iterable[tuple[K, int, int]]) -> Mapping[K, tuple[tuple[int, int], ...]]:
    """Return the sums of (key, holder, amount) by key and holder."""
    found: dict[K, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for key, index, amount in amounts:
        found[key][index] += amount
    return {key: tuple(by_holder.items()) for key, by_holder in found.items()}
