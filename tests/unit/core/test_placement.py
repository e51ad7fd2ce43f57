"""What place() promises alongside its cost: refusals with true numbers, options, determinism, bounded work."""

from __future__ import annotations

import random
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import WITHHELD, Device, Link
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import RESTRICTED, SINGLE, Pages, Placement, PlacementCost, Request
from nodeagent.core.model.topology import EFFICIENCY, PERFORMANCE
from nodeagent.core.placement.describe import describe
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of
from tests.unit.core.test_joint import ledger_of, random_machine, random_request

MIB2 = 2 << 20
EMPTY = Ledger()


def cpus_of(inventory: Inventory, count: int, *options: str, held: str = "", **more: object) -> str:
    ledger = Ledger(reserved=CpuSet.parse(held))
    request = Request(cpus=count, options=frozenset(options), **more)  # type: ignore[arg-type]
    return str(place(inventory, ledger, request).cpus)


def refusal(inventory: Inventory, request: Request, ledger: Ledger = EMPTY) -> Refused:
    with pytest.raises(Refused) as caught:
        place(inventory, ledger, request)
    return caught.value


TWO_SOCKETS = inventory_of(even_rows(2, 2, 2, 4, 2), distances=even_distances(2, 2))
"""2 packages, 4 NUMA nodes, 8 L3 groups of 4 cores, 64 CPUs."""


# ---------------------------------------------------------------- promises over random states


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_what_is_given_does_not_matter(seed: int) -> None:
    pick = random.Random(seed)
    inventory, ledger, request = random_question(pick)
    other = shuffled(pick, inventory)
    turned = replace(
        request,
        hugepages=dict(reversed(request.hugepages.items())),
        devices=dict(reversed(request.devices.items())),
        near=tuple(reversed(request.near)),
    )
    assert answer(inventory, ledger, request) == answer(other, ledger, turned)


def random_question(pick: random.Random) -> tuple[Inventory, Ledger, Request]:
    inventory = random_machine(pick)
    request = random_request(pick, inventory)
    held = [cpu.id for cpu in inventory.cpus if pick.random() < 0.2]
    return inventory, ledger_of(held, []), request


