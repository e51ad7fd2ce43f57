"""Devices in the device-plugin API: each is advertised as one id, or as the configured number of shares.

Pure. What cannot be given away together is in core/ledger/exclusion.py.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.deviceplugin.view import Near, Parts, refuse_unknown
from nodeagent.core.ledger.counters import spent
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import HOST_USES, Advertised, Device
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Health, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.place import find, place
from nodeagent.core.sharing import amounts as gpu_amounts
from nodeagent.errors import Refused

SHARES = "shares"
"""The capacity of a claim's device that is divided into shares."""
SHARE = "::"
"""Separator between a device's id and the number of a share of it."""
LONGEST_ID = 63
"""Longest id that kubelet accepts, in characters."""
MOST_SHARES = 1024
"""Highest number of shares per device that the configuration allows."""
NO_NODE = HealthState(state=UNKNOWN, since=0.0, reason="there is no device node to hand over")
_OF_INTERFACE = frozenset(
    {"netdevs", "rdma", "mac", "mtu", "link_type", "speed_mbps", "phys_port_name", "phys_switch_id"}
)
"""Attributes that an adapter has through its network interface or its RDMA device."""
_OF_DRIVER = frozenset({"rdma"})
"""Those that end with the driver."""
_OF_LINK = frozenset({"speed_mbps"})
_FIELDS = ("id", "pci_address", "pci_class", "vendor", "device", "driver", "numa_node", "parent")

Match = Mapping[str, str | Sequence[str]]


class DeviceResource(msgspec.Struct, frozen=True, kw_only=True):
    """The matching devices of one kind. With replicas > 1 each is advertised as that many shares, "ID::0" and up."""

    name: str
    kind: str
    match: Match = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Shell patterns by field or attribute name; all names must match, and of several patterns one."""
    match_any: tuple[Match, ...] = ()
    """If there are any, one of them must match in addition."""
    replicas: int = 1
    partitions: bool = False
    """Whether it serves parts that are made when they are granted, and nothing else."""

    def devices(self, inventory: Inventory) -> list[Device]:
        """Return the devices that this resource serves, in the inventory's order.

        A device with one of the WITHHELD attributes (core/model/device.py) is served only if `match` mentions that
        attribute.
        """
        return [device for device in inventory.devices if self.serves(device)]

    def serves(self, device: Device) -> bool:
        """Return whether a device is of this kind, matches, and is not WITHHELD (unless `match` mentions why it is)."""
        return (
            device.kind == self.kind
            and (device.partition is not None) == self.partitions
            and self._matches(device)
            and all(self.names(name) for name in device.withheld_for)
        )

    def names(self, name: str) -> bool:
        """Return whether the patterns mention a field or an attribute."""
        return name in self.match or any(name in one for one in self.match_any)

    def advertised(self, inventory: Inventory, ledger: Ledger, health: Health) -> tuple[Advertised, ...]:
        held = {one for (resource, one) in ledger.by_id if resource == self.name}
        taken = self._taken(inventory, ledger)
        shown = [
            Advertised(
                id=one,
                healthy=ill is None and device.id not in taken and left,
                held=ill is None,
                numa_nodes=_device_node(device),
                device=device.id,
                reason="" if ill is None else ill.reason,
            )
            for device in self.devices(inventory)
            for ill in (illness(device, health),)
            for one, left in self._left(device, self._spare(ledger, device), held)
        ]
        known = {one.id for one in shown}
        return (*shown, *(Advertised(id=one, healthy=False) for one in sorted(held - known)))

    def _taken(self, inventory: Inventory, ledger: Ledger) -> frozenset[str]:
        """Return the devices of which containers of this resource can get nothing, or nothing more.

        These are held through another resource or by another device plugin, or held whole while shares are advertised
        (or the reverse), a held device excludes them, or their counters do not last for them.
        """
        ours: set[str] = set()
        theirs: set[str] = set()
        for grant in ledger.grants.values():
            mine = grant.holder.resource == self.name
            # Shares are interchangeable: claims and containers may hold some of the same device.
            alike = mine or grant.holder.api == CLAIM
            (ours if self.replicas > 1 and alike else theirs).update(grant.shares)
            (ours if self.replicas == 1 and mine else theirs).update(grant.devices)
        # What a container of ours has that another plugin gave too stays healthy: kubelet would fail its pod.
        theirs |= ledger.devices_foreign - ours
        excluded = excluded_with(inventory, ledger, theirs) | (excluded_with(inventory, ledger, ours) - ours)
        return excluded | spent(inventory, ledger)

    def parts(self, inventory: Inventory, ids: Sequence[str]) -> Parts:
        known = {one: device.id for device in self.devices(inventory) for one in self._ids(device)}
        refuse_unknown(self.name, ids, known.keys())
        found = tuple(dict.fromkeys(known[one] for one in ids))
        return Parts(shares=found) if self.replicas > 1 else Parts(devices=found)

    def prefer(
        self, inventory: Inventory, ledger: Ledger, available: Sequence[str], must: Sequence[str], size: int, near: Near
    ) -> list[str]:
        if self.replicas > 1:
            return self._prefer_shares(inventory, available, must, size)
        every = frozenset(available)
        request = Request(
            devices={self.kind: size},
            must_devices=frozenset(must),
            within_devices=_parts_first(inventory, every, frozenset(must)),
            near=near.devices,
            near_nodes=near.nodes,
        )
        found = find(inventory, ledger, request)
        if found is None:
            found = place(inventory, ledger, replace(request, within_devices=every))
        return list(found.devices)

    def _prefer_shares(
        self, inventory: Inventory, available: Sequence[str], must: Sequence[str], size: int
    ) -> list[str]:
        """Return shares of different devices, starting with the devices that have most shares to spare."""
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
            raise Refused(
                f"cannot prefer {size} shares: too few are available", want=size, free=len(chosen), unit="shares"
            )
        return chosen

    def _spare(self, ledger: Ledger, device: Device) -> int:
        """Return how many shares of a device can still be granted: by their number, and by what is left of its memory
        and its cores, of which a claim may have more than a share's."""
        if self.replicas == 1:
            return 1
        holding = [one for one in ledger.grants.values() if device.id in one.shares]
        by_number = self.replicas - shares_by_device(holding)[device.id]
        each = gpu_amounts.per_share(device, self.replicas)
        by_amount = gpu_amounts.shares_left(free_amounts(holding, device, self.replicas), each)
        return by_number if by_amount is None else min(by_number, by_amount)

    def _left(self, device: Device, spare: int, held: Container[str]) -> Iterator[tuple[str, bool]]:
        """Yield each id of a device and whether it can be granted or is held.

        spare: how many shares of it can be granted. Free ids beyond these are unavailable, starting with the last.
        """
        for one in self._ids(device):
            spare -= one not in held
            yield one, one in held or spare >= 0

    def _ids(self, device: Device) -> list[str]:
        if self.replicas == 1:
            return [device.id]
        base = _share_base(device.id)
        return [f"{base}{SHARE}{share}" for share in range(self.replicas)]

    def _matches(self, device: Device) -> bool:
        any_of = self.match_any
        return fits(device, self.match) and (not any_of or any(fits(device, one) for one in any_of))


