"""The device pools: one pool per kind; each device whole or in shares, with its attributes, counters and taints.

Pure. A device and its parts consume one counter set, so that the scheduler never allocates both. What is held through
the device plugin, or is not healthy, is tainted. Everything else is computed once per inventory.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import (
    MOST_SHARES,
    SHARES,
    DeviceResource,
    illness,
    shares_by_device,
)
from nodeagent.core.dra import drawn_counters, partition_pool
from nodeagent.core.dra.cpu_pool import HELD, STANDARD_NUMA, STANDARD_ROOT, claimed_names, standard_root
from nodeagent.core.dra.linked_counters import linked_counters
from nodeagent.core.dra.pool import (
    NO_SCHEDULE,
    UNHEALTHY_TAINT,
    Capacity,
    CounterSet,
    DevicePart,
    Features,
    NodeCost,
    Pool,
    PoolDevice,
    Taint,
    Value,
)
from nodeagent.core.ledger.counters import drawn
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.sharing.amounts import MEMORY, MIB, per_share, totals

SIZE = "size"
"""The capacity of a disk, in bytes."""
SWITCH = "pcieSwitch"
PARTS = "parts"
"""The counter of a device that has parts: each part consumes one, the whole consumes all."""
MOST_COUNTER_SETS = 2
"""Highest number of counter sets that one device can consume."""
LONGEST_LABEL, LONGEST_TEXT, LONGEST_NAME, MOST_ATTRIBUTES = 63, 64, 32, 32
LONGEST_BASE = LONGEST_LABEL - len(f"-share{MOST_SHARES - 1}")
"""Longest base of the name of a share."""
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")
_FIRST_FUNCTION = re.compile(r"0000:([0-9a-f]{2}):00\.0")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_IDS = (
    re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f](/(?!mig-[0-9]+g-)[a-z0-9]+(-[a-z0-9]+)*)?"),
    re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]/mig-[0-9]+g\.[0-9]+gb(\+me)?-[0-9]+"),
    re.compile(r"/dev(/[a-z0-9]+)+"),
    re.compile(r"(?!dev-|[0-9a-f]{4,8}-[0-9a-f]{2}-[0-9a-f]{2}-[0-9a-f](-|$))[a-z0-9]+(-[a-z0-9]+)*"),
)
"""Ids that are distinguished by letters and digits alone: they stay distinct when every other character becomes "-"."""
_SHARE = re.compile(r"(.+)-share(0|[1-9][0-9]{0,3})", re.ASCII)
_AS_CAPACITY = {"memory_bytes": MEMORY, "size_bytes": SIZE}
_RENAMED = {"product": "productName", "speed_mbps": "linkSpeedMbps", "netdevs": "ifName"}
_RESTLESS = frozenset(
    {
        "carrier",
        "operstate",
        "representors",
        "ecc_uncorrected",
        "state",
        "manager_state",
        "nvml",
        "in_use",
        "default_route",
        "sriov_numvfs",
    }
)
"""Attributes that change while the device stays the same: publishing them would cause writes indefinitely."""


class DevicePool(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of one kind that the configured resources serve."""

    kind: str
    resources: tuple[DeviceResource, ...]
    """A device that matches several belongs to the first."""
    unhealthy_effect: str = NO_SCHEDULE
    """Taint effect for devices known to be unhealthy; devices in unknown state get NoSchedule and keep their pods."""
    costs: Mapping[str, Mapping[str, NodeCost]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What pods need of the Node's resources in addition to a device, by name of the device's resource."""
    lists: bool = False
    """Whether devices below several PCIe switches name them all, if the API server keeps lists."""

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        still = self._still(inventory)
        now = _Now.of(inventory, ledger, health)
        shown = (
            one
            for forms in still.forms(
                consumable=features.consumable, counters=features.counters, lists=self.lists and features.lists
            )
            for one in now.tainted(forms, self.unhealthy_effect)
        )
        return Pool(
            kind=self.kind,
            devices=tuple(one for one in shown if features.taints or not one.taints),
            counters=drawn_counters.left(still.counters, now.drawn) if features.counters else (),
        )

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return self._still(inventory).part(name)

    def _still(self, inventory: Inventory) -> _Still:
        of = self.resources, self.costs
        return kept_by(inventory, f"_devices_{self.kind}", lambda: _Still(inventory, *of), of)


class _Still:
    """What is published of an inventory's devices while nothing is held and all are healthy."""

    def __init__(
        self,
        inventory: Inventory,
        resources: Iterable[DeviceResource],
        costs: Mapping[str, Mapping[str, NodeCost]],
    ) -> None:
        served: dict[str, tuple[Device, DeviceResource]] = {}
        for resource in resources:
            for device in resource.devices(inventory):
                served.setdefault(device.id, (device, resource))
        self._names = {id: label(id) for id in served}
        self._costs = costs
        self._wholes = _wholes(inventory, served)
        self._possible = frozenset(device.id for device, _ in served.values() if device.partition is not None)
        self._shared = _shared_things(inventory, served.keys() - self._possible)
        self._shared_by: dict[str, list[tuple[str, ...]]] = {}
        for ids in self._shared:
            for one in ids:
                self._shared_by.setdefault(one, []).append(ids)
        self._linked = linked_counters([device for device, _ in served.values()], self._names)
        self._drawing = {id for id, (device, _) in served.items() if device.draws is not None}
        self._sets = {id for id, (device, _) in served.items() if device.members}
        ordered = partition_pool.in_order(device for device, _ in served.values())
        self._devices = [self._device(inventory, *served[one.id]) for one in ordered]
        self._parts = {one.name: one.part for one in self._devices}
        self._divided = {_cut(one.name, LONGEST_BASE): one.part for one in self._devices if one.part.shares}
        self._switches = {
            self._names[id]: switches
            for id, (device, _) in served.items()
            if len(switches := pcie_switches(device)) > 1
        }
        self._forms: dict[tuple[bool, bool, bool], tuple[tuple[PoolDevice, ...], ...]] = {}
        self.counters = (
            *(CounterSet(name=self._names[id], counters={PARTS: parts}) for id, parts in self._wholes.items()),
            *(CounterSet(name=self._shared_name(ids), counters={PARTS: 1}) for ids in self._shared),
            *self._linked.counters,
            *partition_pool.counter_sets(ordered, _partitioned),
            *drawn_counters.counter_sets(ordered, _drawn_on),
        )

    def forms(self, *, consumable: bool, counters: bool, lists: bool = False) -> tuple[tuple[PoolDevice, ...], ...]:
        """Return the published form of each device: the device itself, or one device per share.

        Without counters, a device that has parts is left out, and all but the first of several that hand over the same
        thing, parts that are made when they are granted, and devices that draw on counters: the scheduler could
        allocate two that exclude each other.
        """
        key = consumable, counters, lists
        if key not in self._forms:
            shared = (one for ids in self._shared for one in ids[1:])
            left_out = {*self._wholes, *self._possible, *shared, *self._sets, *self._drawing}
            every = (one for one in self._devices if counters or one.part.device not in left_out)
            every = every if counters else (replace(one, consumes={}) for one in every)
            every = (self._with_lists(one) for one in every) if lists else every
            self._forms[key] = tuple((one,) if consumable else tuple(_shares(one)) for one in every)
        return self._forms[key]

    def _with_lists(self, one: PoolDevice) -> PoolDevice:
        """Return a device with all switches that it is below, if these are several."""
        if one.name not in self._switches:
            return one
        return replace(one, attributes={**one.attributes, SWITCH: self._switches[one.name]})

    def part(self, name: str) -> DevicePart | None:
        share = _SHARE.fullmatch(name)
        if name in self._parts or share is None:
            return self._parts.get(name)
        part = self._divided.get(share[1])
        return part if part is not None and int(share[2]) < part.shares else None

    def _device(self, inventory: Inventory, device: Device, resource: DeviceResource) -> PoolDevice:
        shares = resource.replicas if resource.replicas > 1 else 0
        return PoolDevice(
            name=self._names[device.id],
            part=DevicePart(device=device.id, shares=shares, each=tuple(per_share(device, shares).items())),
            attributes=_attributes(device, resource) if device.partition is None else _of_part(device, resource),
            capacity=_divided(device, shares) if shares else _capacity(device),
            shared=bool(shares),
            consumes=self._consumes(inventory, device),
            costs=self._costs.get(resource.name, {}),
        )

    def _consumes(self, inventory: Inventory, device: Device) -> dict[str, Mapping[str, int]]:
        """Return the counters of the device's own set, of the sets of its ancestors, nearest first, and of the sets of
        what it hands over as other devices do.

        Beyond the number of sets that one device can consume, the scheduler cannot know, and Prepare refuses.
        """
        linked = self._linked.consumes.get(device.id, {})
        made = {**partition_pool.consumed(device, _partitioned), **drawn_counters.consumed(device, _drawn_on)}
        own = {self._names[device.id]: {PARTS: self._wholes[device.id]}} if device.id in self._wholes else {}
        above = {self._names[one]: {PARTS: 1} for one in _above(inventory, device) if one in self._wholes}
        shared = {self._shared_name(ids): {PARTS: 1} for ids in self._shared_by.get(device.id, ())}
        every = [*made.items(), *own.items(), *linked.items(), *above.items(), *shared.items()]
        return {name: dict(counters) for name, counters in every[:MOST_COUNTER_SETS]}

    def _shared_name(self, ids: Sequence[str]) -> str:
        return _cut(f"{self._names[ids[0]]}-{_digest(' '.join(ids))}", LONGEST_LABEL)


def _divided(device: Device, shares: int) -> dict[str, Capacity]:
    """Return the capacities of a device in shares: a claim consumes one share, and of a GPU's memory and cores what it
    asks for, or as much as an equal share has."""
    found, each = {SHARES: Capacity(value=shares)}, per_share(device, shares)
    for name, size in totals(device, shares).items():
        step = MIB if name == MEMORY else 1
        found[name] = Capacity(value=size, binary=name == MEMORY, least=step, step=step, usual=each[name])
    return found


def _partitioned(whole: str) -> str:
    """Return the name of the counter set of a device of which parts are made on demand: "mig-41" for 0000:41:00.0.
    Every part repeats it, so it is short where the address allows that."""
    if plain := _FIRST_FUNCTION.fullmatch(whole):
        return f"mig-{plain[1]}"
    return _cut(f"{label(whole)}-mig", LONGEST_LABEL)


def _drawn_on(of: str) -> str:
    """Return the name of the counter set that several devices draw on."""
    return _cut(f"{label(of)}-drawn", LONGEST_LABEL)


def _wholes(inventory: Inventory, served: Collection[str]) -> dict[str, int]:
    """Return the number of served parts of each served device that has any."""
    counts = {id: sum(part in served for part in inventory.parts_of.get(id, ())) for id in served}
    return {id: count for id, count in counts.items() if count}


def _shared_things(inventory: Inventory, served: Collection[str]) -> list[tuple[str, ...]]:
    """Return the groups of served devices that hand over the same thing, except wholes with their parts and sets with
    their members."""
    found: dict[frozenset[str], None] = {}
    every = frozenset(one for one in served if not inventory.device_by_id[one].members)
    for _, ids in sorted(inventory.devices_by_thing.items()):
        mine = ids & every
        if len(mine) > 1 and not _is_chain(inventory, mine):
            found[mine] = None
    largest = [ids for ids in found if not any(ids < other for other in found)]
    return sorted(tuple(sorted(ids)) for ids in largest)


def _is_chain(inventory: Inventory, ids: frozenset[str]) -> bool:
    """Return whether of any two devices one is a part of the other: the counters of wholes cover these."""
    return all(
        a == b or a in inventory.parts_of.get(b, ()) or b in inventory.parts_of.get(a, ()) for a in ids for b in ids
    )


def _above(inventory: Inventory, device: Device) -> Iterator[str]:
    """Yield the ids of the devices that a device is a part of, nearest first."""
    seen = {device.id}
    above: Device | None = device
    while above is not None and above.parent is not None and above.parent not in seen:
        yield above.parent
        seen.add(above.parent)
        above = inventory.device_by_id.get(above.parent)


def _shares(one: PoolDevice) -> Iterator[PoolDevice]:
    """Yield one device per share, for servers without consumable capacity; an undivided device is yielded itself."""
    if not one.shared:
        yield one
    for share in range(one.part.shares):
        yield replace(one, name=f"{_cut(one.name, LONGEST_BASE)}-share{share}", capacity={}, shared=False)


class _Now(msgspec.Struct, frozen=True):
    """The differences from a state in which nothing is held and all devices are healthy."""

    inventory: Inventory
    bad: Health
    """The devices that are not healthy."""
    held: frozenset[str]
    """Devices that the device plugin or another one granted, or of which it granted a part or the whole."""
    shares: Mapping[str, int]
    """Number of shares of each device that the device plugin granted."""
    amounts: Mapping[str, Mapping[str, int]]
    """What the device plugin granted of the memory and the cores of each device."""
    claimed: frozenset[str]
    """Names of devices that claims hold."""
    drawn: Mapping[tuple[str, str], int]
    """What the device plugin granted of counters, by counter set."""

    @classmethod
    def of(cls, inventory: Inventory, ledger: Ledger, health: Health) -> _Now:
        bad = {id: one for id, one in health.items() if one.state != HEALTHY}
        given = [grant for grant in ledger.grants.values() if grant.holder.api == DEVICE_PLUGIN]
        shares = shares_by_device(given)
        held = excluded_with(inventory, ledger, {one for grant in given for one in grant.devices})
        held |= excluded_with(inventory, ledger, shares) - shares.keys()
        held |= excluded_with(inventory, ledger, ledger.devices_foreign)
        by_set = {
            (_drawn_on(of), name): size
            for (of, name), size in drawn(inventory, (*given, *ledger.foreign.values())).items()
        }
        return cls(inventory, bad, held, shares, _amounts_by_device(given), claimed_names(ledger), by_set)

    def tainted(self, forms: tuple[PoolDevice, ...], effect: str) -> Iterable[PoolDevice]:
        """Return the forms of one device with reduced capacity and taints."""
        part = forms[0].part
        held = part.device in self.held or (not part.shares and part.device in self.shares)
        taints = (*self._unhealthy(part.device, effect), *((HELD,) if held else ()))
        gone = self.shares.get(part.device, 0) if part.shares else 0
        if not taints and not gone:
            return forms
        if forms[0].shared:
            return (_with_less(forms[0], gone, self.amounts.get(part.device, {}), taints),)
        spare = [one.name for one in forms if one.name not in self.claimed]
        lost = {*spare[max(0, len(spare) - gone) :]}
        return [replace(one, taints=_held(taints) if one.name in lost else taints) for one in forms]

    def _unhealthy(self, id: str, effect: str) -> tuple[Taint, ...]:
        ill = illness(self.inventory.device_by_id[id], self.bad)
        if ill is None:
            return ()
        return (Taint(key=UNHEALTHY_TAINT, value=ill.state, effect=effect if ill.state == UNHEALTHY else NO_SCHEDULE),)


def _amounts_by_device(grants: Iterable[Grant]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for grant in grants:
        for device, name, size in grant.amounts:
            found.setdefault(device, Counter())[name] += size
    return found


def _with_less(one: PoolDevice, gone: int, amounts: Mapping[str, int], taints: tuple[Taint, ...]) -> PoolDevice:
    """Return a divided device without the shares that are gone, and what they have; with none left it is tainted as
    held."""
    left = max(0, one.part.shares - gone)
    capacity = {
        name: replace(had, value=left if name == SHARES else max(0, had.value - amounts.get(name, 0)))
        for name, had in one.capacity.items()
    }
    return replace(one, capacity=capacity, taints=taints if left else _held(taints))


def _held(taints: tuple[Taint, ...]) -> tuple[Taint, ...]:
    return taints if HELD in taints else (*taints, HELD)


# ---------------------------------------------------------------- names


def label(id: str) -> str:
    """Return a device's id as a DNS label (RFC 1123): "0000:41:00.0" becomes "0000-41-00-0".

    No two ids have the same label, on any machine: if the characters do not identify the id, a digest of it is
    appended.
    """
    simple = any(one.fullmatch(id) for one in _PLAIN_IDS) and not _SHARE.fullmatch(id)
    if simple and len(_plain(id)) <= LONGEST_LABEL:
        return _plain(id)
    return f"{(_plain(id) or 'device')[: LONGEST_LABEL - 9].rstrip('-')}-{_digest(id)}"


def _plain(id: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", id.lower()).strip("-")


def _cut(text: str, longest: int) -> str:
    """Return the text itself, or if it is too long its beginning and a digest of the whole."""
    return text if len(text) <= longest else f"{text[: longest - 9].rstrip('-')}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


# ---------------------------------------------------------------- attributes


def _attributes(device: Device, resource: DeviceResource) -> dict[str, Value]:
    """Return as many attributes as a device can have: the standard ones first, then ours, then those of the kind."""
    found: dict[str, Value | None] = {
        **_standard(device),
        "kind": device.kind,
        "resource": resource.name.rpartition("/")[2],
        "vendor": device.vendor,
        "device": device.device,
        "driver": device.driver,
        "parent": device.parent,
        "pciAddress": device.pci_address,
        "iommuGroup": device.iommu_group,
        SWITCH: next(iter(reversed(pcie_switches(device))), None),
        **({"rdma": bool(device.attributes.get("rdma")), **_for_cni(device, resource)} if device.kind == "nic" else {}),
        # The holder of one share consumes some of every capacity, so an amount that is not counted is published as an
        # attribute instead.
        **({f"{name}Bytes": one.value for name, one in _capacity(device).items()} if resource.replicas > 1 else {}),
    }
    for name, value in device.attributes.items():
        if name not in _RESTLESS and name not in _AS_CAPACITY:
            found.setdefault(_published_name(name), value)
    most = MOST_ATTRIBUTES - len(_AS_CAPACITY) - 1  # and the shares
    return dict(
        [(name, value) for name, value in found.items() if value is not None and _is_name(name) and _fits(value)][:most]
    )


def pcie_switches(device: Device) -> tuple[str, ...]:
    """Return the PCIe switches that a device is below, the outermost first, each by the address of its upstream port. A
    switch is two bridges below a root port: one towards the root, one towards the device. Only of a PCI function."""
    return device.bridges[1:-1:2] if device.pci_address is not None else ()


def _of_part(device: Device, resource: DeviceResource) -> dict[str, Value]:
    found = partition_pool.attributes(device, resource.name.rpartition("/")[2])
    return {name: value for name, value in found.items() if value is not None and _fits(value)}


def _standard(device: Device) -> dict[str, Value | None]:
    """Return the attributes of resource.kubernetes.io that this machine has in their format (not Hyper-V, platform)."""
    address = device.pci_address or ""
    node = device.numa_node if device.numa_node is not None and device.numa_node >= 0 else None
    return {
        "numaNode": node,
        STANDARD_NUMA: node,
        STANDARD_ROOT: standard_root(device),
        "resource.kubernetes.io/pciBusID": address if _PCI_ADDRESS.fullmatch(address) else None,
    }


def _for_cni(device: Device, resource: DeviceResource) -> dict[str, Value | None]:
    """Return what CNI meta-plugins know a device by (Multus, pkg/draclient): the resource that a network names, and the
    device's id. Only of a whole PCI function."""
    if device.pci_address != device.id:
        return {}
    return {"k8s.cni.cncf.io/resourceName": resource.name, "k8s.cni.cncf.io/deviceID": device.pci_address}


def _fits(value: object) -> bool:
    """Return whether the API server accepts a value; a third-party kind can produce anything."""
    if not isinstance(value, str):
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 63
    try:
        return 0 < len(value.encode()) <= LONGEST_TEXT
    except UnicodeEncodeError:  # sysfs may hold bytes that are not text
        return False


@functools.lru_cache(maxsize=1024)
def _is_name(name: str) -> bool:
    own = name.rpartition("/")[2]
    return len(own) <= LONGEST_NAME and _IDENTIFIER.fullmatch(own) is not None


@functools.lru_cache(maxsize=1024)
def _published_name(name: str) -> str:
    first, *rest = re.split(r"[^A-Za-z0-9]+", name)
    return _RENAMED.get(name) or first + "".join(word[:1].upper() + word[1:] for word in rest)


def _capacity(device: Device) -> dict[str, Capacity]:
    told = ((name, device.attributes.get(key)) for key, name in _AS_CAPACITY.items())
    found = {name: value for name, value in told if isinstance(value, int) and 0 < value < 1 << 63}
    return {name: Capacity(value=value, binary=True) for name, value in found.items()}