def shuffled(pick: random.Random, inventory: Inventory) -> Inventory:
    def mixed(values: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(pick.sample(values, len(values)))

    names = ("cpus", "numa_nodes", "devices", "links")
    return replace(inventory, **{name: mixed(getattr(inventory, name)) for name in names})  # type: ignore[arg-type]


def answer(inventory: Inventory, ledger: Ledger, request: Request) -> object:
    try:
        return place(inventory, ledger, request)
    except Refused as refused:
        return str(refused)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_more_free_cpus_never_make_the_span_worse(seed: int) -> None:
    pick = random.Random(seed)
    free = CpuSet(pick.sample(range(64), pick.randint(1, 60)))
    more = free | CpuSet(pick.sample(range(64), pick.randint(1, 20)))
    options = frozenset(pick.choice([(), (opt.FULL_PCPUS,), (opt.SPREAD_CORES,)]))
    request = Request(cpus=pick.randint(1, len(free)), options=options, within_cpus=free)
    try:
        before = place(TWO_SOCKETS, EMPTY, request)
    except Refused:
        return
    after = place(TWO_SOCKETS, EMPTY, replace(request, within_cpus=more))
    assert span(options, after.cost) <= span(options, before.cost)


def span(options: frozenset[str], cost: PlacementCost) -> tuple[int, ...]:
    """The first eight parts as the options rank them."""
    cores = (cost.split_cores, cost.l3) if opt.SPREAD_CORES in options else (cost.l3, cost.split_cores)
    return (*cost[:6], *cores)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_the_number_a_refusal_gives_fits_and_one_step_more_does_not(seed: int) -> None:
    pick = random.Random(seed)
    free = CpuSet(pick.sample(range(64), pick.randint(4, 60)))
    options = frozenset(pick.choice([(), (), (opt.FULL_PCPUS,)]))
    request = Request(
        cpus=pick.randint(1, 40), options=options, within_cpus=free, numa=pick.choice([SINGLE, RESTRICTED])
    )
    try:
        place(TWO_SOCKETS, EMPTY, request)
    except Refused as refused:
        if refused.free:
            smaller = replace(request, cpus=refused.free)
            if request.cpus <= len(free):
                assert len(place(TWO_SOCKETS, EMPTY, smaller).cpus) == refused.free
        assert refused.free < refused.want == request.cpus


# ---------------------------------------------------------------- refusals


def test_too_few_cpus_are_counted_with_who_holds_them() -> None:
    ledger = replace(ledger_of(list(range(8)), []), reserved=CpuSet([8, 9]))
    refused = refusal(TWO_SOCKETS, Request(cpus=60), ledger)
    assert (refused.want, refused.free) == (60, 54)
    assert refused.why == "cannot place 60 CPUs: 54 of 64 are free (8 held, 2 reserved)"
    assert refused.would_admit == "6 more free CPUs would admit it"


def test_cpus_that_are_reserved_and_held_count_once_and_those_that_are_offline_not_at_all() -> None:
    """As after reservedCpus has changed: free, held and reserved ones make up the machine."""
    ledger = replace(ledger_of(list(range(8)), []), reserved=CpuSet([6, 7, 8, 200]))
    refused = refusal(TWO_SOCKETS, Request(cpus=60), ledger)
    assert refused.why == "cannot place 60 CPUs: 55 of 64 are free (6 held, 3 reserved)"


def test_nothing_is_advised_that_the_machine_cannot_have() -> None:
    """More CPUs than are online, whether more could be plugged in or not, more pages and memory than there are."""
    assert refusal(TWO_SOCKETS, Request(cpus=65)).would_admit == ""
    larger = replace(TWO_SOCKETS, cpus_possible=CpuSet(range(128)))
    assert refusal(larger, Request(cpus=65)).would_admit == ""
    memory = sum(node.memory_bytes for node in TWO_SOCKETS.numa_nodes)
    assert refusal(TWO_SOCKETS, Request(memory_bytes=memory + GIB)).would_admit == ""
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), pages={(0, GIB): 2})
    assert refusal(machine, Request(hugepages={GIB: 1000})).would_admit == ""


def test_no_more_devices_are_advised_than_the_machine_can_give_away_together() -> None:
    """Two functions of one IOMMU group are one thing, however many of them are free."""
    group = [Device(kind="gpu", id=f"gpu{i}", exclusive=("iommu-group:5",)) for i in (0, 1)]
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[*group, Device(kind="gpu", id="gpu2")])
    refused = refusal(machine, Request(devices={"gpu": 3}))
    assert (refused.want, refused.free, refused.would_admit) == (3, 2, "")
    held = Ledger(grants={"g": Grant(id="g", holder=Holder(api=CLAIM), devices=("gpu2",))})
    refused = refusal(machine, Request(devices={"gpu": 2}), held)
    assert (refused.free, refused.would_admit) == (1, "1 more would admit it")


@pytest.mark.parametrize(
    ("kind", "want", "advice"),
    [("hbm", 1, ""), ("gpu", 40, ""), ("gpu", 30, "14Gi more would admit it"), ("dram", 20, "")],
)
def test_no_more_memory_of_a_kind_is_advised_than_the_machine_has(kind: str, want: int, advice: str) -> None:
    """The memory of other nodes does not become memory of this kind."""
    machine = inventory_of(even_rows(1, 1, 1, 2, 1))
    (node,) = machine.numa_nodes
    gpu = replace(node, id=1, kind="gpu", cpus=CpuSet(), memory_bytes=32 * GIB)
    machine = replace(machine, numa_nodes=(node, gpu))
    held = Ledger(grants={"g": Grant(id="g", holder=Holder(api=CLAIM), memory=((1, 16 * GIB),))})
    assert refusal(machine, Request(memory_bytes=want * GIB, memory_kind=kind), held).would_admit == advice


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_that_is_withheld_is_placed(seed: int) -> None:
    """What a request does not name is never given to it: a placement is that of the machine with the rest held."""
    pick = random.Random(seed)
    inventory, ledger, request = random_question(pick)
    inventory = replace(inventory, devices=tuple(withheld_at_random(pick, one) for one in inventory.devices))
    closed = [one.id for one in inventory.devices if one.withheld_for]
    open_ones = frozenset(one.id for one in inventory.devices) - frozenset(closed)
    found = answer(inventory, ledger, request)
    if isinstance(found, Placement):
        assert not {*found.devices} & {*closed}
    assert found == answer(inventory, ledger, replace(request, within_devices=open_ones))


