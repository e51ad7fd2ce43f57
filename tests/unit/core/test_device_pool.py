"""What DRA publishes of devices: names that last, parts that exclude their whole, taints for what cannot be had."""

from __future__ import annotations

import re
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import SHARES, DeviceResource
from nodeagent.core.dra.device_pool import DevicePool, label
from nodeagent.core.dra.pool import HELD_TAINT, NO_EXECUTE, NO_SCHEDULE, UNHEALTHY_TAINT, DevicePart, Features, Pool
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from nodeagent.core.model.inventory import Inventory
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, FORMS, NOBODY, device, health_of, pool_of, result, shown, taints, wrong_with

RESOURCE = DeviceResource(name="r/nic", kind="nic")
NICS = DevicePool(kind="nic", resources=(RESOURCE,))
SHARED = DevicePool(kind="nic", resources=(DeviceResource(name="r/nic", kind="nic", replicas=4),))
OLD = Features(consumable=False)
UUID = "ab" * 31


def machine(*devices: Device) -> Inventory:
    return inventory_of(even_rows(1, 1, 1, 2, 1), devices=devices)


def family() -> Inventory:
    """A function with 2 virtual ones, one of which has a part; a function of its own."""
    return machine(
        device("pf"), device("vf0", parent="pf"), device("vf1", parent="pf"), device("q", parent="vf0"), device("x")
    )


def given_away(*ids: str, shares: bool = False, name: str = "g", ledger: Ledger = NOBODY, n: int = 1) -> Ledger:
    holder = Holder(api=DEVICE_PLUGIN, resource="r/nic")
    if not shares:
        return grant(ledger, Grant(id=name, holder=holder, ids=ids, devices=ids))
    own = tuple(f"{one}::{name}{i}" for one in ids for i in range(n))
    return grant(ledger, Grant(id=name, holder=holder, ids=own, shares=ids))


def claimed(name: str, published: str, ledger: Ledger = NOBODY, n: int = 1, **parts: tuple[str, ...]) -> Ledger:
    holder = Holder(api=CLAIM, resource=f"nic.{DRIVER}", namespace="ns", claim=name, uid=name)
    one = Grant(id=f"{name}-0", holder=holder, ids=(name,), result=result("nic", published, shares=n))
    return grant(ledger, replace(one, **parts))  # type: ignore[arg-type]


def shares_left(pool: Pool) -> dict[str, int]:
    return {one.name: one.capacity[SHARES].value for one in pool.devices}


# Health


def test_a_device_without_a_node_is_published_as_unknown() -> None:
    """The scheduler places no new pod on it; where taints are not kept it is left out."""
    gpus = DevicePool(kind="gpu", resources=(DeviceResource(name="r/gpu", kind="gpu"),), unhealthy_effect=NO_EXECUTE)
    inventory = machine(device("bare", kind="gpu"), device("x", kind="gpu", paths=("/dev/dri/renderD128",)))
    (taint,) = shown(pool_of(gpus, inventory))["bare"].taints
    assert (taint.key, taint.value, taint.effect) == (UNHEALTHY_TAINT, UNKNOWN, NO_SCHEDULE)
    assert list(shown(pool_of(gpus, inventory, features=Features(taints=False)))) == ["x"]


# Names


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("0000:41:00.0", "0000-41-00-0"),
        ("10000:e1:00.0", "10000-e1-00-0"),
        ("0000:41:00.0/mig-1-0", "0000-41-00-0-mig-1-0"),
        ("/dev/null", "dev-null"),
        ("/dev/dri/card0", "dev-dri-card0"),
        ("fpga-0", "fpga-0"),
    ],
)
def test_a_name_is_the_id_where_letters_and_digits_tell_it_from_all_others(id: str, name: str) -> None:
    assert label(id) == name


@pytest.mark.parametrize(
    "id",
    [
        "/dev/ttyS0",
        "/dev/a-b",
        "0000-41-00-0",
        "dev-null",
        "x-share0",
        "eth0.5",
        "a--b",
        "-a",
        "a_b",
        "Ä",
        "",
        "n" * 64,
        UUID * 3,
    ],
)
def test_any_other_name_ends_with_a_digest_of_the_id(id: str) -> None:
    """Else the name of one device would depend on what other devices there are."""
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,52}[a-z0-9])?-[0-9a-f]{8}", label(id))


@given(st.lists(st.text(st.sampled_from("a0:./-_A"), min_size=1, max_size=8), unique=True, max_size=30))
def test_two_devices_never_have_one_name_and_each_is_found_by_its_own(ids: list[str]) -> None:
    """Whatever their ids look like, in every form."""
    inventory = machine(*(device(id) for id in ids))
    assert len(shown(pool_of(NICS, inventory))) == len(ids)
    assert wrong_with(NICS, inventory) == wrong_with(SHARED, inventory) == []


