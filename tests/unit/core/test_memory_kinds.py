"""Requests that name no kind of memory get ordinary memory only, in placement, the device plugin and pools of DRA."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nodeagent.core.deviceplugin.view import HugepageResource, Near
from nodeagent.core.dra.memory_pools import SIZE, MemoryPool, PagePool
from nodeagent.core.ledger.free import PageLimit, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, SINGLE, Request
from nodeagent.core.model.topology import DRAM, MEMORY_KINDS
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import FORMS, NOBODY, amounts, pool_of

MIB = 1 << 20
OTHERS = [kind for kind in MEMORY_KINDS if kind != DRAM]
PAGES = HugepageResource(name="r/pages", page_bytes=2 * MIB)


def with_special(kind: str) -> Inventory:
    """Node 0 has 4 CPUs, 1 GiB and 8 pages of 2 MiB; node 1 has no CPUs and twice as much of another kind of memory."""
    pages = {(0, 2 * MIB): 8, (1, 2 * MIB): 16}
    found = inventory_of(even_rows(1, 1, 1, 4, 1), more_nodes=[1], pages=pages, memory={0: GIB, 1: 2 * GIB})
    return replace(found, numa_nodes=tuple(replace(n, kind=kind if n.id else DRAM) for n in found.numa_nodes))


@pytest.mark.parametrize("kind", [*OTHERS, "none", "of-the-future"])
@pytest.mark.parametrize("policy", [BEST_EFFORT, RESTRICTED, SINGLE])
@pytest.mark.parametrize("cpus", [0, 2])
def test_an_ordinary_request_never_gets_other_memory(kind: str, policy: str, cpus: int) -> None:
    inventory = with_special(kind)
    found = place(inventory, Ledger(), Request(cpus=cpus, memory_bytes=GIB, hugepages={2 * MIB: 8}, numa=policy))
    assert found.memory == ((0, GIB),)
    assert [(one.node, one.pages) for one in found.hugepages] == [(0, 8)]
    with pytest.raises(Refused, match="of memory: 1Gi can be granted"):
        place(inventory, Ledger(), Request(cpus=cpus, memory_bytes=GIB + 4096, numa=policy))
    with pytest.raises(Refused, match="9 hugepages of 2Mi: 8 can be granted"):
        place(inventory, Ledger(), Request(cpus=cpus, hugepages={2 * MIB: 9}, numa=policy))


@pytest.mark.parametrize("kind", OTHERS)
def test_a_request_that_names_the_kind_gets_that_kind_only(kind: str) -> None:
    inventory = with_special(kind)
    request = Request(memory_bytes=2 * GIB, hugepages={2 * MIB: 16}, memory_kind=kind)
    found = place(inventory, Ledger(), request)
    assert found.memory == ((1, 2 * GIB),)
    assert [(one.node, one.pages) for one in found.hugepages] == [(1, 16)]
    with pytest.raises(Refused, match=f"of {kind} memory: 2Gi can be granted"):
        place(inventory, Ledger(), replace(request, memory_bytes=3 * GIB))


@pytest.mark.parametrize("kind", OTHERS)
def test_an_empty_machine_has_no_more_for_an_ordinary_request(kind: str) -> None:
    stock = Stock.of(with_special(kind), Ledger(), Request(memory_bytes=1, hugepages={2 * MIB: 1}), empty=True)
    assert stock.nodes == {0}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_device_plugin_offers_pages_of_ordinary_memory_only(kind: str) -> None:
    inventory = with_special(kind)
    ids = [one.id for one in PAGES.advertised(inventory, NOBODY, NO_HEALTH)]
    assert ids == [f"node0-2Mi-{number}" for number in range(8)]
    with pytest.raises(InputError, match="node1-2Mi-0 of r/pages: unknown"):
        PAGES.parts(inventory, ["node1-2Mi-0"])
    assert PAGES.prefer(inventory, NOBODY, ids, [], 8, Near(nodes=(1,))) == ids


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("features", FORMS)
def test_claims_see_other_memory_under_a_kind_of_its_own(kind: str, features: object) -> None:
    inventory = with_special(kind)
    limits = (PageLimit(node=1, page_bytes=2 * MIB, max_pages=32),)
    for pool in (PagePool(sizes=(2 * MIB,), limits=limits), MemoryPool(limits=limits)):
        devices = pool_of(pool, inventory, features=features).devices  # type: ignore[arg-type]
        found = {one.attributes["numaNode"]: (one.attributes["kind"], one.attributes["memoryKind"]) for one in devices}
        assert found == {0: (pool.kind, DRAM), 1: (f"special-{pool.kind}", kind)}


def test_what_a_pool_has_does_not_depend_on_the_kind() -> None:
    assert amounts(pool_of(MemoryPool(), with_special("gpu")), SIZE) == {"numa0": GIB, "numa1": 2 * GIB}
