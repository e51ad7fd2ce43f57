"""What two readings say of the time between them: use by grant and by NUMA node. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from nodeagent.cli.agent.top.sample import CpuTime, Sample
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import NodeId
from nodeagent.host.cgroup.read import CgroupState

IDLE_BELOW = 0.05
"""CPUs that are held and busy for less of the time are noted."""
NONE: Mapping[str, str] = {}


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What one holder has, of all its grants."""

    holder: str
    pod_uids: tuple[str, ...] = ()
    container: str = ""
    """Id of its container; "" if it is not known, or if several have it."""
    cpus: CpuSet
    pages: Mapping[int, int]
    """Number of pages by page_bytes."""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What a holder used. Shares are of the time between the readings; None if it is not known."""

    holder: str
    cpus: CpuSet
    nodes: CpuSet
    busy: float | None
    """Share of the time of its CPUs in which anything ran on them."""
    cpus_used: float | None
    """CPUs that its own processes used on average."""
    throttled: float | None
    """Share of the time in which its processes were throttled."""
    mhz: int | None
    """Mean over its CPUs."""
    pages_used: Mapping[int, tuple[int | None, int]]
    """By page_bytes: used and held."""

    @property
    def idles(self) -> bool:
        """Return whether it holds CPUs on which next to nothing ran."""
        return bool(self.cpus) and self.busy is not None and self.busy < IDLE_BELOW


class NodeUse(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of a NUMA node."""

    node: NodeId
    cpus: CpuSet
    busy: float | None
    used_bytes: int | None
    total_bytes: int | None
    pages: Mapping[int, tuple[int, int]]
    """By page_bytes: used and all."""


def uses(held: Iterable[Held], inventory: Inventory, before: Sample, after: Sample) -> Iterator[Use]:
    """Yield what each holder used between two readings."""
    nodes = {cpu.id: cpu.numa_node for cpu in inventory.cpus}
    for one in held:
        was, is_ = _group(one, before), _group(one, after)
        took_s = after.at_s - before.at_s
        yield Use(
            holder=one.holder,
            cpus=one.cpus,
            nodes=CpuSet(node for cpu in one.cpus if (node := nodes.get(cpu)) is not None),
            busy=busy(one.cpus, before.cpus, after.cpus),
            cpus_used=_rate(was, is_, "used_us", took_s),
            throttled=_rate(was, is_, "throttled_us", took_s),
            mhz=_mean_mhz(one.cpus, after.khz),
            pages_used={size: (_pages(is_, size), count) for size, count in sorted(one.pages.items())},
        )


def node_uses(inventory: Inventory, before: Sample, after: Sample) -> Iterator[NodeUse]:
    """Yield what was used of each NUMA node."""
    for node in inventory.numa_nodes:
        cpus = CpuSet(cpu.id for cpu in inventory.cpus if cpu.numa_node == node.id)
        memory = after.nodes[node.id]
        known = memory.total_bytes is not None and memory.free_bytes is not None
        yield NodeUse(
            node=node.id,
            cpus=cpus,
            busy=busy(cpus, before.cpus, after.cpus),
            used_bytes=(memory.total_bytes or 0) - (memory.free_bytes or 0) if known else None,
            total_bytes=memory.total_bytes,
            pages={size: (total - free, total) for size, (total, free) in sorted(memory.pages.items()) if total},
        )


def busy(cpus: Iterable[int], before: Mapping[int, CpuTime], after: Mapping[int, CpuTime]) -> float | None:
    """Return the share of the time of some CPUs in which they were busy, or None if no time has passed on them. A CPU
    that went offline meanwhile is left out; counters that went backwards count as no time (proc(5) on iowait)."""
    there = [one for one in cpus if one in before and one in after]
    total = sum(max(0, after[one].total - before[one].total) for one in there)
    used = sum(max(0, after[one].busy - before[one].busy) for one in there)
    return min(1.0, used / total) if total else None


def _group(one: Held, sample: Sample) -> list[CgroupState]:
    if one.container and one.container in sample.containers:
        return [sample.containers[one.container]]
    return [sample.pods[uid] for uid in one.pod_uids if uid in sample.pods]


def _rate(before: list[CgroupState], after: list[CgroupState], field: str, took_s: float) -> float | None:
    """Return how fast a counter in microseconds rose, in seconds per second, over cgroups that both readings have."""
    was = {one.path: getattr(one, field) for one in before}
    risen = [
        max(0, getattr(one, field) - was[one.path])
        for one in after
        if was.get(one.path) is not None and getattr(one, field) is not None
    ]
    return sum(risen) / 1e6 / took_s if risen and took_s > 0 else None


def _mean_mhz(cpus: CpuSet, khz: Mapping[int, int]) -> int | None:
    known = [khz[one] for one in cpus if one in khz]
    return round(sum(known) / len(known) / 1000) if known else None


def _pages(groups: list[CgroupState], page_bytes: int) -> int | None:
    sizes = [one.hugetlb[page_bytes].current_bytes for one in groups if one.hugetlb and page_bytes in one.hugetlb]
    known = [one for one in sizes if one is not None]
    return sum(known) // page_bytes if known else None