@given(st.text(min_size=1, max_size=80))
def test_every_id_makes_a_name_that_the_server_takes(id: str) -> None:
    """Also of bytes that are no text, and of 63 characters with a share's number behind."""
    inventory = machine(device(id), device("b" * 63, attributes={"x": "\udcff", "y": id}))
    assert wrong_with(NICS, inventory) == wrong_with(SHARED, inventory) == []


@pytest.mark.parametrize(
    "name", ["0000-41-00-0-share4", "0000-41-00-0-share01", "0000-41-00-0-share", "y", "x-share²", ""]
)
def test_a_name_of_no_device_stands_for_nothing(name: str) -> None:
    inventory = machine(device("0000:41:00.0"), device("x"))
    assert SHARED.part(inventory, name) is None
    assert NICS.part(inventory, name) is None
    assert NICS.part(inventory, "x-share0") is None


def test_a_device_is_served_by_the_first_resource_that_matches() -> None:
    """One that none matches is not there, in the pool or by its name."""
    many = DeviceResource(name="r/many", kind="nic", match={"id": "[ab]"}, replicas=4)
    pool = DevicePool(kind="nic", resources=(DeviceResource(name="r/a", kind="nic", match={"id": "a"}), many))
    inventory = machine(device("a"), device("b"), device("c"), device("gpu", kind="gpu"))
    found = shown(pool_of(pool, inventory))
    assert {name: one.attributes["resource"] for name, one in found.items()} == {"a": "a", "b": "many"}
    assert [pool.part(inventory, name) for name in ("a", "b", "c", "gpu")] == [
        DevicePart(device="a"),
        DevicePart(device="b", shares=4),
        None,
        None,
    ]
    assert list(shown(pool_of(NICS, inventory))) == ["a", "b", "c"], "another pool of the same inventory is its own"


# Parts and wholes


def test_a_whole_and_its_parts_consume_one_counter_set() -> None:
    """Each part one, the whole all: no sum of two that exclude each other fits, and any parts together do."""
    pool = pool_of(NICS, family())
    sets = {one.name: one.counters["parts"] for one in pool.counters}
    assert sets == {"pf": 3, "vf0": 1}
    consumed = {one.name: {name: them["parts"] for name, them in one.consumes.items()} for one in pool.devices}
    assert consumed == {
        "pf": {"pf": 3},
        "vf0": {"vf0": 1, "pf": 1},
        "vf1": {"pf": 1},
        "q": {"vf0": 1, "pf": 1},
        "x": {},
    }


def test_no_device_consumes_more_than_two_counter_sets() -> None:
    """Of a deeper family the nearest count; the rest Prepare refuses."""
    inventory = machine(*(device(f"d{n}", parent=f"d{n - 1}" if n else None) for n in range(5)))
    found = shown(pool_of(NICS, inventory))
    assert [list(found[f"d{n}"].consumes) for n in range(5)] == [
        ["d0"],
        ["d1", "d0"],
        ["d2", "d1"],
        ["d3", "d2"],
        ["d3", "d2"],
    ]
    assert wrong_with(NICS, inventory) == []


def test_without_counters_a_whole_that_has_parts_is_left_out() -> None:
    """And nothing consumes what is not there."""
    pool = pool_of(NICS, family(), features=Features(counters=False))
    assert (list(shown(pool)), pool.counters) == (["vf1", "q", "x"], ())
    assert not any(one.consumes for one in pool.devices)
    assert wrong_with(NICS, family()) == []


def test_parts_count_only_where_both_they_and_the_whole_are_served() -> None:
    """A function with the node's own network on it gives away its virtual ones."""
    inventory = machine(device("pf", attributes={"default_route": True}), device("vf", parent="pf"))
    pool = pool_of(NICS, inventory)
    assert (list(shown(pool)), pool.counters, pool.devices[0].consumes) == (["vf"], (), {})


def test_devices_that_say_to_be_parts_of_each_other_do_no_harm() -> None:
    """A third party's kind may say anything."""
    inventory = machine(device("a", parent="b"), device("b", parent="a"), device("c", parent="c"))
    assert wrong_with(NICS, inventory) == []


# What is held and what is ill


