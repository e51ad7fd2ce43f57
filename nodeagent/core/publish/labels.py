"""Labels of the Node about its machine, for node selectors and node affinity.

They say what the machine has and what can be granted on it, never what is free: a label that changed with each grant
would be a write to the API server each time, and outdated when it is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size

LONGEST_VALUE = 63
MIB = 1 << 20
GPU = "gpu"
COUNTED = ("accel", "fpga", GPU, "nic", "nvme", "qat")
"""Kinds whose devices are counted: those that a machine is bought for, and that seldom change."""


def labels(inventory: Inventory, reserved: CpuSet, domain: str) -> Mapping[str, str]:
    """Return the labels of a machine, each name with its prefix. reserved: CPUs that are never granted. domain: what
    comes before the slash."""
    found = {**dict(_topology(inventory, reserved)), **dict(_pages(inventory)), **dict(_devices(inventory))}
    return {f"{domain}/{name}": value for name, value in sorted(found.items())}


def _topology(inventory: Inventory, reserved: CpuSet) -> Iterator[tuple[str, str]]:
    cpus = inventory.cpus
    yield "cpu.count", str(len(cpus))
    yield "cpu.cores", str(len({one.core for one in cpus}))
    yield "cpu.sockets", str(len({one.package for one in cpus}))
    yield "cpu.exclusive", str(len(inventory.cpus_usable - reserved))
    yield "numa.count", str(len(inventory.numa_nodes))
    if groups := {one.l3 for one in cpus} - {None}:
        yield "l3.count", str(len(groups))


def _pages(inventory: Inventory) -> Iterator[tuple[str, str]]:
    """Yield the pages of each size of which the machine has some."""
    pages: Counter[int] = Counter()
    for node in inventory.numa_nodes:
        for pool in node.hugepages:
            pages[pool.page_bytes] += pool.persistent_pages
    yield from ((f"hugepages-{format_size(size)}.count", str(count)) for size, count in pages.items() if count)


def _devices(inventory: Inventory) -> Iterator[tuple[str, str]]:
    """Yield how many whole devices there are of some kinds, and what all GPUs have in common."""
    whole = [one for one in inventory.devices if one.parent is None and one.kind in COUNTED and not one.members]
    yield from ((f"{kind}.count", str(count)) for kind, count in Counter(one.kind for one in whole).items())
    gpus = [one for one in whole if one.kind == GPU]
    if product := _common(gpus, "product"):
        yield "gpu.product", _value(product)
    memory = _common(gpus, "memory_bytes")
    if memory.isdigit():
        yield "gpu.memory", str(int(memory) // MIB)


def _common(devices: list[Device], attribute: str) -> str:
    """Return an attribute that all devices have with the same value, or ""."""
    values = {str(one.attributes.get(attribute) or "") for one in devices}
    return values.pop() if len(values) == 1 else ""


def _value(text: str) -> str:
    """Return a text as the value of a label (apimachinery, util/validation: IsValidLabelValue)."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:LONGEST_VALUE].strip("-_.")
