"""The machine as read equals what hwloc found on 22 recorded machines, and what lscpu finds on this one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import cpus as topology
from tests.builders import tables
from tests.builders.tables import Answers

MACHINES = (
    "128arm-2pa2n8cluster4co",
    "128ia64-17n4s2c",
    "16amd64-4n4c-cgroup-distance-merge",
    "16amd64-8n2c-cpusets",
    "16em64t-4s2c2t-offlines",
    "20em64t-hybrid-1p6c2t+2ca4co1t",
    "20s390-2g6s4c",
    "256ppc-8n8s4t",
    "2arm-2c",
    "2pa-pcidomain32bits",
    "32intel64-2p8co2t+8ve",
    "40intel64-2g2n4c+pcilocality",
    "48amd64-4pa2n6c-sparse",
    "4fake-4gr1nu1pu",
    "64amd64-4s2n4ca2co",
    "64fake-4n2s2ca2c2t",
    "8em64t-2s2ca2c-buggynuma",
    "8ia64-2s2c2t",
    "96em64t-4no4pa3ca2co",
    "fakeheterocpunuma",
    "fakeheteromemtiers",
    "memorysidecaches",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differs:
    """What this program says where hwloc on purpose says something else, and why."""

    why: str
    online: str | None = None
    nodes: str | None = None
    node_cpus: Mapping[int, str] = dataclasses.field(default_factory=dict)
    cores: tuple[str, ...] | None = None
    kinds: Mapping[str, str] | None = None
    distances: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)


EXCEPTIONS = {
    "16amd64-4n4c-cgroup-distance-merge": Differs(
        why="hwloc shows only what its own cgroup may use; the machine is more", online="0-15", nodes="0-3"
    ),
    "16amd64-8n2c-cpusets": Differs(
        why="hwloc shows only what its own cgroup may use; the machine is more", online="0-3,5-15", nodes="0-7"
    ),
    "4fake-4gr1nu1pu": Differs(
        why="hwloc shows only what its own cgroup may use, and no cores where the kernel has no siblings",
        online="0-3",
        nodes="0-3",
        cores=("0", "1"),
    ),
    "64amd64-4s2n4ca2co": Differs(
        why="hwloc makes two cores of a Bulldozer module; the kernel calls them siblings, for they share one front end",
        cores=tuple(f"{cpu}-{cpu + 1}" for cpu in range(0, 64, 2)),
    ),
    "8ia64-2s2c2t": Differs(why="hwloc hides the distance 0 of the only node to itself", distances={0: {0: 0}}),
    "8em64t-2s2ca2c-buggynuma": Differs(
        why="each of 8 nodes lists all CPUs: hwloc drops all but one, the links cpuN/nodeM say where each CPU is",
        nodes="0-7",
        node_cpus={node: str(node) for node in range(8)},
        distances={node: dict.fromkeys(range(8), 10) for node in range(8)},
    ),
    "fakeheterocpunuma": Differs(
        why="hwloc drops the nodes 4 and 5 that overlap 3, spreads the CPU-less node 2 over its neighbours, and splits "
        "CPUs of one capacity by base frequency",
        nodes="0-5",
        node_cpus={0: "0-3", 1: "8-11", 2: "", 3: "20-23", 4: "16-19", 5: "12-15"},
        kinds={"0-11": "efficiency", "12-23": "performance"},
    ),
    "fakeheteromemtiers": Differs(
        why="hwloc gives memory without CPUs the CPUs that are near to it; the kernel gives it none",
        node_cpus={4: "", 6: "", 8: "", 9: ""},
    ),
}
NONE = Differs(why="")

MEMORY_KINDS = {
    "fakeheteromemtiers": {0: "dram", 1: "dram", 2: "hbm", 4: "hbm", 6: "pmem", 8: "pmem", 9: "pmem"},
}
WARNINGS = {
    "8em64t-2s2ca2c-buggynuma": [f"node{node}/cpulist: '0-7' has CPUs 0-7 of another node" for node in range(1, 8)],
    "fakeheterocpunuma": [
        "node4/cpumap: '16-23' has CPUs 20-23 of another node",
        "node5/cpumap: '12-23' has CPUs 16-23 of another node",
        "cannot place CPUs 4-7: no node",
    ],
}


@dataclasses.dataclass(frozen=True)
class Recorded:
    name: str
    root: Path
    found: Inventory
    reference: Answers
    differs: Differs

    @functools.cached_property
    def seen(self) -> CpuSet:
        """The CPUs that hwloc shows; comparisons of groups are cut to them."""
        return CpuSet.parse(self.reference.online)


@pytest.fixture(scope="session")
def machines(recorded_tree: Callable[[str], Path]) -> Callable[[str], Recorded]:
    @functools.cache
    def read(name: str) -> Recorded:
        root, answers = recorded_tree(name), tables.load(name).hwloc
        assert answers is not None
        return Recorded(name, root, topology.read(SysFs(root)), answers, EXCEPTIONS.get(name, NONE))

    return read


@pytest.fixture(params=MACHINES)
def recorded(request: pytest.FixtureRequest, machines: Callable[[str], Recorded]) -> Recorded:
    return machines(request.param)


def partition(cpus: Mapping[int, object], within: Iterable[int]) -> set[str]:
    """The sets of CPUs that have one value; a CPU whose value is None is in none."""
    groups: dict[object, list[int]] = {}
    for cpu in within:
        if cpus[cpu] is not None:
            groups.setdefault(cpus[cpu], []).append(cpu)
    return {str(CpuSet(members)) for members in groups.values()}


def ours(recorded: Recorded, level: str, within: Iterable[int] | None = None) -> set[str]:
    numbers = {cpu.id: getattr(cpu, level) for cpu in recorded.found.cpus}
    return partition(numbers, recorded.seen if within is None else within)


def reference_groups(recorded: Recorded, level: str) -> set[str]:
    return set(recorded.reference.levels[level])


def test_all_recorded_machines_are_in_this_table() -> None:
    assert tables.names() == sorted(MACHINES)


@pytest.mark.parametrize("level", ["package", "l3", "l2"])
def test_packages_and_caches_are_the_same_sets_of_cpus(recorded: Recorded, level: str) -> None:
    assert ours(recorded, level) == reference_groups(recorded, level)


def test_cores_are_the_same_sets_of_cpus(recorded: Recorded) -> None:
    expected = recorded.differs.cores
    assert ours(recorded, "core") == (reference_groups(recorded, "core") if expected is None else set(expected))


def test_online_and_offline_cpus_are_the_kernels(recorded: Recorded) -> None:
    found = recorded.found
    assert str(found.cpus_online) == (recorded.differs.online or recorded.reference.online)
    assert [cpu.id for cpu in found.cpus] == list(found.cpus_online)
    assert list(found.cpus_offline) == recorded.reference.offline
    assert found.cpus_online | found.cpus_offline <= found.cpus_possible


@pytest.mark.parametrize("level", ["die", "cluster"])
def test_dies_and_clusters_are_what_each_cpus_own_file_says(recorded: Recorded, level: str) -> None:
    """Read from every CPU, where the scan reads one file per group."""
    online = recorded.found.cpus_online
    folders = {cpu: recorded.root / f"sys/devices/system/cpu/cpu{cpu}/topology" for cpu in online}
    ids = {cpu: _content(folder / f"{level}_id") for cpu, folder in folders.items()}
    lists = {cpu: _content(folder / f"{level}_cpus_list") for cpu, folder in folders.items()}
    told = {cpu: members if ids[cpu] != "-1" else None for cpu, members in lists.items()}
    if level == "die" and not any(told.values()):
        assert ours(recorded, "die", online) == ours(recorded, "package", online)
    else:
        assert ours(recorded, level, online) == partition(told, online)


def _content(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def test_levels_lie_within_each_other(recorded: Recorded) -> None:
    packages = {cpu.id: cpu.package for cpu in recorded.found.cpus}
    for level in ("die", "cluster", "core"):
        for members in ours(recorded, level, recorded.found.cpus_online):
            assert len({packages[cpu] for cpu in CpuSet.parse(members)}) == 1


@pytest.mark.parametrize("level", ["package", "die", "cluster", "core", "l2", "l3"])
def test_indices_are_counted_by_lowest_member(recorded: Recorded, level: str) -> None:
    seen = [index for cpu in recorded.found.cpus if (index := getattr(cpu, level)) is not None]
    assert list(dict.fromkeys(seen)) == list(range(len(set(seen))))


@pytest.mark.parametrize("level", [2, 3])
def test_cache_groups_and_cpus_name_each_other(recorded: Recorded, level: int) -> None:
    groups = {group.index: group.cpus for group in recorded.found.caches if group.level == level}
    for cpu in recorded.found.cpus:
        index = cpu.l2 if level == 2 else cpu.l3
        assert [at for at, cpus in groups.items() if cpu.id in cpus] == ([] if index is None else [index])


def test_numa_nodes_have_the_same_ids_and_cpus(recorded: Recorded) -> None:
    nodes = {node.id: node for node in recorded.found.numa_nodes}
    expected_ids = recorded.differs.nodes or str(CpuSet(recorded.reference.nodes))
    assert str(CpuSet(nodes)) == expected_ids
    for node, told in recorded.reference.nodes.items():
        expected = recorded.differs.node_cpus.get(node, told.cpus)
        assert str(nodes[node].cpus & recorded.seen) == expected, f"node {node}"
    for node, cpus in recorded.differs.node_cpus.items():
        assert str(nodes[node].cpus) == cpus, f"node {node}"


def test_each_cpu_is_on_the_node_that_lists_it_and_on_no_other(recorded: Recorded) -> None:
    for cpu in recorded.found.cpus:
        listing = [node.id for node in recorded.found.numa_nodes if cpu.id in node.cpus]
        assert listing == ([] if cpu.numa_node == -1 else [cpu.numa_node])
    homeless = CpuSet(cpu.id for cpu in recorded.found.cpus if cpu.numa_node == -1)
    assert str(homeless) == ("4-7" if recorded.name == "fakeheterocpunuma" else "")


def test_numa_nodes_have_the_same_memory(recorded: Recorded) -> None:
    nodes = {node.id: node for node in recorded.found.numa_nodes}
    for node, expected in recorded.reference.nodes.items():
        assert nodes[node].memory_bytes == expected.memory_bytes, f"node {node}"


def test_numa_nodes_have_the_same_page_counts(recorded: Recorded) -> None:
    nodes = {node.id: node for node in recorded.found.numa_nodes}
    for node, expected in recorded.reference.nodes.items():
        pools = nodes[node].hugepages
        pages = dict(expected.pages)
        small = pages.pop(4096)
        assert {pool.page_bytes: pool.total_pages for pool in pools} == pages, f"node {node}"
        assert small * 4096 == nodes[node].memory_bytes - sum(p.page_bytes * p.total_pages for p in pools)


def test_distances_are_the_same_by_node_id(recorded: Recorded) -> None:
    nodes = {node.id: node for node in recorded.found.numa_nodes}
    for matrix in recorded.reference.distances:
        for a, row in zip(matrix.nodes, matrix.rows, strict=True):
            expected = dict(zip(matrix.nodes, row, strict=True))
            assert {b: nodes[a].distances[b] for b in matrix.nodes} == expected, f"from node {a}"
    if not recorded.reference.distances:
        expected_rows = recorded.differs.distances or {0: {0: 10}}
        assert all(node.distances in ({}, expected_rows.get(node.id)) for node in nodes.values())
        assert all(nodes[node].distances == row for node, row in recorded.differs.distances.items())


def test_kinds_of_cpus_are_the_same(recorded: Recorded) -> None:
    """hwloc lists kinds from the slowest; one kind, or one that does not cover all CPUs, is no difference at all."""
    listed = recorded.reference.kinds
    expected = dict(zip(listed, ("efficiency", "performance"), strict=True)) if len(listed) == 2 else {}
    if recorded.differs.kinds is not None:
        expected = dict(recorded.differs.kinds)
    kinds = {cpu.id: cpu.kind or None for cpu in recorded.found.cpus}
    assert {
        str(CpuSet(cpu for cpu, kind in kinds.items() if kind == name)): name for name in set(kinds.values()) - {None}
    } == expected


def test_kinds_of_memory_follow_the_evidence(recorded: Recorded) -> None:
    found = {node.id: node.kind for node in recorded.found.numa_nodes}
    assert found == MEMORY_KINDS.get(recorded.name, dict.fromkeys(found, "dram"))


def test_only_broken_machines_give_warnings(recorded: Recorded) -> None:
    expected = WARNINGS.get(recorded.name, [])
    assert len(recorded.found.warnings) == len(expected), recorded.found.warnings
    for warning, part in zip(recorded.found.warnings, expected, strict=True):
        assert part in warning


# ---------------------------------------------------------------- this machine


def _lscpu() -> list[dict[str, str]]:
    """One row per online CPU, from lscpu; without it, from /proc/cpuinfo."""
    if shutil.which("lscpu"):
        command = ["lscpu", "-J", "-e=CPU,CORE,SOCKET,NODE"]
        rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["cpus"]
        return [{key: str(value) for key, value in row.items()} for row in rows]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [{"cpu": line.split(":")[1].strip()} for line in lines if line.startswith("processor")]


def test_this_machine_is_what_lscpu_says() -> None:
    found = topology.read(SysFs("/"))
    rows = {int(row["cpu"]): row for row in _lscpu()}
    assert list(rows) == list(found.cpus_online)
    for column, level in (("core", "core"), ("socket", "package"), ("node", "numa_node")):
        told = {cpu: row.get(column) for cpu, row in rows.items()}
        if all(value not in (None, "-", "None") for value in told.values()):
            assert partition({cpu.id: getattr(cpu, level) for cpu in found.cpus}, rows) == partition(told, rows)


def test_this_machines_nodes_hold_the_memory_of_their_zones() -> None:
    zones = Path("/proc/zoneinfo")
    if not zones.exists():
        pytest.skip("no /proc/zoneinfo")
    found: dict[int, int] = {}
    for section in re.split(r"(?m)^Node ", zones.read_text())[1:]:
        pages = re.search(r"(?m)^ +managed +(\d+)$", section)
        node = int(section.split(",")[0])
        found[node] = found.get(node, 0) + (int(pages[1]) if pages else 0) * os.sysconf("SC_PAGE_SIZE")
    for one in topology.read(SysFs("/")).numa_nodes:
        assert one.memory_bytes == pytest.approx(found.get(one.id, 0), rel=0.01)
