"""From the machine to ResourceSlices: how long the largest pools take, part by part, and how many bytes they are.

A change is what costs most of them: one device is given through the device plugin, so that it is tainted; the pool is
formed, checked and compared with what the server holds, and what differs is encoded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks.placement import machine
from nodeagent.config.schema import Config
from nodeagent.core.dra.cpu_pool import PoolKind
from nodeagent.core.dra.pool import ALL_FEATURES, Pool
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices import all_kinds
from nodeagent.kube.resourceslice.pool_writer import DEFAULT_PACE, PoolLane
from nodeagent.kube.resourceslice.render import Object, Owner, SlicePlan, plan, render
from nodeagent.resources.catalog import dra_of

OWNER = Owner(driver="nodeagent.dev", node_name="node-a", node_uid="8f2d2c1e-0000-4000-8000-000000000001")
EMPTY = Ledger()
ROUNDS = 5
REACH_MS = 500


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pool of one machine, and what is given of it."""

    name: str
    inventory: Inventory
    kind: PoolKind
    given: Grant

    def fresh(self) -> Inventory:
        """The inventory without what was worked out of it."""
        return replace(self.inventory)

    def pool(self, inventory: Inventory, ledger: Ledger = EMPTY) -> Pool:
        return self.kind.pool(inventory, ledger, NO_HEALTH, ALL_FEATURES)


# ---------------------------------------------------------------- the machines


def adapters(ports: int, functions: int) -> Iterator[Device]:
    """Adapters with virtual functions, as their kernel driver shows them."""
    for port in range(ports):
        one = Device(
            kind="nic",
            id=f"{port:04x}:41:00.0",
            pci_address=f"{port:04x}:41:00.0",
            vendor="15b3",
            device="101d",
            driver="mlx5_core",
            numa_node=port % 8,
            pcie_root=f"pci{port:04x}:40",
            iommu_group=port,
            attributes=MappingProxyType({"netdevs": f"eth{port}", "speed_mbps": 200_000, "mtu": 9000}),
        )
        yield one
        for number in range(functions):
            address = f"{port:04x}:42:{number // 8:02x}.{number % 8}"
            yield replace(one, id=address, pci_address=address, parent=one.id, device="101e", iommu_group=None)


def gpus(count: int) -> Iterator[Device]:
    """GPUs as NVML tells of them."""
    told: dict[str, str | int | bool] = {
        "product": "NVIDIA Double 80GB",
        "memory_bytes": 80 << 30,
        "uuid": "GPU-00000001-0000-0000-0000-000000000000",
    }
    for number in range(count):
        address = f"0000:{number + 0x81:02x}:00.0"
        yield Device(
            kind="gpu",
            id=address,
            pci_address=address,
            vendor="10de",
            device="2330",
            driver="nvidia",
            numa_node=number % 8,
            pcie_root="pci0000:80",
            attributes=MappingProxyType(told),
        )


def pools_of(resources: list[dict[str, Any]]) -> list[PoolKind]:
    """The pools that a configuration makes."""
    served = [{**one, "serve": "both" if one["kind"] != "memory" else "dra"} for one in resources]
    config = msgspec.convert({"resources": served}, Config)
    return list(dra_of(config, all_kinds.load_kinds(), OWNER.node_name).catalog.kinds.values())


def cases() -> Iterator[Case]:
    holder = Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/x")
    cpu = Grant(id="g-1", holder=holder, ids=("cpu500",), cpus=CpuSet([500]))
    (individual,) = pools_of([{"name": "cpu", "kind": "cpu", "grouping": "individual"}])
    yield Case(name="1,024 CPUs, one by one", inventory=machine((2, 8, 8, 4, 2)), kind=individual, given=cpu)
    devices = tuple(adapters(64, 64))
    (nic,) = pools_of([{"name": "nic", "kind": "nic"}])
    large = machine((2, 4, 4, 8, 2), devices)
    # The adapter is tainted too, which lies in the same slice as its first function and in another than its last.
    for name, vf in (("the first given", devices[1].id), ("the last given", devices[-1].id)):
        given = Grant(id="g-1", holder=holder, ids=(vf,), devices=(vf,))
        yield Case(name=f"4,096 VFs of 64 adapters, {name}", inventory=large, kind=nic, given=given)


