"""What the scheduler counts against the Node for a claim is what the claim is granted, in every form of every pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import CPUS, INDIVIDUAL, L3, NUMA_NODE, SOCKET, CpuPool, PoolKind
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import SIZE, MemoryPool, PagePool
from nodeagent.core.dra.node_allocatable import NO_BOOKS, NodeBooks, counted, uncounted
from nodeagent.core.dra.pool import Features, NodeCost, Pool, PoolDevice
from nodeagent.core.dra.prepare import Catalog, prepare
from nodeagent.core.ledger.free import PageLimit
from nodeagent.core.ledger.ledger import grant
from nodeagent.core.model.claim import Result
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.kube.resourceslice.render import render
from nodeagent.kube.resourceslice.validate import check
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, NODE, OWNER, claim, device, pool_of, result, stamp
from tests.oracles import scheduler_books as scheduler

MIB = 1 << 20
PAGES_2M, PAGES_1G = "hugepages-2Mi", "hugepages-1Gi"
MACHINE = inventory_of(
    even_rows(2, 2, 2, 2, 2),
    pages={(node, size): 4 for node in range(4) for size in (2 * MIB, GIB)},
    memory=dict.fromkeys(range(4), 16 * GIB),
    devices=(device("0000:3b:00.0", "gpu", numa_node=0), device("0000:5e:00.0", "nic", numa_node=1)),
)
BOOKS = NodeBooks(declared=True, pages={PAGES_2M: 16 * 2 * MIB, PAGES_1G: 16 * GIB})
WHOLE = frozenset({"full-pcpus-only"})
GROUPS = (NUMA_NODE, SOCKET, L3, INDIVIDUAL)
KINDS: list[PoolKind] = [
    *(CpuPool(group=group, options=options) for group in GROUPS for options in (frozenset(), WHOLE)),
    PagePool(sizes=(2 * MIB, GIB)),
    MemoryPool(),
]
OLD = Features(consumable=False)


def gpu_pool(**overhead: NodeCost) -> DevicePool:
    resource = DeviceResource(name="r/gpu", kind="gpu")
    return DevicePool(kind="gpu", resources=(resource,), costs={"r/gpu": overhead})


def shown(kind: PoolKind, books: NodeBooks = BOOKS, features: Features = Features()) -> Pool:  # noqa: B008
    return counted(pool_of(kind, MACHINE, features=features), books)


def written(pool: Pool) -> dict[str, dict[str, Any]]:
    """The devices as they are stored."""
    return {one["name"]: one for part in render(pool, OWNER, 1) for one in part["spec"].get("devices", ())}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("kind", "features", "name", "costs"),
    [
        (CpuPool(), Features(), "numa0", {"cpu": {"capacityKey": "cpus", "capacityMultiplier": "1"}}),
        (CpuPool(group=INDIVIDUAL), Features(), "cpu7", {"cpu": {"deviceMultiplier": "1"}}),
        (CpuPool(), OLD, "cpu7", {"cpu": {"deviceMultiplier": "1"}}),
        (MemoryPool(), Features(), "numa1", {"memory": {"capacityKey": "size", "capacityMultiplier": "1"}}),
        (
            PagePool(sizes=(GIB,)),
            Features(),
            "numa1-1gi",
            {PAGES_1G: {"capacityKey": "size", "capacityMultiplier": "1"}},
        ),
        (PagePool(sizes=(GIB,)), OLD, "numa1-1gi-block0", {PAGES_1G: {"deviceMultiplier": str(GIB)}}),
    ],
    ids=["group", "one CPU", "CPUs of an older server", "memory", "pages", "block of pages"],
)
def test_a_device_says_what_an_allocation_takes_of_the_node(
    kind: PoolKind, features: Features, name: str, costs: Mapping[str, Any]
) -> None:
    """By what is consumed of it where it is shared, by the device where it is allocated whole."""
    pool = shown(kind, features=features)
    assert written(pool)[name]["nodeAllocatableResources"] == {one: {"mapping": it} for one, it in costs.items()}
    assert not check(render(pool, OWNER, 1))


def test_a_gpu_says_what_its_pods_need_of_the_node_besides() -> None:
    """As configured, for whole devices and for shares; an adapter without it says nothing."""
    pool = shown(gpu_pool(memory=NodeCost(per_pod="1Gi", per_container="128Mi"), cpu=NodeCost(per_pod="500m")))
    (one,) = written(pool).values()
    assert one["nodeAllocatableResources"] == {
        "memory": {"overhead": {"perPod": "1Gi", "perContainer": "128Mi"}},
        "cpu": {"overhead": {"perPod": "500m"}},
    }
    assert scheduler.counted([(one, None)], containers=2) == {"memory": GIB + 256 * MIB, "cpu": 0.5}
    assert not check(render(pool, OWNER, 1))
    (nic,) = written(shown(DevicePool(kind="nic", resources=(DeviceResource(name="r/nic", kind="nic"),)))).values()
    assert "nodeAllocatableResources" not in nic


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_is_said_on_a_node_that_does_not_count_claims(kind: PoolKind) -> None:
    """Kubelet's gate is off, or the Node is not known: the slices are what they were before there was the feature."""
    for features in (Features(), OLD):
        assert shown(kind, NO_BOOKS, features) == pool_of(kind, MACHINE, features=features)
        assert not [
            one for one in written(shown(kind, NO_BOOKS, features)).values() if "nodeAllocatableResources" in one
        ]


