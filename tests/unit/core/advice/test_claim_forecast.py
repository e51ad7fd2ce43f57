"""Forecasts of claims, against plain counting on each NUMA node."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.advice.claim_forecast import ClaimNode, forecast_claims
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import PagePool
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.health import UNHEALTHY, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError
from nodeagent.kube.claim_spec import read_claim
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.support.crowds import crowd, random_server

DRIVER = "nodeagent.dev"


def device_class(kind: str) -> dict[str, Any]:
    expression = f'device.driver == "{DRIVER}" && device.attributes["{DRIVER}"].kind == "{kind}"'
    selectors = [{"cel": {"expression": expression}}]
    return {"kind": "DeviceClass", "metadata": {"name": kind}, "spec": {"selectors": selectors}}


CLASSES = [device_class(kind) for kind in ("cpu", "gpu", "hugepages")]


def node(inventory: Inventory, *ill: str) -> ClaimNode:
    kinds = (
        CpuPool(),
        PagePool(sizes=(GIB,)),
        DevicePool(kind="gpu", resources=(DeviceResource(name="nodeagent.dev/gpu", kind="gpu"),)),
    )
    return ClaimNode(
        inventory=inventory,
        health={one: HealthState(state=UNHEALTHY, since=0.0, reason="x") for one in ill},
        catalog=Catalog(driver=DRIVER, node_name="n", kinds={one.kind: one for one in kinds}),
        features=ALL_FEATURES,
        now_s=1000.0,
    )


def claim(*requests: dict[str, Any], **devices: Any) -> list[dict[str, Any]]:
    spec = {"devices": {"requests": list(requests), **devices}}
    return [{"kind": "ResourceClaim", "metadata": {"name": "c"}, "spec": spec}, *CLASSES]


def exactly(name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "exactly": {"deviceClassName": kind, **more}}


def aligned(gpus: int, cpus: int, pages: int) -> list[dict[str, Any]]:
    requests = [exactly("g", "gpu", count=gpus)] if gpus else []
    requests += [exactly("c", "cpu", capacity={"requests": {"cpus": str(cpus)}})]
    requests += [exactly("p", "hugepages", capacity={"requests": {"size": f"{pages}Gi"}})] if pages else []
    return claim(*requests, constraints=[{"matchAttribute": "resource.kubernetes.io/numaNode"}])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_as_many_aligned_claims_fit_as_counting_on_each_node_finds(seed: int) -> None:
    """Up to 8 GPUs and 32 CPUs, partly held through the device plugin: what each node has enough of, added up."""
    pick = random.Random(seed)
    inventory = random_server(pick)
    ledger = crowd(pick, inventory, 3)
    gpus = pick.randint(0, 2) if inventory.devices else 0
    cpus, pages = pick.randint(1, 6), pick.randint(0, 1)
    held = ledger.devices_held
    expected = 0
    for one in inventory.numa_nodes:
        free = len(one.cpus - ledger.cpus_held - ledger.reserved)
        amounts = [free // cpus]
        if gpus:
            amounts += [sum(d.numa_node == one.id and d.id not in held for d in inventory.devices) // gpus]
        if pages:
            left = sum(pool.free_pages - ledger.pages_held.get((one.id, GIB), 0) for pool in one.hugepages)
            amounts += [left // pages]
        expected += min(amounts)
    found = forecast_claims(node(inventory), ledger, read_claim(aligned(gpus, cpus, pages)))
    assert found.count == expected
    new = [one for id, one in found.ledger.grants.items() if id not in ledger.grants]
    assert sum(len(one.cpus) for one in new) == cpus * expected
    assert sum(len(one.devices) for one in new) == gpus * expected


def gpus(count: int) -> Inventory:
    devices = [
        Device(kind="gpu", id=f"gpu{i}", numa_node=i % 2, paths=(f"/dev/g{i}",), attributes={"memory_bytes": i * GIB})
        for i in range(count)
    ]
    return inventory_of(even_rows(2, 1, 1, 4, 1), devices=devices)


def test_alternatives_are_tried_in_order() -> None:
    """One large GPU, or else two of any size: of five GPUs, two large ones go first, and one pair is left."""
    large = f'device.capacity["{DRIVER}"].memory.compareTo(quantity("3Gi")) >= 0'
    has = f'has(device.capacity["{DRIVER}"].memory) && {large}'
    request = {
        "name": "g",
        "firstAvailable": [
            {"name": "large", "deviceClassName": "gpu", "selectors": [{"cel": {"expression": has}}]},
            {"name": "two", "deviceClassName": "gpu", "count": 2},
        ],
    }
    found = forecast_claims(node(gpus(5)), Ledger(), read_claim(claim(request)))
    assert found.count == 3


def test_all_devices_and_none_that_are_ill() -> None:
    """allocationMode All takes every match, or nothing while one is tainted; a toleration changes that."""
    every = exactly("g", "gpu", allocationMode="All")
    assert forecast_claims(node(gpus(3)), Ledger(), read_claim(claim(every))).count == 1
    assert forecast_claims(node(gpus(3), "gpu1"), Ledger(), read_claim(claim(every))).count == 0
    assert forecast_claims(node(gpus(3), "gpu1"), Ledger(), read_claim(claim(exactly("g", "gpu")))).count == 2
    tolerant = exactly("g", "gpu", tolerations=[{"operator": "Exists"}])
    assert forecast_claims(node(gpus(3), "gpu1"), Ledger(), read_claim(claim(tolerant))).count == 3


@pytest.mark.parametrize("use", HOST_USES)
def test_devices_that_are_withheld_are_not_counted(use: str) -> None:
    """What the node uses is not published; what is in quarantine is tainted."""
    inventory = gpus(4)
    used = [replace(one, attributes={use: True}) for one in inventory.devices[:1]]
    inventory = replace(inventory, devices=(*used, *inventory.devices[1:]))
    one, every = (exactly("g", "gpu", **more) for more in ({}, {"allocationMode": "All"}))
    now = forecast_claims(node(inventory, "gpu1"), Ledger(), read_claim(claim(one)))
    assert now.count == 2
    assert {device for grant in now.ledger.grants.values() for device in grant.devices} == {"gpu2", "gpu3"}
    assert forecast_claims(node(inventory), Ledger(), read_claim(claim(one))).count == 3
    assert forecast_claims(node(inventory), Ledger(), read_claim(claim(every))).count == 1


def test_devices_that_must_differ_differ() -> None:
    """Two GPUs on different nodes: of two and one on the nodes, one pair."""
    rule = {"distinctAttribute": "resource.kubernetes.io/numaNode"}
    spec = read_claim(claim(exactly("g", "gpu", count=2), constraints=[rule]))
    assert forecast_claims(node(gpus(3)), Ledger(), spec).count == 1


def test_a_later_request_makes_an_earlier_one_choose_again() -> None:
    """The first GPU is on node 0; if only node 1 has CPUs left, the GPU of node 1 is found."""
    inventory = gpus(2)
    ledger = forecast_claims(node(inventory), Ledger(), read_claim(aligned(0, 4, 0)), most=1).ledger
    found = forecast_claims(node(inventory), ledger, read_claim(aligned(1, 4, 0)))
    assert found.count == 1
    assert "gpu1" in [one for grant in found.ledger.grants.values() for one in grant.devices]


def test_a_class_that_matches_nothing_says_so() -> None:
    found = forecast_claims(node(gpus(0)), Ledger(), read_claim(claim(exactly("g", "gpu"))))
    assert (found.count, found.why) == (0, 'cannot allocate request "g": no published device matches')


def test_a_selector_that_fails_on_a_device_fails_the_claim() -> None:
    """As the scheduler does: an attribute that a device lacks is an error."""
    lacking = exactly("g", "gpu", selectors=[{"cel": {"expression": f'device.attributes["{DRIVER}"].colour == "red"'}}])
    with pytest.raises(InputError, match=r"the scheduler fails it on device gpu/.*no such key: colour"):
        forecast_claims(node(gpus(1)), Ledger(), read_claim(claim(lacking)))


def test_what_is_not_known_of_a_claim_is_refused_and_not_ignored() -> None:
    for documents, why in (
        (claim(exactly("g", "tpu")), "DeviceClass 'tpu' is not known, given are cpu, gpu, hugepages"),
        (claim(exactly("g", "gpu", colour="red")), "unknown field `colour`"),
        (claim(exactly("g", "gpu"), shape="round"), "unknown field `shape`"),
        (claim(), "it has no requests"),
        (claim(exactly("g", "gpu"), constraints=[{}]), "neither or both of matchAttribute, distinctAttribute"),
        (claim(exactly("g", "gpu", selectors=[{"cel": {"expression": "cel.bind(x, 1, x)"}}])), "'cel.bind"),
        (CLASSES, "0 of kind ResourceClaim"),
    ):
        with pytest.raises(InputError, match=why):
            read_claim(documents)


def test_older_versions_have_the_same_fields_in_the_request_itself() -> None:
    """resource.k8s.io/v1beta1."""
    old = {"name": "g", "deviceClassName": "gpu", "count": 2}
    assert forecast_claims(node(gpus(4)), Ledger(), read_claim(claim(old))).count == 2
    template = {"kind": "ResourceClaimTemplate", "spec": {"spec": {"devices": {"requests": [old]}}}}
    assert forecast_claims(node(gpus(4)), Ledger(), read_claim([template, *CLASSES])).count == 2
