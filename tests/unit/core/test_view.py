"""What kubelet is shown: stable ids in a fixed order, healthy only where a container can have them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import LONGEST_ID, DeviceResource, illness, refuse_missing_shares, without
from nodeagent.core.deviceplugin.view import CpuResource, HugepageResource, Near, Parts, ResourceKind
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import NODE_KINDS, Advertised, Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence, Health, observe
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Request
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from tests.builders.inventories import even_rows, inventory_of

MIB = 1 << 20
NOBODY = Ledger()
CPUS, PAGES = CpuResource(name="r/cpu"), HugepageResource(name="r/pages", page_bytes=2 * MIB, pages_per_block=4)
NICS = DeviceResource(name="r/nic", kind="nic")


def nic(name: str, node: int | None = 0, parent: str | None = None, **attributes: str | bool) -> Device:
    return Device(kind="nic", id=name, numa_node=node, parent=parent, attributes=MappingProxyType(attributes))


def machine(*devices: Device, without_cpus: Iterable[int] = (), free: int = 16) -> Inventory:
    """8 CPUs on 2 NUMA nodes, 16 pages (4 blocks) on each."""
    rows = [row for row in even_rows(1, 2, 1, 4, 1) if row[0] not in set(without_cpus)]
    inventory = inventory_of(rows, pages={(0, 2 * MIB): 16, (1, 2 * MIB): 16}, devices=devices)
    nodes = [
        replace(node, hugepages=tuple(replace(pool, free_pages=free) for pool in node.hugepages))
        for node in inventory.numa_nodes
    ]
    return replace(inventory, numa_nodes=tuple(nodes))


def held(resource: ResourceKind, inventory: Inventory, *ids: str, name: str = "g", ledger: Ledger = NOBODY) -> Ledger:
    parts = resource.parts(inventory, ids)
    holder = Holder(api=DEVICE_PLUGIN, resource=resource.name)
    return grant(
        ledger,
        Grant(
            id=name,
            holder=holder,
            ids=ids,
            cpus=parts.cpus,
            hugepages=parts.hugepages,
            devices=parts.devices,
            shares=parts.shares,
        ),
    )


def health(**states: str) -> Health:
    return observe({}, [Evidence(device=one, source="s", state=state) for one, state in states.items()], 0)


def well(shown: Sequence[Advertised]) -> list[str]:
    return [one.id for one in shown if one.healthy]


def ids(shown: Sequence[Advertised]) -> list[str]:
    return [one.id for one in shown]


# CPUs


def test_each_cpu_that_may_be_granted_is_shown_with_its_node() -> None:
    """In order of number; reserved ones are not shown."""
    shown = CPUS.advertised(machine(), Ledger(reserved=CpuSet([0, 5])), {})
    assert ids(shown) == well(shown) == ["cpu1", "cpu2", "cpu3", "cpu4", "cpu6", "cpu7"]
    assert [one.numa_nodes for one in shown] == [(0,)] * 3 + [(1,)] * 3


def test_a_cpu_held_through_another_resource_is_unhealthy_and_one_of_our_own_is_not() -> None:
    """Kubelet knows its own; of the other resource's it must not give."""
    other = CpuResource(name="r/other")
    ledger = held(other, machine(), "cpu1", ledger=held(CPUS, machine(), "cpu2"), name="h")
    assert well(CPUS.advertised(machine(), ledger, {})) == [f"cpu{n}" for n in (0, 2, 3, 4, 5, 6, 7)]
    assert well(other.advertised(machine(), ledger, {})) == [f"cpu{n}" for n in (0, 1, 3, 4, 5, 6, 7)]


def test_a_cpu_that_is_held_and_went_offline_is_shown_unhealthy_in_its_place() -> None:
    """So that its pod is notified; one that no pod holds is gone."""
    shown = CPUS.advertised(machine(without_cpus=[3, 4]), held(CPUS, machine(), "cpu3"), {})
    assert ids(shown) == [f"cpu{n}" for n in (0, 1, 2, 3, 5, 6, 7)]
    assert "cpu3" not in well(shown)


@pytest.mark.parametrize(
    "bad", ["cpu8", "cpu01", "cpu", "CPU1", "cpu-1", "cpu1 ", "cpu²", "cpu１", "1", "cpu99999999999"]
)
def test_an_id_that_is_none_is_named(bad: str) -> None:
    """Also what Python would read as a number."""
    with pytest.raises(InputError, match=f"cannot allocate {bad} of r/cpu: unknown"):
        CPUS.parts(machine(), ["cpu1", bad])