def withheld_at_random(pick: random.Random, device: Device) -> Device:
    name = pick.choice([None, None, *WITHHELD])
    return device if name is None else replace(device, attributes={name: pick.choice([True, False, "some"])})


def test_a_refusal_counts_the_devices_that_the_node_uses() -> None:
    """Those that stand for others, or are parts, are not meant by the request, and not counted."""
    said = [{"in_use": True}, {"default_route": True}, {"type": "partition"}, {"mig": True}, {}]
    disks = [Device(kind="block", id=f"d{i}", attributes=attributes) for i, attributes in enumerate(said)]
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=disks)
    assert place(machine, EMPTY, Request(devices={"block": 1})).devices == ("d4",)
    refused = refusal(machine, Request(devices={"block": 2}))
    assert refused.why == "cannot place 2 devices of kind block: 1 of 3 are free (2 in use by the node)"
    assert (refused.want, refused.free, refused.would_admit) == (2, 1, "")
    few = refusal(machine, Request(devices={"block": 1}, within_devices=frozenset()))
    assert few.why == "cannot place 1 devices of kind block: 0 of 3 are free (2 in use by the node, 1 not offered)"
    named = Request(devices={"block": 2}, within_devices=frozenset({"d0", "d2"}))
    assert place(machine, EMPTY, named).devices == ("d0", "d2")


def test_too_few_devices_and_pages_are_counted() -> None:
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), pages={(0, GIB): 2}, devices=[Device(kind="gpu", id="gpu0")])
    refused = refusal(machine, Request(devices={"gpu": 3}))
    assert (refused.want, refused.free, refused.would_admit) == (3, 1, "")
    refused = refusal(machine, Request(hugepages={GIB: 5}))
    assert (refused.want, refused.free, refused.would_admit) == (5, 2, "")
    pages = (Pages(node=0, page_bytes=GIB, pages=1),)
    held = Ledger(grants={"g": Grant(id="g", holder=Holder(api=CLAIM), hugepages=pages)})
    refused = refusal(machine, Request(hugepages={GIB: 2}), held)
    assert (refused.free, refused.would_admit) == (1, "1 more pages of 1Gi would admit it")
    refused = refusal(machine, Request(memory_bytes=17 * GIB))
    assert (refused.want, refused.free) == (17 * GIB, 16 * GIB)
    assert refusal(machine, Request(devices={"nic": 1})).free == 0


def test_a_policy_that_is_in_the_way_is_named() -> None:
    refused = refusal(TWO_SOCKETS, Request(cpus=20, numa=SINGLE))
    assert (refused.want, refused.free) == (20, 16)
    assert refused.why == "cannot place 20 CPUs under NUMA policy single: 16 CPUs would fit"
    assert refused.would_admit == "NUMA policy best-effort would admit it"


def test_an_odd_number_of_whole_cores_is_refused_with_the_next_that_fits() -> None:
    assert refusal(TWO_SOCKETS, Request(cpus=3, options=frozenset({opt.FULL_PCPUS}))).free == 2


# ---------------------------------------------------------------- options


def test_every_option_is_accepted_alone_and_the_answer_is_whole() -> None:
    kinds = {cpu: PERFORMANCE if cpu % 32 < 16 else EFFICIENCY for cpu in range(64)}
    machine = inventory_of(even_rows(2, 2, 2, 4, 2), core_kinds=kinds, isolated=range(0, 64, 4))
    for name in opt.OPTIONS:
        assert len(CpuSet.parse(cpus_of(machine, 4, name))) == 4


