"""Advice about moves, against all sets of pods in all orders, tried by hand."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.advice.fragmentation import fragmentation
from nodeagent.core.advice.moves import MOST_ORDERED, Advice, advise
from nodeagent.core.advice.tenants import tenants_of
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import FULL_PCPUS
from nodeagent.core.model.request import SINGLE, Placement, Request
from nodeagent.core.placement.place import find
from tests.builders.inventories import even_distances, even_rows, inventory_of
from tests.support.crowds import crowd, random_ask, random_server

MOST_PODS = 6
SPAN = 6
"""Parts of the cost: device_links, near, preference, packages, numa_nodes, numa_distance."""


def grant(inventory: Inventory, name: str, placed: Placement) -> Grant:
    return Grant(
        id=name,
        holder=Holder(api=DEVICE_PLUGIN, namespace="ns", pod=name, container="main"),
        cpus=placed.cpus,
        hugepages=placed.hugepages,
        devices=placed.devices,
        things=things_of(inventory, placed.devices),
    )


def asked(inventory: Inventory, one: Grant) -> Request:
    """What a grant asks for again: as much as it has, in whole cores if it has whole cores."""
    cores: dict[int, set[int]] = {}
    for cpu in inventory.cpus:
        cores.setdefault(cpu.core, set()).add(cpu.id)
    mine = [cores[inventory.cpu_by_id[cpu].core] for cpu in one.cpus]
    whole = all(len(core) > 1 and core <= set(one.cpus) for core in mine)
    pages: dict[int, int] = {}
    for some in one.hugepages:
        pages[some.page_bytes] = pages.get(some.page_bytes, 0) + some.pages
    return Request(
        cpus=len(one.cpus),
        hugepages=pages,
        devices={"gpu": len(one.devices)} if one.devices else {},
        options=frozenset({FULL_PCPUS} if mine and whole else ()),
    )


def span(inventory: Inventory, one: Grant) -> tuple[int, ...]:
    """How far apart a grant lies, from its place alone."""
    on = {inventory.cpu_by_id[cpu].numa_node for cpu in one.cpus} | {some.node for some in one.hugepages}
    rest = Ledger(
        grants={
            "others": Grant(
                id="others",
                holder=Holder(api=CLAIM, uid="o"),
                cpus=inventory.cpus_online - one.cpus,
                devices=tuple(d.id for d in inventory.devices if d.id not in one.devices),
                things=things_of(inventory, [d.id for d in inventory.devices if d.id not in one.devices]),
                hugepages=tuple(
                    replace(some, pages=pool.total_pages - some.pages)
                    for some in one.hugepages
                    for pool in inventory.node_by_id[some.node].hugepages
                    if pool.page_bytes == some.page_bytes
                ),
            )
        }
    )
    nodes = tuple(
        replace(node, hugepages=tuple(replace(p, free_pages=0, total_pages=0) for p in node.hugepages))
        if node.id not in {some.node for some in one.hugepages}
        else node
        for node in inventory.numa_nodes
    )
    placed = find(replace(inventory, numa_nodes=nodes), rest, asked(inventory, one))
    assert placed is not None and placed.cpus == one.cpus and on
    return tuple(placed.cost[:SPAN])


def by_hand(inventory: Inventory, ledger: Ledger, request: Request) -> tuple[int, int] | None:
    """(pods, CPUs and devices) of the least disruptive set of at most MOST_ORDERED pods that can be moved."""
    best = find(inventory, Ledger(reserved=ledger.reserved), request)
    if best is None:
        return None
    by_pod: dict[str, list[Grant]] = {}
    for one in sorted(ledger.grants.values(), key=lambda one: (one.granted_at, one.id)):
        by_pod.setdefault(one.holder.pod, []).append(one)
    spans = {one.id: span(inventory, one) for one in ledger.grants.values()}
    found = []
    for size in range(min(len(by_pod), MOST_ORDERED) + 1):
        for order in itertools.permutations(by_pod, size):
            gone = [one for pod in order for one in by_pod[pod]]
            state = ledger_of.release(ledger, [one.id for one in gone])
            placed = find(inventory, state, request)
            if placed is None or tuple(placed.cost[:SPAN]) > tuple(best.cost[:SPAN]):
                continue
            state = ledger_of.grant(state, grant(inventory, "the-request", placed))
            for one in gone:
                again = find(inventory, state, asked(inventory, one))
                if again is None or tuple(again.cost[:SPAN]) > spans[one.id]:
                    break
                state = ledger_of.grant(state, replace(grant(inventory, one.id, again), id=one.id))
            else:
                found.append((size, sum(len(one.cpus) + len(one.devices) for one in gone)))
    return min(found, default=None)


def weight(found: Advice) -> tuple[int, int]:
    grants = [one for move in found.moves for one in move.tenant.grants]
    return sum(len(one.tenant.pods) for one in found.moves), sum(len(one.cpus) + len(one.devices) for one in grants)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_no_less_disruptive_moves_align_the_request(seed: int) -> None:
    """Up to 8 GPUs, 32 CPUs, 6 pods, of which up to 4 move in any order: as trying everything finds."""
    pick = random.Random(seed)
    inventory = random_server(pick)
    ledger = crowd(pick, inventory, MOST_PODS)
    request = replace(random_ask(pick, inventory), numa=pick.choice([SINGLE, "best-effort"]))
    found = advise(inventory, ledger, request, tenants_of(ledger))
    least = by_hand(inventory, ledger, request)
    if least is not None:
        assert found.after is not None and found.exact
        assert weight(found) == least
    elif found.after is not None:
        assert len(found.moves) > MOST_ORDERED and not found.exact
    check(inventory, ledger, found)


def check(inventory: Inventory, ledger: Ledger, found: Advice) -> None:
    """Carry a plan out: nothing overlaps, the request is aligned, and no pod that moves lies farther apart."""
    if found.after is None:
        assert not found.moves
        return
    assert found.on_empty is not None
    assert found.after.cost[:SPAN] <= found.on_empty.cost[:SPAN]
    state = ledger_of.release(ledger, [one.id for move in found.moves for one in move.tenant.grants])
    state = ledger_of.grant(state, grant(inventory, "the-request", found.after))
    for unit in (unit for move in found.moves for unit in move.units):
        state = ledger_of.grant(state, grant(inventory, f"moved {unit.name}", unit.after))
        assert unit.after.cost[:SPAN] <= unit.before.cost[:SPAN]
    pools = {(pool.node, pool.page_bytes): pool for node in inventory.numa_nodes for pool in node.hugepages}
    assert all(count <= pools[key].total_pages for key, count in state.pages_held.items())


def pod(name: str, cpus: str, *devices: str) -> Grant:
    holder = Holder(api=DEVICE_PLUGIN, resource="r", namespace="ns", pod=name, container="main")
    return Grant(id=name, holder=holder, cpus=CpuSet.parse(cpus), devices=devices)


def test_the_smaller_of_two_pods_is_moved() -> None:
    """Four CPUs on one of two nodes need one pod to move: the one that holds fewer CPUs."""
    inventory = inventory_of(even_rows(1, 2, 1, 4, 1), distances=even_distances(1, 2))
    held = [pod("a", "0-1"), pod("b", "4")]
    ledger = Ledger(grants={one.id: one for one in held})
    found = advise(inventory, ledger, Request(cpus=4, numa=SINGLE), tenants_of(ledger))
    assert [str(move.tenant) for move in found.moves] == ["ns/b"] and found.exact
    assert found.after is not None and found.after.cpus == CpuSet.parse("4-7")
    assert found.moves[0].units[0].after.cpus <= CpuSet.parse("2-3")
    assert dict(fragmentation(inventory, ledger)) == {"cpu": 1 - 3 / 4}


def test_pods_that_kubelet_has_not_named_yet_do_not_get_the_same_cpus() -> None:
    """They have one name until kubelet lists them."""
    inventory = inventory_of(even_rows(1, 2, 1, 6, 1), distances=even_distances(1, 2))
    unnamed = Holder(api=DEVICE_PLUGIN, resource="r")
    held = [Grant(id=f"g-{cpu}", holder=unnamed, cpus=CpuSet([cpu])) for cpu in (0, 1)]
    held.append(Grant(id="kubelet", holder=Holder(api=KUBELET, uid="u"), cpus=CpuSet.parse("6-8")))
    ledger = Ledger(grants={one.id: one for one in held})
    found = advise(inventory, ledger, Request(cpus=6, numa=SINGLE), tenants_of(ledger))
    after = [unit.after.cpus for move in found.moves for unit in move.units]
    assert len(after) == 2 and not after[0] & after[1]


def test_what_no_move_can_give_is_refused_with_the_reason() -> None:
    inventory = inventory_of(even_rows(1, 2, 1, 4, 1), distances=even_distances(1, 2))
    ledger = Ledger(grants={one.id: one for one in [pod("a", "0-1"), pod("b", "4-6")]})
    found = advise(inventory, ledger, Request(cpus=4), tenants_of(ledger))
    assert found.after is None and found.why_not == "only 3 CPUs are free, and pods that are moved take theirs again"
    foreign = replace(pod("a", "0-1"), holder=Holder(api="kubelet", uid="u"))
    ledger = Ledger(grants={"a": foreign, "b": replace(foreign, id="b", cpus=CpuSet.parse("4"))})
    found = advise(inventory, ledger, Request(cpus=4, numa=SINGLE), tenants_of(ledger))
    assert found.after is None and found.why_not == "what cannot be moved is in the way"


def test_a_plan_that_was_not_found_by_trying_all_sets_says_so() -> None:
    """With too many pods one node is cleared, and the answer is not called the least disruptive."""
    inventory = inventory_of(even_rows(1, 2, 1, 8, 1), distances=even_distances(1, 2))
    ledger = Ledger(grants={f"p{i}": pod(f"p{i}", str(i)) for i in (0, 2, 4, 6, 8, 10)})
    found = advise(inventory, ledger, Request(cpus=8, numa=SINGLE), tenants_of(ledger), most_tried=3)
    assert found.after is not None and not found.exact and len(found.moves) == 2
    check(inventory, ledger, found)
