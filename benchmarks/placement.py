"""How long one placement takes through the Python call, and one CpuSet operation. `python -m benchmarks.placement`.

Each case runs in rounds of a few calls; best and median are over the rounds, in microseconds for one call.
"""

from __future__ import annotations

import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import SINGLE, Request
from nodeagent.core.model.topology import Cpu, HugepagePool, NumaNode
from nodeagent.core.placement.place import place
from nodeagent.version import VERSION

ROUNDS = 25
ROUND_S = 0.01
GIB = 1 << 30
EMPTY = Ledger()
SHAPES = ((2, 1, 16, 8, 2), (2, 4, 4, 8, 2), (2, 8, 2, 8, 2), (2, 1, 1, 128, 2))
"""Packages, nodes per package, L3 groups per node, cores per group, threads."""

Case = tuple[str, Callable[[], object]]


def machine(
    shape: tuple[int, int, int, int, int], devices: tuple[Device, ...] = (), links: tuple[Link, ...] = ()
) -> Inventory:
    """An even machine, 8 pages of 1 GiB on each node."""
    packages, nodes, groups, cores, threads = shape
    count = packages * nodes * groups * cores
    cpus = tuple(
        Cpu(
            id=cpu,
            core=cpu % count,
            l3=cpu % count // cores,
            numa_node=cpu % count // (cores * groups),
            package=cpu % count // (cores * groups * nodes),
            die=0,
        )
        for cpu in range(count * threads)
    )
    every = range(packages * nodes)
    return Inventory(
        cpus=cpus,
        cpus_online=CpuSet(range(count * threads)),
        numa_nodes=tuple(
            NumaNode(
                id=node,
                memory_bytes=64 * GIB,
                cpus=CpuSet(cpu.id for cpu in cpus if cpu.numa_node == node),
                distances=MappingProxyType(
                    {other: 10 if node == other else 12 if node // nodes == other // nodes else 32 for other in every}
                ),
                hugepages=(HugepagePool(node=node, page_bytes=GIB, total_pages=8, free_pages=8),),
            )
            for node in every
        ),
        devices=devices,
        links=links,
    )


def fragmented(inventory: Inventory, seed: int = 1) -> Ledger:
    """Half of the CPUs are held, at random."""
    pick = random.Random(seed)
    return Ledger(reserved=CpuSet(cpu.id for cpu in inventory.cpus if pick.random() < 0.5))


def devices_of(nodes: int) -> tuple[Device, ...]:
    """16 GPUs and 16 NICs over the nodes, a GPU and a NIC below each PCIe switch."""
    return tuple(
        Device(
            kind=kind,
            id=f"{kind}{number:02}",
            numa_node=number * nodes // 16,
            pcie_root=f"pci{number * nodes // 16}",
            bridges=(f"switch{number}",),
        )
        for kind in ("gpu", "nic")
        for number in range(16)
    )


def nvlinks(kind: str) -> tuple[Link, ...]:
    """Links of 16 GPUs: every pair alike (NVSwitch), or a random mesh."""
    pick = random.Random(3)
    pairs = [(a, b) for a in range(16) for b in range(a)]
    return tuple(
        Link(a=f"gpu{a:02}", b=f"gpu{b:02}", type="nvlink", weight=100 if kind == "switch" else pick.choice([100, 110]))
        for a, b in pairs
        if kind == "switch" or pick.random() < 0.4
    )


def cpu_cases() -> Iterator[Case]:
    small, four = machine((1, 1, 1, 8, 2)), Request(cpus=4)
    yield "16 CPUs, take 4", lambda: place(small, EMPTY, four)
    for shape in (*SHAPES, (2, 8, 8, 16, 2)):
        inventory = machine(shape)
        ledger, request, name = fragmented(inventory), Request(cpus=64), "x".join(map(str, shape))
        name = f"{len(inventory.cpus)} CPUs ({name}), fragmented, take 64"
        yield name, lambda i=inventory, g=ledger, r=request: place(i, g, r)  # type: ignore[misc]


def joint_cases() -> Iterator[Case]:
    inventory = machine((2, 4, 4, 8, 2), devices_of(8))
    wanted = Request(cpus=8, hugepages={GIB: 1}, devices={"gpu": 2, "nic": 1})
    single = Request(cpus=8, hugepages={GIB: 1}, devices={"gpu": 2, "nic": 1}, numa=SINGLE)
    yield "8 CPUs + 1Gi page + 2 of 16 GPUs + 1 of 16 NICs, 8 nodes", lambda: place(inventory, EMPTY, wanted)
    yield "the same, NUMA policy single", lambda: place(inventory, EMPTY, single)
    sixteen, few, many = machine((2, 8, 2, 8, 2)), Request(hugepages={GIB: 3}), Request(hugepages={GIB: 20})
    yield "3 pages of 1Gi alone, 16 nodes", lambda: place(sixteen, EMPTY, few)
    yield "20 pages of 1Gi alone, 3 of 16 nodes needed", lambda: place(sixteen, EMPTY, many)
    for links in ("tree", "switch", "mesh"):
        some = machine((2, 4, 4, 8, 2), devices_of(8), () if links == "tree" else nvlinks(links))
        request = max((Request(devices={"gpu": count}) for count in range(1, 17)), key=lambda r, i=some: _warm(i, r))  # type: ignore[misc]
        name = f"{request.devices['gpu']} of 16 GPUs ({links}; the slowest count)"
        yield name, lambda i=some, r=request: place(i, EMPTY, r)  # type: ignore[misc]


def _warm(inventory: Inventory, request: Request) -> float:
    return min(_once(lambda: place(inventory, EMPTY, request)) for _ in range(5))


def set_cases() -> Iterator[Case]:
    text = ",".join(str(cpu) for cpu in range(0, 512, 2))
    even, odd = CpuSet.parse(text), CpuSet(range(1, 512, 2))
    yield "CpuSet of 512, 256 ranges: parse", lambda: CpuSet.parse(text)
    yield "CpuSet of 512, 256 ranges: print", lambda: str(even)
    yield "CpuSet of 512, 256 ranges: union", lambda: even | odd


def cases() -> Iterator[Case]:
    yield from cpu_cases()
    yield from joint_cases()
    yield from set_cases()


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """(median, best) microseconds of one call."""
    call()
    count = max(1, int(ROUND_S / max(_once(call), 1e-7)))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(rounds), min(rounds)


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def results() -> list[tuple[str, float, float]]:
    """(case, median µs, best µs)."""
    return [(name, *measure(call)) for name, call in cases()]


def machine_line() -> str:
    """The machine and the versions that the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    count = sum(line.startswith("processor") for line in lines)
    return f"{model}, {count} CPUs; Python {platform.python_version()}, nodeagent {VERSION}"


def main() -> int:
    print(machine_line())
    print(f"{'case':70} {'median µs':>10} {'best µs':>10}")
    for name, median, best in results():
        print(f"{name:70} {median:10.2f} {best:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
