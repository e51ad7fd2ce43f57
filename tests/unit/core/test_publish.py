"""What is published of a machine: labels that change with the machine alone, and its NUMA nodes with what is left."""

from __future__ import annotations

import re

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.publish.labels import labels
from nodeagent.core.publish.zones import Amount, zones
from tests.builders.inventories import even_rows, inventory_of

MIB = 1 << 20
CPU = CpuResource(name="nodeagent.dev/cpu")
VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
"""Of a label (apimachinery, util/validation)."""


def machine(*devices: Device) -> Inventory:
    """8 CPUs on 2 NUMA nodes with 8 pages of 2 MiB each."""
    found = sorted(devices, key=lambda one: (one.kind, one.id))
    return inventory_of(even_rows(1, 2, 1, 2, 2), pages={(node, 2 * MIB): 8 for node in (0, 1)}, devices=found)


def gpu(number: int, product: str) -> Device:
    attributes = {"product": product, "memory_bytes": 80 << 30}
    return Device(kind="gpu", id=f"gpu-{number}", numa_node=number % 2, attributes=attributes)


def held(api: str, *ids: str, resource: str = "", cpus: str = "", pages: int = 0) -> Grant:
    some = (Pages(page_bytes=2 * MIB, node=0, pages=pages),) if pages else ()
    holder = Holder(api=api, resource=resource, uid="u")
    return Grant(id=f"g-{api}", holder=holder, ids=ids, cpus=CpuSet.parse(cpus), hugepages=some)


def test_the_labels_say_what_the_machine_has_and_what_can_be_granted_exclusively() -> None:
    found = labels(machine(gpu(0, "NVIDIA H200"), gpu(1, "NVIDIA H200")), CpuSet.parse("0"), "example.com")
    short = {name.removeprefix("example.com/"): value for name, value in found.items()}
    assert short["cpu.count"] == "8" and short["cpu.exclusive"] == "7" and short["cpu.cores"] == "4"
    assert short["numa.count"] == "2" and short["hugepages-2Mi.count"] == "16"
    assert (short["gpu.count"], short["gpu.product"], short["gpu.memory"]) == ("2", "NVIDIA-H200", "81920")
    assert all(name.startswith("example.com/") for name in found)


def test_gpus_that_differ_have_no_product_in_common() -> None:
    found = labels(machine(gpu(0, "A"), gpu(1, "B")), CpuSet(), "d")
    assert "d/gpu.product" not in found and found["d/gpu.count"] == "2" and "d/gpu.memory" in found


@given(st.text())
def test_whatever_a_device_calls_itself_is_a_valid_value(product: str) -> None:
    found = labels(machine(gpu(0, product)), CpuSet(), "d")
    assert all(VALUE.fullmatch(value) for value in found.values())


def amounts(inventory: Inventory, ledger: Ledger, reserved: str = "") -> dict[int, dict[str, Amount]]:
    shown = {CPU.name: CPU.advertised(inventory, ledger, {})}
    found = zones(inventory, ledger, CpuSet.parse(reserved), shown)
    return {zone.node: {one.name: one for one in zone.amounts} for zone in found}


def test_what_is_held_through_either_api_is_not_available() -> None:
    inventory, ledger = machine(), Ledger()
    ledger = grant(ledger, held(DEVICE_PLUGIN, "cpu1", resource=CPU.name, cpus="1"))
    ledger = grant(ledger, held(CLAIM, cpus="4", pages=3))
    found = amounts(inventory, ledger, "0")
    first = {name: (one.capacity, one.allocatable, one.available) for name, one in found[0].items()}
    assert first["cpu"] == (4, 3, 1)
    assert first["hugepages-2Mi"] == (16 * MIB, 16 * MIB, 10 * MIB)
    assert first[CPU.name] == (4, 4, 2)
    assert (found[1]["cpu"].available, found[1][CPU.name].available) == (4, 4)


def test_the_zones_have_the_distances_of_the_kernel() -> None:
    inventory = machine()
    nodes = tuple(msgspec.structs.replace(one, distances={0: 10, 1: 21}) for one in inventory.numa_nodes)
    found = zones(msgspec.structs.replace(inventory, numa_nodes=nodes), Ledger(), CpuSet(), {})
    assert [zone.distances for zone in found] == [{0: 10, 1: 21}] * 2


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_available_is_never_more_than_allocatable_nor_that_than_capacity(mine: set[int], reserved: set[int]) -> None:
    ledger = Ledger()
    if cpus := CpuSet(mine - reserved):
        ledger = grant(ledger, held(CLAIM, cpus=str(cpus)))
    for zone in amounts(machine(), ledger, str(CpuSet(reserved))).values():
        for one in zone.values():
            assert 0 <= one.available <= one.allocatable <= one.capacity
