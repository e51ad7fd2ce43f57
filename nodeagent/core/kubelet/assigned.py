"""What kubelet's own managers gave to the containers of its pods, as disjoint sets. Pure.

Containers of one pod may have the same CPUs: those of an init container are reused by later ones, and a pod may have
exclusive CPUs that several of its containers share. CPUs that the same containers have are one set, under all their
names: of an init container with 1-4, of which one container has 1-2 and another 3-4, there are two sets, and neither of
the two containers has the other's CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import NodeId


class MemoryBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Memory or hugepages that kubelet assigned on one or more NUMA nodes; it does not report how much on each node."""

    nodes: tuple[NodeId, ...]
    page_bytes: int
    """core.ledger.free.MEMORY if not in hugepages."""
    size_bytes: int

    def __str__(self) -> str:
        what = "memory" if self.page_bytes == MEMORY else f"{format_size(self.page_bytes)} pages"
        return f"{self.size_bytes} bytes of {what} on NUMA node {','.join(str(node) for node in self.nodes)}"


class Assigned(msgspec.Struct, frozen=True, kw_only=True):
    """What kubelet assigned to one or more containers of a pod; without containers, to the pod as a whole."""

    uid: str
    """UID of the pod."""
    containers: tuple[str, ...] = ()
    """Sorted by name."""
    cpus: CpuSet = EMPTY
    blocks: tuple[MemoryBlock, ...] = ()

    @property
    def container(self) -> str:
        """Return the names of the containers, separated by commas."""
        return ",".join(self.containers)

    @property
    def id(self) -> str:
        """Return the id of the grant."""
        return f"k-{self.uid}-{self.container}" if self.containers else f"k-{self.uid}"

    @property
    def bytes_by_size(self) -> Mapping[int, int]:
        """Return the bytes by page_bytes."""
        found: dict[int, int] = {}
        for block in self.blocks:
            if block.size_bytes:
                found[block.page_bytes] = found.get(block.page_bytes, 0) + block.size_bytes
        return found


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of kubelet's two state files.

    What a manager does not mention is significant only if that manager is on.
    """

    assigned: tuple[Assigned, ...] = ()
    unnamed: tuple[Assigned, ...] = ()
    """Assignments to containers of which only the container id is known, and not the pod."""
    cpus: bool = False
    """Whether the CPU manager is on."""
    memory: bool = False
    """Whether the memory manager is on."""


def assigned(
    cpus: Mapping[tuple[str, str], CpuSet],
    pod_cpus: Mapping[str, CpuSet],
    blocks: Mapping[tuple[str, str], tuple[MemoryBlock, ...]],
    pod_blocks: Mapping[str, tuple[MemoryBlock, ...]],
) -> tuple[Assigned, ...]:
    """Combine kubelet's two states, in order of pod and container.

    cpus, blocks: by (pod UID, container). pod_cpus, pod_blocks: of whole pods, by pod UID.
    """
    found: dict[tuple[str, tuple[str, ...]], Assigned] = {}
    for uid in {uid for uid, _ in cpus} | pod_cpus.keys():
        mine = {name: some for (pod, name), some in cpus.items() if pod == uid}
        for names, some in _apart(mine, pod_cpus.get(uid, EMPTY)).items():
            found[uid, names] = Assigned(uid=uid, containers=names, cpus=some)
    for uid in {uid for uid, _ in blocks} | pod_blocks.keys():
        own = {name: several for (pod, name), several in blocks.items() if pod == uid}
        for names, several in _memory_of(own, pod_blocks.get(uid)).items():
            one = found.get((uid, names)) or Assigned(uid=uid, containers=names)
            found[uid, names] = replace(one, blocks=several)
    return tuple(found[key] for key in sorted(found) if found[key].cpus or found[key].blocks)


def _apart(mine: Mapping[str, CpuSet], whole: CpuSet) -> dict[tuple[str, ...], CpuSet]:
    """Return the CPUs of one pod as disjoint sets, each under the containers that have all of it.

    whole: the CPUs of the pod as a whole, some of which may belong to no container.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for cpu in union((whole, *mine.values())):
        names = tuple(sorted(name for name, cpus in mine.items() if cpu in cpus))
        sets.setdefault(names, []).append(cpu)
    return {names: CpuSet(cpus) for names, cpus in sets.items()}


def _memory_of(
    own: Mapping[str, tuple[MemoryBlock, ...]], whole: tuple[MemoryBlock, ...] | None
) -> dict[tuple[str, ...], tuple[MemoryBlock, ...]]:
    """Return memory by the containers that have it; pod-level memory belongs to all containers of the pod."""
    if whole is not None:
        return {tuple(sorted(own)): whole}
    return {(name,): several for name, several in own.items()}
