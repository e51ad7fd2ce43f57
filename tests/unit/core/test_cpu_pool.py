"""What DRA publishes of CPUs, pages and memory: in a fixed order, as much as claims can have, by names that last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import (
    CPUS,
    INDIVIDUAL,
    L3,
    NUMA_NODE,
    SOCKET,
    STANDARD_NUMA,
    STANDARD_ROOT,
    CpuPool,
    PoolKind,
)
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import SIZE, MemoryPool, PagePool
from nodeagent.core.dra.pool import HELD_TAINT, DevicePart, Features
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import EFFICIENCY, PERFORMANCE
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, amounts, pool_of, result, shown, taints, wrong_with
from tests.unit.host.test_machines import MACHINES

MIB = 1 << 20
WHOLE = frozenset({"full-pcpus-only"})
OLD = Features(consumable=False)
OLDEST = Features(consumable=False, counters=False, taints=False)
EVERY_POOL: list[PoolKind] = [
    *(CpuPool(group=group, options=options) for group in (NUMA_NODE, SOCKET, L3) for options in (frozenset(), WHOLE)),
    CpuPool(group=INDIVIDUAL),
    PagePool(sizes=(2 * MIB, GIB, 64 << 10, 16 * MIB, 16 * GIB)),
    MemoryPool(),
    *(
        DevicePool(kind=one.name, resources=(DeviceResource(name=f"r/{one.name}", kind=one.name),))
        for one in builtin_kinds()
    ),
]


def smt(pages: int = 16, cpus: int = 16) -> Inventory:
    """2 sockets of 2 NUMA nodes, each an L3 of 2 cores of 2 threads; pages of 2 MiB and 16 GiB besides on each node."""
    rows = [row for row in even_rows(2, 2, 1, 2, 2, adjacent=True) if row[0] < cpus]
    return inventory_of(rows, pages={(node, 2 * MIB): pages for node in range(4)})


def holding(*parts: Grant) -> Ledger:
    ledger = NOBODY
    for one in parts:
        ledger = grant(ledger, one)
    return ledger


def container(name: str, **parts: object) -> Grant:
    return Grant(id=name, holder=Holder(api=DEVICE_PLUGIN, resource="r"), ids=(name,), **parts)  # type: ignore[arg-type]


def claimed(name: str, kind: str = "cpu", device: str = "", **parts: object) -> Grant:
    holder = Holder(api=CLAIM, resource=f"{kind}.{DRIVER}", namespace="ns", claim=name, uid=name)
    return Grant(id=f"{name}-0", holder=holder, ids=(name,), result=result(kind, device or name), **parts)  # type: ignore[arg-type]


def pages(node: int, count: int) -> Pages:
    return Pages(node=node, page_bytes=2 * MIB, pages=count)


# The rules of the API


@pytest.fixture(scope="session")
def recorded(recorded_tree: Callable[[str], Path]) -> Callable[[str], Inventory]:
    return lambda name: scan(SysFs(recorded_tree(name)), builtin_kinds())


@pytest.mark.parametrize("name", MACHINES)
def test_no_pool_of_a_recorded_machine_breaks_a_rule_in_any_form(
    name: str, recorded: Callable[[str], Inventory]
) -> None:
    """With a CPU reserved, and a CPU and a page held through the device plugin."""
    inventory = recorded(name)
    cpus = [cpu.id for cpu in inventory.cpus]
    some = [one for node in inventory.numa_nodes for one in node.hugepages if one.free_pages]
    ledger = Ledger(reserved=CpuSet(cpus[:1]))
    ledger = grant(ledger, container("a", cpus=CpuSet(cpus[1:2])))
    for one in some[:1]:
        ledger = grant(ledger, container("b", hugepages=(Pages(node=one.node, page_bytes=one.page_bytes, pages=1),)))
    for kind in EVERY_POOL:
        assert wrong_with(kind, inventory, ledger) == []


@pytest.mark.parametrize("kind", EVERY_POOL[:9])
def test_no_pool_of_a_built_machine_breaks_a_rule_in_any_form(kind: PoolKind) -> None:
    """All of a node gone through the device plugin, a part of a node, nothing."""
    ledger = holding(container("a", cpus=CpuSet([0, 1, 2, 3, 5]), hugepages=(pages(0, 16), pages(1, 3))))
    for inventory in (smt(), smt(cpus=15), inventory_of([(0, 0, -1, -1, 0)])):
        assert wrong_with(kind, inventory) == []
        assert wrong_with(kind, inventory, ledger) == []


# CPUs


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (NUMA_NODE, ["numa0", "numa1", "numa2", "numa3"]),
        (SOCKET, ["socket0", "socket1"]),
        (L3, ["l3-0", "l3-1", "l3-2", "l3-3"]),
        (INDIVIDUAL, [f"cpu{n}" for n in range(16)]),
    ],
)
def test_a_device_is_a_numa_node_a_socket_an_l3_group_or_a_cpu(group: str, names: list[str]) -> None:
    """In order of the lowest CPU; together they are all CPUs."""
    devices = shown(pool_of(CpuPool(group=group), smt()))
    assert list(devices) == names
    assert sorted(cpu for one in devices.values() for cpu in one.part.cpus) == list(range(16))
    if group != INDIVIDUAL:
        assert {one.capacity[CPUS].value for one in devices.values()} == {16 // len(names)}
        assert {(one.capacity[CPUS].least, one.capacity[CPUS].step) for one in devices.values()} == {(1, 1)}


def test_attributes_say_what_all_cpus_of_a_device_have_in_common() -> None:
    """Under every name that NUMA nodes are matched by; a socket of two nodes has none."""
    common = {"kind": "cpu", "socket": 0, "threadsPerCore": 2, "isolated": False}
    node = dict.fromkeys(("numaNode", "resource.kubernetes.io/numaNode", "dra.cpu/numaNodeID", "dra.net/numaNode"), 1)
    inventory = smt()
    assert shown(pool_of(CpuPool(), inventory))["numa1"].attributes == {**common, **node, "l3": 1}
    assert shown(pool_of(CpuPool(group=SOCKET), inventory))["socket0"].attributes == common
    one = shown(pool_of(CpuPool(group=INDIVIDUAL), inventory))["cpu5"]
    assert one.attributes == {**common, **node, "l3": 1, "core": 2}


def test_groups_name_all_that_is_near_them_where_lists_are_kept() -> None:
    """Their own NUMA nodes first, then those of the same socket at the least distance; the PCIe roots of their own."""
    gpu = Device(kind="gpu", id="g", numa_node=1, pcie_root="pci0000:80")
    nic = replace(gpu, kind="nic", id="n", pcie_root="pci0000:40")
    odd = replace(gpu, id="o", pcie_root="LNXSYSTM:00")
    far = replace(gpu, id="f", numa_node=2, pcie_root="pci0000:c0")
    near, across = 12, 32
    distances = {(a, b): 10 if a == b else near if a // 2 == b // 2 else across for a in range(4) for b in range(4)}
    inventory = inventory_of(even_rows(2, 2, 1, 2, 1), devices=(gpu, nic, odd, far), distances=distances)
    found = shown(CpuPool(lists=True).pool(inventory, NOBODY, {}, Features()))
    assert [found[f"numa{node}"].attributes[STANDARD_NUMA] for node in range(4)] == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert found["numa1"].attributes[STANDARD_ROOT] == ("pci0000:40", "pci0000:80")
    assert STANDARD_ROOT not in found["numa0"].attributes
    sockets = shown(CpuPool(group=SOCKET, lists=True).pool(inventory, NOBODY, {}, Features()))
    assert sockets["socket0"].attributes[STANDARD_NUMA] == (0, 1)
    for plain in (
        CpuPool().pool(inventory, NOBODY, {}, Features()),
        CpuPool(lists=True).pool(inventory, NOBODY, {}, Features(lists=False)),
    ):
        assert (
            shown(plain)["numa1"].attributes[STANDARD_NUMA] == 1
            and STANDARD_ROOT not in shown(plain)["numa1"].attributes
        )


def test_no_more_roots_are_named_than_a_device_may_have() -> None:
    roots = [Device(kind="nic", id=f"n{one}", numa_node=0, pcie_root=f"pci{one:04x}:00") for one in range(17)]
    for count, named in ((16, True), (17, False)):
        inventory = inventory_of(even_rows(1, 1, 1, 2, 1), devices=tuple(roots[:count]))
        pool = CpuPool(lists=True).pool(inventory, NOBODY, {}, Features())
        assert (STANDARD_ROOT in pool.devices[0].attributes) == named
        assert not wrong_with(CpuPool(lists=True), inventory)


def test_a_machine_without_numa_nodes_or_l3_has_one_device() -> None:
    """It is named so, and says nothing of what is not there."""
    inventory = inventory_of([(cpu, 0, -1, -1, cpu) for cpu in range(4)])
    for group, name in ((NUMA_NODE, "no-numa"), (L3, "no-l3")):
        (device,) = pool_of(CpuPool(group=group), inventory).devices
        assert (device.name, device.capacity[CPUS].value) == (name, 4)
        assert not {"numaNode", "l3", "resource.kubernetes.io/numaNode"} & device.attributes.keys()


def test_what_claims_hold_stays_in_the_capacity_and_what_containers_hold_does_not() -> None:
    """Reserved CPUs are never in it; a claim that comes or goes changes nothing at all."""
    inventory, kind = smt(), CpuPool()
    before = Ledger(reserved=CpuSet([0]))
    before = grant(before, container("a", cpus=CpuSet([1, 4])))
    pool = pool_of(kind, inventory, before)
    assert amounts(pool, CPUS) == {"numa0": 2, "numa1": 3, "numa2": 4, "numa3": 4}
    assert pool_of(kind, inventory, grant(before, claimed("c", cpus=CpuSet([2, 5, 6])))) == pool


def test_a_device_with_nothing_left_is_tainted_and_one_with_nothing_ever_is_left_out() -> None:
    """Where the server has no taints, both are left out."""
    ledger = grant(Ledger(reserved=CpuSet(range(4))), container("a", cpus=CpuSet(range(4, 8))))
    pool = pool_of(CpuPool(), smt(), ledger)
    assert (list(shown(pool)), taints(pool)) == (["numa1", "numa2", "numa3"], {"numa1": [HELD_TAINT]})
    assert list(shown(pool_of(CpuPool(), smt(), ledger, features=Features(taints=False)))) == ["numa2", "numa3"]


def test_whole_cores_are_counted_and_consumed_as_such() -> None:
    """A core of which a thread is reserved or held is none that a claim can have."""
    ledger = grant(Ledger(reserved=CpuSet([0])), container("a", cpus=CpuSet([4, 6])))
    pool = pool_of(CpuPool(options=WHOLE), smt(), ledger)
    assert amounts(pool, CPUS) == {"numa0": 2, "numa1": 0, "numa2": 4, "numa3": 4}
    assert {(one.capacity[CPUS].least, one.capacity[CPUS].step) for one in pool.devices} == {(2, 2)}
    assert taints(pool) == {"numa1": [HELD_TAINT]}


def test_where_cores_differ_the_step_is_the_largest_and_every_smaller_core_adds_to_it() -> None:
    """2 performance cores of 2 threads alongside 3 efficiency cores: 7 CPUs, of which any even number can be had."""
    rows = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (2, 0, 0, 0, 1), (3, 0, 0, 0, 1), *((n, 0, 0, 0, n) for n in (4, 5, 6))]
    (device,) = pool_of(CpuPool(options=WHOLE), inventory_of(rows)).devices
    amount = device.capacity[CPUS]
    assert (amount.value, amount.least, amount.step) == (7, 2, 2)
    assert "threadsPerCore" not in device.attributes


def test_cores_that_add_up_to_no_step_are_not_counted() -> None:
    """A core of 4 threads, one of which a thread is offline (3), one with 2 left: 4 and 2 are counted."""
    sizes = {0: 4, 1: 3, 2: 2}
    rows = [(core * 4 + thread, 0, 0, 0, core) for core, size in sizes.items() for thread in range(size)]
    (device,) = pool_of(CpuPool(options=WHOLE), inventory_of(rows)).devices
    assert (device.capacity[CPUS].value, device.capacity[CPUS].step) == (6, 4)


def test_cpus_that_the_options_forbid_are_not_counted() -> None:
    """A claim that says nothing has the pool's options; the scheduler must not promise it others."""
    kinds = {cpu: PERFORMANCE if cpu < 2 else EFFICIENCY for cpu in range(8)}
    inventory = inventory_of(even_rows(1, 1, 1, 8, 1), core_kinds=kinds, isolated=[1, 2])
    for options, count in (
        ({"require-performance-cores"}, 2),
        ({"require-efficiency-cores"}, 6),
        ({"require-isolated-cpus"}, 2),
        ({"require-isolated-cpus", "require-performance-cores"}, 1),
        ({"prefer-performance-cores"}, 8),
    ):
        assert amounts(pool_of(CpuPool(options=frozenset(options)), inventory), CPUS) == {"numa0": count}


