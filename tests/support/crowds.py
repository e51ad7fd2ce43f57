"""Machines with pods on them, at random: what each holds was placed by the agent's own placement."""

from __future__ import annotations

import random

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.placement.place import find
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of


def random_server(pick: random.Random, *, most_gpus: int = 8, most_cores: int = 32) -> Inventory:
    """Two or four nodes, one or two threads a core, GPUs and pages of 1 GiB on the nodes."""
    (packages, nodes), threads = pick.choice([(1, 2), (2, 1), (2, 2)]), pick.choice([1, 2])
    groups = pick.choice([1, 2])
    cores = pick.randint(1, most_cores // (packages * nodes * groups * threads))
    every = packages * nodes
    gpus = [
        Device(kind="gpu", id=f"gpu{i}", numa_node=i % every, pcie_root=f"pci{i % every}", paths=(f"/dev/gpu{i}",))
        for i in range(pick.randint(0, most_gpus))
    ]
    pages = {(node, GIB): pick.randint(0, 3) for node in range(every)}
    rows = even_rows(packages, nodes, groups, cores, threads)
    return inventory_of(rows, distances=even_distances(packages, nodes), pages=pages, devices=gpus)


def random_ask(pick: random.Random, inventory: Inventory, *, most_cpus: int = 0) -> Request:
    """A request that the machine might admit if it were empty."""
    most = most_cpus or max(1, len(inventory.cpus) // 2)
    gpus = min(2, len(inventory.devices))
    return Request(
        cpus=pick.randint(1, most),
        devices={"gpu": pick.randint(1, gpus)} if gpus and pick.random() < 0.5 else {},
        hugepages={GIB: pick.randint(1, 2)} if pick.random() < 0.3 else {},
    )


def crowd(pick: random.Random, inventory: Inventory, most_pods: int) -> Ledger:
    """Pods that came until one did not fit, of which some have gone: what is free lies scattered."""
    ledger = Ledger(reserved=CpuSet([0] if pick.random() < 0.3 else []))
    for number in range(most_pods + pick.randint(0, most_pods)):
        request = random_ask(pick, inventory, most_cpus=max(1, len(inventory.cpus) // 3))
        placed = find(inventory, ledger, request)
        if placed is None:
            continue
        pod = f"pod{number}" if pick.random() < 0.9 or not number else f"pod{number - 1}"
        grant = Grant(
            id=f"g{number}",
            holder=Holder(api=DEVICE_PLUGIN, resource="r", namespace="ns", pod=pod, container=f"c{number}"),
            cpus=placed.cpus,
            hugepages=placed.hugepages,
            devices=placed.devices,
            things=things_of(inventory, placed.devices),
            granted_at=float(number),
            confirmed=True,
        )
        ledger = ledger_of.grant(ledger, grant)
    gone = sorted({one.holder.pod for one in ledger.grants.values()})
    pick.shuffle(gone)
    gone = gone[most_pods:] or gone[: pick.randint(0, 2)]
    return ledger_of.release(ledger, [one.id for one in ledger.grants.values() if one.holder.pod in gone])
