"""place() on small machines costs what the best of all placements costs, and refuses only what cannot be placed."""

from __future__ import annotations

import random
from types import MappingProxyType

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, SINGLE, PlacementCost, Request
from nodeagent.core.placement.place import place
from nodeagent.errors import Refused
from tests.builders.inventories import GIB, inventory_of
from tests.oracles.joint import Oracle

MIB2 = 2 << 20
SPREADS = (opt.SPREAD_NUMA, opt.SPREAD_CORES)
OWN = slice(6, 9)
"""Where the oracle tells what CPUs span by themselves."""


def random_machine(pick: random.Random) -> Inventory:
    """Up to 3 nodes with CPUs and perhaps one without, up to 8 CPUs, 5 devices of two kinds, pages of two sizes."""
    nodes, packages = pick.randint(1, 3), pick.randint(1, 2)
    threads, cpus = pick.choice([1, 2]), pick.randint(2, 8)
    rows = []
    for cpu in range(cpus):
        core = cpu // threads
        node = core % nodes
        rows.append((cpu, node % packages, node, node * 2 + core // nodes % 2, core))
    ids = dict(zip(range(nodes), sorted(pick.sample([0, 1, 8, 255], nodes)), strict=True))
    more = [300] if pick.random() < 0.2 else []
    used = sorted({ids[row[2]] for row in rows} | set(more))
    far = pick.choice([[20], [12, 20, 32]])
    distances = {(a, b): 10 if a == b else pick.choice(far) for a in used for b in used}
    pages = {(node, size): pick.randint(0, 3) for node in used for size in (MIB2, GIB)}
    memory = {node: pick.choice([0, 1, 4]) * GIB for node in used}
    devices = [random_device(pick, number, used, cpus) for number in range(pick.randint(0, 5))]
    devices = random_parts(pick, devices)
    pairs = [(a.id, b.id) for a in devices for b in devices if a.id < b.id]
    links = [Link(a=a, b=b, type="nvlink", weight=pick.choice([100, 110])) for a, b in pairs if pick.random() < 0.3]
    isolated = [cpu for cpu in range(cpus) if pick.random() < 0.2]
    return inventory_of(
        rows,
        distances=distances,
        ids=ids,
        more_nodes=more,
        pages=pages,
        memory=memory,
        devices=devices,
        links=links,
        isolated=isolated,
    )


def random_device(pick: random.Random, number: int, nodes: list[int], cpus: int) -> Device:
    node = pick.choice([*nodes, *nodes, None])
    local = CpuSet(cpu for cpu in range(cpus) if pick.random() < 0.5) if pick.random() < 0.3 else CpuSet()
    root = pick.choice([None, f"pci{node}", f"pci{node}"])
    bridges = (f"{root}-{pick.randint(0, 1)}",) if root and pick.random() < 0.7 else ()
    kind = pick.choice(["gpu", "gpu", "nic"])
    return Device(kind=kind, id=f"{kind}{number}", numa_node=node, local_cpus=local, pcie_root=root, bridges=bridges)


def random_parts(pick: random.Random, devices: list[Device]) -> list[Device]:
    """Some are a part of an earlier one, some share a device node."""
    if pick.random() < 0.5:
        return devices
    nodes = ("/dev/x", "/dev/y")
    return [
        replace(
            one,
            parent=pick.choice(devices[:number]).id if number and pick.random() < 0.3 else None,
            paths=tuple(node for node in nodes if pick.random() < 0.25),
        )
        for number, one in enumerate(devices)
    ]


def random_request(pick: random.Random, inventory: Inventory) -> Request:
    devices = {kind: pick.randint(1, 2) for kind in ("gpu", "nic") if pick.random() < 0.4}
    pages = {size: pick.randint(1, 4) for size in (MIB2, GIB) if pick.random() < 0.4}
    near = [one.id for one in inventory.devices if pick.random() < 0.1]
    names = [(opt.FULL_PCPUS,), (opt.SPREAD_CORES,), ("prefer-isolated-cpus",), ("require-isolated-cpus",)]
    options = set(pick.choice([(), (), (), *names]))
    numa = pick.choice([BEST_EFFORT, BEST_EFFORT, RESTRICTED, SINGLE])
    if numa == SINGLE and pick.random() < 0.3:
        options.add(opt.ALIGN_SOCKET)
    return Request(
        cpus=pick.choice([0, 1, 1, 2, 2, 3, 4]),
        hugepages=MappingProxyType(pages),
        memory_bytes=pick.choice([0, 0, 1, 5]) * GIB,
        devices=MappingProxyType(devices),
        near=tuple(near),
        near_nodes=tuple(node.id for node in inventory.numa_nodes if pick.random() < 0.1),
        options=frozenset(options),
        numa=numa,
    )


def ledger_of(cpus: list[int], devices: list[str]) -> Ledger:
    holder = Holder(api="claim", uid="other")
    return Ledger(grants={"one": Grant(id="one", holder=holder, cpus=CpuSet(cpus), devices=tuple(devices))})


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**32))
@example(0)
def test_a_joint_placement_costs_what_the_best_of_all_costs(seed: int) -> None:
    pick = random.Random(seed)
    inventory = random_machine(pick)
    request = random_request(pick, inventory)
    held = [cpu.id for cpu in inventory.cpus if pick.random() < 0.2]
    gone = [one.id for one in inventory.devices if pick.random() < 0.1]
    check_against_all(inventory, request, held, gone)


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**32))
def test_a_joint_placement_that_is_distributed_costs_what_the_best_of_all_costs(seed: int) -> None:
    pick = random.Random(seed)
    inventory = random_machine(pick)
    options = pick.choice([(opt.SPREAD_CORES,), (opt.SPREAD_NUMA,), (opt.SPREAD_NUMA, opt.FULL_PCPUS), SPREADS])
    request = replace(
        random_request(pick, inventory), options=frozenset(options), cpus=pick.randint(1, len(inventory.cpus))
    )
    odds = pick.choice([0, 0.3])
    check_against_all(inventory, request, [cpu.id for cpu in inventory.cpus if pick.random() < odds], [])