def test_other_options_of_the_same_machine_are_not_mixed_up() -> None:
    """What is kept for one configuration is not shown for another."""
    inventory = smt()
    steps = [
        pool_of(CpuPool(options=one), inventory).devices[0].capacity[CPUS].step for one in (WHOLE, frozenset(), WHOLE)
    ]
    assert steps == [2, 1, 2]


@pytest.mark.parametrize("features", [OLD, OLDEST])
def test_without_consumable_capacity_cpus_are_shown_one_by_one(features: Features) -> None:
    """Reserved ones are not; held ones are tainted, or left out where there are no taints."""
    ledger = grant(Ledger(reserved=CpuSet([0])), container("a", cpus=CpuSet([1])))
    pool = pool_of(CpuPool(), smt(), grant(ledger, claimed("c", cpus=CpuSet([2]))), features=features)
    assert list(shown(pool)) == [f"cpu{n}" for n in range(1 if features.taints else 2, 16)]
    assert taints(pool) == ({"cpu1": [HELD_TAINT]} if features.taints else {})
    assert not any(one.shared or one.capacity for one in pool.devices)


@pytest.mark.parametrize(
    "name", ["cpu16", "cpu01", "cpu", "numa4", "numa00", "socket2", "l3-4", "l3", "no-l3", "", "CPU1"]
)
def test_a_name_of_no_device_stands_for_nothing(name: str) -> None:
    assert CpuPool().part(smt(), name) is None


