"""The picture of a machine shows each of its parts once, with exactly those who hold it."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import DeviceState, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Placement
from nodeagent.core.model.topology import NO_NODE
from nodeagent.core.picture.document import to_document
from nodeagent.core.picture.draw import draw
from nodeagent.core.picture.holders import LETTERS, MORE
from nodeagent.core.picture.values import EXCLUDED, FREE, HELD, PLACED, RESERVED, Picture
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pictures import claim_grant, large_machine, many_grants, pod_grant
from tests.oracles.placement import Row

KINDS = ("gpu", "nic", "bridge")
ROWS = st.tuples(*(st.integers(0, 3) for _ in range(3)), st.integers(0, 5))


@st.composite
def machines(draw_one: st.DrawFn) -> Inventory:
    """Uneven machines: nodes across packages, CPUs without a node or an L3 cache, devices of unknown nodes."""
    some: list[tuple[int, int, int, int]] = draw_one(st.lists(ROWS, min_size=1, max_size=24))
    rows: list[Row] = [(cpu, package, node - 1, l3 - 1, core) for cpu, (package, node, l3, core) in enumerate(some)]
    nodes = draw_one(st.lists(st.sampled_from([None, -1, 0, 1, 7]), max_size=6))
    devices = [Device(kind=KINDS[i % 3], id=f"d{i}", numa_node=node) for i, node in enumerate(nodes)]
    return inventory_of(rows, more_nodes=[5], pages={(5, GIB): 4, (0, GIB): 2}, devices=devices)


@st.composite
def grants_on(draw_one: st.DrawFn, inventory: Inventory) -> tuple[Grant, ...]:
    """Grants that overlap, too: what a picture shows of a ledger is what the ledger says."""
    cpus, devices = sorted(inventory.cpus_online), [one.id for one in inventory.devices]
    held = st.tuples(
        st.booleans(),
        st.integers(0, 4),
        st.sets(st.sampled_from(cpus), max_size=4),
        st.sets(st.sampled_from([*devices, "gone"]), max_size=2),
        st.integers(0, 3),
    )
    grants = []
    for number, (claim, who, some, things, pages) in enumerate(draw_one(st.lists(held, max_size=8))):
        of_pages = (Pages(node=5, page_bytes=GIB, pages=pages),) if pages else ()
        made = (claim_grant if claim else pod_grant)(
            who, CpuSet(some), devices=tuple(sorted(things)), hugepages=of_pages
        )
        grants.append(
            Grant(id=f"{number}", holder=made.holder, cpus=made.cpus, devices=made.devices, hugepages=of_pages)
        )
    return tuple(grants)


CASES = machines().flatmap(lambda one: st.tuples(st.just(one), grants_on(one)))


@given(CASES)
def test_each_part_of_the_machine_is_drawn_once_in_its_place(case: tuple[Inventory, tuple[Grant, ...]]) -> None:
    inventory, grants = case
    picture = draw(inventory, grants)
    assert sorted(cpu.id for cpu in picture.cpus()) == sorted(inventory.cpus_online)
    for package in picture.packages:
        for node in package.nodes:
            for group in node.groups:
                for core in group.cores:
                    of = [inventory.cpu_by_id[cpu.id] for cpu in core.cpus]
                    where = {(cpu.package, cpu.numa_node, cpu.l3, cpu.core) for cpu in of}
                    assert where == {(group.package, node.node, group.l3, core.core)}
                    assert group.package in package.packages
    real = [node.node for node in picture.nodes() if node.node != NO_NODE]
    assert sorted(real) == sorted(one for one in inventory.node_order if one != NO_NODE)
    shown = Counter(device.id for node in picture.nodes() for device in node.devices)
    assert shown == Counter(one.id for one in inventory.devices if one.kind != "bridge")
    pools = Counter((node.node, pool.page_bytes) for node in picture.nodes() for pool in node.hugepages)
    assert pools == Counter((pool.node, pool.page_bytes) for node in inventory.numa_nodes for pool in node.hugepages)


@given(CASES)
def test_every_part_shows_exactly_its_holders(case: tuple[Inventory, tuple[Grant, ...]]) -> None:
    """Compared with the grants, one by one."""
    inventory, grants = case
    picture = draw(inventory, grants)

    def name(grant: Grant) -> str:
        holder = grant.holder
        return f"claim {holder.namespace}/{holder.claim}" if holder.claim else f"{holder.namespace}/{holder.pod}"

    assert [one.name for one in picture.holders] == list(dict.fromkeys(name(grant) for grant in grants))
    for cpu in picture.cpus():
        held = {name(grant) for grant in grants if cpu.id in grant.cpus}
        assert {picture.holders[one].name for one in cpu.holders} == held
        assert cpu.state == (HELD if held else FREE)
    for device in (device for node in picture.nodes() for device in node.devices):
        assert {picture.holders[one].name for one in device.holders} == {
            name(grant) for grant in grants if device.id in grant.devices
        }
    for node in picture.nodes():
        for pool in node.hugepages:
            held_pages = sum(p.pages for g in grants for p in g.hugepages if (p.node, p.page_bytes) == (node.node, GIB))
            assert sum(pages for _, pages in pool.held) == held_pages
    for holder in picture.holders:
        mine = [grant for grant in grants if name(grant) == holder.name]
        assert set(holder.grants) == {grant.id for grant in mine}
        assert set(holder.devices) == {one for grant in mine for one in grant.devices}, "also what has disappeared"


@given(CASES)
def test_the_picture_in_plain_types_is_json_and_refers_to_holders_that_are_there(
    case: tuple[Inventory, tuple[Grant, ...]],
) -> None:
    document = json.loads(json.dumps(to_document(draw(*case))))
    count = len(document["holders"])
    for package in document["packages"]:
        for node in package["nodes"]:
            parts = [*node["devices"], *(cpu for g in node["groups"] for core in g["cores"] for cpu in core["cpus"])]
            assert all(0 <= holder < count for part in parts for holder in part["holders"])


def test_holders_have_letters_of_their_own_until_there_are_none_left() -> None:
    inventory = inventory_of(even_rows(2, 2, 4, 8, 2))
    many = [pod_grant(number, CpuSet([number])) for number in range(240)]
    letters = [one.letter for one in draw(inventory, many).holders]
    assert letters[: len(LETTERS)] == list(LETTERS)
    assert set(letters[len(LETTERS) :]) == {MORE}
    assert len({*LETTERS}) == len(LETTERS) >= 200 and MORE not in LETTERS


def test_grants_whose_pods_are_not_known_yet_are_not_taken_for_one_holder() -> None:
    grants = [
        Grant(id=one, holder=Holder(api=DEVICE_PLUGIN, resource="cpu"), cpus=CpuSet([n])) for n, one in enumerate("ab")
    ]
    assert len(draw(inventory_of(even_rows(1, 1, 1, 2, 1)), grants).holders) == 2


def test_a_placement_on_trial_is_shown_as_one_more_holder() -> None:
    placement = Placement(cpus=CpuSet([2, 3]), devices=("gpu0",), hugepages=(Pages(node=0, page_bytes=GIB, pages=1),))
    devices = [Device(kind="gpu", id="gpu0", numa_node=0)]
    inventory = inventory_of(even_rows(1, 1, 1, 4, 1), devices=devices, pages={(0, GIB): 2})
    picture = draw(inventory, [pod_grant(1, CpuSet([0]))], reserved=CpuSet([1]), placement=placement)
    assert [cpu.state for cpu in picture.cpus()] == [HELD, RESERVED, PLACED, PLACED]
    (node,) = picture.nodes()
    assert [device.state for device in node.devices] == [PLACED]
    assert node.hugepages[0].held == ((1, 1),)
    assert [one.letter for one in picture.holders] == ["A", "*"]


def test_a_device_says_that_it_is_ill_or_that_another_excludes_it() -> None:
    devices = [
        Device(kind="nic", id="pf", numa_node=0),
        Device(kind="nic", id="vf", numa_node=0, parent="pf"),
        Device(kind="nic", id="ill", numa_node=0),
    ]
    inventory = inventory_of(even_rows(1, 1, 1, 1, 1), devices=devices)
    health = {"ill": HealthState(state=DeviceState.UNHEALTHY, since=0, reason="no carrier")}
    shown = _devices(draw(inventory, [pod_grant(1, devices=("vf",))], health=health))
    assert {one: (state, health) for one, (state, health, _) in shown.items()} == {
        "pf": (EXCLUDED, "healthy"),
        "vf": (HELD, "healthy"),
        "ill": (FREE, "unhealthy"),
    }
    assert shown["ill"][2] == "no carrier"


def _devices(picture: Picture) -> dict[str, tuple[str, str, str]]:
    return {one.id: (one.state, one.health, one.reason) for node in picture.nodes() for one in node.devices}


def test_the_large_machine_of_other_tests_is_as_large_as_they_say() -> None:
    inventory = large_machine()
    picture = draw(inventory, many_grants(inventory))
    assert sum(1 for _ in picture.cpus()) == 256
    assert sum(len(node.devices) for node in picture.nodes()) == 64
    assert len(picture.holders) == 200
