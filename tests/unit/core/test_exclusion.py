"""Exclusive is the thing that is handed over: random devices, wholes, parts and shared nodes against plain counting."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import Stamp, allocate, refuse_excluded
from nodeagent.core.deviceplugin.devices import DeviceResource, still_told
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.pool import Features
from nodeagent.core.ledger.exclusion import blocked, excluded_with, most_together, things_of
from nodeagent.core.ledger.ledger import Ledger, grant, release, with_foreign
from nodeagent.core.model.device import SHARED_NODES, Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, Request
from nodeagent.core.placement.place import place
from nodeagent.errors import Refused
from tests.builders.inventories import even_rows, inventory_of

KINDS = ("gpu", "nic", "nvme")
NODES = ("/dev/x", "/dev/y", "/dev/vfio/vfio", "/dev/nvidiactl")
MORE = ("wwid:1", "iommu-group:7")


def random_devices(pick: random.Random, count: int) -> list[Device]:
    """Each may be a part of an earlier one; device nodes and further things are drawn from few, so that many share."""
    found: list[Device] = []
    for number in range(count):
        paths = (f"/dev/d{number}", *(node for node in NODES if pick.random() < 0.15))
        own = tuple(thing for thing in (*paths, *MORE) if thing not in SHARED_NODES and pick.random() < 0.3)
        found.append(
            Device(
                kind=pick.choice(KINDS),
                id=f"d{number}",
                paths=paths,
                exclusive=own if pick.random() < 0.5 else None,
                parent=pick.choice(found).id if found and pick.random() < 0.4 else None,
                numa_node=pick.choice([0, 1, None]),
            )
        )
    return found


def machine(devices: Sequence[Device]) -> Inventory:
    return inventory_of(even_rows(1, 2, 1, 2, 1), devices=devices)


def handed_over(devices: Sequence[Device], one: Device) -> set[str]:
    """The plain rule: itself, what belongs to its holder alone, and what its parts hand over."""
    own = one.exclusive if one.exclusive is not None else set(one.paths) - SHARED_NODES
    parts = [handed_over(devices, part) for part in devices if part.parent == one.id]
    return {one.id, *own}.union(*parts)


def clash(devices: Sequence[Device], a: str, b: str) -> bool:
    by_id = {one.id: one for one in devices}
    return a != b and not handed_over(devices, by_id[a]).isdisjoint(handed_over(devices, by_id[b]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_devices_exclude_each_other_where_they_hand_over_the_same_thing(seed: int) -> None:
    devices = random_devices(random.Random(seed), 8)
    inventory = machine(devices)
    for one in devices:
        wanted = {other.id for other in devices if clash(devices, one.id, other.id)}
        assert inventory.excluded_by.get(one.id, frozenset()) == wanted
        assert excluded_with(inventory, Ledger(), [one.id]) == wanted | {one.id}
    chosen = most_together(inventory, [one.id for one in devices])
    assert not any(clash(devices, a, b) for a, b in itertools.combinations(chosen, 2))


class Node:
    """What is granted over both APIs, and what the oracle knows of it."""

    def __init__(self, pick: random.Random) -> None:
        self.pick = pick
        self.devices = random_devices(pick, pick.randint(2, 9))
        self.inventory = machine(self.devices)
        self.resources = [DeviceResource(name=f"r/{kind}", kind=kind) for kind in KINDS]
        self.ledger = Ledger()
        self.given: dict[str, set[str]] = {}
        """What each held device handed over when it was granted."""
        self.foreign: dict[str, tuple[str, set[str]]] = {}
        """(device, what it handed over then) of each holding of another device plugin, which may overlap."""
        self.ids = (f"g{number}" for number in itertools.count())

    def now(self, id: str) -> set[str]:
        return handed_over(self.inventory.devices, self.inventory.device_by_id[id])

    def free(self, id: str) -> bool:
        """Whether nothing that a device hands over is in use: as it was granted, and as it is now."""
        every = [*self.given.items(), *self.foreign.values()]
        held = [things | (self.now(one) if one in self.there else set()) for one, things in every]
        return all(self.now(id).isdisjoint(things) for things in held)

    @property
    def there(self) -> list[str]:
        return [one.id for one in self.inventory.devices]

    def take(self, ledger: Ledger, ids: Sequence[str]) -> None:
        self.ledger = ledger
        self.given.update({one: self.now(one) for one in ids})

    def by_container(self) -> None:
        """What kubelet is shown as healthy can be allocated, and nothing else."""
        resource = self.pick.choice(self.resources)
        shown = {one.id: one.healthy for one in resource.advertised(self.inventory, self.ledger, {})}
        mine = {id for name, id in self.ledger.by_id if name == resource.name}
        assert all(shown[id] == (id in self.there and self.free(id)) for id in shown if id not in mine)
        wanted = [id for id in shown if id in self.there and id not in mine]
        ids = self.pick.sample(wanted, min(len(wanted), self.pick.choice([1, 1, 2])))
        if not ids:
            return
        pairs = itertools.combinations(ids, 2)
        fits = all(map(self.free, ids)) and not any(clash(self.inventory.devices, a, b) for a, b in pairs)
        stamp = Stamp(new_id=lambda: next(self.ids), at=0.0)
        try:
            after = allocate(self.inventory, self.ledger, resource, [ids], stamp).ledger
        except Refused:
            assert not fits, ids
        else:
            assert fits, ids
            self.take(after, ids)

    def by_claim(self) -> None:
        if not self.there:
            return
        id, number = self.pick.choice(self.there), next(self.ids)
        fits, holder = self.free(id), Holder(api=CLAIM, uid=number)
        new = Grant(id=number, holder=holder, devices=(id,), things=things_of(self.inventory, [id]))
        try:
            refuse_excluded(self.inventory, self.ledger, new)
            after = grant(self.ledger, new)
        except Refused:
            assert not fits, id
        else:
            assert fits, id
            self.take(after, [id])

    def by_another_plugin(self) -> None:
        """It gives what it likes, as often as it likes."""
        if self.there:
            id, number = self.pick.choice(self.there), next(self.ids)
            holder, things = Holder(api=DEVICE_PLUGIN, resource="x/y"), things_of(self.inventory, [id])
            new = Grant(id=number, holder=holder, ids=(id,), devices=(id,), things=things)
            self.ledger = with_foreign(self.ledger, {**self.ledger.foreign, number: new})
            self.foreign[number] = id, self.now(id)

    def other_takes_back(self) -> None:
        if self.foreign:
            gone = self.pick.choice(list(self.foreign))
            del self.foreign[gone]
            self.ledger = with_foreign(self.ledger, {n: one for n, one in self.ledger.foreign.items() if n != gone})

    def give_back(self) -> None:
        if self.ledger.grants:
            gone = self.pick.choice(list(self.ledger.grants.values()))
            self.ledger = release(self.ledger, [gone.id])
            for id in gone.devices:
                del self.given[id]

    def lose(self) -> None:
        """Devices go, held or not; another day all are there. What loses its whole goes with it."""
        kept: list[Device] = []
        for one in self.devices:
            if self.pick.random() < 0.7 and (one.parent is None or any(one.parent == other.id for other in kept)):
                kept.append(one)
        self.inventory = machine(self.devices if self.pick.random() < 0.5 else kept)

    def check(self) -> None:
        """No thing was given to two holders, and what is not free is not offered to a placement either."""
        assert set(self.given) == self.ledger.devices_held
        every = [thing for things in self.given.values() for thing in things]
        assert len(every) == len(set(every)), self.ledger.grants
        assert {id for id in self.there if not self.free(id)} == blocked(self.inventory, self.ledger) & {*self.there}


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32))
def test_no_thing_is_in_two_grants_whatever_comes_and_goes(seed: int) -> None:
    """Over both APIs, over devices that leave the inventory while they are held and come back, and alongside another
    device plugin."""
    node = Node(random.Random(seed))
    steps = [node.by_container] * 3 + [node.by_claim] * 2 + [node.give_back, node.lose]
    steps += [node.by_another_plugin, node.other_takes_back]
    for _ in range(25):
        node.pick.choice(steps)()
        node.check()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_devices_are_placed_together_only_where_they_hand_over_different_things(seed: int) -> None:
    """And refused only where there are too few of these."""
    pick = random.Random(seed)
    devices = random_devices(pick, 8)
    kind = pick.choice(KINDS)
    count = pick.randint(1, 4)
    mine = [one.id for one in devices if one.kind == kind]
    sets = [
        some
        for some in itertools.combinations(mine, count)
        if not any(clash(devices, a, b) for a, b in itertools.combinations(some, 2))
    ]
    try:
        placement = place(machine(devices), Ledger(), Request(devices={kind: count}))
    except Refused as refused:
        assert not sets
        assert (refused.want, refused.free < count) == (count, True)
    else:
        assert placement.devices in sets
        assert placement.exact


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_the_scheduler_cannot_allocate_what_excludes_each_other(seed: int) -> None:
    """By counters, as far as a device may consume them: two sets; without counters, of devices that are published."""
    pick = random.Random(seed)
    devices = [replace(one, kind="nic") for one in random_devices(pick, 6)]
    inventory = machine(devices)
    served = DevicePool(kind="nic", resources=(DeviceResource(name="r/nic", kind="nic"),))
    pool = served.pool(inventory, Ledger(), {}, Features())
    room = {one.name: one.counters for one in pool.counters}
    needed = {one.part.device: one.consumes for one in pool.devices}
    assert all(len(sets) <= 2 and sets.keys() <= room.keys() for sets in needed.values())
    for a, b in itertools.combinations(needed, 2):
        both = needed[a].keys() & needed[b].keys()
        together = all(needed[a][one]["parts"] + needed[b][one]["parts"] <= room[one]["parts"] for one in both)
        if not clash(devices, a, b):
            assert together, (a, b)
        elif len(needed[a]) < 2 and len(needed[b]) < 2:
            assert not together, (a, b)
    plain = served.pool(inventory, Ledger(), {}, Features(counters=False)).devices
    names = [one.part.device for one in plain]
    assert not any(clash(devices, a, b) for a, b in itertools.combinations(names, 2))


@pytest.mark.parametrize(
    ("groups", "kinds", "want"),
    [
        (9, ("gpu", "nic"), {"gpu": 1, "nic": 8}),
        (8, ("gpu", "nic", "nvme"), {"gpu": 1, "nic": 1, "nvme": 6}),
        (32, ("gpu", "nic"), {"gpu": 4, "nic": 4}),
        (16, ("gpu", "nic"), {"gpu": 8, "nic": 8}),
    ],
)
def test_of_many_groups_as_many_are_placed_as_fit(groups: int, kinds: Sequence[str], want: dict[str, int]) -> None:
    """More combinations than can be tried: what fits is found all the same, also on as few NUMA nodes as can be."""
    devices = [
        Device(kind=kind, id=f"{kind}{group:02}", numa_node=group % 2, exclusive=(f"iommu-group:{group}",))
        for group in range(groups)
        for kind in kinds
    ]
    inventory = machine(devices)
    for numa in (BEST_EFFORT, RESTRICTED):
        placement = place(inventory, Ledger(), Request(devices=want, numa=numa))
        assert Counter(inventory.device_by_id[one].kind for one in placement.devices) == want
        assert not any(clash(devices, a, b) for a, b in itertools.combinations(placement.devices, 2))
    more = {**want, kinds[0]: groups - sum(want.values()) + want[kinds[0]] + 1}
    with pytest.raises(Refused):
        place(inventory, Ledger(), Request(devices=more))


def test_a_device_that_must_be_taken_is_found_in_a_large_group() -> None:
    devices = [Device(kind="nic", id=f"n{number:03}", exclusive=("iommu-group:1",)) for number in range(150)]
    for one in devices[::10]:
        request = Request(devices={"nic": 1}, must_devices=frozenset({one.id}))
        assert place(machine(devices), Ledger(), request).devices == (one.id,)


def test_a_held_disk_that_its_holder_mounts_stays_served() -> None:
    """The kernel shows the mount of a container as it shows one of the host."""
    disk = Device(kind="nvme", id="d", paths=("/dev/nvme0n1",), attributes={"in_use": False})
    mounted = machine([replace(disk, attributes={"in_use": True})])
    resource = DeviceResource(name="r/nvme", kind="nvme")
    assert resource.devices(mounted) == []
    for before in (machine([disk]), machine([])):
        known = still_told(before, mounted, {"d"})
        assert [one.id for one in resource.devices(known)] == ["d"], "known before, or found after a restart"
    assert resource.devices(still_told(machine([disk]), mounted, set())) == []
