"""On which CPUs to measure, and which memory from there. Pure.

CPUs that another pod holds are never measured on, be it by the agent's grants, by those of other plugins, or by
kubelet's own CPU manager.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import NodeId
from nodeagent.errors import InputError

MOST_CPUS = 8
"""So many threads read at once; more of them seldom read more."""
MIB = 1 << 20
LEAST_BYTES, MOST_BYTES = 64 * MIB, 256 * MIB
CACHES = 4
"""The memory that is read is so many times as large as the largest cache."""
Documents = Sequence[Mapping[str, Any]]
"""Grants, as the page /v1/grants has them."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    whose: str
    """The pod, or "" for free CPUs."""
    cpus: CpuSet
    local: CpuSet
    """The NUMA nodes that the grant, or a good placement, uses."""
    nodes: tuple[NodeId, ...]
    """All nodes with memory to measure."""
    skipped: Mapping[NodeId, str]
    """Why others are left out."""
    bytes_per_node: int


def held_by_others(grants: Documents, by_kubelet: CpuSet, pod: str) -> CpuSet:
    """Return the CPUs that anybody but a pod (NAMESPACE/NAME, or "") holds."""
    others = (CpuSet.parse(str(one["cpus"])) for one in grants if not pod or _pod(one) != pod)
    own = union(CpuSet.parse(str(one["cpus"])) for one in grants if pod and _pod(one) == pod)
    return union(others) | (by_kubelet - own)


def _pod(grant: Mapping[str, Any]) -> str:
    return f"{grant['namespace']}/{grant['pod']}"


def plan(inventory: Inventory, grants: Documents, others: CpuSet, reserved: CpuSet, pod: str = "") -> Plan:
    """Return what to measure for a pod, or for a placement on free CPUs. Raise InputError if the pod holds
    no CPUs of its own, or if no CPU is free."""
    cpus = _of_pod(grants, pod) - others & inventory.cpus_online if pod else _free(inventory, others | reserved)
    if not cpus:
        whose = f"pod {pod} holds no CPUs of its own" if pod else "no CPU is free that is neither held nor reserved"
        raise InputError(f"cannot measure: {whose}")
    measured, skipped = _nodes(inventory)
    return Plan(
        whose=pod,
        cpus=CpuSet(sorted(cpus)[:MOST_CPUS]),
        local=_local(inventory, grants, cpus, pod),
        nodes=measured,
        skipped=skipped,
        bytes_per_node=_size(inventory),
    )


def _of_pod(grants: Documents, pod: str) -> CpuSet:
    return union(CpuSet.parse(str(one["cpus"])) for one in grants if _pod(one) == pod)


def _free(inventory: Inventory, taken: CpuSet) -> CpuSet:
    """Return the free CPUs of the NUMA node that has most of them."""
    free = inventory.cpus_usable - taken
    by_node = [CpuSet(one.id for one in inventory.cpus if one.numa_node == node.id) for node in inventory.numa_nodes]
    return max((cpus & free for cpus in by_node), key=len, default=EMPTY)


def _nodes(inventory: Inventory) -> tuple[tuple[NodeId, ...], Mapping[NodeId, str]]:
    skipped: dict[NodeId, str] = {}
    for node in inventory.numa_nodes:
        if not node.memory_bytes:
            skipped[node.id] = "it has no memory"
        elif not node.serves():
            skipped[node.id] = f"its memory is of kind {node.kind}"
    return tuple(one.id for one in inventory.numa_nodes if one.id not in skipped), skipped


def _local(inventory: Inventory, grants: Documents, cpus: CpuSet, pod: str) -> CpuSet:
    mine = [one for one in grants if pod and _pod(one) == pod]
    bound = {part["numa_node"] for one in mine for part in (*one["hugepages"], *one["memory"])}
    return CpuSet(bound or {one.numa_node for one in inventory.cpus if one.id in cpus})


def _size(inventory: Inventory) -> int:
    largest = max((one.size_bytes or 0 for one in inventory.caches), default=0)
    wanted = min(max(CACHES * largest, LEAST_BYTES), MOST_BYTES)
    return wanted // MIB * MIB


def jittered(late_ns: Iterable[int]) -> tuple[int, int, int]:
    """Return the median, the 99th percentile and the maximum of late wake-ups that are in order."""
    every = list(late_ns)
    return every[len(every) // 2], every[min(len(every) - 1, len(every) * 99 // 100)], every[-1]
