"""The kind of memory of a NUMA node, decided in this order:

1. no memory: "none";
2. the NVIDIA driver lists the node as a GPU's memory (/proc/driver/nvidia/gpus/*/numa_status): "gpu";
3. no CPUs, and a DAX device onlined it as memory: below an NVDIMM bus "pmem", below a CXL region "cxl";
4. the firmware's bandwidth to the nearest CPUs (ACPI HMAT, access1 then access0): twice that of the slowest node with
   CPUs or more is "hbm"; half of it or less, without CPUs, is "cxl";
5. no CPUs and no bandwidth: a faster memory tier than that of all nodes with CPUs is "hbm", a slower one "cxl";
6. otherwise "dram".

Sources: Documentation/admin-guide/mm/numaperf.rst, Documentation/ABI/testing/sysfs-kernel-mm-memory-tiers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.topology import NodeId
from nodeagent.host.sysfs.lists import ListReader

_GPUS = "proc/driver/nvidia/gpus"
_DAX = "sys/bus/dax/devices"
_TIERS = "sys/devices/virtual/memory_tiering"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    """What the machine reports about its nodes, by node."""

    gpu: frozenset[NodeId]
    dax: Mapping[NodeId, str]
    bandwidth: Mapping[NodeId, int]
    """MB/s."""
    tier: Mapping[NodeId, int]
    """Lower is faster."""


def kinds(
    reader: ListReader, cpus: Mapping[NodeId, CpuSet], memory_bytes: Mapping[NodeId, int]
) -> Mapping[NodeId, str]:
    """Return the kind of each node; `cpus` and `memory_bytes` have the same keys."""
    with_cpus = [node for node in cpus if cpus[node]]
    found = _Evidence(gpu=_gpu_nodes(reader), dax=_dax(reader), bandwidth=_bandwidth(reader, cpus), tier=_tiers(reader))
    return {node: _kind(node, found, with_cpus) if memory_bytes[node] else "none" for node in cpus}


def _kind(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str:
    if node in found.gpu:
        return "gpu"
    if node not in with_cpus and node in found.dax:
        return found.dax[node]
    by_speed = _by_bandwidth(node, found, with_cpus)
    return by_speed if by_speed is not None else _by_tier(node, found, with_cpus)


def _by_bandwidth(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str | None:
    ordinary = min((found.bandwidth[one] for one in with_cpus if one in found.bandwidth), default=None)
    if ordinary is None or node not in found.bandwidth:
        return None
    if found.bandwidth[node] >= 2 * ordinary:
        return "hbm"
    return "cxl" if node not in with_cpus and 2 * found.bandwidth[node] <= ordinary else "dram"


def _by_tier(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str:
    ordinary = [found.tier[one] for one in with_cpus if one in found.tier]
    if node in with_cpus or node not in found.tier or not ordinary:
        return "dram"
    if found.tier[node] < min(ordinary):
        return "hbm"
    return "cxl" if found.tier[node] > max(ordinary) else "dram"


def _gpu_nodes(reader: ListReader) -> frozenset[NodeId]:
    """Return the nodes with GPU memory. The file exists if the driver gives GPU memory to the
    kernel (Grace Hopper, POWER9)."""
    nodes = (reader.given(f"{_GPUS}/{name}/numa_status", _numa_status) for name in reader.names(_GPUS))
    return frozenset(node for node in nodes if node is not None)


def _numa_status(text: str) -> NodeId:
    match = re.search(r"^Node:\s*(-?\d{1,5})\s*$", text, re.MULTILINE)
    if match is None:
        raise ValueError("expected a line Node: N")
    return int(match[1])


def _dax(reader: ListReader) -> dict[NodeId, str]:
    """Return the nodes with persistent or CXL memory. Soft-reserved memory (hmem) can be of any kind."""
    found: dict[NodeId, str] = {}
    for name in reader.names(_DAX):
        path = f"{_DAX}/{name}"
        place = reader.sysfs.real(path)
        kind = "pmem" if "/ndbus" in place else "cxl" if "/ACPI0017" in place or "/cxl" in place else None
        node = reader.number(f"{path}/target_node") if kind else None
        if kind and node is not None:
            found[node] = kind
    return found


def _bandwidth(reader: ListReader, nodes: Mapping[NodeId, CpuSet]) -> dict[NodeId, int]:
    """Return the read bandwidth from the nearest CPUs (access1); access0 also counts other initiators such as GPUs."""
    found: dict[NodeId, int] = {}
    for node in nodes:
        for access in ("access1", "access0"):
            number = reader.number(f"sys/devices/system/node/node{node}/{access}/initiators/read_bandwidth")
            if number is not None and number > 0:
                found.setdefault(node, number)
    return found


def _tiers(reader: ListReader) -> dict[NodeId, int]:
    found: dict[NodeId, int] = {}
    for tier in reader.numbered(_TIERS, "memory_tier"):
        found.update(dict.fromkeys(reader.cpus(f"{_TIERS}/memory_tier{tier}/nodelist") or (), tier))
    return found