def check_against_all(inventory: Inventory, request: Request, held: list[int], gone: list[str]) -> None:
    """The placement of a request that is not for CPUs alone costs what the best of all costs."""
    if not (request.hugepages or request.memory_bytes or request.devices or request.near or request.near_nodes):
        return
    expected = Oracle(inventory, held, gone, request).best()
    try:
        placement = place(inventory, ledger_of(held, gone), request)
    except Refused as refused:
        assert expected is None, f"refused ({refused}) what fits for {expected}"
        return
    assert expected is not None
    shown = (*expected[: OWN.start], *expected[OWN.stop : -1])
    assert placement.cost == PlacementCost(*shown)
    assert placement.exact
    check_whole(inventory, request, held, gone, placement)


def check_whole(inventory: Inventory, request: Request, held: list[int], gone: list[str], placement: object) -> None:
    """Everything asked for is there, and nothing that is held."""
    cpus, pages, memory, devices, *_ = placement  # type: ignore[misc]
    assert len(cpus) == request.cpus
    assert cpus.isdisjoint(CpuSet(held))
    assert not set(devices) & set(gone)
    kinds = [inventory.device_by_id[one].kind for one in devices]
    assert {kind: kinds.count(kind) for kind in kinds} == dict(request.devices)
    assert sum(size for _, size in memory) == request.memory_bytes
    for size, count in request.hugepages.items():
        assert sum(one.pages for one in pages if one.page_bytes == size) == count
    pools = {(p.node, p.page_bytes): p.free_pages for node in inventory.numa_nodes for p in node.hugepages}
    assert all(one.pages <= pools[one.node, one.page_bytes] for one in pages)
