"""Builds the /sys and /proc of a machine from a few words, with the files a kernel would write.

    root = machine(tmp_path, "2s4n128c-smt")                       # 2 packages, 4 NUMA nodes, 128 cores, 256 CPUs
    root = machine(tmp_path, "1s1n6c-offline3", isolated="4-5")
    root = build(tmp_path, Shape(packages=2, cores_per_l3=8, node_ids=(0, 8)))

A shape is even; what makes a machine uneven (kinds, offline CPUs, nodes without CPUs, odd ids) is said alongside it.
CPUs are numbered as on most servers: first one thread of every core, then the second threads; `adjacent` puts siblings
together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nodeagent.core.model.cpuset import CpuSet, union
from tests.builders.tree_writer import TreeWriter

MIB = 1 << 20
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Core:
    """One core as it was laid out; all numbers count over the whole machine."""

    index: int
    package: int
    node: int
    l3: int
    cpus: CpuSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A machine. Sequences "per core" repeat from their start where they are shorter than the machine."""

    packages: int = 1
    nodes_per_package: int = 1
    l3_per_node: int = 1
    cores_per_l3: int = 4
    threads: int = 1
    adjacent: bool = False
    core_threads: Sequence[int] = ()
    """Threads per core where cores differ; overrides `threads` and numbers siblings side by side."""
    cores_per_l2: int = 1
    cluster_cores: int = 0
    """Cores per cluster; 0: the kernel knows no clusters."""
    offline: str = ""
    isolated: str = ""
    nohz_full: str = ""
    possible: str = ""
    """More than is present, for hotplug."""
    node_ids: Sequence[int] = ()
    """Ids of the nodes with CPUs; 0, 1, 2, … where not given."""
    memory_only_nodes: Sequence[int] = ()
    memory: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Bytes per node; 16 GiB where not given."""
    distances: Sequence[Sequence[int]] = ()
    """Rows in order of node id; 10 within a node and 20 beyond where not given."""
    hugepages: Mapping[tuple[int, int], tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    """(node, page bytes) -> (total, free, surplus)."""
    reserved: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """page bytes -> reserved pages of the machine."""
    capacities: Sequence[int] = ()
    """cpu_capacity per core."""
    base_khz: Sequence[int] = ()
    max_khz: Sequence[int] = ()
    pmus: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """"cpu_core" -> "0-11"."""
    bandwidth: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """MB/s per node, as ACPI HMAT gives it."""
    tiers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Memory tier -> nodes."""
    gpu_nodes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """PCI address of an NVIDIA GPU -> node of its memory."""
    dax: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    """DAX device -> (its folder below sys/devices, target node)."""

    def ids_with_cpus(self) -> Sequence[int]:
        return self.node_ids or range(self.packages * self.nodes_per_package)

    def nodes(self) -> list[int]:
        return sorted({*self.ids_with_cpus(), *self.memory_only_nodes})

    def cores(self) -> list[Core]:
        per_node = self.l3_per_node * self.cores_per_l3
        count = self.packages * self.nodes_per_package * per_node
        threads = self._threads(count)
        return [
            Core(
                index=core,
                package=core // (per_node * self.nodes_per_package),
                node=self.ids_with_cpus()[core // per_node],
                l3=core // self.cores_per_l3,
                cpus=CpuSet(threads[core]),
            )
            for core in range(count)
        ]

    def _threads(self, count: int) -> list[Sequence[int]]:
        """The CPU numbers of each core."""
        if not self.core_threads and not self.adjacent:
            return [range(core, self.threads * count, count) for core in range(count)]
        widths = _repeated(self.core_threads or (self.threads,), count)
        starts = [sum(widths[:core]) for core in range(count)]
        return [range(start, start + width) for start, width in zip(starts, widths, strict=True)]


def machine(root: Path, name: str, **more: object) -> Path:
    """Build a machine from its name, and what else its Shape says."""
    return build(root, dataclasses.replace(named(name), **more))  # type: ignore[arg-type]


def named(name: str) -> Shape:
    """`2s4n128c-smt`: packages, NUMA nodes and cores of the whole machine, two threads each; offline CPUs as a list."""
    match = re.fullmatch(r"(\d+)s(\d+)n(\d+)c(?:-smt(\d*))?(?:-offline([\d,-]+))?", name)
    if match is None:
        raise ValueError(f"cannot build machine {name!r}: expected a name such as 2s4n128c-smt or 1s1n6c-offline3")
    packages, nodes, cores = (int(match[part]) for part in (1, 2, 3))
    if nodes % packages or cores % nodes:
        raise ValueError(f"cannot build machine {name!r}: it is not even")
    smt = match[4]
    return Shape(
        packages=packages,
        nodes_per_package=nodes // packages,
        cores_per_l3=cores // nodes,
        threads=1 if smt is None else int(smt or 2),
        offline=match[5] or "",
    )


def build(root: Path, shape: Shape) -> Path:
    """Write the machine below `root`; returns `root`."""
    tree = _Tree(root)
    cores = shape.cores()
    present = union(core.cpus for core in cores)
    online = present - CpuSet.parse(shape.offline)
    _write_lists(tree, shape, present, online)
    for core in cores:
        for cpu in core.cpus:
            tree.write(f"{_CPU}/cpu{cpu}/online", str(int(cpu in online)))
        for cpu in core.cpus & online:
            _write_topology(tree, shape, cores, core, cpu, online)
            _write_caches(tree, shape, cores, core, cpu, online)
            _write_speed(tree, shape, core, cpu)
    _write_nodes(tree, shape, cores, online)
    _write_memory_kinds(tree, shape)
    return root


class _Tree(TreeWriter):
    """Writes lists of CPUs in both of the kernel's forms, too."""

    def members(self, folder: str, name: str, mask_name: str, cpus: CpuSet, cpu_count: int) -> None:
        """A list file and the mask file next to it."""
        self.write(f"{folder}/{name}", str(cpus))
        self.write(f"{folder}/{mask_name}", _mask(cpus, cpu_count))


_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_CACHES = ((1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"), (3, "Unified", "32768K"))


def _write_lists(tree: _Tree, shape: Shape, present: CpuSet, online: CpuSet) -> None:
    possible = CpuSet.parse(shape.possible) | present
    lists = {
        "possible": str(possible),
        "present": str(present),
        "online": str(online),
        "offline": str(possible - online),
        "isolated": shape.isolated,
        "nohz_full": shape.nohz_full,
    }
    for name, text in lists.items():
        tree.write(f"{_CPU}/{name}", text)
    tree.write("proc/cpuinfo", "\n\n".join(f"processor\t: {cpu}\nmodel name\t: Built" for cpu in online))


def _write_topology(tree: _Tree, shape: Shape, cores: Sequence[Core], core: Core, cpu: int, online: CpuSet) -> None:
    folder = f"{_CPU}/cpu{cpu}/topology"
    per_package = len(cores) // shape.packages
    package = _cpus_of(cores[core.package * per_package : (core.package + 1) * per_package]) & online
    groups = {"package_cpus": package, "core_siblings": package, "die_cpus": package}
    groups |= {"core_cpus": core.cpus & online, "thread_siblings": core.cpus & online}
    numbers = {"physical_package_id": core.package, "die_id": 0, "core_id": core.index % per_package}
    if shape.cluster_cores:
        groups["cluster_cpus"] = _cpus_of(_block(cores, core.index, shape.cluster_cores)) & online
        numbers["cluster_id"] = core.index // shape.cluster_cores
    for name, cpus in groups.items():
        tree.members(folder, f"{name}_list", name, cpus, _width(cores))
    for name, number in numbers.items():
        tree.write(f"{folder}/{name}", str(number))


def _write_caches(tree: _Tree, shape: Shape, cores: Sequence[Core], core: Core, cpu: int, online: CpuSet) -> None:
    widths = {1: 1, 2: shape.cores_per_l2, 3: shape.cores_per_l3}
    for index, (level, kind, size) in enumerate(_CACHES):
        folder = f"{_CPU}/cpu{cpu}/cache/index{index}"
        members = _cpus_of(_block(cores, core.index, widths[level])) & online
        for name, text in (("level", str(level)), ("type", kind), ("size", size)):
            tree.write(f"{folder}/{name}", text)
        tree.members(folder, "shared_cpu_list", "shared_cpu_map", members, _width(cores))


def _write_speed(tree: _Tree, shape: Shape, core: Core, cpu: int) -> None:
    files = {
        "cpu_capacity": shape.capacities,
        "cpufreq/base_frequency": shape.base_khz,
        "cpufreq/cpuinfo_max_freq": shape.max_khz,
    }
    for name, per_core in files.items():
        if per_core:
            tree.write(f"{_CPU}/cpu{cpu}/{name}", str(per_core[core.index % len(per_core)]))


def _write_nodes(tree: _Tree, shape: Shape, cores: Sequence[Core], online: CpuSet) -> None:
    ids = shape.nodes()
    for row, node in enumerate(ids):
        folder = f"{_NODE}/node{node}"
        cpus = _cpus_of(core for core in cores if core.node == node) & online
        tree.members(folder, "cpulist", "cpumap", cpus, _width(cores))
        distances = shape.distances[row] if shape.distances else [10 if node == other else 20 for other in ids]
        tree.write(f"{folder}/distance", " ".join(map(str, distances)))
        tree.write(f"{folder}/meminfo", _meminfo(shape.memory.get(node, 16 * GIB), f"Node {node} "))
        for cpu in cpus:
            tree.link(f"{folder}/cpu{cpu}", f"../../cpu/cpu{cpu}")
            tree.link(f"{_CPU}/cpu{cpu}/node{node}", f"../../node/node{node}")
    tree.write(f"{_NODE}/online", str(CpuSet(ids)))
    tree.write("proc/meminfo", _meminfo(sum(shape.memory.get(node, 16 * GIB) for node in ids), ""))
    _write_hugepages(tree, shape)


def _write_hugepages(tree: _Tree, shape: Shape) -> None:
    """A size that any node has exists on every node."""
    sizes = sorted({page_bytes for _, page_bytes in shape.hugepages} | {2 * MIB})
    for size in sizes:
        name = f"hugepages-{size >> 10}kB"
        pools = {node: shape.hugepages.get((node, size), (0, 0, 0)) for node in shape.nodes()}
        for node, counts in pools.items():
            _write_pool(tree, f"{_NODE}/node{node}/hugepages/{name}", counts)
        folder = f"sys/kernel/mm/hugepages/{name}"
        _write_pool(tree, folder, tuple(map(sum, zip(*pools.values(), strict=True))))
        tree.write(f"{folder}/resv_hugepages", str(shape.reserved.get(size, 0)))
        tree.write(f"{folder}/nr_overcommit_hugepages", "0")


def _write_pool(tree: _Tree, folder: str, counts: Iterable[int]) -> None:
    for what, count in zip(("nr", "free", "surplus"), counts, strict=True):
        tree.write(f"{folder}/{what}_hugepages", str(count))


def _write_memory_kinds(tree: _Tree, shape: Shape) -> None:
    for pmu, cpus in shape.pmus.items():
        tree.write(f"sys/devices/{pmu}/cpus", cpus)
    for node, bandwidth in shape.bandwidth.items():
        tree.write(f"{_NODE}/node{node}/access0/initiators/read_bandwidth", str(bandwidth))
    for tier, nodes in shape.tiers.items():
        tree.write(f"sys/devices/virtual/memory_tiering/memory_tier{tier}/nodelist", nodes)
    for address, node in shape.gpu_nodes.items():
        tree.write(f"proc/driver/nvidia/gpus/{address}/numa_status", f"Node: {node}\nStatus: online")
    for name, (folder, node) in shape.dax.items():
        tree.write(f"sys/devices/{folder}/{name}/target_node", str(node))
        tree.link(f"sys/bus/dax/devices/{name}", f"../../../devices/{folder}/{name}")


def _meminfo(total_bytes: int, prefix: str) -> str:
    lines = {"MemTotal": total_bytes >> 10, "MemFree": total_bytes >> 11}
    if not prefix:
        lines["MemAvailable"] = lines["MemFree"]
    return "\n".join(f"{prefix}{name}:{kib:>16} kB" for name, kib in lines.items())


def _cpus_of(cores: Iterable[Core]) -> CpuSet:
    return union(core.cpus for core in cores)


def _block(cores: Sequence[Core], index: int, width: int) -> Sequence[Core]:
    """The aligned run of `width` cores that holds one core."""
    start = index - index % width
    return cores[start : start + width]


def _width(cores: Sequence[Core]) -> int:
    return sum(len(core.cpus) for core in cores)


def _mask(cpus: CpuSet, width: int) -> str:
    """The kernel's %*pb: words of 32 bits, as many as the machine needs."""
    words = max(1, (width + 31) // 32)
    digits = f"{cpus.mask:0{words * 8}x}"
    return ",".join(digits[at : at + 8] for at in range(0, len(digits), 8))


def _repeated(values: Sequence[int], count: int) -> list[int]:
    return [values[at % len(values)] for at in range(count)]