def test_a_name_stands_for_the_same_in_whichever_form_it_was_published() -> None:
    """The configuration may have changed since."""
    for kind in (CpuPool(), CpuPool(group=SOCKET), CpuPool(group=INDIVIDUAL, options=WHOLE)):
        assert kind.part(smt(), "socket1") == DevicePart(cpus=CpuSet(range(8, 16)))
        assert kind.part(smt(), "l3-0") == kind.part(smt(), "numa0") == DevicePart(cpus=CpuSet(range(4)))
        assert kind.part(smt(), "cpu3") == DevicePart(cpus=CpuSet([3]))


# Hugepages and memory


def test_pages_are_published_by_node_and_size_in_steps_of_a_page() -> None:
    """Sizes that are not served and nodes without pages are not."""
    inventory = inventory_of(
        even_rows(1, 2, 1, 2, 1), more_nodes=[5], pages={(0, 2 * MIB): 8, (1, GIB): 2, (5, 2 * MIB): 3, (1, 2 * MIB): 0}
    )
    pool = pool_of(PagePool(sizes=(2 * MIB, GIB)), inventory)
    assert amounts(pool, SIZE) == {"numa0-2mi": 16 * MIB, "numa1-1gi": 2 * GIB, "numa5-2mi": 6 * MIB}
    one = shown(pool)["numa1-1gi"]
    assert (one.capacity[SIZE].least, one.capacity[SIZE].step, one.shared) == (GIB, GIB, True)
    assert (one.attributes["pageSize"], one.attributes["resource.kubernetes.io/numaNode"]) == ("1Gi", 1)
    assert list(shown(pool_of(PagePool(sizes=(GIB,)), inventory))) == ["numa1-1gi"]


