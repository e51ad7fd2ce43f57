"""One reading of what is used: CPU time of each CPU and of pods, frequencies, memory and pages of NUMA nodes.

What cannot be read, or is not there, is None. Sources: proc(5) on /proc/stat and /proc/uptime,
Documentation/admin-guide/cgroup-v2.rst (cpu.stat, hugetlb), Documentation/ABI/stable/sysfs-devices-node,
Documentation/admin-guide/pm/cpufreq.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from nodeagent.core.model.topology import NodeId
from nodeagent.errors import HostError
from nodeagent.host.cgroup.layout import CONTAINER, POD, Cgroup
from nodeagent.host.cgroup.read import V2, CgroupPart, CgroupReader, CgroupState, find, hierarchy, page_sizes
from nodeagent.host.hugepages.pools import read as read_pools
from nodeagent.host.sysfs.sysfs import SysFs

IDLE_FIELDS = (3, 4)
"""idle and iowait, among the numbers of a line of /proc/stat."""
OWN_FIELDS = 8
"""user to steal: time of guests is in user and nice already."""
PARTS = CgroupPart.CPU_TIME | CgroupPart.HUGETLB_USE


class CpuTime(msgspec.Struct, frozen=True):
    """Time of one CPU since boot, in the kernel's ticks."""

    busy: int
    total: int


class NodeMemory(msgspec.Struct, frozen=True):
    """Memory and hugepages of one NUMA node."""

    total_bytes: int | None
    free_bytes: int | None
    pages: Mapping[int, tuple[int, int]]
    """By page_bytes: all and free ones."""


class Sample(msgspec.Struct, frozen=True):
    """One reading."""

    at_s: float
    """Since boot."""
    cpus: Mapping[int, CpuTime]
    khz: Mapping[int, int]
    nodes: Mapping[NodeId, NodeMemory]
    pods: Mapping[str, CgroupState]
    """By UID."""
    containers: Mapping[str, CgroupState]
    """By container id."""


def read(sysfs: SysFs, nodes: Iterable[NodeId], cgroup_root: str = "/") -> Sample:
    """Read everything once. Raise HostError if /proc shows no time."""
    cgroups = dict(_states(sysfs, cgroup_root))
    cpus = dict(_cpu_times(sysfs))
    return Sample(
        at_s=_uptime_s(sysfs),
        cpus=cpus,
        khz=dict(_frequencies(sysfs, cpus)),
        nodes=_memory(sysfs, list(nodes)),
        pods={one.pod_uid: state for one, state in cgroups.items() if one.kind == POD},
        containers={one.container_id: state for one, state in cgroups.items() if one.kind == CONTAINER},
    )


def _uptime_s(sysfs: SysFs) -> float:
    text = sysfs.text("proc/uptime")
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        raise HostError(f"cannot read {sysfs.path('proc/uptime')}: {text[:80]!r} begins with no number") from None


def _cpu_times(sysfs: SysFs) -> Iterator[tuple[int, CpuTime]]:
    for line in sysfs.text("proc/stat").splitlines():
        name, *words = line.split() or [""]
        if not name.startswith("cpu") or name == "cpu":
            continue
        if not name[3:].isdigit() or not all(word.isdigit() for word in words) or len(words) <= max(IDLE_FIELDS):
            raise HostError(f"cannot read {sysfs.path('proc/stat')}: {line[:80]!r} is no line of a CPU")
        ticks = [int(word) for word in words[:OWN_FIELDS]]
        idle = sum(ticks[one] for one in IDLE_FIELDS)
        yield int(name[3:]), CpuTime(busy=sum(ticks) - idle, total=sum(ticks))


def _frequencies(sysfs: SysFs, cpus: Iterable[int]) -> Iterator[tuple[int, int]]:
    for cpu in cpus:
        try:
            khz = sysfs.number(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq")
        except HostError:
            continue  # some drivers refuse while a CPU sleeps
        if khz is not None:
            yield cpu, khz


def _memory(sysfs: SysFs, nodes: list[NodeId]) -> dict[NodeId, NodeMemory]:
    pools = read_pools(sysfs, nodes, [])
    found = {}
    for node in nodes:
        sizes = dict(meminfo(sysfs, node))
        pages = {one.page_bytes: (one.total_pages, one.free_pages) for one in pools.get(node, ())}
        found[node] = NodeMemory(sizes.get("MemTotal"), sizes.get("MemFree"), pages)
    return found


def meminfo(sysfs: SysFs, node: NodeId) -> Iterator[tuple[str, int]]:
    """Yield the sizes of a node's meminfo in bytes: "Node 0 MemFree: 123 kB"."""
    for line in sysfs.text(f"sys/devices/system/node/node{node}/meminfo", "").splitlines():
        words = line.split()
        if len(words) == 5 and words[3].isdigit() and words[4] == "kB":
            yield words[2].rstrip(":"), int(words[3]) << 10


def _states(sysfs: SysFs, cgroup_root: str) -> Iterator[tuple[Cgroup, CgroupState]]:
    found = hierarchy(sysfs)
    if found.mode != V2:
        return
    reader = CgroupReader(found.mount, page_sizes(sysfs))
    for one in find(found.mount, cgroup_root):
        if (state := reader.read(one.path, PARTS)) is not None:
            yield one, state
