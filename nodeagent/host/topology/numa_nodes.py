"""NUMA nodes: their CPUs, memory, distances and hugepages, and the kind of memory of each.

Any ids, nodes without CPUs and nodes without memory are normal. A machine without node folders (s390, Arm, kernels
without NUMA) is one node 0 with all online CPUs and the memory of /proc/meminfo.
Source: Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.topology import NodeId, NumaNode
from nodeagent.host.hugepages import pools as hugepages
from nodeagent.host.sysfs.lists import ListReader
from nodeagent.host.topology import memory_kinds as memorykinds

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"


def read(reader: ListReader, online: CpuSet) -> tuple[NumaNode, ...]:
    """Return all nodes in order of id. Every online CPU is on at most one of them."""
    ids = reader.numbered(_NODE, "node")
    cpus = _cpus(reader, ids, online) if ids else {0: online}
    memory_bytes = {node: _total(reader, f"{_NODE}/node{node}/meminfo" if ids else "proc/meminfo") for node in cpus}
    kinds = memorykinds.kinds(reader, cpus, memory_bytes)
    pools = hugepages.read(reader.sysfs, list(cpus), reader.warnings)
    order = _order(reader, ids)
    return tuple(
        NumaNode(
            id=node,
            cpus=cpus[node],
            memory_bytes=memory_bytes[node],
            kind=kinds[node],
            distances=_distances(reader, node, ids, order),
            hugepages=pools[node],
        )
        for node in cpus
    )


# ---------------------------------------------------------------- memory


def _total(reader: ListReader, path: str) -> int:
    """Return the bytes of memory, or 0 if the file cannot be read."""
    return reader.need(path, _read_total) or 0


def _read_total(text: str) -> int:
    found = re.search(r"\bMemTotal:\s*(\d{1,15}) kB", text)
    if found is None:
        raise ValueError("expected a line MemTotal: N kB")
    return int(found[1]) << 10


# ---------------------------------------------------------------- CPUs of nodes


def _cpus(reader: ListReader, ids: Sequence[NodeId], online: CpuSet) -> dict[NodeId, CpuSet]:
    """Return the online CPUs of each node. If lists overlap or are bad, the link in the CPU's folder decides."""
    claims = dict.fromkeys(ids, EMPTY)
    disputed = EMPTY
    for node in ids:
        path, cpus = _claim(reader, node)
        others = union(claims.values()) & cpus
        if others:
            reader.refuse(path, str(cpus), f"has CPUs {others} of another node")
        claims[node] = cpus & online
        disputed |= others & online
    return _settled(reader, claims, disputed, online)


def _claim(reader: ListReader, node: NodeId) -> tuple[str, CpuSet]:
    """Return the file with the node's own CPU list, and its CPUs."""
    for name in ("cpulist", "cpumap"):
        path = f"{_NODE}/node{node}/{name}"
        cpus = reader.cpus(path)
        if cpus is not None:
            return path, cpus
    return "", EMPTY


def _settled(
    reader: ListReader, claims: Mapping[NodeId, CpuSet], disputed: CpuSet, online: CpuSet
) -> dict[NodeId, CpuSet]:
    sure = {node: cpus - disputed for node, cpus in claims.items()}
    for cpu in disputed | (online - union(claims.values())):
        home = _home(reader, cpu, claims)
        if home is not None:
            sure[home] |= CpuSet((cpu,))
    homeless = online - union(sure.values())
    if homeless:
        reader.warnings.append(f"cannot place CPUs {homeless}: no node of {reader.sysfs.path(_NODE)} lists them")
    return sure


def _home(reader: ListReader, cpu: int, claims: Mapping[NodeId, CpuSet]) -> NodeId | None:
    """Return the node to which the kernel assigns the CPU; without that, the lowest node that lists it, or None."""
    for node in reader.numbered(f"{_CPU}/cpu{cpu}", "node"):
        if node in claims:
            return node
    return next((node for node, cpus in claims.items() if cpu in cpus), None)


# ---------------------------------------------------------------- distances


def _order(reader: ListReader, ids: Sequence[NodeId]) -> list[NodeId]:
    """Return the nodes in the columns of a distance row: the online ones, some of which a partial capture may lack."""
    listed = reader.cpus(f"{_NODE}/online")
    return list(listed) if listed else list(ids)


def _distances(
    reader: ListReader, node: NodeId, ids: Sequence[NodeId], order: Sequence[NodeId]
) -> Mapping[NodeId, int]:
    path = f"{_NODE}/node{node}/distance"
    row = reader.given(path, _row)
    if row is None:
        return MappingProxyType({})
    columns = next((nodes for nodes in (order, ids) if len(nodes) == len(row)), None)
    if columns is None:
        reader.refuse(path, " ".join(map(str, row)), f"has {len(row)} distances for {len(order)} nodes")
        return MappingProxyType({})
    return MappingProxyType({to: distance for to, distance in zip(columns, row, strict=True) if to in ids})


def _row(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,5}( +\d{1,5})*", text, re.ASCII):
        raise ValueError("expected distances")
    return [int(one) for one in text.split()]