def _parts_first(inventory: Inventory, available: frozenset[str], must: frozenset[str]) -> frozenset[str]:
    """Return the available ids without devices whose parts are available too, except those that must be taken."""
    return frozenset(one for one in available if one in must or available.isdisjoint(inventory.parts_of.get(one, ())))


def still_told(before: Inventory, after: Inventory, held: Container[str]) -> Inventory:
    """Return a fresh snapshot in which devices keep the attributes last reported.

    A held adapter keeps those of its interface and its RDMA device, which cannot be seen from here while they are in a
    container's network namespace; any adapter keeps its speed while the link is down. A held device is used by its
    holder, which may mount it or route through it: it keeps what was known of its use by the host, or is not used by
    it.
    """

    def told(device: Device) -> Device:
        old = before.device_by_id.get(device.id)
        known = {} if old is None else old.attributes
        names = _OF_INTERFACE if device.id in held else _OF_LINK
        names -= _OF_DRIVER if old is not None and old.driver != device.driver else frozenset()
        kept = {name: known[name] for name in names & known.keys() if name not in device.attributes}
        if device.id in held:
            kept |= {name: known.get(name, False) for name in HOST_USES if device.attributes.get(name)}
        if all(device.attributes.get(name) == value for name, value in kept.items()):
            return device
        return replace(device, attributes=MappingProxyType({**device.attributes, **kept}))

    devices = tuple(map(told, after.devices))
    same = all(a is b for a, b in zip(devices, after.devices, strict=True))
    return after if same else replace(after, devices=devices)


def refuse_missing_shares(ledger: Ledger, grant: Grant, device: str, shares: int, want: int) -> None:
    """Raise Refused if other grants leave fewer than `want` shares of a device."""
    others = [one for one in ledger.grants.values() if device in one.shares and one.id != grant.id]
    free = max(0, shares - sum(shares_of(one, device) for one in others))
    if want > free:
        holders = ", ".join(sorted({str(one.holder) for one in others}))
        held = f", others are held by {holders}" if holders else ""
        why = f"cannot grant {want} of {shares} shares of {device}: {free} are left{held}"
        raise Refused(why, want=want, free=free, unit="shares")


