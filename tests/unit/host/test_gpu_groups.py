"""Ready-made sets of linked GPUs: devices of the inventory that exclude their members, over both APIs."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.admin import numa_gauges
from nodeagent.config.schema import Config
from nodeagent.core.advice.fragmentation import fragmentation
from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource, illness
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.pool import Features
from nodeagent.core.dra.prepare import prepare
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.health import UNHEALTHY, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.picture.draw import draw
from nodeagent.core.placement.place import place
from nodeagent.core.publish.labels import labels
from nodeagent.errors import Refused
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.gpus.groups import gpu_groups
from nodeagent.managers.inventory.gpu_health import nvidia_gpus
from nodeagent.resources.catalog import dra_of
from nodeagent.resources.offer import offers, selectors
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import NODE, claim, pool_of, result, stamp, wrong_with

GPUS = [f"0000:{bus:02x}:00.0" for bus in range(1, 9)]
RESOURCES: list[dict[str, Any]] = [
    {"name": "gpu", "kind": "gpu", "serve": "both", "match": {"parent": ""}},
    {"name": "gpu-2", "kind": "gpu", "serve": "both", "match": {"group": "2"}},
    {"name": "gpu-4", "kind": "gpu", "serve": "both", "match": {"group": "4"}},
    {"name": "gpu-8", "kind": "gpu", "serve": "both", "match": {"group": "8"}},
]
EVERY = frozenset({2, 4, 8})


def gpu(number: int, **facts: Any) -> Device:
    own = {
        "pci_address": GPUS[number],
        "vendor": "10de",
        "driver": "nvidia",
        "numa_node": number // 4,
        "paths": (f"/dev/nvidia{number}", "/dev/nvidiactl"),
        "attributes": {"uuid": f"GPU-{number}", "memory_bytes": 80 << 30, "product": "NVIDIA H100"},
    }
    return Device(kind="gpu", id=GPUS[number], **{**own, **facts})


def machine(sizes: frozenset[int] = EVERY, *changed: Device) -> Inventory:
    """Eight GPUs on switches, four a socket."""
    gpus = {one: gpu(number) for number, one in enumerate(GPUS)} | {one.id: one for one in changed}
    links = tuple(Link(a=a, b=b, type="nvlink", weight=270) for a, b in combinations(GPUS, 2))
    made = replace(inventory_of(even_rows(2, 1, 1, 4, 1), devices=tuple(gpus.values())), links=links)
    return replace(made, devices=all_kinds.in_order((*made.devices, *gpu_groups(made, sizes))))


def groups(inventory: Inventory, size: int) -> list[Device]:
    return [one for one in inventory.devices if one.attributes.get("group") == size]


def test_a_set_has_the_nodes_and_the_sums_of_its_members() -> None:
    pairs, quads, (eight,) = (groups(machine(), size) for size in (2, 4, 8))
    assert [one.members for one in quads] == [tuple(GPUS[:4]), tuple(GPUS[4:])]
    assert [one.numa_node for one in (*quads, eight)] == [0, 1, None]
    assert len(pairs) == 4
    assert quads[0].paths == ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidia2", "/dev/nvidia3")
    assert quads[0].attributes["memory_bytes"] == 320 << 30
    assert quads[0].attributes["product"] == "NVIDIA H100"
    assert not quads[0].lacks_node


def test_a_set_of_other_members_is_another_device() -> None:
    """Where a GPU is gone, others are grouped; who holds the old set does not hold the new one."""
    less = machine(EVERY, gpu(1, driver="vfio-pci", exclusive=("/dev/vfio/7",)))
    assert GPUS[1] not in {member for size in EVERY for one in groups(less, size) for member in one.members}
    before, after = ({one.id for one in groups(it, 4)} for it in (machine(), less))
    assert len(before & after) < len(before)


@pytest.mark.parametrize(
    "facts", [{"attributes": {"mig": True}}, {"parent": "x"}, {"paths": ()}, {"paths": ("/dev/nvidiactl",)}]
)
def test_what_cannot_be_handed_over_whole_is_in_no_set(facts: dict[str, Any]) -> None:
    made = machine(EVERY, gpu(0, **facts))
    assert groups(made, 8) == []
    assert GPUS[0] not in {member for one in groups(made, 2) for member in one.members}


def test_the_sets_are_found_only_for_sizes_that_a_resource_matches() -> None:
    assert [one for one in machine(frozenset()).devices if one.members] == []
    for match, sizes in (({"group": "4"}, {4}), ({"group": "*"}, {2, 4, 8}), ({"parent": ""}, set())):
        content = {"resources": [{"name": "x", "kind": "gpu", "match": match}]}
        assert selectors(msgspec.convert(content, Config)).gpu_groups == sizes


def test_a_set_is_served_only_where_a_resource_asks_for_sets() -> None:
    made = machine()
    assert [one.id for one in DeviceResource(name="r", kind="gpu", match={"parent": ""}).devices(made)] == GPUS
    assert [one.id for one in DeviceResource(name="r", kind="gpu").devices(made)] == GPUS
    asked = DeviceResource(name="r", kind="gpu", match={"group": "4"})
    assert asked.devices(made) == groups(made, 4)
    assert place(made, Ledger(), Request(devices={"gpu": 3})).devices == tuple(GPUS[:3])


def test_a_set_is_ill_with_a_member_and_no_source_of_health_takes_it_for_a_gpu() -> None:
    made = machine()
    health = {GPUS[5]: HealthState(state=UNHEALTHY, since=0.0, reason="xid 79")}
    ill = [illness(one, health) is not None for size in (4, 8) for one in groups(made, size)]
    assert ill == [False, True, True]
    assert [one.id for one in nvidia_gpus(made)] == GPUS


# ---------------------------------------------------------------- both APIs


def config() -> Config:
    return msgspec.convert({"resources": RESOURCES}, Config)


def _healthy(made: Inventory, ledger: Ledger) -> dict[str, list[bool]]:
    resources = [one.resource for one in offers(config(), all_kinds.builtin_kinds())]
    return {
        one.name.rpartition("/")[2]: [shown.healthy for shown in one.advertised(made, ledger, {})] for one in resources
    }


def test_what_a_claim_holds_of_a_set_no_container_is_given_and_the_other_way_round() -> None:
    """The second quad is granted to a claim: its GPUs and pairs are gone, and the whole, but not the other quad."""
    made, catalog = machine(), dra_of(config(), all_kinds.builtin_kinds(), NODE).catalog
    quad = groups(made, 4)[1]
    one = claim("c", result("gpu", quad.id))
    batch = prepare(made, Ledger(), catalog, [one], stamp())
    assert not batch.errors
    (held,) = batch.grants[one.ref.uid]
    assert held.devices == (quad.id,)
    assert _healthy(made, batch.ledger) == {
        "gpu": [True] * 4 + [False] * 4,
        "gpu-2": [True] * 2 + [False] * 2,
        "gpu-4": [True, False],
        "gpu-8": [False],
    }
    offer = offers(config(), all_kinds.builtin_kinds())[0]
    with pytest.raises(Refused, match="held by"):
        allocate(made, batch.ledger, offer.resource, [[GPUS[6]]], stamp())


def test_the_scheduler_allocates_no_set_together_with_a_member() -> None:
    """The counters allow two devices together exactly where these have no GPU in common."""
    made = machine()
    kind = DevicePool(kind="gpu", resources=tuple(_resources()))
    pool = pool_of(kind, made)
    assert wrong_with(kind, made) == []
    available = {(one.name, name): count for one in pool.counters for name, count in one.counters.items()}
    shown = {one.part.device: one for one in pool.devices}
    assert len(shown) == 8 + 4 + 2 + 1
    for a, b in combinations(shown, 2):
        used: dict[tuple[str, str], int] = {}
        for one in (a, b):
            for name, counters in shown[one].consumes.items():
                for counter, count in counters.items():
                    used[name, counter] = used.get((name, counter), 0) + count
        fits = all(count <= available[key] for key, count in used.items())
        together = made.things_of[a].isdisjoint(made.things_of[b])
        assert fits == together, (a, b)


def _resources() -> list[DeviceResource]:
    return [
        one.resource for one in offers(config(), all_kinds.builtin_kinds()) if isinstance(one.resource, DeviceResource)
    ]


def test_without_counters_the_scheduler_is_shown_no_set() -> None:
    kind = DevicePool(kind="gpu", resources=tuple(_resources()))
    pool = kind.pool(machine(), Ledger(), {}, Features(counters=False))
    assert [one.part.device for one in pool.devices] == GPUS


def test_a_granted_set_hands_over_all_its_gpus() -> None:
    made = machine()
    quad = groups(made, 4)[0]
    offer = next(one for one in offers(config(), all_kinds.builtin_kinds()) if one.name.endswith("/gpu-4"))
    got = offer.device_edits(made, quad, [quad])
    assert [one.host_path for one in got.device_nodes] == list(quad.paths)
    assert got.env["PCIDEVICE_NODEAGENT_GPU"] == ",".join(GPUS[:4])
    assert got.env["NVIDIA_VISIBLE_DEVICES"] == "GPU-0,GPU-1,GPU-2,GPU-3"


# ---------------------------------------------------------------- what is shown


def _held_quad() -> tuple[Inventory, Ledger]:
    made, catalog = machine(), dra_of(config(), all_kinds.builtin_kinds(), NODE).catalog
    return made, prepare(made, Ledger(), catalog, [claim("c", result("gpu", groups(made, 4)[1].id))], stamp()).ledger


def test_a_held_set_is_drawn_on_its_members() -> None:
    made, ledger = _held_quad()
    picture = draw(made, ledger.grants.values())
    drawn = [one for package in picture.packages for node in package.nodes for one in node.devices]
    assert {one.id for one in drawn} == set(GPUS)
    assert [one.id for one in drawn if one.holders] == GPUS[4:]


def test_gauges_count_gpus_and_no_sets() -> None:
    made, ledger = _held_quad()
    served = [one.resource for one in offers(config(), all_kinds.builtin_kinds())]
    counts = {labels: value for labels, value in numa_gauges.devices(made, ledger, {}, served) if value}
    assert counts == {("0", "gpu", "free"): 4, ("1", "gpu", "held"): 4}


def test_labels_and_fragmentation_count_gpus_and_no_sets() -> None:
    made, ledger = _held_quad()
    assert labels(made, EMPTY, "d")["d/gpu.count"] == "8"
    assert dict(fragmentation(made, ledger, ["gpu"]))["gpu"] == 0.0