def test_pages_shrink_by_what_containers_and_the_host_have_and_not_by_claims() -> None:
    """Faulted or not: a claim's pages stay in the capacity."""
    kind = PagePool(sizes=(2 * MIB,))
    ledger = holding(container("a", hugepages=(pages(0, 3),)))
    assert amounts(pool_of(kind, smt(), ledger), SIZE)["numa0-2mi"] == 13 * 2 * MIB
    ledger = grant(ledger, claimed("c", "hugepages", hugepages=(pages(0, 5),)))
    for free in range(16, 7, -1):
        assert amounts(pool_of(kind, with_free(smt(), free), ledger), SIZE)["numa0-2mi"] == 13 * 2 * MIB
    assert amounts(pool_of(kind, with_free(smt(), 6), ledger), SIZE)["numa0-2mi"] == 11 * 2 * MIB
    gone = pool_of(kind, with_free(smt(), 0), NOBODY)
    assert taints(gone) == {f"numa{n}-2mi": [HELD_TAINT] for n in range(4)}


def with_free(inventory: Inventory, free: int) -> Inventory:
    nodes = [
        replace(node, hugepages=tuple(replace(pool, free_pages=free) for pool in node.hugepages))
        for node in inventory.numa_nodes
    ]
    return replace(inventory, numa_nodes=tuple(nodes))