def test_preference_is_exact_placement_among_what_is_available() -> None:
    """One node where it has enough; with what must be included."""
    available = [f"cpu{n}" for n in (0, 1, 4, 5, 6)]
    assert CPUS.prefer(machine(), NOBODY, available, [], 3, Near()) == ["cpu4", "cpu5", "cpu6"]
    assert CPUS.prefer(machine(), NOBODY, available, ["cpu0"], 2, Near()) == ["cpu0", "cpu1"]
    assert CPUS.prefer(machine(), NOBODY, available, [], 1, Near(cpus=CpuSet([7]))) == ["cpu4"]
    with pytest.raises(Refused):
        CPUS.prefer(machine(), NOBODY, available, [], 6, Near())


def test_a_container_takes_what_a_claim_would_be_allocated_last() -> None:
    """Of equally good nodes the last one; a better node all the same, and what must be included."""
    both, every = dataclasses.replace(CPUS, claimed=True), [f"cpu{n}" for n in range(8)]
    assert CPUS.prefer(machine(), NOBODY, every, [], 2, Near()) == ["cpu0", "cpu1"]
    assert both.prefer(machine(), NOBODY, every, [], 2, Near()) == ["cpu4", "cpu5"]
    assert both.prefer(machine(), NOBODY, every, ["cpu0"], 2, Near()) == ["cpu0", "cpu1"]
    assert both.prefer(machine(), NOBODY, every, [], 2, Near(cpus=CpuSet([1]))) == ["cpu0", "cpu1"]
    assert both.prefer(machine(), NOBODY, every[:2] + every[3:], [], 4, Near()) == ["cpu4", "cpu5", "cpu6", "cpu7"]
    assert both.prefer(machine(), NOBODY, every, [], 6, Near()) == CPUS.prefer(machine(), NOBODY, every, [], 6, Near())


@given(st.sets(st.integers(0, 15), min_size=1), st.sets(st.integers(0, 15)), st.data())
def test_what_a_container_takes_is_as_good_on_the_last_node(
    free: set[int], taken: set[int], data: st.DataObject
) -> None:
    """By all that placement counts but the numbers of the CPUs."""
    inventory = inventory_of(even_rows(2, 2, 1, 2, 2))
    size = data.draw(st.integers(1, len(free)))
    ledger = replace(NOBODY, reserved=CpuSet(taken - free))
    every = [f"cpu{one}" for one in sorted(free)]
    costs = []
    for resource in (CPUS, dataclasses.replace(CPUS, claimed=True)):
        chosen = CpuSet(int(one[3:]) for one in resource.prefer(inventory, ledger, every, [], size, Near()))
        assert len(chosen) == size and set(chosen) <= free
        costs.append(place(inventory, ledger, Request(cpus=size, within_cpus=CpuSet(free), must_cpus=chosen)).cost[:-1])
    assert costs[0] == costs[1]


def test_scattered_cpus_are_preferred_where_the_options_cannot_be_met() -> None:
    """Kubelet has decided already that the pod gets them."""
    strict = CpuResource(name="r/cpu", options=frozenset({"full-pcpus-only"}), numa="single")
    assert strict.prefer(machine(), NOBODY, ["cpu0", "cpu7"], [], 2, Near()) == ["cpu0", "cpu7"]


# Hugepages


def test_blocks_are_shown_by_node_and_number() -> None:
    """All of them, as many healthy as there are pages for."""
    shown = PAGES.advertised(machine(free=7), NOBODY, {})
    assert ids(shown) == [f"node{n}-2Mi-{block}" for n in (0, 1) for block in range(4)]
    assert well(shown) == ["node0-2Mi-0", "node1-2Mi-0"]


def test_blocks_that_are_held_are_healthy_and_the_rest_is_what_the_host_left() -> None:
    """12 of 16 pages free, 8 held and not yet in use: one block is left, whichever number the held ones have."""
    ledger = held(PAGES, machine(), "node0-2Mi-2", "node0-2Mi-3")
    shown = [one for one in PAGES.advertised(machine(free=12), ledger, {}) if one.numa_nodes == (0,)]
    assert well(shown) == ["node0-2Mi-0", "node0-2Mi-1", "node0-2Mi-2", "node0-2Mi-3"]
    shown = [one for one in PAGES.advertised(machine(free=6), ledger, {}) if one.numa_nodes == (0,)]
    assert well(shown) == ["node0-2Mi-0", "node0-2Mi-2", "node0-2Mi-3"]


