"""The compiled search for joint placements answers as the plain search does, placement for placement and refusal for
refusal."""

from __future__ import annotations

import random
import sys

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, Pages, Request
from nodeagent.core.placement.place import place
from nodeagent.errors import NodeagentError
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of
from tests.oracles.search.place import place as plain_place
from tests.support.long_form import share_of
from tests.unit.core.test_joint import MIB2, SPREADS, random_machine, random_parts, random_request

STATES = share_of(20_000, 0.2)
BATCHES = 20


def answer(ask: object, inventory: Inventory, ledger: Ledger, request: Request) -> object:
    """Return the placement, or the refusal with its numbers and the change that would admit the request."""
    try:
        return ask(inventory, ledger, request)  # type: ignore[operator]
    except NodeagentError as error:
        return type(error), str(error), getattr(error, "free", None), getattr(error, "would_admit", None)


def check(inventory: Inventory, ledger: Ledger, request: Request) -> None:
    found, expected = (answer(ask, inventory, ledger, request) for ask in (place, plain_place))
    assert found == expected, request


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_states_are_answered_as_the_plain_search_answers_them(batch: int) -> None:
    """20,000 in the long form (NODEAGENT_LONG=1)."""
    for number in range(STATES // BATCHES):
        pick = random.Random(batch * 1_000_003 + number)
        inventory = pick.choice([random_machine, random_machine, larger_machine])(pick)
        check(inventory, random_ledger(pick, inventory), any_request(pick, inventory))


def larger_machine(pick: random.Random) -> Inventory:
    """Up to 16 nodes in up to 4 packages, with up to 24 devices of three kinds and pages on some nodes."""
    packages, nodes, groups = pick.choice([1, 2, 4]), pick.randint(1, 4), pick.randint(1, 2)
    rows = even_rows(packages, nodes, groups, pick.randint(1, 3), pick.choice([1, 2]))
    more = [300] if pick.random() < 0.2 else []
    every = [*range(packages * nodes), *more]
    cpus = len(rows)
    pages = {(node, size): pick.choice([0, 0, 1, 2, 5]) for node in every for size in (MIB2, GIB)}
    devices = [random_device(pick, number, every, cpus) for number in range(pick.randint(0, 24))]
    if pick.random() < 0.5:
        devices = random_parts(pick, devices)
    return inventory_of(
        rows,
        distances=even_distances(packages, nodes) if not more else None,
        more_nodes=more,
        pages=pages,
        memory={node: pick.choice([0, 1, 4]) * GIB for node in every},
        devices=devices,
        isolated=[cpu for cpu in range(cpus) if pick.random() < 0.1],
    )


def random_device(pick: random.Random, number: int, nodes: list[int], cpus: int) -> Device:
    """Devices of one node are alike, or differ by what is local to them; some are on a node that does not exist."""
    node = pick.choice([*nodes, *nodes, None, 77 if pick.random() < 0.1 else None])
    local = CpuSet(cpu for cpu in range(cpus) if pick.random() < 0.5) if pick.random() < 0.1 else CpuSet()
    shared = (f"iommu-group:{pick.randint(0, 5)}",) if pick.random() < 0.1 else None
    kind = pick.choice(["gpu", "nic", "nvme"])
    return Device(
        kind=kind,
        id=f"{kind}{number}",
        numa_node=node,
        local_cpus=local,
        exclusive=shared,
        pcie_root=pick.choice([None, f"pci{node}"]),
    )


def random_ledger(pick: random.Random, inventory: Inventory) -> Ledger:
    """Some CPUs, pages, memory and devices are held, some CPUs reserved."""
    odds = pick.choice([0, 0.1, 0.4])
    cpus = CpuSet(cpu.id for cpu in inventory.cpus if pick.random() < odds)
    pools = [pool for node in inventory.numa_nodes for pool in node.hugepages if pick.random() < odds]
    grant = Grant(
        id="one",
        holder=Holder(api="claim", uid="other"),
        cpus=cpus,
        hugepages=tuple(Pages(node=pool.node, page_bytes=pool.page_bytes, pages=pick.randint(1, 3)) for pool in pools),
        memory=tuple((node.id, pick.choice([1, 2]) * GIB) for node in inventory.numa_nodes if pick.random() < odds),
        devices=tuple(one.id for one in inventory.devices if pick.random() < odds / 3),
    )
    reserved = CpuSet(cpu.id for cpu in inventory.cpus if pick.random() < 0.05) - cpus
    return Ledger(grants={"one": grant}, reserved=reserved)


def any_request(pick: random.Random, inventory: Inventory) -> Request:
    """A request that is not for CPUs alone, sometimes with what kubelet adds: CPUs and devices that must or may be
    given."""
    request = random_request(pick, inventory)
    if pick.random() < 0.2:
        options = pick.choice([(opt.SPREAD_NUMA,), SPREADS, (opt.REQUIRE_L3,), (opt.SPREAD_NUMA, opt.FULL_PCPUS)])
        request = replace(request, options=frozenset(options))
    if pick.random() < 0.2:
        request = replace(request, devices={kind: pick.randint(0, 5) for kind in ("gpu", "nic", "nvme", "fpga")})
    if pick.random() < 0.2:
        request = replace(request, cpus=pick.randint(0, len(inventory.cpus)))
    if pick.random() < 0.2:
        request = replace(request, near_cpus=CpuSet(one.id for one in inventory.cpus if pick.random() < 0.2))
    if pick.random() < 0.2:
        request = with_limits(pick, inventory, request)
    alone = not (request.hugepages or request.memory_bytes or request.devices)
    return replace(request, memory_bytes=GIB) if alone else request


def with_limits(pick: random.Random, inventory: Inventory, request: Request) -> Request:
    must = [one.id for one in inventory.cpus if pick.random() < 0.2][: request.cpus]
    ids = [one.id for one in inventory.devices]
    return replace(
        request,
        must_cpus=CpuSet(must),
        within_cpus=pick.choice([None, CpuSet(one.id for one in inventory.cpus if pick.random() < 0.8)]),
        must_devices=frozenset(one for one in ids if pick.random() < 0.1),
        within_devices=pick.choice([None, frozenset(one for one in ids if pick.random() < 0.8)]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_that_is_cut_short_is_the_same_too(seed: int) -> None:
    """More sets of nodes and of devices than are searched: the best one seen is marked as such, and is the same."""
    pick = random.Random(seed)
    pages = {(node, GIB): 1 + node % 3 for node in range(40)}
    devices = [
        Device(kind=kind, id=f"{kind}{group}", numa_node=group % 40, exclusive=(f"iommu-group:{group}",))
        for group in range(12)
        for kind in ("gpu", "nic")
    ]
    inventory = inventory_of(
        even_rows(4, 10, 1, 1, 2), distances=even_distances(4, 10), pages=pages, devices=devices if seed % 2 else ()
    )
    for cpus in (0, 3, 30):
        request = Request(
            cpus=cpus,
            hugepages={GIB: pick.randint(12, 40)},
            devices={"gpu": 4, "nic": 4} if seed % 2 else {},
            numa=pick.choice([BEST_EFFORT, RESTRICTED]),
        )
        check(inventory, Ledger(), request)
    assert not place(inventory, Ledger(), Request(cpus=3, hugepages={GIB: 38})).exact


def test_a_decision_takes_as_many_steps_of_python_on_a_large_machine_as_on_a_small_one() -> None:
    """All that is searched, is searched in the compiled core; an inventory is laid out for it once."""
    request = Request(cpus=2, hugepages={GIB: 3}, devices={"gpu": 2, "nic": 1}, numa=RESTRICTED)
    counts = [calls_of(machine_with_devices(nodes), request) for nodes in (2, 16)]
    assert counts[0] == counts[1] < 60


def machine_with_devices(nodes: int) -> Inventory:
    """A page of 1 GiB, a whole adapter with two parts and two GPUs on each node: pages of three nodes are needed."""
    devices = [Device(kind="gpu", id=f"gpu{one}", numa_node=one % nodes) for one in range(2 * nodes)]
    for one in range(nodes):
        devices.append(Device(kind="nic", id=f"nic{one}", numa_node=one))
        devices += [Device(kind="nic", id=f"vf{one}-{n}", numa_node=one, parent=f"nic{one}") for n in range(2)]
    pages = {(node, GIB): 2 for node in range(nodes)}
    return inventory_of(even_rows(2, nodes // 2, 1, 2, 1), pages=pages, devices=devices)


def calls_of(inventory: Inventory, request: Request) -> int:
    """How many Python functions run in a decision, once the inventory is laid out."""
    count = 0

    def seen(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    place(inventory, Ledger(), request)
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        place(inventory, Ledger(), request)
    finally:
        sys.setprofile(before)
    return count
