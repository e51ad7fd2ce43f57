"""Who stands in the way: the smallest set of pods whose end admits a request, against all sets tried by hand."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.advice.release import by_disruption, smallest_release, smallest_set
from nodeagent.core.advice.tenants import Tenant, tenants_of
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import SINGLE, Request
from nodeagent.core.placement.place import find
from tests.builders.inventories import even_rows, inventory_of
from tests.support.crowds import crowd, random_ask, random_server

MOST_PODS = 7


def smallest_by_hand(inventory: Inventory, ledger: Ledger, request: Request) -> tuple[int, int] | None:
    """(pods, CPUs and devices) of the least disruptive set; None if even all of them do not help."""
    by_pod: dict[str, list[Grant]] = {}
    for grant in ledger.grants.values():
        by_pod.setdefault(grant.holder.pod, []).append(grant)
    found = []
    for size in range(len(by_pod) + 1):
        for some in itertools.combinations(by_pod, size):
            gone = [grant for pod in some for grant in by_pod[pod]]
            if find(inventory, ledger_of.release(ledger, [one.id for one in gone]), request) is not None:
                found.append((size, sum(len(one.cpus) + len(one.devices) for one in gone)))
    return min(found, default=None)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_no_smaller_set_of_pods_would_admit_the_request(seed: int) -> None:
    """Up to 8 GPUs, 32 CPUs, 7 pods: as few pods as possible, and of those the ones that hold least."""
    pick = random.Random(seed)
    inventory = random_server(pick)
    ledger = crowd(pick, inventory, MOST_PODS)
    request = replace(random_ask(pick, inventory), numa=pick.choice([SINGLE, "best-effort"]))
    found = smallest_release(inventory, ledger, request, tenants_of(ledger))
    least = smallest_by_hand(inventory, ledger, request)
    assert (found is None) == (least is None)
    if found is not None:
        grants = [grant for one in found.tenants for grant in one.grants]
        pods = sum(len(one.pods) for one in found.tenants)
        assert (pods, sum(len(one.cpus) + len(one.devices) for one in grants)) == least
        assert found.exact


def test_a_device_of_another_plugin_is_in_the_way_as_well(tmp_path: object) -> None:
    """What another plugin gave to a pod is not ours to grant: its pod is named."""
    inventory = random_server(random.Random(3), most_gpus=8)
    gpus = tuple(one.id for one in inventory.devices)
    assert gpus
    other = Grant(id="f", holder=Holder(api="other-plugin", resource="x.com/gpu", namespace="a", pod="b"), devices=gpus)
    ledger = Ledger(foreign={other.id: other})
    found = smallest_release(inventory, ledger, Request(devices={"gpu": 1}), tenants_of(ledger))
    assert found is not None and [one.pods for one in found.tenants] == [("a/b",)]


def test_pods_that_share_a_claim_end_together() -> None:
    """A claim of two pods counts as two pods, and comes back only when both have ended."""
    inventory = inventory_of(even_rows(1, 1, 1, 4, 1))
    grants = [
        Grant(
            id="c-0",
            holder=Holder(api=CLAIM, namespace="ns", claim="c", uid="c"),
            cpus=CpuSet([0, 1]),
            pods=("u1", "u2"),
        ),
        Grant(
            id="g1",
            holder=Holder(api=DEVICE_PLUGIN, namespace="ns", pod="one", container="m"),
            cpus=CpuSet([2]),
            pods=("u1",),
        ),
        Grant(id="g2", holder=Holder(api=DEVICE_PLUGIN, namespace="ns", pod="alone", container="m"), cpus=CpuSet([3])),
    ]
    tenants = tenants_of(Ledger(grants={one.id: one for one in grants}), {"u2": "ns/two"})
    assert [one.pods for one in tenants] == [("ns/alone",), ("ns/one", "ns/two")]
    found = smallest_release(inventory, Ledger(grants={one.id: one for one in grants}), Request(cpus=2), tenants)
    assert found is not None and [one.pods for one in found.tenants] == [("ns/one", "ns/two")]


def many(count: int) -> list[Tenant]:
    return [
        Tenant(pods=(f"ns/p{i:02}",), grants=(Grant(id=f"g{i}", holder=Holder(api=CLAIM), cpus=CpuSet([i])),))
        for i in range(count)
    ]


def test_a_search_that_gives_up_says_so_and_leaves_out_whom_it_can() -> None:
    """Where every set cannot be tried, what is named still admits the request, and no holder in it is needless."""
    tenants = many(30)
    needed = {"ns/p03", "ns/p17", "ns/p29"}
    found, exact = smallest_set(
        tenants, lambda some: needed <= {pod for one in some for pod in one.pods}, most_tried=50
    )
    assert not exact
    assert {pod for one in found for pod in one.pods} == needed


def test_sets_come_in_order_of_disruption() -> None:
    """Fewest pods first, whether they are one tenant or several, then fewest CPUs."""
    two = Tenant(pods=("ns/a", "ns/b"), grants=(Grant(id="x", holder=Holder(api=CLAIM)),))
    order = [sum(len(one.pods) for one in some) for some in by_disruption([*many(3), two], 1000)]
    assert order == sorted(order)
    assert len(order) == 2**4