def test_core_kinds_are_required_or_preferred() -> None:
    rows = [(cpu, 0, 0, 0, cpu // 2) for cpu in range(4)] + [(cpu, 0, 0, 1, cpu) for cpu in range(4, 8)]
    machine = inventory_of(rows, core_kinds={cpu: PERFORMANCE if cpu < 4 else EFFICIENCY for cpu in range(8)})
    assert cpus_of(machine, 3, "require-efficiency-cores") == "4-6"
    assert cpus_of(machine, 6, "prefer-efficiency-cores") == "0-1,4-7"
    assert cpus_of(machine, 5, "prefer-performance-cores") == "0-4"
    refused = refusal(machine, Request(cpus=5, options=frozenset({"require-performance-cores"})))
    assert (refused.free, refused.would_admit) == (4, "without option require-performance-cores it would fit")


def test_isolated_cpus_are_required_preferred_or_avoided() -> None:
    machine = inventory_of(even_rows(1, 1, 1, 4, 1), isolated=(2, 3))
    assert cpus_of(machine, 2, "require-isolated-cpus") == "2-3"
    assert cpus_of(machine, 3, "prefer-isolated-cpus") == "0,2-3"
    assert cpus_of(machine, 2, "avoid-isolated-cpus") == "0-1"
    assert cpus_of(machine, 3, "avoid-isolated-cpus") == "0-2"
    refusal(machine, Request(cpus=3, options=frozenset({"require-isolated-cpus"})))


def test_align_by_socket_counts_sockets() -> None:
    assert refusal(TWO_SOCKETS, Request(cpus=20, numa=SINGLE)).free == 16
    found = place(TWO_SOCKETS, EMPTY, Request(cpus=20, numa=SINGLE, options=frozenset({opt.ALIGN_SOCKET})))
    assert found.cost.packages == 1
    assert refusal(TWO_SOCKETS, Request(cpus=40, numa=SINGLE, options=frozenset({opt.ALIGN_SOCKET}))).free == 32


def test_few_l3_groups_can_be_required() -> None:
    half = CpuSet(cpu for cpu in range(64) if cpu % 4 < 2)
    wide = Request(cpus=8, within_cpus=half)
    assert place(TWO_SOCKETS, EMPTY, wide).cost.l3 == 2
    assert refusal(TWO_SOCKETS, replace(wide, options=frozenset({opt.REQUIRE_L3}))).free == 4
    assert place(TWO_SOCKETS, EMPTY, Request(cpus=12, options=frozenset({opt.REQUIRE_L3}))).cost.l3 == 2


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"distribute-cpus-across-cores.*excludes|excludes.*distribute-cpus"):
        opt.check_options([opt.FULL_PCPUS, opt.SPREAD_CORES])


def test_spreading_takes_one_cpu_of_a_core_and_equal_shares_of_nodes() -> None:
    assert cpus_of(TWO_SOCKETS, 4, opt.SPREAD_CORES) == "0-3"
    found = CpuSet.parse(cpus_of(TWO_SOCKETS, 24, opt.SPREAD_NUMA))
    assert [len(found & node.cpus) for node in TWO_SOCKETS.numa_nodes] == [12, 12, 0, 0]


# ---------------------------------------------------------------- must and within


def test_cpus_that_must_be_taken_are_taken_with_their_neighbours() -> None:
    found = place(TWO_SOCKETS, EMPTY, Request(cpus=4, must_cpus=CpuSet([17, 49])))
    assert CpuSet([17, 49]) <= found.cpus
    assert found.cost.l3 == 1
    only = place(TWO_SOCKETS, EMPTY, Request(cpus=3, must_cpus=CpuSet([0]), within_cpus=CpuSet([0, 20, 21, 22])))
    assert only.cpus <= CpuSet([0, 20, 21, 22])
    assert 0 in only.cpus


def test_more_cpus_that_must_be_taken_than_asked_for_are_refused() -> None:
    refusal(TWO_SOCKETS, Request(cpus=1, must_cpus=CpuSet([1, 2])))


NVLINKED = [Device(kind="gpu", id=f"gpu{i}", numa_node=i // 2) for i in range(4)]


def test_devices_that_must_be_taken_draw_their_linked_neighbours() -> None:
    machine = inventory_of(
        even_rows(1, 2, 1, 2, 1), devices=NVLINKED, links=[Link(a="gpu1", b="gpu3", type="nvlink", weight=100)]
    )
    assert place(machine, EMPTY, Request(devices={"gpu": 2})).devices == ("gpu1", "gpu3")
    assert place(machine, EMPTY, Request(devices={"gpu": 2}, must_devices=frozenset({"gpu0"}))).devices[0] == "gpu0"
    within = frozenset({"gpu0", "gpu2", "gpu3"})
    assert place(machine, EMPTY, Request(devices={"gpu": 2}, within_devices=within)).devices == ("gpu2", "gpu3")


def test_cpus_lie_near_devices_and_near_other_cpus() -> None:
    machine = inventory_of(even_rows(2, 2, 2, 4, 2), distances=even_distances(2, 2), devices=NVLINKED)
    near = place(machine, EMPTY, Request(cpus=4, near=("gpu3",)))
    assert {machine.cpu_by_id[one].numa_node for one in near.cpus} == {1}
    for node in (0, 1):
        on = place(machine, EMPTY, Request(cpus=2, devices={"gpu": 1}, near_nodes=(node,)))
        assert {machine.cpu_by_id[one].numa_node for one in on.cpus} == {node}
        assert {machine.device_by_id[one].numa_node for one in on.devices} == {node}
    alongside = place(machine, EMPTY, Request(cpus=2, near_cpus=CpuSet([20])))
    assert {machine.cpu_by_id[one].l3 for one in alongside.cpus} == {machine.cpu_by_id[20].l3}
    with pytest.raises(InputError, match="no such device"):
        place(machine, EMPTY, Request(cpus=1, near=("gpu9",)))


# ---------------------------------------------------------------- nodes of all sorts


def test_pages_come_from_a_node_without_cpus_where_only_it_has_them() -> None:
    machine = inventory_of(even_rows(1, 2, 1, 2, 1), more_nodes=[8], pages={(8, GIB): 4})
    found = place(machine, EMPTY, Request(cpus=2, hugepages={GIB: 3}))
    assert found.hugepages == (Pages(node=8, page_bytes=GIB, pages=3),)
    assert found.cost.numa_nodes == 2
    assert refusal(machine, Request(cpus=2, hugepages={GIB: 3}, numa=SINGLE)).would_admit.startswith("NUMA policy")


@pytest.mark.parametrize("ids", [{0: 0, 1: 8}, {0: 255, 1: 3}, {0: 72, 1: 73}])
def test_any_node_ids_will_do(ids: dict[int, int]) -> None:
    machine = inventory_of(even_rows(1, 2, 1, 2, 2), ids=ids, pages={(ids[1], MIB2): 8})
    found = place(machine, EMPTY, Request(cpus=3, hugepages={MIB2: 8}, numa=SINGLE))
    assert describe(machine, Request(cpus=3), found).numa_nodes == (ids[1],)


def test_pages_of_thirty_four_nodes_are_gathered_in_bounded_work() -> None:
    pages = {(node, GIB): 1 + node % 3 for node in range(34)}
    machine = inventory_of(even_rows(2, 17, 1, 2, 1), distances=even_distances(2, 17), pages=pages)
    found = place(machine, EMPTY, Request(cpus=2, hugepages={GIB: 40}))
    assert sum(one.pages for one in found.hugepages) == 40
    assert sum(one.pages for one in place(machine, EMPTY, Request(hugepages={GIB: 66})).hugepages) == 66
    assert refusal(machine, Request(hugepages={GIB: 68})).free == sum(pages.values())


def test_nothing_asked_is_nothing_placed() -> None:
    assert place(TWO_SOCKETS, EMPTY, Request()) == Placement()


def test_what_others_hold_is_not_given_twice() -> None:
    machine = inventory_of(even_rows(1, 1, 1, 4, 1), pages={(0, GIB): 4}, devices=NVLINKED[:2])
    holder = ledger_of([0, 1], ["gpu0"])
    held = replace(holder.grants["one"], hugepages=(Pages(node=0, page_bytes=GIB, pages=3),))
    ledger = Ledger(grants=MappingProxyType({"one": held}))
    found = place(machine, ledger, Request(cpus=2, devices={"gpu": 1}, hugepages={GIB: 1}))
    assert (str(found.cpus), found.devices) == ("2-3", ("gpu1",))
    assert refusal(machine, Request(hugepages={GIB: 2}), ledger).free == 1
