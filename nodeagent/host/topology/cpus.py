"""The CPUs of the machine: which exist, what they share, where they are. With caches and NUMA nodes: the topology.

Packages, dies, clusters and cores come from the kernel's sibling lists, read once for all members of a list. core_id
repeats in every package, and on some machines in every die, cluster or NUMA node. It is used only for CPUs without
sibling lists, and then never joins CPUs of different dies, clusters, NUMA nodes or first-level caches. One bad file
never affects another: its item is left out, and `Inventory.warnings` names file and value.
Source: Documentation/admin-guide/cputopology.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import NO_NODE, CacheGroup, Cpu, NumaNode
from nodeagent.host.sysfs.lists import ListReader
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import caches
from nodeagent.host.topology import cpu_kinds as cpukinds
from nodeagent.host.topology import numa_nodes as memory

_CPU = "sys/devices/system/cpu"
_NO_SUCH_LEVEL = (-1, 65535)
"""die_id and cluster_id if the platform has none; x86 stores -1 in 16 bits."""


class _Levels(msgspec.Struct, frozen=True, kw_only=True):
    """Each level as disjoint groups of online CPUs."""

    packages: Sequence[CpuSet]
    dies: Sequence[CpuSet]
    clusters: Sequence[CpuSet]
    cores: Sequence[CpuSet]
    guessed: CpuSet
    """CPUs whose core follows from ids, because no sibling list names them."""


def read(sysfs: SysFs) -> Inventory:
    """Return CPUs, caches, NUMA nodes and hugepages as an inventory without devices. Faulty or missing files raise
    nothing. CPUs that are only possible (empty sockets, hotplug slots) do not count as offline."""
    warnings: list[str] = []
    reader = ListReader(sysfs, warnings)
    online = _online(reader)
    present = _listed(reader, "present") or CpuSet(reader.numbered(_CPU, "cpu")) or online
    isolated = _listed(reader, "isolated") or EMPTY
    nodes = memory.read(reader, online)
    levels = _levels(reader, online, _index(node.cpus for node in nodes if node.cpus))
    groups = caches.read(reader, online, levels.cores)
    levels = replace(levels, cores=_apart_by_cache(levels, groups))
    return Inventory(
        cpus=_cpus(reader, online, isolated, levels, groups, nodes),
        cpus_possible=(_listed(reader, "possible") or present) | online,
        cpus_online=online,
        cpus_offline=present - online,
        cpus_isolated=isolated,
        cpus_nohz_full=_listed(reader, "nohz_full") or EMPTY,
        numa_nodes=nodes,
        caches=groups,
        warnings=tuple(warnings),
    )


def _cpus(
    reader: ListReader,
    online: CpuSet,
    isolated: CpuSet,
    levels: _Levels,
    groups: Iterable[CacheGroup],
    nodes: Iterable[NumaNode],
) -> tuple[Cpu, ...]:
    package, die, core = _index(levels.packages), _index(levels.dies), _index(levels.cores)
    cluster = _index(levels.clusters)
    l2, l3 = ({cpu: group.index for group in groups if group.level == level for cpu in group.cpus} for level in (2, 3))
    node_of = {cpu: node.id for node in nodes for cpu in node.cpus}
    speeds = cpukinds.speeds(reader, levels.cores)
    kinds = cpukinds.kinds(reader, online, speeds)
    return tuple(
        Cpu(
            id=cpu,
            package=package[cpu],
            die=die[cpu],
            cluster=cluster.get(cpu),
            core=core[cpu],
            numa_node=node_of.get(cpu, NO_NODE),
            l2=l2.get(cpu),
            l3=l3.get(cpu),
            kind=kinds.get(cpu, ""),
            isolated=cpu in isolated,
            capacity=speeds[cpu].capacity,
            base_khz=speeds[cpu].base_khz,
            max_khz=speeds[cpu].max_khz,
        )
        for cpu in online
    )


def _index(groups: Iterable[CpuSet]) -> Mapping[int, int]:
    """Return the index of each CPU's group, counted by lowest member."""
    return {cpu: index for index, group in enumerate(sorted(groups, key=CpuSet.first)) for cpu in group}


# ---------------------------------------------------------------- which CPUs there are


def _listed(reader: ListReader, name: str) -> CpuSet | None:
    """Return one of the lists next to the CPU folders, or None if it is missing or malformed."""
    return reader.given(f"{_CPU}/{name}", _list)


def _list(text: str) -> CpuSet:
    return EMPTY if text == "(null)" else CpuSet.parse(text)  # how some kernels print an unset nohz_full


def _online(reader: ListReader) -> CpuSet:
    """Return the online list; if it is bad (or before 2.6.26), the CPU folders; without those, /proc/cpuinfo."""
    listed = _listed(reader, "online")
    if listed:
        return listed
    if listed is not None:
        reader.refuse(f"{_CPU}/online", "", "names no CPU")
    numbers = reader.numbered(_CPU, "cpu")
    # A CPU that cannot be taken offline has no file "online".
    online = CpuSet(cpu for cpu in numbers if reader.number(f"{_CPU}/cpu{cpu}/online", 1) == 1)
    return online or reader.need("proc/cpuinfo", _processors) or EMPTY


def _processors(text: str) -> CpuSet:
    """Return the CPUs in lines "processor : 3" (on s390 "processor 3: version = ...")."""
    found = CpuSet(int(number) for number in re.findall(r"^processor\s*:?\s*(\d{1,5})\b", text, re.MULTILINE))
    if not found:
        raise ValueError("no processor line")
    return found


# ---------------------------------------------------------------- what CPUs share