def test_pages_that_nobody_was_granted_do_not_count_as_held() -> None:
    """Those that the host uses or has reserved: only what other grants have is held, and the rest says why not."""
    other = HugepageResource(name="r/other", page_bytes=2 * MIB, pages_per_block=2)
    ledger = held(other, machine(), "node0-2Mi-0", "node0-2Mi-1")
    shown = [one for one in PAGES.advertised(machine(free=4), ledger, {}) if one.numa_nodes == (0,)]
    why = "its pages are in use or reserved by processes without a grant"
    assert [(one.healthy, one.held, one.reason) for one in shown] == [
        (True, False, ""),
        (False, True, ""),
        (False, False, why),
        (False, False, why),
    ]
    unheld = PAGES.advertised(machine(free=0), NOBODY, {})
    assert {(one.healthy, one.held, one.reason) for one in unheld} == {(False, False, why)}


def test_held_blocks_of_a_pool_that_shrank_are_shown_unhealthy() -> None:
    """Behind those that are there."""
    small = inventory_of(even_rows(1, 2, 1, 4, 1), pages={(0, 2 * MIB): 4})
    shown = PAGES.advertised(small, held(PAGES, machine(), "node1-2Mi-3", "node0-2Mi-0"), {})
    assert (ids(shown), well(shown)) == (["node0-2Mi-0", "node1-2Mi-3"], ["node0-2Mi-0"])


@pytest.mark.parametrize(
    "bad", ["node0-2Mi-4", "node2-2Mi-0", "node0-1Gi-0", "node0-2Mi-01", "node0-2Mi-", "node00-2Mi-0"]
)
def test_a_block_that_is_none_is_named(bad: str) -> None:
    """A number has one form."""
    with pytest.raises(InputError, match=f"cannot allocate {bad} of r/pages: unknown"):
        PAGES.parts(machine(), ["node0-2Mi-0", bad])


def test_blocks_stand_for_pages_of_their_node() -> None:
    """Summed by node."""
    parts = PAGES.parts(machine(), ["node1-2Mi-0", "node0-2Mi-3", "node1-2Mi-2"])
    assert parts.hugepages == (
        Pages(node=0, page_bytes=2 * MIB, pages=4),
        Pages(node=1, page_bytes=2 * MIB, pages=8),
    )


def test_blocks_are_preferred_on_one_node_the_near_one_the_fuller_one() -> None:
    """In this order: the node of what must be included, nearness, all on one node, the fewest to spare."""
    every = [f"node{n}-2Mi-{block}" for n in (0, 1) for block in range(4)]
    assert PAGES.prefer(machine(), NOBODY, every, ["node1-2Mi-3"], 2, Near()) == ["node1-2Mi-3", "node1-2Mi-0"]
    assert PAGES.prefer(machine(), NOBODY, every, [], 1, Near(nodes=(1,))) == ["node1-2Mi-0"]
    assert PAGES.prefer(machine(), NOBODY, every[1:], [], 3, Near()) == ["node0-2Mi-1", "node0-2Mi-2", "node0-2Mi-3"]
    assert PAGES.prefer(machine(), NOBODY, every[3:], [], 3, Near()) == ["node1-2Mi-0", "node1-2Mi-1", "node1-2Mi-2"]
    with pytest.raises(Refused, match="cannot prefer 9 blocks: too few are available"):
        PAGES.prefer(machine(), NOBODY, every, [], 9, Near())


# Devices


def test_only_devices_that_match_and_that_the_host_does_not_use_are_shown() -> None:
    """What is in use is shown where the configuration speaks of that."""
    inventory = machine(nic("a", in_use=True), nic("b", driver="x"), nic("c", speed="1"))

    def shown(**match: str) -> list[str]:
        return ids(DeviceResource(name="r", kind="nic", match=match).advertised(inventory, NOBODY, {}))

    assert shown() == ["b", "c"]
    assert shown(in_use="true") == ["a"]
    assert shown(id="[bc]", speed="?") == ["c"]


@pytest.mark.parametrize("attribute", ["in_use", "default_route", "mig"])
@pytest.mark.parametrize("value", [True, "unknown"])
def test_a_device_that_is_withheld_is_served_only_where_the_configuration_names_why(
    attribute: str, value: bool | str
) -> None:
    """A use that is unknown counts as one; a GPU in MIG mode without instances is no GPU of its whole memory."""
    inventory = machine(nic("a", **{attribute: value}), nic("b", **{attribute: False}), nic("c"))

    def served(**match: str) -> list[str]:
        return [one.id for one in DeviceResource(name="r", kind="nic", match=match).devices(inventory)]

    assert served() == ["b", "c"]
    assert served(**{attribute: str(value).lower()}) == ["a"]
    assert served(**{attribute: "false"}) == ["b"]