def free_amounts(holding: Iterable[Grant], device: Device, replicas: int) -> dict[str, int]:
    """Return what some grants leave of the memory and the cores of a device that is divided into shares."""
    each, whole = gpu_amounts.per_share(device, replicas), gpu_amounts.totals(device, replicas)
    return gpu_amounts.left(
        whole, (gpu_amounts.held(one, device.id, shares_of(one, device.id), each) for one in holding)
    )


def refuse_missing_amounts(ledger: Ledger, grant: Grant, device: Device, replicas: int) -> None:
    """Raise Refused if other grants leave less of a device's memory or cores than a grant has of them."""
    others = [one for one in ledger.grants.values() if device.id in one.shares and one.id != grant.id]
    wanted = {name: size for id, name, size in grant.amounts if id == device.id}
    holders = ", ".join(sorted({str(one.holder) for one in others}))
    gpu_amounts.refuse_missing(device.id, wanted, free_amounts(others, device, replicas), holders)


def shares_by_device(grants: Iterable[Grant]) -> Counter[str]:
    """Return how many shares of each device the grants hold together."""
    held: Counter[str] = Counter()
    for grant in grants:
        for device in grant.shares:
            held[device] += shares_of(grant, device)
    return held


def shares_of(grant: Grant, device: str) -> int:
    """Return how many shares of a device a grant holds."""
    if grant.result is not None:
        return grant.result.consumed.get(SHARES, 1)
    base = _share_base(device)
    return sum(_owner(one) == base for one in grant.ids)


def without(grant: Grant, ids: Iterable[str], parts: Parts) -> Grant | None:
    """Return a grant without some ids and the parts that they stand for, or None if nothing is left.

    The remaining ids may be unknown by now: a CPU that went offline stays held.
    """
    taken = frozenset(ids)
    rest = tuple(one for one in grant.ids if one not in taken)
    if not rest:
        return None
    bases = {_owner(one) for one in rest}
    devices = tuple(one for one in grant.devices if one not in parts.devices)
    shares = tuple(one for one in grant.shares if _share_base(one) in bases)
    before = {one: shares_of(grant, one) for one in shares}
    after = {one: shares_of(replace(grant, ids=rest), one) for one in shares}
    return replace(
        grant,
        ids=rest,
        cpus=grant.cpus - parts.cpus,
        hugepages=_fewer(grant.hugepages, parts.hugepages),
        devices=devices,
        shares=shares,
        amounts=tuple(
            (one, name, size * after[one] // before[one]) for one, name, size in grant.amounts if one in after
        ),
        things=tuple((one, thing) for one, thing in grant.things if one in devices or one in shares),
    )


def _fewer(pages: Iterable[Pages], taken: Iterable[Pages]) -> tuple[Pages, ...]:
    gone = {(one.node, one.page_bytes): one.pages for one in taken}
    rest = (replace(one, pages=one.pages - gone.get((one.node, one.page_bytes), 0)) for one in pages)
    return tuple(one for one in rest if one.pages > 0)


def patterns_of(value: str | Sequence[str]) -> Sequence[str]:
    """Return the patterns of one name, of which one must match."""
    return (value,) if isinstance(value, str) else value


def fits(device: Device, match: Match) -> bool:
    """Return whether each name that is mentioned matches one of its patterns."""
    return all(
        any(fnmatch.fnmatchcase(_field(device, name), pattern) for pattern in patterns_of(value))
        for name, value in match.items()
    )


def _field(device: Device, name: str) -> str:
    value = getattr(device, name) if name in _FIELDS else device.attributes.get(name)
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def has_field(device: Device, name: str) -> bool:
    """Return whether `match` can name a field or an attribute of a device."""
    return name in _FIELDS or name in device.attributes


def illness(device: Device, health: Health) -> HealthState | None:
    """Return the worst state of a device, its parent and its members, or None if nothing is known against any.

    A device without a device node to hand over is in unknown state at best.
    """
    states = health_about(device, health).values()
    ill = [one for one in states if one.state != HEALTHY] or ([NO_NODE] if device.lacks_node else [])
    return next((one for one in ill if one.state == UNHEALTHY), ill[0] if ill else None)


def health_about(device: Device, health: Health) -> Health:
    """Return the health of a device, its parent and its members, as far as it is known, in this order."""
    every = (device.id, device.parent, *device.members)
    return {one: health[one] for one in every if one is not None and one in health}


def _share_base(device: str) -> str:
    """Return what the ids of a device's shares start with: its id, shortened with a digest if it is too long."""
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