# ---------------------------------------------------------------- hugepages that kubelet has not seen


def test_pages_that_kubelet_has_not_seen_are_not_counted_and_that_is_noted() -> None:
    """The scheduler compares with what kubelet saw at its start: claims for the other pages would wait indefinitely."""
    books = replace(BOOKS, pages={PAGES_2M: 16 * 2 * MIB, PAGES_1G: 15 * GIB})
    pool = shown(PagePool(sizes=(2 * MIB, GIB)), books)
    assert pool.counted == {PAGES_2M}
    costs = {name: one.get("nodeAllocatableResources") for name, one in written(pool).items()}
    assert costs["numa0-1gi"] is None and costs["numa0-2mi"]
    (note,) = uncounted([pool], books)
    assert note.startswith(f"claims for {PAGES_1G} are not counted by the scheduler") and str(15 * GIB) in note


def test_pages_by_which_a_pool_may_grow_count_as_not_seen() -> None:
    """Whether they have been added by now or not: what is published must not depend on the claims of the moment."""
    growing = PagePool(sizes=(2 * MIB,), limits=(PageLimit(node=0, page_bytes=2 * MIB, max_pages=8),))
    assert shown(growing).counted == frozenset()
    assert shown(growing, replace(BOOKS, pages={PAGES_2M: 20 * 2 * MIB})).counted == {PAGES_2M}


def test_what_the_device_plugin_holds_changes_nothing_of_what_is_counted() -> None:
    """Otherwise each container with pages would be a change of every slice."""
    books, kind = replace(BOOKS, pages={PAGES_2M: 15 * 2 * MIB}), PagePool(sizes=(2 * MIB,))
    held = grant(
        NOBODY,
        Grant(
            id="g",
            holder=Holder(api=DEVICE_PLUGIN, resource="r"),
            ids=("g",),
            hugepages=(Pages(node=0, page_bytes=2 * MIB, pages=3),),
        ),
    )
    for ledger in (NOBODY, held):
        assert counted(pool_of(kind, MACHINE, ledger), books).counted == frozenset()


# ---------------------------------------------------------------- the scheduler's books against the ledger


@st.composite
def allocations(draw: st.DrawFn) -> tuple[PoolKind, Features, list[tuple[PoolDevice, int]]]:
    """A pool in one of its forms, and devices of it with what a claim consumes of each."""
    kind, features = draw(st.sampled_from(KINDS)), draw(st.sampled_from([Features(), OLD]))
    devices = shown(kind, features=features).devices
    chosen = draw(st.lists(st.sampled_from(devices), min_size=1, max_size=4, unique_by=lambda one: one.name))
    return kind, features, [(one, draw(amount_of(one))) for one in chosen]


def amount_of(one: PoolDevice) -> st.SearchStrategy[int]:
    if not one.shared:
        return st.just(0)
    (capacity,) = one.capacity.values()
    return st.integers(1, capacity.value // capacity.step).map(lambda steps: steps * capacity.step)


@given(allocations())
def test_the_scheduler_counts_exactly_what_the_claim_is_granted(
    given: tuple[PoolKind, Features, list[tuple[PoolDevice, int]]],
) -> None:
    kind, features, chosen = given
    stored = written(shown(kind, features=features))
    batch = prepare(
        MACHINE,
        NOBODY,
        Catalog(driver=DRIVER, node_name=NODE, kinds={kind.kind: kind}),
        [claim("c", *(_result(kind, index, *one) for index, one in enumerate(chosen)))],
        stamp(),
    )
    assert not batch.errors
    consumed = [
        (stored[one.name], {key: str(much) for key in one.capacity} if one.shared else None) for one, much in chosen
    ]
    assert scheduler.counted(consumed) == _granted(batch.grants["uid-c"])


def _result(kind: PoolKind, index: int, one: PoolDevice, much: int) -> Result:
    key = CPUS if kind.kind == "cpu" else SIZE
    return result(
        kind.kind, one.name, f"r{index}", share=f"s{index}" if one.shared else "", **({key: much} if much else {})
    )


def _granted(grants: tuple[Grant, ...]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in grants:
        total["cpu"] += len(one.cpus)
        total["memory"] += sum(size for _, size in one.memory)
        for pages in one.hugepages:
            total[PAGES_2M if pages.page_bytes == 2 * MIB else PAGES_1G] += pages.pages * pages.page_bytes
    return +total
