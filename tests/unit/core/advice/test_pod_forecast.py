"""Forecasts of pods, against plain counting and against what is then granted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.advice.pod_forecast import ContainerDemand, PodNode, forecast_pods, total_of
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.deviceplugin.view import CpuResource, HugepageResource, ResourceKind
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import UNHEALTHY, Health, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.support.crowds import crowd, random_server

CPU, GPU, PAGES = "nodeagent.dev/cpu", "nodeagent.dev/gpu", "nodeagent.dev/pages"
RESOURCES: dict[str, ResourceKind] = {
    CPU: CpuResource(name=CPU),
    GPU: DeviceResource(name=GPU, kind="gpu"),
    PAGES: HugepageResource(name=PAGES, page_bytes=GIB),
}


def node(inventory: Inventory, health: Health | None = None) -> PodNode:
    return PodNode(inventory=inventory, health=health or {}, resources=RESOURCES, now_s=1000.0)


def random_pod(pick: random.Random) -> list[ContainerDemand]:
    def amounts() -> dict[str, int]:
        return {name: pick.randint(1, 3) for name in (CPU, GPU, PAGES) if pick.random() < 0.4}

    init = [
        ContainerDemand(name=f"i{i}", amounts=amounts(), init=True, sidecar=pick.random() < 0.4)
        for i in range(pick.randint(0, 2))
    ]
    apps = [ContainerDemand(name=f"c{i}", amounts=amounts()) for i in range(pick.randint(1, 2))]
    return [*init, *apps, ContainerDemand(name="last", amounts={CPU: 1})]


def free_of(inventory: Inventory, ledger: Ledger, health: Health) -> dict[str, int]:
    """How many of each resource are free: CPUs, healthy devices, pages."""
    held = {device for one in ledger.grants.values() for device in one.devices}
    pools = [pool for one in inventory.numa_nodes for pool in one.hugepages]
    return {
        CPU: len(inventory.cpus_online - ledger.cpus_held - ledger.reserved),
        GPU: sum(one.id not in held and one.id not in health for one in inventory.devices),
        PAGES: sum(pool.free_pages - ledger.pages_held.get((pool.node, pool.page_bytes), 0) for pool in pools),
    }


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_as_many_pods_fit_as_plain_counting_finds(seed: int) -> None:
    """Up to 8 GPUs and 32 CPUs with other pods on them. Nothing that is granted overlaps."""
    pick = random.Random(seed)
    inventory = random_server(pick)
    ledger, pod = crowd(pick, inventory, 3), random_pod(pick)
    ill = [one.id for one in inventory.devices if pick.random() < 0.1 and one.id not in ledger.devices_held]
    health = {one: HealthState(state=UNHEALTHY, since=0.0, reason="x") for one in ill}
    free, want = free_of(inventory, ledger, health), {name: n for name, n in total_of(pod).items() if n}
    expected = min(free[name] // count for name, count in want.items())
    found = forecast_pods(node(inventory, health), ledger, pod)
    assert found.count == expected
    assert found.why
    new = [one for id, one in found.ledger.grants.items() if id not in ledger.grants]
    disjoint(inventory, [*ledger.grants.values(), *new])
    total = {CPU: sum(len(one.cpus) for one in new), GPU: sum(len(one.devices) for one in new)}
    assert all(total[name] == want.get(name, 0) * expected for name in total)


def disjoint(inventory: Inventory, grants: list[Grant]) -> None:
    cpus = [cpu for one in grants for cpu in one.cpus]
    devices = [device for one in grants for device in one.devices]
    assert len(cpus) == len(set(cpus)) and len(devices) == len(set(devices))
    for pool in (pool for one in inventory.numa_nodes for pool in one.hugepages):
        pages = (some for one in grants for some in one.hugepages if some.node == pool.node)
        assert sum(some.pages for some in pages) <= pool.total_pages


def test_the_scheduler_counts_init_containers_as_kubernetes_does() -> None:
    """An init container counts with the sidecars before it, if that is more than all that runs together."""
    pod = [
        ContainerDemand(name="side", amounts={CPU: 1}, init=True, sidecar=True),
        ContainerDemand(name="warm", amounts={CPU: 6}, init=True),
        ContainerDemand(name="late", amounts={CPU: 2}, init=True, sidecar=True),
        ContainerDemand(name="main", amounts={CPU: 3}),
    ]
    assert total_of(pod) == {CPU: 7}
    assert total_of([*pod, ContainerDemand(name="more", amounts={CPU: 4})]) == {CPU: 10}


def test_the_ids_of_init_containers_are_given_on_to_the_next(tmp_path: object) -> None:
    """A pod that warms up on 4 CPUs and runs on 4 needs 4, not 8."""
    inventory = inventory_of(even_rows(1, 1, 1, 8, 1))
    pod = [ContainerDemand(name="i", amounts={CPU: 4}, init=True), ContainerDemand(name="c", amounts={CPU: 4})]
    assert forecast_pods(node(inventory), Ledger(), pod).count == 2
    sidecar = [ContainerDemand(name="i", amounts={CPU: 4}, init=True, sidecar=True), pod[1]]
    assert forecast_pods(node(inventory), Ledger(), sidecar).count == 1


def test_devices_that_exclude_each_other_are_not_counted_twice() -> None:
    """A GPU and its two instances: a pod that gets the GPU leaves no instance."""
    whole = Device(kind="gpu", id="gpu0", paths=("/dev/nvidia0",))
    parts = [Device(kind="gpu", id=f"gpu0/{i}", parent="gpu0", paths=(f"/dev/mig{i}",)) for i in range(2)]
    inventory = inventory_of(even_rows(1, 1, 1, 8, 1), devices=[whole, *parts])
    found = forecast_pods(node(inventory), Ledger(), [ContainerDemand(name="c", amounts={GPU: 1})])
    assert found.count == 2
    assert {device for one in found.ledger.grants.values() for device in one.devices} == {"gpu0/0", "gpu0/1"}


@pytest.mark.parametrize("use", HOST_USES)
@pytest.mark.parametrize("value", [True, "unknown"])
def test_devices_that_are_withheld_are_not_counted(use: str, value: bool | str) -> None:
    """Neither what the node uses, also on an empty one, nor what the configuration keeps in quarantine here; unless the
    resource asks for what is in use."""
    free = [Device(kind="gpu", id=f"gpu{i}", paths=(f"/dev/g{i}",)) for i in range(4)]
    used = [replace(one, attributes={use: value}) for one in free[:1]]
    inventory = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[*used, *free[1:]])
    quarantine = HealthState(state=UNHEALTHY, since=0.0, reason="quarantined by the configuration (gpu1)")
    pod = [ContainerDemand(name="c", amounts={GPU: 1})]
    now = forecast_pods(node(inventory, {"gpu1": quarantine}), Ledger(), pod)
    assert now.count == 2
    assert {device for one in now.ledger.grants.values() for device in one.devices} == {"gpu2", "gpu3"}
    assert forecast_pods(node(inventory), Ledger(), pod).count == 3
    every = {GPU: DeviceResource(name=GPU, kind="gpu", match={use: "*"})}
    wide = PodNode(inventory=inventory, health={}, resources=every, now_s=1000.0)
    assert forecast_pods(wide, Ledger(), pod).count == 4


def test_what_the_agent_does_not_serve_is_an_error_and_no_number() -> None:
    inventory = inventory_of(even_rows(1, 1, 1, 2, 1))
    with pytest.raises(InputError, match=r"cannot forecast x\.com/tpu: the agent does not serve it"):
        forecast_pods(node(inventory), Ledger(), [ContainerDemand(name="c", amounts={"x.com/tpu": 1})])
    with pytest.raises(InputError, match="requests nothing of the agent"):
        forecast_pods(node(inventory), Ledger(), [ContainerDemand(name="c", amounts={})])
