"""CPUs of a NUMA node that is offline: they can be granted, but they meet no NUMA policy, and no output shows a node
for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import near
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.dra.cpu_pool import INDIVIDUAL, L3, NUMA_NODE, SOCKET, CpuPool
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, SINGLE, Request
from nodeagent.core.model.topology import NO_NODE
from nodeagent.core.placement.describe import describe
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from nodeagent.resources.offer import held_variables
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import NOBODY, amounts, pool_of

MIB = 1 << 20


def half(offline: int = 0) -> Inventory:
    """2 sockets of one NUMA node with 4 CPUs each: CPUs 0-3 and 4-7. One of the nodes is offline, its CPUs are not."""
    whole = inventory_of(even_rows(2, 1, 1, 4, 1), pages={(0, 2 * MIB): 8, (1, 2 * MIB): 8})
    cpus = (replace(cpu, numa_node=NO_NODE) if cpu.numa_node == offline else cpu for cpu in whole.cpus)
    return replace(whole, cpus=tuple(cpus), numa_nodes=tuple(n for n in whole.numa_nodes if n.id != offline))


def negatives(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [one for key, part in value.items() for one in negatives(key) + negatives(part)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in negatives(part)]
    return [value] if isinstance(value, int) and value < 0 else []


@pytest.mark.parametrize("policy", [SINGLE, RESTRICTED])
@pytest.mark.parametrize("options", [(), ("full-pcpus-only",), ("align-by-socket",), ("prefer-isolated-cpus",)])
@pytest.mark.parametrize("more", [{}, {"memory_bytes": GIB}, {"hugepages": {2 * MIB: 4}}])
def test_a_numa_policy_is_met_on_a_known_node_only(policy: str, options: tuple[str, ...], more: dict[str, Any]) -> None:
    for offline, there in ((0, CpuSet(range(4, 8))), (1, CpuSet(range(4)))):
        request = Request(cpus=4, numa=policy, options=frozenset(options), **more)
        assert place(half(offline), Ledger(), request).cpus == there
        with pytest.raises(Refused) as refused:
            place(half(offline), Ledger(), replace(request, cpus=5))
        assert refused.value.would_admit == "NUMA policy best-effort would admit it"


@pytest.mark.parametrize("more", [{}, {"memory_bytes": GIB}])
def test_best_effort_takes_them_and_shows_no_node_for_them(more: dict[str, Any]) -> None:
    inventory = half()
    for cpus, nodes in ((4, ()), (6, (1,)), (8, (1,))):
        request = Request(cpus=cpus, numa=BEST_EFFORT, within_cpus=None if cpus > 4 else CpuSet(range(4)), **more)
        found = describe(inventory, request, place(inventory, Ledger(), request))
        assert found.numa_nodes == (nodes or ((1,) if more else ()))
        assert not any("-1" in sentence for sentence in found.why)


def test_the_inventory_shows_null_and_reads_it_and_the_older_number_back() -> None:
    inventory = half()
    document = to_document(inventory)
    assert not negatives(document)
    assert [cpu["numa_node"] for cpu in document["cpus"]] == [None] * 4 + [1] * 4
    for text in (json.dumps(document), json.dumps(document).replace('"numa_node": null', '"numa_node": -1')):
        assert from_document(text, source="x").cpus == inventory.cpus


def test_a_negative_node_other_than_none_is_refused() -> None:
    text = json.dumps(to_document(half())).replace('"numa_node": null', '"numa_node": -2')
    with pytest.raises(InputError, match="numa_node -2 is not in numa_nodes"):
        from_document(text, source="x")


@pytest.mark.parametrize("group", [NUMA_NODE, SOCKET, L3, INDIVIDUAL])
def test_pools_have_no_node_among_their_attributes(group: str) -> None:
    devices = pool_of(CpuPool(group=group), half()).devices
    assert not negatives([[*one.attributes.values()] for one in devices])
    nodes = [one.attributes.get("numaNode") for one in devices]
    assert {*nodes} == {None, 1}


def test_a_pool_with_a_policy_offers_only_what_the_policy_admits() -> None:
    assert amounts(pool_of(CpuPool(), half()), "cpus") == {"no-numa": 4, "numa1": 4}
    assert amounts(pool_of(CpuPool(numa=SINGLE), half()), "cpus") == {"numa1": 4}


def test_kubelet_gets_no_hint_for_them() -> None:
    found = CpuResource(name="r/cpu").advertised(half(), NOBODY, NO_HEALTH)
    assert [one.numa_nodes for one in found] == [()] * 4 + [(1,)] * 4


def test_variables_and_nearness_leave_them_out() -> None:
    inventory = half()
    holder = Holder(api=DEVICE_PLUGIN, resource="r/cpu")
    held = Grant(id="g", holder=holder, ids=("cpu0", "cpu4"), cpus=CpuSet([0, 4]), granted_at=100.0)
    assert held_variables(inventory, [held])["NODEAGENT_NUMA_NODES"] == "1"
    lone = replace(held, ids=("cpu0",), cpus=CpuSet([0]))
    assert held_variables(inventory, [lone])["NODEAGENT_NUMA_NODES"] == ""
    assert near(inventory, grant(NOBODY, held), 100.5).nodes == (1,)
    assert near(inventory, grant(NOBODY, lone), 100.5).nodes == ()