@pytest.mark.parametrize("kind", sorted(NODE_KINDS))
@pytest.mark.parametrize("paths", [(), ("/dev/kfd", "/dev/nvidiactl")])
def test_a_device_without_a_node_of_its_own_is_never_healthy(kind: str, paths: tuple[str, ...]) -> None:
    """A container would start without it. Nodes that all holders share are not the device; evidence does not help."""
    bare = Device(kind=kind, id="bare", paths=paths)
    other = Device(kind=kind, id="other", paths=(*paths, "/dev/own"))
    known = health(bare=HEALTHY, other=HEALTHY)
    shown = DeviceResource(name="r", kind=kind).advertised(machine(bare, other), NOBODY, known)
    assert well(shown) == ["other"]
    assert [one.reason for one in shown] == ["there is no device node to hand over", ""]
    assert illness(other, known) is None


def test_a_shared_node_that_is_a_device_itself_is_healthy() -> None:
    """A character device may be configured whose node is everyone's, and an interface needs no node."""
    node = Device(kind="char", id="/dev/kfd", paths=("/dev/kfd",), exclusive=("/dev/kfd",))
    assert well(DeviceResource(name="r", kind="char").advertised(machine(node), NOBODY, {})) == ["/dev/kfd"]
    assert well(DeviceResource(name="r", kind="nic").advertised(machine(nic("a")), NOBODY, {})) == ["a"]


def test_a_device_known_to_be_unhealthy_stays_so_without_a_node() -> None:
    bare = Device(kind="gpu", id="bare")
    found = illness(bare, health(bare=UNHEALTHY))
    assert found is not None
    assert found.state == UNHEALTHY


def test_a_device_is_as_healthy_as_what_it_is_a_part_of() -> None:
    """Unknown is not healthy; what no source judged is."""
    inventory = machine(nic("pf"), nic("vf", parent="pf"), nic("x"), nic("y"), nic("z"))
    shown = NICS.advertised(inventory, NOBODY, health(pf=UNHEALTHY, vf=HEALTHY, x=UNKNOWN, y=HEALTHY))
    assert well(shown) == ["y", "z"]