@pytest.mark.parametrize(
    ("taken", "tainted"), [("pf", "pf vf0 vf1 q"), ("vf0", "pf vf0 q"), ("vf1", "pf vf1"), ("x", "x")]
)
def test_what_a_container_holds_is_tainted_with_its_parts_and_its_whole(taken: str, tainted: str) -> None:
    """Left out where there are no taints. What a claim holds changes nothing: the scheduler knows."""
    ledger = given_away(taken)
    assert taints(pool_of(NICS, family(), ledger)) == {name: [HELD_TAINT] for name in tainted.split()}
    left = pool_of(NICS, family(), ledger, features=Features(taints=False))
    assert {*shown(left)} == {"pf", "vf0", "vf1", "q", "x"} - {*tainted.split()}
    by_claim = claimed("c", taken, devices=(taken,))
    assert pool_of(NICS, family(), by_claim) == pool_of(NICS, family())


def test_what_is_ill_is_tainted_by_its_worst_word_and_unknown_never_evicts() -> None:
    """A part is as fit as its whole."""
    pool = DevicePool(kind="nic", resources=(RESOURCE,), unhealthy_effect=NO_EXECUTE)
    health = health_of(pf=UNHEALTHY, vf0=UNKNOWN, x=UNKNOWN, vf1=HEALTHY)
    found = {
        name: [(it.key, it.value, it.effect) for it in one.taints]
        for name, one in shown(pool_of(pool, family(), health=health)).items()
    }
    ill, unknown = (UNHEALTHY_TAINT, UNHEALTHY, NO_EXECUTE), (UNHEALTHY_TAINT, UNKNOWN, NO_SCHEDULE)
    assert found == {"pf": [ill], "vf0": [ill], "vf1": [ill], "q": [unknown], "x": [unknown]}
    assert wrong_with(pool, family(), given_away("x"), health) == []
    both = pool_of(pool, family(), given_away("x"), health)
    assert taints(both)["x"] == [UNHEALTHY_TAINT, HELD_TAINT]


def test_shares_that_containers_hold_are_gone_from_the_capacity_and_those_of_claims_are_not() -> None:
    """The last one leaves a taint; a part and the whole are tainted with the first."""
    inventory = machine(device("a"), device("vf", parent="a"), device("b"))
    ledger = claimed("c", "a", given_away("a", shares=True, n=3), shares=("a",))
    pool = pool_of(SHARED, inventory, ledger)
    assert shares_left(pool) == {"a": 1, "vf": 4, "b": 4}
    assert taints(pool) == {"vf": [HELD_TAINT]}
    ledger = given_away("b", shares=True, name="h", n=4, ledger=ledger)
    assert taints(pool_of(SHARED, inventory, ledger)) == {"vf": [HELD_TAINT], "b": [HELD_TAINT]}
    assert taints(pool_of(NICS, inventory, ledger)) == {one: [HELD_TAINT] for one in ("a", "vf", "b")}
    assert taints(pool_of(SHARED, inventory, given_away("b"))) == {"b": [HELD_TAINT]}


@given(st.integers(0, 4), st.sets(st.integers(0, 3)))
def test_without_consumable_capacity_each_share_is_a_device_and_as_many_can_be_had_as_are_left(
    given: int, claims: set[int]
) -> None:
    """Never one taken from a claim that has it, and none too many."""
    inventory, ledger = machine(device("a"), device("b")), NOBODY
    claims = set(sorted(claims)[: 4 - given])
    for share in claims:
        ledger = claimed(f"c{share}", f"a-share{share}", ledger, shares=("a",))
    if given:
        ledger = given_away("a", shares=True, n=given, ledger=ledger)
    pool = pool_of(SHARED, inventory, ledger, features=OLD)
    assert list(shown(pool)) == [f"{one}-share{share}" for one in "ab" for share in range(4)]
    free = {one.name for one in pool.devices if not one.taints and one.name.startswith("a-")}
    assert {f"a-share{share}" for share in claims} <= free
    assert len(free) == 4 - given
    assert not any(one.shared or SHARES in one.capacity for one in pool.devices)


# Attributes and capacities


def test_what_is_published_of_a_device() -> None:
    """Standard names alongside our own; sizes are capacities, what comes and goes is not published."""
    attributes = {"speed_mbps": 100000, "netdevs": "eth0", "mtu": 1500, "rdma": "mlx5_0", "memory_bytes": 1 << 30}
    one = device(
        "0000:41:00.0",
        pci_address="0000:41:00.0",
        pcie_root="pci0000:40",
        numa_node=1,
        vendor="15b3",
        driver="mlx5_core",
        attributes={**attributes, "carrier": True, "operstate": "up", "sriov_numvfs": 3, "in_use": False},
    )
    (found,) = pool_of(NICS, machine(one)).devices
    assert found.attributes == {
        "numaNode": 1,
        "resource.kubernetes.io/numaNode": 1,
        "resource.kubernetes.io/pcieRoot": "pci0000:40",
        "resource.kubernetes.io/pciBusID": "0000:41:00.0",
        "kind": "nic",
        "resource": "nic",
        "vendor": "15b3",
        "driver": "mlx5_core",
        "pciAddress": "0000:41:00.0",
        "rdma": True,
        "k8s.cni.cncf.io/resourceName": "r/nic",
        "k8s.cni.cncf.io/deviceID": "0000:41:00.0",
        "linkSpeedMbps": 100000,
        "ifName": "eth0",
        "mtu": 1500,
    }
    assert {name: (it.value, it.binary) for name, it in found.capacity.items()} == {"memory": (1 << 30, True)}