def test_memory_is_what_is_not_in_hugepages_in_whole_pages() -> None:
    """Of every node that has any, with its kind; a node without CPUs too."""
    inventory = inventory_of(
        even_rows(1, 1, 1, 2, 1), more_nodes=[3, 4], pages={(0, GIB): 4}, memory={0: 5000, 3: GIB, 4: 0}
    )
    inventory = replace(
        inventory, numa_nodes=tuple(replace(n, kind="cxl" if n.id == 3 else n.kind) for n in inventory.numa_nodes)
    )
    pool = pool_of(MemoryPool(), inventory)
    assert amounts(pool, SIZE) == {"numa0": 4096, "numa3": GIB}
    assert [one.attributes["memoryKind"] for one in pool.devices] == ["dram", "cxl"]
    held = Grant(id="c-0", holder=Holder(api=CLAIM), memory=((3, GIB),))
    assert pool_of(MemoryPool(), inventory, holding(held)) == pool
    assert MemoryPool().part(inventory, "numa4") is None


@given(st.integers(1, 100), st.integers(0, 100), st.sets(st.integers(0, 15)))
def test_blocks_are_all_of_the_pages_and_those_that_are_not_tainted_are_there(
    total: int, gone: int, held: set[int]
) -> None:
    """Where the server knows no consumable capacity. A block that a claim has is never tainted for another's pages."""
    inventory, kind, gone = smt(pages=total), PagePool(sizes=(2 * MIB,)), min(gone, total)
    blocks = [one for one in pool_of(kind, inventory, features=OLD).devices if one.part.node == 0]
    assert sum(one.part.amount for one in blocks) == total * 2 * MIB
    assert len(blocks) == min(total, 16)
    ledger, left = NOBODY, total - gone
    for one in (one for number, one in enumerate(blocks) if number in held):
        count = one.part.amount // (2 * MIB)
        if count <= left:
            left -= count
            ledger = grant(ledger, claimed(one.name, "hugepages", one.name, hugepages=(pages(0, count),)))
    if gone:
        ledger = grant(ledger, container("a", hugepages=(pages(0, gone),)))
    names = {held.result.device for held in ledger.grants.values() if held.result}
    free = [
        one for one in pool_of(kind, inventory, ledger, features=OLD).devices if one.part.node == 0 and not one.taints
    ]
    assert names <= {one.name for one in free}
    spare = left * 2 * MIB - sum(one.part.amount for one in free if one.name not in names)
    assert spare >= 0
    assert all(one.part.amount > spare for one in blocks if one not in free), "none is tainted that could be had"
    shrunk = pool_of(kind, inventory, ledger, features=OLDEST)
    assert [one.name for one in shrunk.devices if one.part.node == 0] == [one.name for one in free]


@pytest.mark.parametrize(
    "name",
    [
        "numa0",
        "numa0-2mi-block16",
        "numa0-2mi-block01",
        "numa0-2mi-block",
        "numa4-2mi",
        "numa0-1gi",
        "numa0-2mi-block１",
    ],
)
def test_a_name_of_no_pages_stands_for_nothing(name: str) -> None:
    assert PagePool(sizes=(2 * MIB,)).part(smt(), name) is None
    assert MemoryPool().part(smt(), name.replace("numa0", "numa9")) is None
