"""What the device-plugin API shows: the ids of a resource, which of them are healthy, which are best for a container.

Pure functions of (inventory, ledger, health). One class a family of resources: CPUs, hugepages, devices. Ids are stable
over restarts, at most 63 characters, and listed in a fixed order.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from nodeagent.core.cpuset import CpuSet, union
from nodeagent.core.health import HEALTHY, Health
from nodeagent.core.ledger import Ledger
from nodeagent.core.machine import machine_of
from nodeagent.core.model import BEST_EFFORT, Advertised, Device, Grant, HugepagePool, Inventory, NodeId, Pages, Request
from nodeagent.core.placement import place
from nodeagent.core.sizes import format_size
from nodeagent.core.stock import grantable
from nodeagent.errors import InputError, Refused

HOST_USES = ("in_use", "default_route")
"""Attributes that say that the host itself uses a device."""
SHARE = "::"
"""Between a device's id and the number of a share of it."""
LONGEST_ID = 63
"""Characters of an id that kubelet takes."""
MOST_SHARES = 1024
"""Shares of one device, as the configuration allows them."""
_FIELDS = ("id", "pci_address", "pci_class", "vendor", "device", "driver", "numa_node", "parent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What some ids of a resource stand for."""

    cpus: CpuSet = field(default_factory=CpuSet)
    hugepages: tuple[Pages, ...] = ()
    devices: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """What the same pod is thought to hold already."""

    devices: tuple[str, ...] = ()
    cpus: CpuSet = field(default_factory=CpuSet)
    nodes: tuple[NodeId, ...] = ()


class ResourceKind(Protocol):
    """One resource. `name` is the extended resource's whole name, domain included."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        """Every id, in a fixed order."""
        ...

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        """What ids stand for; InputError names those that are none of this resource's."""
        ...

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        """The best `size` ids of `available`, those of `must` among them; Refused where there are too few."""
        ...


# ---------------------------------------------------------------- CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuResource:
    """Each CPU that may be granted is one id, "cpu12"."""

    name: str
    kind: str = "cpu"
    options: frozenset[str] = frozenset()
    numa: str = BEST_EFFORT

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {number for (resource, one) in ledger.by_id if resource == self.name for number in _cpu_numbers(one)}
        elsewhere = union(grant.cpus for grant in ledger.grants.values() if grant.holder.resource != self.name)
        shown = {
            cpu.id: Advertised(id=f"cpu{cpu.id}", healthy=cpu.id not in elsewhere, numa_nodes=_node(cpu.numa_node))
            for cpu in inventory.cpus
            if cpu.id not in ledger.reserved
        }
        # A CPU that is held and went offline stays in the list, so that its pod is told.
        shown.update({one: Advertised(id=f"cpu{one}", healthy=False) for one in held - shown.keys()})
        return tuple(shown[one] for one in sorted(shown))

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        numbers = [number for one in ids for number in _cpu_numbers(one) if number in inventory.cpu_by_id]
        if len(numbers) < len(ids):
            _refuse_unknown(self.name, ids, {f"cpu{number}" for number in numbers})
        return Parts(cpus=CpuSet(numbers))

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        request = Request(
            cpus=size,
            options=self.options,
            numa=self.numa,
            within_cpus=CpuSet(number for one in available for number in _cpu_numbers(one)) & inventory.cpus_online,
            must_cpus=self.parts(inventory, must).cpus,
            near=near.devices,
            near_cpus=near.cpus,
        )
        try:
            found = place(inventory, ledger, request)
        except Refused:
            # Kubelet fails the pod on an error, and has decided already: better scattered CPUs than none.
            found = place(inventory, ledger, replace(request, options=frozenset(), numa=BEST_EFFORT))
        return [f"cpu{one}" for one in found.cpus]


def _cpu_numbers(one: str) -> tuple[int, ...]:
    """The number in an id, or nothing where it is none as this file writes them."""
    return (int(one[3:]),) if re.fullmatch(r"cpu(0|[1-9][0-9]{0,6})", one, re.ASCII) else ()


# ---------------------------------------------------------------- hugepages


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepageResource:
    """Each id, "node0-2Mi-17", is a block of pages_per_block pages on one NUMA node."""

    name: str
    page_bytes: int
    pages_per_block: int = 1
    kind: str = "hugepages"

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {one for (resource, one) in ledger.by_id if resource == self.name}
        shown: list[Advertised] = []
        for pool in self._pools(inventory):
            spare = grantable(pool, ledger) // self.pages_per_block
            for one in self._ids(pool):
                spare -= one not in held
                shown.append(Advertised(id=one, healthy=one in held or spare >= 0, numa_nodes=_node(pool.node)))
        known = {one.id for one in shown}
        return (*shown, *(Advertised(id=one, healthy=False) for one in sorted(held - known)))

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        nodes = {one: node for one in ids for node in self._node_of(inventory, one)}
        _refuse_unknown(self.name, ids, nodes.keys())
        counts: dict[NodeId, int] = {}
        for one in ids:
            counts[nodes[one]] = counts.get(nodes[one], 0) + self.pages_per_block
        return Parts(
            hugepages=tuple(
                Pages(node=node, page_bytes=self.page_bytes, pages=count) for node, count in sorted(counts.items())
            )
        )

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        """All on one node if that can be, the nearest to what the pod holds; of those the one with the fewest blocks
        to spare."""
        nodes: dict[NodeId, list[str]] = {}
        free = frozenset(available) - frozenset(must)
        for pool in self._pools(inventory):
            nodes[pool.node] = [one for one in self._ids(pool) if one in free]
        home = {pool.node for pool in self._pools(inventory) for one in self._ids(pool) if one in must}
        machine = machine_of(inventory)
        want = size - len(must)

        def rank(node: NodeId) -> tuple[bool, int, bool, int, NodeId]:
            far = sum(machine.proximity.node_distance(node, other) for other in near.nodes)
            return bool(home) and node not in home, far, len(nodes[node]) < want, len(nodes[node]), node

        rest = [one for node in sorted(nodes, key=rank) for one in nodes[node]]
        if len(rest) < want:
            raise Refused(f"cannot prefer {size} blocks: too few are available", want=size, free=len(rest) + len(must))
        return [*must, *rest[:want]]

    def _pools(self, inventory: Inventory) -> list[HugepagePool]:
        return [pool for node in inventory.numa_nodes for pool in node.hugepages if pool.page_bytes == self.page_bytes]

    def _node_of(self, inventory: Inventory, one: str) -> tuple[NodeId, ...]:
        """The node of a block, or nothing where there is no such block. Asked without listing every block there is."""
        found = re.fullmatch(rf"node([0-9]+)-{format_size(self.page_bytes)}-(0|[1-9][0-9]*)", one, re.ASCII)
        if found is None:
            return ()
        blocks = {f"{pool.node}": pool.total_pages // self.pages_per_block for pool in self._pools(inventory)}
        return (int(found[1]),) if int(found[2]) < blocks.get(found[1], 0) else ()

    def _ids(self, pool: HugepagePool) -> list[str]:
        size = format_size(pool.page_bytes)
        return [f"node{pool.node}-{size}-{i}" for i in range(pool.total_pages // self.pages_per_block)]


# ---------------------------------------------------------------- devices


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResource:
    """Devices of one kind that match; with replicas > 1 each is shown as that many shares, "ID::0" and up."""

    name: str
    kind: str
    match: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Shell patterns by field or attribute name; all have to match."""
    replicas: int = 1

    def devices(self, inventory: Inventory) -> list[Device]:
        """The devices that this resource serves, in the inventory's order. What the host itself uses is served only
        where `match` speaks of that."""
        return [
            device
            for device in inventory.devices
            if device.kind == self.kind
            and self._matches(device)
            and not any(device.attributes.get(use) and use not in self.match for use in HOST_USES)
        ]

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {one for (resource, one) in ledger.by_id if resource == self.name}
        taken = self._taken(inventory, ledger)
        shown = [
            Advertised(id=one, healthy=_fit(device, health) and device.id not in taken, numa_nodes=_device_node(device))
            for device in self.devices(inventory)
            for one in self._ids(device)
        ]
        known = {one.id for one in shown}
        return (*shown, *(Advertised(id=one, healthy=False) for one in sorted(held - known)))

    def _taken(self, inventory: Inventory, ledger: Ledger) -> frozenset[str]:
        """Devices that no container of this resource can get (more of): held through another resource, held whole
        where shares are shown or the other way round, or a part or the whole of a device that is held."""
        ours: set[str] = set()
        theirs: set[str] = set()
        for grant in ledger.grants.values():
            mine = grant.holder.resource == self.name
            shares, whole = (ours, theirs) if self.replicas > 1 else (theirs, ours)
            (shares if mine else theirs).update(grant.shares)
            (whole if mine else theirs).update(grant.devices)
        return relatives(inventory, theirs) | (relatives(inventory, ours) - ours)

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        known = {one: device.id for device in self.devices(inventory) for one in self._ids(device)}
        _refuse_unknown(self.name, ids, known.keys())
        found = tuple(dict.fromkeys(known[one] for one in ids))
        return Parts(shares=found) if self.replicas > 1 else Parts(devices=found)

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        if self.replicas > 1:
            return self._prefer_shares(inventory, available, must, size)
        request = Request(
            devices={self.kind: size},
            within_devices=_parts_first(inventory, available, must),
            must_devices=frozenset(must),
            near=near.devices,
            near_cpus=near.cpus,
        )
        try:
            return list(place(inventory, ledger, request).devices)
        except Refused:
            return list(place(inventory, ledger, replace(request, within_devices=frozenset(available))).devices)

    def _prefer_shares(
        self, inventory: Inventory, available: Sequence[str], must: Sequence[str], size: int
    ) -> list[str]:
        """Shares of different devices, those with most shares to spare first."""
        chosen = list(must)
        order = {_share_base(device.id): i for i, device in enumerate(self.devices(inventory))}
        free: dict[str, list[str]] = {}
        for one in sorted(set(available) - set(must), key=lambda one: (order.get(_owner(one), 0), _share(one))):
            free.setdefault(_owner(one), []).append(one)
        while len(chosen) < size and any(free.values()):
            taken = [_owner(one) for one in chosen]
            device = min((d for d in free if free[d]), key=lambda d: (taken.count(d), -len(free[d]), order.get(d, 0)))
            chosen.append(free[device].pop(0))
        if len(chosen) < size:
            raise Refused(f"cannot prefer {size} shares: too few are available", want=size, free=len(chosen))
        return chosen

    def _ids(self, device: Device) -> list[str]:
        if self.replicas == 1:
            return [device.id]
        base = _share_base(device.id)
        return [f"{base}{SHARE}{share}" for share in range(self.replicas)]

    def _matches(self, device: Device) -> bool:
        return all(fnmatch.fnmatchcase(_field(device, name), pattern) for name, pattern in self.match.items())


def _parts_first(inventory: Inventory, available: Iterable[str], must: Iterable[str]) -> frozenset[str]:
    """What is available, a device and its parts not at once: where parts can be had, the whole is left alone, and
    where it must be taken, its parts."""
    every, chosen = frozenset(available), frozenset(must)
    spoken_for = relatives(inventory, chosen) - chosen
    return frozenset(
        one for one in every - spoken_for if one in chosen or every.isdisjoint(inventory.parts_of.get(one, ()))
    )


def relatives(inventory: Inventory, ids: Iterable[str]) -> frozenset[str]:
    """Devices, what they are a part of, and what is a part of them: one cannot be given away without the others."""
    found = set(ids)
    for one in tuple(found):
        device = inventory.device_by_id.get(one)
        while device is not None and device.parent is not None and device.parent not in found:
            found.add(device.parent)
            device = inventory.device_by_id.get(device.parent)
        found.update(inventory.parts_of.get(one, ()))
    return frozenset(found)


def without(grant: Grant, ids: Iterable[str], parts: Parts) -> Grant | None:
    """What is left of a grant when another takes some of its ids and what they stand for; None: nothing. The ids that
    are left need not be known any more: a CPU that went offline stays held."""
    taken = frozenset(ids)
    rest = tuple(one for one in grant.ids if one not in taken)
    if not rest:
        return None
    bases = {_owner(one) for one in rest}
    return replace(
        grant,
        ids=rest,
        cpus=grant.cpus - parts.cpus,
        hugepages=_fewer(grant.hugepages, parts.hugepages),
        devices=tuple(one for one in grant.devices if one not in parts.devices),
        shares=tuple(one for one in grant.shares if _share_base(one) in bases),
    )


def _fewer(pages: Iterable[Pages], taken: Iterable[Pages]) -> tuple[Pages, ...]:
    gone = {(one.node, one.page_bytes): one.pages for one in taken}
    rest = (replace(one, pages=one.pages - gone.get((one.node, one.page_bytes), 0)) for one in pages)
    return tuple(one for one in rest if one.pages > 0)


def _field(device: Device, name: str) -> str:
    value = getattr(device, name) if name in _FIELDS else device.attributes.get(name)
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _fit(device: Device, health: Health) -> bool:
    """A part is as fit as what it is a part of."""
    return all(health[one].state == HEALTHY for one in (device.id, device.parent) if one is not None and one in health)


def _share_base(device: str) -> str:
    """What the ids of a device's shares begin with: its id, cut and made distinct where that would be too long."""
    longest = LONGEST_ID - len(SHARE) - len(str(MOST_SHARES - 1))
    if len(device) <= longest:
        return device
    return f"{device[: longest - 9]}-{hashlib.sha256(device.encode()).hexdigest()[:8]}"


def _owner(share: str) -> str:
    return share.rpartition(SHARE)[0]


def _share(share: str) -> int:
    number = share.rpartition(SHARE)[2]
    return int(number) if number.isdigit() else 0


def _device_node(device: Device) -> tuple[NodeId, ...]:
    return () if device.numa_node is None else (device.numa_node,)


def _node(node: NodeId) -> tuple[NodeId, ...]:
    return (node,) if node >= 0 else ()


def _refuse_unknown(name: str, ids: Iterable[str], known: Container[str]) -> None:
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise InputError(f"cannot allocate {', '.join(unknown)} of {name}: unknown")