@pytest.mark.parametrize(
    ("taken", "left"), [("pf", ["pf", "x"]), ("vf1", ["vf1", "vf2", "x"]), ("x", ["pf", "vf1", "vf2", "x"])]
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_part_and_its_whole_are_not_shown_healthy_once_one_is_held(taken: str, left: list[str], ours: bool) -> None:
    """Through this resource or another; siblings are free, and what is ours stays healthy."""
    inventory = machine(nic("pf"), nic("vf1", parent="pf"), nic("vf2", parent="pf"), nic("x"))
    ledger = held(NICS if ours else DeviceResource(name="r/other", kind="nic"), inventory, taken)
    shown = NICS.advertised(inventory, ledger, {})
    assert sorted(well(shown)) == [one for one in left if ours or one != taken]


def test_a_held_device_that_is_gone_is_shown_unhealthy() -> None:
    """Behind those that are there."""
    ledger = held(NICS, machine(nic("a"), nic("b")), "a")
    shown = NICS.advertised(machine(nic("b")), ledger, {})
    assert (ids(shown), well(shown)) == (["b", "a"], ["b"])


def test_shares_of_a_device_are_shown_and_the_physical_device_is_what_is_healthy() -> None:
    """n of each, in order of the number."""
    shared = DeviceResource(name="r/nic", kind="nic", replicas=11)
    inventory = machine(nic("a"), nic("b"))
    shown = shared.advertised(inventory, NOBODY, health(b=UNHEALTHY))
    assert ids(shown) == [f"{one}::{share}" for one in "ab" for share in range(11)]
    assert well(shown) == [f"a::{share}" for share in range(11)]
    assert shared.parts(inventory, ["a::3", "b::0", "a::10"]) == Parts(shares=("a", "b"))


def test_a_device_held_whole_has_no_shares_to_give_and_the_other_way_round() -> None:
    """The configuration changed the number of shares while it was held."""
    inventory = machine(nic("a"), nic("b"))
    shared = DeviceResource(name="r/nic", kind="nic", replicas=2)
    assert well(shared.advertised(inventory, held(NICS, inventory, "a"), {})) == ["b::0", "b::1"]
    assert well(NICS.advertised(inventory, held(shared, inventory, "a::0"), {})) == ["b"]


@pytest.mark.parametrize("length", [1, 56, 57, 58, 62, 63])
def test_ids_have_at_most_63_characters_and_differ(length: int) -> None:
    """Also 1024 shares of devices whose ids differ at the end only."""
    devices = [nic("n" * (length - 1) + end) for end in "ab"]
    inventory = machine(*devices)
    for replicas in (1, 1024):
        resource = DeviceResource(name="r/nic", kind="nic", replicas=replicas)
        listed = resource.advertised(inventory, NOBODY, {})
        assert {one.device for one in listed} <= set(inventory.device_by_id), "a cut id still names its device"
        shown = ids(listed)
        assert len(set(shown)) == len(shown) == 2 * replicas
        assert max(map(len, shown)) <= LONGEST_ID
        parts = resource.parts(inventory, shown[::replicas])
        assert {*parts.devices, *parts.shares} == {one.id for one in devices}
        chosen = resource.prefer(inventory, NOBODY, shown, [], 2, Near())
        parts = resource.parts(inventory, chosen)
        assert len({*parts.devices, *parts.shares}) == 2


def test_shares_are_preferred_on_different_devices_with_most_to_spare() -> None:
    """A container that asks for two shares wants two devices."""
    shared = DeviceResource(name="r/nic", kind="nic", replicas=3)
    inventory = machine(nic("a"), nic("b"))
    available = ["a::1", "b::0", "b::1", "b::2"]
    assert shared.prefer(inventory, NOBODY, available, [], 1, Near()) == ["b::0"]
    assert shared.prefer(inventory, NOBODY, available, [], 2, Near()) == ["b::0", "a::1"]
    assert shared.prefer(inventory, NOBODY, available, ["b::2"], 3, Near()) == ["b::2", "a::1", "b::0"]
    with pytest.raises(Refused, match="cannot prefer 5 shares: too few are available"):
        shared.prefer(inventory, NOBODY, available, [], 5, Near())


def by_claim(name: str, device: str, shares: int, ledger: Ledger) -> Ledger:
    """What a claim has of a device's shares, as the scheduler allocated it."""
    result = Result(request="r", driver="d", pool="n/nic", device=device, consumed={"shares": shares})
    holder = Holder(api=CLAIM, resource="nic.d", namespace="ns", claim=name, uid=name)
    return grant(ledger, Grant(id=name, holder=holder, ids=(name,), shares=(device,), result=result))


def test_shares_that_claims_have_are_taken_from_the_end_of_those_that_are_free() -> None:
    """Shares are alike: what a container has stays healthy, as many others are as are left."""
    shared = DeviceResource(name="r/nic", kind="nic", replicas=4)
    inventory = machine(nic("a"), nic("b"))
    ledger = held(shared, inventory, "a::3")
    assert well(shared.advertised(inventory, by_claim("c", "a", 2, ledger), {})) == [
        "a::0",
        "a::3",
        *(f"b::{n}" for n in range(4)),
    ]
    full = by_claim("d", "a", 1, by_claim("c", "a", 2, ledger))
    assert well(shared.advertised(inventory, full, {}))[0] == "a::3"
    assert well(shared.advertised(inventory, by_claim("e", "b", 4, full), {})) == ["a::3"]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=6))
def test_as_many_shares_are_healthy_and_free_as_neither_claims_nor_containers_have(
    steps: list[tuple[bool, int]],
) -> None:
    """Never more than there are, whatever came first; what is refused changes nothing."""
    shared, inventory, ledger, used = DeviceResource(name="r/nic", kind="nic", replicas=6), machine(nic("a")), NOBODY, 0
    for number, (container, count) in enumerate(steps):
        free = [one for one in well(shared.advertised(inventory, ledger, {})) if ("r/nic", one) not in ledger.by_id]
        assert len(free) == 6 - used
        if count > len(free):
            with pytest.raises(
                Refused, match=rf"cannot grant {count} of 6 shares of a: {len(free)} are left, others are held by "
            ):
                refuse_missing_shares(ledger, Grant(id="x", holder=Holder(api=CLAIM)), "a", 6, count)
            continue
        used += count
        if container:
            ledger = held(shared, inventory, *free[:count], name=f"g{number}", ledger=ledger)
        else:
            ledger = by_claim(f"c{number}", "a", count, ledger)


