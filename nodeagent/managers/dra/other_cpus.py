"""Which CPUs other DRA drivers hand out, as far as their ResourceSlices and their sockets show it.

Such a driver publishes each CPU as a device with its number (`cpuID`), or a group of them, of which it chooses when a
claim is prepared, with their count (`numCPUs`): then any CPU of the group's NUMA node may be meant, and where it names
none, any of the machine. Source: kubernetes-sigs/dra-driver-cpu, pkg/device/attributes.go and builder.go, whose driver
is `dra.cpu`; the names are looked at without their domain, so that a driver under another name is recognized too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory

CPU_DRIVERS = ("dra.cpu",)
"""Drivers that hand out CPUs whatever their devices say."""
REGISTRY = "plugins_registry"
"""Below kubelet's folder: sockets of drivers, called DRIVER-reg.sock or DRIVER-UID-reg.sock
(k8s.io/dynamic-resource-allocation/kubeletplugin)."""
_CPU, _COUNT = "cpuid", "numcpus"
_NODES = ("numanodeid", "numanode")


class OfferedCpus(NamedTuple):
    """What one device of another driver may mean: one CPU, any of a NUMA node, or with neither any of the machine."""

    cpu: int | None = None
    node: int | None = None


def offered_cpus(driver: str, devices: Iterable[Mapping[str, Any]]) -> Iterator[OfferedCpus]:
    """Yield what those devices of a driver mean that hand out CPUs, of ResourceSlices as the API server has them."""
    for device in devices:
        numbers = dict(_numbers(device.get("attributes") or {}))
        if driver in CPU_DRIVERS or _CPU in numbers or _COUNT in numbers:
            node = next((numbers[one] for one in _NODES if one in numbers), None)
            yield OfferedCpus(numbers[_CPU]) if _CPU in numbers else OfferedCpus(node=node)


def cpus_of(offered: Iterable[OfferedCpus], inventory: Inventory) -> CpuSet:
    """Return the online CPUs that may be handed out."""
    some = frozenset(offered)
    if OfferedCpus() in some:
        return inventory.cpus_online
    numbers, nodes = {one.cpu for one in some}, {one.node for one in some} - {None}
    return CpuSet(one.id for one in inventory.cpus if one.id in numbers or one.numa_node in nodes)


def registered_cpu_drivers(kubelet_dir: Path) -> list[str]:
    """Return the drivers that hand out CPUs and have a socket in kubelet's registry; none if it cannot be read.

    Blocks."""
    try:
        names = [one.name for one in (kubelet_dir / REGISTRY).iterdir()]
    except OSError:
        return []
    return [driver for driver in CPU_DRIVERS if any(name.startswith(f"{driver}-") for name in names)]


def _numbers(attributes: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in attributes.items():
        number = value.get("int") if isinstance(value, Mapping) else None
        if isinstance(number, int) and not isinstance(number, bool):
            yield name.rpartition("/")[2].lower(), number