def _levels(reader: ListReader, online: CpuSet, node_of: Mapping[int, int]) -> _Levels:
    """Return the levels. node_of: a number per NUMA node by CPU; CPUs without a node are left out."""
    packages = _packages(reader, online)
    has_dies, has_clusters = (_has_level(reader, online, name) for name in ("die", "cluster"))
    cores = [_cores(reader, package, node_of) for package in packages]
    return _Levels(
        packages=packages,
        dies=[die for package in packages for die in _dies(reader, package)] if has_dies else packages,
        clusters=[one for package in packages for one in _clusters(reader, package)] if has_clusters else [],
        cores=[core for of_package, _ in cores for core in of_package],
        guessed=union(guessed for _, guessed in cores),
    )


def _has_level(reader: ListReader, online: CpuSet, name: str) -> bool:
    """Return whether the kernel and the platform have a level: its id and its lists are there for all CPUs or for none,
    and the id says that a platform lacks it."""
    there = any(one.startswith(name) for one in _topology_files(reader, online))
    return there and reader.number(f"{_CPU}/cpu{online.first()}/topology/{name}_id") not in _NO_SUCH_LEVEL


def _topology_files(reader: ListReader, cpus: CpuSet) -> set[str]:
    """Return the names of the files that the first and the last of some CPUs have."""
    ends = (cpus.first(), cpus.last())
    return {name for cpu in ends for name in reader.names(f"{_CPU}/cpu{cpu}/topology")}


def _packages(reader: ListReader, online: CpuSet) -> list[CpuSet]:
    files = ("package_cpus_list", "core_siblings_list", "package_cpus", "core_siblings")
    groups, left = _siblings(reader, online, files)
    by_id = _same_ids(reader, left, ("drawer_id", "book_id", "physical_package_id"))
    return groups + [CpuSet(cpus) for cpus in by_id.values()]


def _dies(reader: ListReader, package: CpuSet) -> list[CpuSet]:
    """Return the dies of a package. CPUs in no die list are grouped by die_id; those without one form one die."""
    groups, left = _siblings(reader, package, ("die_cpus_list", "die_cpus"))
    return groups + [CpuSet(cpus) for cpus in _same_ids(reader, left, ("die_id",)).values()]


def _clusters(reader: ListReader, package: CpuSet) -> list[CpuSet]:
    groups, _ = _siblings(reader, package, ("cluster_cpus_list", "cluster_cpus"))
    return groups


def _cores(reader: ListReader, package: CpuSet, node_of: Mapping[int, int]) -> tuple[list[CpuSet], CpuSet]:
    """Return the cores, and the CPUs that no sibling list names.

    Such CPUs are one core if their ids are equal at every level and they are on the same NUMA node; a CPU without
    core_id is its own core.
    """
    files = ("core_cpus_list", "thread_siblings_list", "core_cpus", "thread_siblings")
    groups, left = _siblings(reader, package, files)
    by_id = _same_ids(reader, left, ("die_id", "cluster_id", "core_id"))
    known = [CpuSet(cpus) for ids, cpus in by_id.items() if ids[-1] is not None]
    alone = [CpuSet((cpu,)) for ids, cpus in by_id.items() if ids[-1] is None for cpu in cpus]
    return groups + [part for core in known for part in _apart(core, node_of)] + alone, left


def _apart_by_cache(levels: _Levels, groups: Iterable[CacheGroup]) -> list[CpuSet]:
    """Return the cores with those that follow from ids divided by first-level cache: the threads of a core share it."""
    of_cache = {cpu: group.index for group in groups if group.level == 1 for cpu in group.cpus}
    return [part for core in levels.cores for part in (_apart(core, of_cache) if core <= levels.guessed else [core])]


def _apart(cpus: CpuSet, group_of: Mapping[int, int]) -> list[CpuSet]:
    """Return the CPUs divided by group; those without a group stay together."""
    parts: dict[int | None, list[int]] = {}
    for cpu in cpus:
        parts.setdefault(group_of.get(cpu), []).append(cpu)
    return [CpuSet(part) for part in parts.values()]


def _siblings(reader: ListReader, cpus: CpuSet, files: Sequence[str]) -> tuple[list[CpuSet], CpuSet]:
    """Return disjoint groups of the CPUs that any list names, and the CPUs that none names."""
    groups, left = [], cpus
    there = _topology_files(reader, cpus)
    some = [one for one in files if one in there] if there else files
    for cpu in cpus if some else ():
        path, members = _members(reader, cpu, some) if cpu in left else ("", EMPTY)
        if members & cpus - left:
            reader.refuse(path, str(members), f"names CPUs {members & cpus - left} that share with others")
        if members:
            groups.append(members & left)
            left = left - members
    return groups, left


def _members(reader: ListReader, cpu: int, files: Sequence[str]) -> tuple[str, CpuSet]:
    """Return the first valid file and its members; empty if none is valid."""
    for name in files:
        path = f"{_CPU}/cpu{cpu}/topology/{name}"
        members = reader.cpus(path)
        if members is not None:
            if cpu in members:
                return path, members
            reader.refuse(path, str(members), f"does not name CPU {cpu}")
    return "", EMPTY


def _same_ids(reader: ListReader, cpus: CpuSet, names: Sequence[str]) -> dict[tuple[int | None, ...], list[int]]:
    """Return CPUs by the ids in those files of their folder; None for what is missing, bad or -1."""
    groups: dict[tuple[int | None, ...], list[int]] = {}
    for cpu in cpus:
        numbers = (reader.number(f"{_CPU}/cpu{cpu}/topology/{name}") for name in names)
        ids = tuple(None if number is None or number < 0 else number for number in numbers)
        groups.setdefault(ids, []).append(cpu)
    return groups
