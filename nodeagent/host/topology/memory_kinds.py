"""The kind of memory of a NUMA node, decided in this order:

1. no memory: "none";
2. no CPUs, and the NVIDIA driver lists the node as a GPU's memory (/proc/driver/nvidia/gpus/*/numa_status): "gpu";
3. no CPUs, and a DAX device onlined it as memory: below an NVDIMM bus "pmem", below a CXL region "cxl";
4. the firmware's bandwidth to the nearest CPUs (ACPI HMAT, access1 then access0): twice that of the slowest node with
   CPUs or more is "hbm"; half of it or less, without CPUs, is "cxl";
5. no CPUs: a faster memory tier than that of all nodes with CPUs is "hbm", a slower one "cxl";
6. no CPUs, and set apart by the kernel or the firmware: "special". It has no normal memory (has_normal_memory), as if
   onlined by a driver that may take it away, or any other DAX device onlined it (memory that the firmware reserved);
7. otherwise "dram".

Only "dram" serves requests that name no kind (NumaNode.serves).
Sources: Documentation/admin-guide/mm/numaperf.rst, Documentation/ABI/testing/sysfs-kernel-mm-memory-tiers,
Documentation/ABI/stable/sysfs-devices-node, Documentation/admin-guide/mm/memory-hotplug.rst (ZONE_MOVABLE),
drivers/dax/kmem.c, kernel-open/nvidia/nv-procfs.c of the NVIDIA driver.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.topology import CXL, DRAM, GPU, HBM, PMEM, SPECIAL, NodeId
from nodeagent.host.sysfs.lists import ListReader

_GPUS = "proc/driver/nvidia/gpus"
_DAX = "sys/bus/dax/devices"
_NODE = "sys/devices/system/node"
_TIERS = "sys/devices/virtual/memory_tiering"


class _Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine reports about its nodes, by node."""

    gpu: frozenset[NodeId]
    dax: Mapping[NodeId, str]
    bandwidth: Mapping[NodeId, int]
    """MB/s."""
    tier: Mapping[NodeId, int]
    """Lower is faster."""
    abnormal: frozenset[NodeId]
    """Nodes that the kernel's list of nodes with normal memory lacks."""


def kinds(
    reader: ListReader, cpus: Mapping[NodeId, CpuSet], memory_bytes: Mapping[NodeId, int]
) -> Mapping[NodeId, str]:
    """Return the kind of each node; `cpus` and `memory_bytes` have the same keys."""
    with_cpus = [node for node in cpus if cpus[node]]
    found = _Evidence(
        gpu=_gpu_nodes(reader),
        dax=_dax(reader),
        bandwidth=_bandwidth(reader, cpus),
        tier=_tiers(reader),
        abnormal=_abnormal(reader, cpus),
    )
    return {node: _kind(node, found, with_cpus) if memory_bytes[node] else "none" for node in cpus}


def _kind(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str:
    by_speed = _by_bandwidth(node, found, with_cpus)
    if node in with_cpus:
        return by_speed or DRAM
    if node in found.gpu:
        return GPU
    by_origin = found.dax.get(node, SPECIAL if node in found.abnormal else DRAM)
    if by_origin in (PMEM, CXL):
        return by_origin
    return by_speed or _by_tier(node, found, with_cpus) or by_origin


def _by_bandwidth(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str | None:
    """Return HBM or CXL, or None if the bandwidth is unknown or that of ordinary memory."""
    ordinary = min((found.bandwidth[one] for one in with_cpus if one in found.bandwidth), default=None)
    if ordinary is None or node not in found.bandwidth:
        return None
    if found.bandwidth[node] >= 2 * ordinary:
        return HBM
    return CXL if node not in with_cpus and 2 * found.bandwidth[node] <= ordinary else None


def _by_tier(node: NodeId, found: _Evidence, with_cpus: list[NodeId]) -> str | None:
    """Return HBM or CXL for a node without CPUs, or None if its tier is unknown or that of ordinary memory."""
    ordinary = [found.tier[one] for one in with_cpus if one in found.tier]
    if node not in found.tier or not ordinary:
        return None
    if found.tier[node] < min(ordinary):
        return HBM
    return CXL if found.tier[node] > max(ordinary) else None


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
    """Return the kind of memory of the nodes whose memory comes from DAX devices.

    Memory that the firmware reserved (hmem) can be of any kind. A device with a driver other than kmem is not used as
    memory of the system.
    """
    found: dict[NodeId, str] = {}
    for name in reader.names(_DAX):
        path = f"{_DAX}/{name}"
        node = reader.number(f"{path}/target_node")
        if node is not None and reader.link_name(f"{path}/driver") in (None, "kmem"):
            kind = _dax_kind(reader.sysfs.real(path))
            found[node] = kind if kind != SPECIAL else found.get(node, kind)
    return found


def _dax_kind(path: str) -> str:
    if "/ndbus" in path:
        return PMEM
    return CXL if "/ACPI0017" in path or "/cxl" in path else SPECIAL


def _abnormal(reader: ListReader, nodes: Mapping[NodeId, CpuSet]) -> frozenset[NodeId]:
    """Return the nodes that the kernel does not list among those with normal memory; none if it lists none at all."""
    normal = reader.given(f"{_NODE}/has_normal_memory", CpuSet.parse)
    return frozenset(node for node in nodes if node not in normal) if normal else frozenset()


def _bandwidth(reader: ListReader, nodes: Mapping[NodeId, CpuSet]) -> dict[NodeId, int]:
    """Return the read bandwidth from the nearest CPUs (access1); access0 also counts other initiators such as GPUs."""
    found: dict[NodeId, int] = {}
    for node in nodes:
        for access in ("access1", "access0"):
            number = reader.number(f"{_NODE}/node{node}/{access}/initiators/read_bandwidth")
            if number is not None and number > 0:
                found.setdefault(node, number)
    return found


def _tiers(reader: ListReader) -> dict[NodeId, int]:
    found: dict[NodeId, int] = {}
    for tier in reader.numbered(_TIERS, "memory_tier"):
        found.update(dict.fromkeys(reader.cpus(f"{_TIERS}/memory_tier{tier}/nodelist") or (), tier))
    return found