def usual() -> tuple[Inventory, list[PoolKind]]:
    """256 CPUs on 8 NUMA nodes with their pages and memory, 8 GPUs and 16 adapters."""
    names = ("cpu", "memory", "gpu", "nic")
    pages = {"name": "pages", "kind": "hugepages", "pageSize": "1Gi"}
    devices = (*gpus(8), *adapters(16, 0))
    return machine((2, 4, 2, 8, 2), devices), pools_of([*({"name": one, "kind": one} for one in names), pages])


# ---------------------------------------------------------------- the parts


def median_ms(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median of ROUNDS; `before` comes before each and is not timed."""
    took = []
    for _ in range(ROUNDS):
        before()
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def stored(slices: tuple[Object, ...]) -> list[Object]:
    """As the server has them."""
    added = {"uid": "u", "resourceVersion": "1", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return [{**one, "metadata": {**one["metadata"], **added}} for one in slices]


def encoded(todo: SlicePlan) -> int:
    """Bytes of what is written."""
    return sum(len(msgspec.json.encode(one)) for one in (*todo.create, *todo.replace))


def lane_with(pool: Pool) -> PoolLane:
    """A lane that has taken a pool: checked it against every rule."""
    lane = PoolLane(DEFAULT_PACE)
    lane.take(pool, OWNER)
    if lane.broken:
        raise AssertionError(str(lane.broken[0]))
    return lane


def changed(case: Case, inventory: Inventory, lane: PoolLane, held: list[Object]) -> int:
    """All that follows when the device is given; bytes that are written."""
    lane.take(case.pool(inventory, grant(EMPTY, case.given)), OWNER)
    return encoded(plan(held, lane.pool, OWNER))


def row(case: Case) -> str:
    inventory = case.fresh()
    pool, ledger = case.pool(inventory), grant(EMPTY, case.given)
    after = case.pool(inventory, ledger)
    slices = render(pool, OWNER, 1)
    held = stored(slices)
    first, change = plan((), pool, OWNER), plan(held, after, OWNER)
    fresh: list[Inventory] = []
    lanes: list[PoolLane] = []
    figures = (
        median_ms(lambda: case.pool(fresh[-1]), lambda: fresh.append(case.fresh())),
        median_ms(lambda: case.pool(inventory, ledger)),
        median_ms(lambda: lane_with(pool)),
        median_ms(lambda: plan((), pool, OWNER)),
        median_ms(lambda: plan(held, after, OWNER)),
        median_ms(lambda: encoded(first)),
        median_ms(lambda: changed(case, inventory, lanes[-1], held), lambda: lanes.append(lane_with(pool))),
    )
    shown = " | ".join(f"{one:.1f}" for one in figures)
    sizes = " | ".join(
        f"{len(some)}, {size / 1024:.0f} KiB"
        for some, size in ((slices, encoded(first)), (change.replace, encoded(change)))
    )
    return f"| {case.name} | {sizes} | {shown} |"


def main() -> None:
    columns = ("slices", "of a change", "formed", "formed again", "rules", "plan", "plan of a change", "encoded")
    print(f"| ms | {' | '.join(columns)} | a change in all (reach: {REACH_MS}) |\n|{'---|' * 10}")
    for case in cases():
        print(row(case), flush=True)
    inventory, every = usual()
    slices = [one for kind in every for one in render(kind.pool(inventory, EMPTY, NO_HEALTH, ALL_FEATURES), OWNER, 1)]
    size = sum(len(msgspec.json.encode(one)) for one in stored(tuple(slices)))
    what = "A node of 256 CPUs, 8 NUMA nodes, 8 GPUs and 16 adapters"
    print(f"\n{what}: {len(slices)} slices of {size / 1024:.1f} KiB in all.")


if __name__ == "__main__":
    main()
