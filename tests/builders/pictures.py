"""A busy machine and its grants: what pictures and the page are tried with, and what docs/images/map.svg shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of

CPUS, DEVICES, GRANTS = 256, 64, 200
"""The largest machine that is drawn in tests."""


def large_machine() -> Inventory:
    """2 packages, 4 NUMA nodes, 16 L3 groups of 8 cores, 256 CPUs; 8 GPUs, 8 NICs, 48 virtual functions."""
    gpus = [_gpu(i) for i in range(8)]
    nics = [_nic(i) for i in range(8)]
    vfs = [_vf(nic, n) for nic in nics for n in range(1, 7)]
    pages = {(node, size): count for node in range(4) for size, count in ((GIB, 16), (2 << 20, 512))}
    return inventory_of(
        even_rows(2, 2, 4, 8, 2),
        distances=even_distances(2, 2),
        memory=dict.fromkeys(range(4), 128 * GIB),
        pages=pages,
        devices=sorted([*gpus, *nics, *vfs], key=lambda one: (one.kind, one.id)),
    )


def _gpu(number: int) -> Device:
    return Device(
        kind="gpu", id=f"0000:{0x11 + number:02x}:00.0", numa_node=number // 2, paths=(f"/dev/nvidia{number}",)
    )


def _nic(number: int) -> Device:
    attributes = {"name": f"ens{number}f0"}
    return Device(kind="nic", id=f"0000:{0x81 + number:02x}:00.0", numa_node=number // 2, attributes=attributes)


def _vf(nic: Device, number: int) -> Device:
    return replace(nic, id=f"{nic.id[:-1]}{number}", parent=nic.id, attributes={})


def pod_grant(number: int, cpus: CpuSet = EMPTY, **more: object) -> Grant:
    """A grant of the device plugin to a pod named after its number."""
    holder = Holder(api=DEVICE_PLUGIN, namespace="team", pod=f"pod-{number}", container="main")
    return Grant(id=f"g{number:03}", holder=holder, cpus=cpus, **more)  # type: ignore[arg-type]


def claim_grant(number: int, cpus: CpuSet = EMPTY, **more: object) -> Grant:
    """A grant to a claim named after its number."""
    holder = Holder(api=CLAIM, namespace="team", claim=f"claim-{number}", uid=f"uid-{number}")
    return Grant(id=f"g{number:03}", holder=holder, cpus=cpus, **more)  # type: ignore[arg-type]


def many_grants(inventory: Inventory, count: int = GRANTS) -> tuple[Grant, ...]:
    """So many grants, each of another holder: a CPU each, to every fourth a device, to every eighth a page."""
    cpus, devices = iter(inventory.cpus_online), iter(_functions(inventory))
    return tuple(_one_of_many(number, islice(cpus, 1), devices) for number in range(count))


def _one_of_many(number: int, cpus: Iterable[int], devices: Iterator[str]) -> Grant:
    pages = (Pages(node=number // 8 % 4, page_bytes=GIB, pages=1),) if number % 8 == 0 else ()
    held: Sequence[str] = tuple(islice(devices, 1)) if number % 4 == 0 else ()
    make = claim_grant if number % 3 == 0 else pod_grant
    return make(number, CpuSet(cpus), devices=tuple(held), hugepages=pages)


def _functions(inventory: Inventory) -> list[str]:
    """Devices that can be held at the same time."""
    return [one.id for one in inventory.devices if one.kind == "gpu" or one.parent is not None]