def test_a_refusal_of_shares_names_every_holder_once_and_nobody_where_there_is_none() -> None:
    """More are asked for than there are since the number was changed."""
    shared = DeviceResource(name="r/nic", kind="nic", replicas=3)
    ledger = by_claim("c", "a", 1, by_claim("b", "a", 1, held(shared, machine(nic("a")), "a::0")))
    one = Grant(id="x", holder=Holder(api=CLAIM))
    with pytest.raises(Refused) as refusal:
        refuse_missing_shares(ledger, one, "a", 3, 2)
    assert refusal.value.why == (
        "cannot grant 2 of 3 shares of a: 0 are left, others are held by "
        "a container not yet listed (r/nic), claim ns/b, claim ns/c"
    )
    assert (refusal.value.want, refusal.value.free) == (2, 0)
    with pytest.raises(Refused, match=r"^cannot grant 4 of 3 shares of b: 3 are left$"):
        refuse_missing_shares(ledger, one, "b", 3, 4)


def test_devices_are_preferred_near_what_the_pod_holds() -> None:
    """And parts before the whole."""
    inventory = machine(nic("a", 0), nic("b", 1), nic("pf", 1), nic("vf", 1, parent="pf"))
    assert NICS.prefer(inventory, NOBODY, ["a", "b"], [], 1, Near(nodes=(1,))) == ["b"]
    assert sorted(NICS.prefer(inventory, NOBODY, ["a", "b"], [], 2, Near(nodes=(1,)))) == ["a", "b"]
    assert sorted(NICS.prefer(inventory, NOBODY, ["pf", "vf", "b"], [], 2, Near())) == ["b", "vf"]


def test_relatives_are_all_above_and_all_below_and_no_siblings() -> None:
    """Over several levels; a parent that is not shown is named too."""
    inventory = machine(
        nic("pf", parent="card"), nic("vf1", parent="pf"), nic("vf2", parent="pf"), nic("q", parent="vf1")
    )
    assert excluded_with(inventory, NOBODY, ["vf1"]) == {"vf1", "pf", "card", "q"}
    assert excluded_with(inventory, NOBODY, ["pf"]) == {"pf", "card", "vf1", "vf2", "q"}
    assert excluded_with(inventory, NOBODY, ["gone"]) == {"gone"}


# What all have in common


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_the_order_is_fixed_whatever_the_order_of_the_grants(seed: int, count: int) -> None:
    """Kubelet sees a change only where there is one."""
    inventory, chance = machine(nic("a"), nic("b"), nic("c")), random.Random(seed)
    choices = [(CPUS, [f"cpu{n}" for n in range(8)]), (PAGES, ["node0-2Mi-0", "node1-2Mi-3"]), (NICS, ["a", "b", "c"])]
    parts = [(resource, one) for resource, known in choices for one in chance.sample(known, min(count, len(known)))]
    shown = []
    for order in (parts, chance.sample(parts, len(parts))):
        ledger = NOBODY
        for resource, one in order:
            ledger = held(resource, inventory, one, name=f"g-{resource.name}-{one}", ledger=ledger)
        shown.append([resource.advertised(inventory, ledger, {}) for resource, _ in choices])
    assert shown[0] == shown[1]


@given(st.sets(st.integers(0, 7), min_size=1), st.sets(st.integers(0, 7), min_size=1))
def test_a_grant_that_gives_way_loses_what_is_taken_and_keeps_the_rest(mine: set[int], taken: set[int]) -> None:
    """For CPUs, pages and shares alike, counted from the other side."""
    inventory = machine(nic("a"), nic("b"))
    shared = DeviceResource(name="r/shared", kind="nic", replicas=4)
    forms: list[tuple[ResourceKind, str]] = [(CPUS, "cpu{0}"), (PAGES, "node{1}-2Mi-{2}"), (shared, "{3}::{2}")]
    for resource, form in forms:
        names = {n: form.format(n, n // 4, n % 4, "ab"[n // 4]) for n in range(8)}
        before = held(resource, inventory, *(names[n] for n in sorted(mine))).grants["g"]
        gone = [names[n] for n in sorted(mine & taken)]
        rest = without(before, gone, resource.parts(inventory, gone))
        left = [names[n] for n in sorted(mine - taken)]
        if not left:
            assert rest is None
            continue
        assert rest == held(resource, inventory, *left).grants["g"]