def test_the_nearest_switch_is_named_and_all_of_them_only_where_the_server_keeps_lists() -> None:
    """Below a root port there are two bridges for each switch."""
    near = device("a", pci_address="0000:05:00.0", bridges=("0000:00:01.0", "0000:01:00.0", "0000:02:00.0"))
    nested = replace(near, id="b", bridges=(*near.bridges, "0000:03:00.0", "0000:04:00.0"))
    direct = replace(near, id="c", bridges=("0000:00:02.0",))
    inventory = machine(near, nested, direct)
    names = {one.name: one.attributes.get("pcieSwitch") for one in pool_of(NICS, inventory).devices}
    assert names == {"a": "0000:01:00.0", "b": "0000:03:00.0", "c": None}
    with_lists = replace(NICS, lists=True)
    listed = {one.name: one.attributes.get("pcieSwitch") for one in pool_of(with_lists, inventory).devices}
    assert listed == {"a": "0000:01:00.0", "b": ("0000:01:00.0", "0000:03:00.0"), "c": None}
    old = with_lists.pool(inventory, NOBODY, {}, Features(lists=False))
    assert {one.name: one.attributes.get("pcieSwitch") for one in old.devices} == names
    assert wrong_with(with_lists, inventory) == []


def test_standard_attributes_are_left_out_where_the_machine_has_another_form() -> None:
    """A domain of five digits, a root that is no PCI bus, no NUMA node."""
    odd = device("x", pci_address="10000:e1:00.0", pcie_root="VMBUS:01", numa_node=-1)
    (found,) = pool_of(NICS, machine(odd)).devices
    assert {name for name in found.attributes if "/" in name or name == "numaNode"} == set()
    assert found.attributes["pciAddress"] == "10000:e1:00.0"


def test_what_the_server_would_not_take_is_left_out_and_the_rest_is_published() -> None:
    """Names that are no identifiers, texts too long or empty, numbers too large, values of no form, too many."""
    bad = {"9x": 1, "n" * 33: 1, "long": "ä" * 33, "empty": "", "large": 1 << 63, "list": [1], "bytes": "a\udcff"}
    good = {f"good{n}": n for n in range(40)}
    one = device("x", attributes={**bad, **good, "size_bytes": -1, "memory_bytes": 1 << 63})
    inventory = machine(one)
    (found,) = pool_of(NICS, inventory).devices
    assert not {*bad} & found.attributes.keys()
    assert {"good0", "good20", "rdma", "kind"} <= found.attributes.keys()
    assert found.capacity == {}
    full = machine(device("x", attributes={**good, "size_bytes": 1, "memory_bytes": 1}))
    assert wrong_with(SHARED, inventory) == wrong_with(SHARED, full) == []


# Order and cost


@pytest.mark.parametrize("features", FORMS)
def test_the_order_is_the_inventorys_and_the_same_twice(features: Features) -> None:
    """Whatever is held; an inventory that is read again gives an equal pool."""
    ledger = given_away("x", ledger=claimed("c", "vf1", devices=("vf1",)))
    first, again = (pool_of(NICS, family(), ledger, features=features) for _ in range(2))
    assert first == again
    assert first is not again
    names = [one.name for one in first.devices]
    assert names == [name for name in ("pf", "vf0", "vf1", "q", "x") if name in names]


def test_what_is_kept_of_an_inventory_is_not_changed_by_what_was_held_once() -> None:
    """And unchanged devices are the very same values."""
    inventory = family()
    before = pool_of(NICS, inventory)
    pool_of(NICS, inventory, given_away("pf"), health_of(x=UNHEALTHY))
    after = pool_of(NICS, inventory)
    assert after == before
    assert all(a is b for a, b in zip(after.devices, before.devices, strict=True))


def test_another_configuration_of_the_same_kind_is_not_answered_from_what_was_kept() -> None:
    inventory = machine(device("a"))
    assert [pool_of(pool, inventory).devices[0].shared for pool in (NICS, SHARED, NICS)] == [False, True, False]
    match = MappingProxyType({"id": "b"})
    other = DevicePool(kind="nic", resources=(DeviceResource(name="r/nic", kind="nic", match=match),))
    assert pool_of(other, inventory).devices == ()
