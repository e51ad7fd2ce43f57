"""CPUs, caches and NUMA nodes of machines that were built to be odd, and of files that were broken on purpose."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.inventory import Inventory, same_machine
from nodeagent.core.model.topology import NO_NODE, NumaNode
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import cpus as topology
from tests.builders.machines import GIB, MIB, Core, Shape, build, machine, named

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"


def read(root: Path) -> Inventory:
    return topology.read(SysFs(root))


def groups(found: Inventory, level: str) -> list[str]:
    """The CPUs of each group of a level, by index."""
    members: dict[int, list[int]] = {}
    for cpu in found.cpus:
        if (index := getattr(cpu, level)) is not None:
            members.setdefault(index, []).append(cpu.id)
    return [str(CpuSet(members[index])) for index in sorted(members)]


def node_cpus(found: Inventory) -> dict[int, str]:
    return {node.id: str(node.cpus) for node in found.numa_nodes}


def laid_out(cores: list[Core], key: Callable[[Core], int], online: CpuSet) -> list[str]:
    found: dict[int, CpuSet] = {}
    for core in cores:
        found[key(core)] = union((found.get(key(core), CpuSet()), core.cpus & online))
    return [str(cpus) for cpus in sorted(found.values(), key=CpuSet.first) if cpus]


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "name", ["1s1n1c", "1s1n6c-offline3", "2s2n16c-smt", "2s4n128c-smt", "1s1n4c-smt4", "4s8n32c-smt-offline1,33-40"]
)
def test_a_machine_is_read_as_it_was_built(tmp_path: Path, name: str) -> None:
    found = read(machine(tmp_path, name))
    shape = named(name)
    cores = shape.cores()
    present = union(core.cpus for core in cores)
    online = present - CpuSet.parse(shape.offline)
    assert (found.cpus_online, found.cpus_offline) == (online, present - online)
    assert groups(found, "package") == laid_out(cores, lambda core: core.package, online)
    assert groups(found, "core") == laid_out(cores, lambda core: core.index, online)
    assert groups(found, "l3") == laid_out(cores, lambda core: core.l3, online)
    assert groups(found, "numa_node") == laid_out(cores, lambda core: core.node, online)
    assert found.warnings == ()


def test_a_core_keeps_its_online_thread(tmp_path: Path) -> None:
    found = read(machine(tmp_path, "1s1n4c-smt-offline5"))
    assert groups(found, "core") == ["0,4", "1", "2,6", "3,7"]
    assert 5 not in union(group.cpus for group in found.caches)
    assert node_cpus(found) == {0: "0-4,6-7"}


def test_indices_follow_the_lowest_online_member(tmp_path: Path) -> None:
    found = read(machine(tmp_path, "2s2n4c-smt-offline0,1"))
    assert groups(found, "core") == ["2,6", "3,7", "4", "5"]
    assert groups(found, "package") == ["2-3,6-7", "4-5"]


def test_a_thousand_cpus_are_read(tmp_path: Path) -> None:
    found = read(machine(tmp_path, "8s8n512c-smt"))
    assert (len(found.cpus), str(found.cpus_online)) == (1024, "0-1023")
    assert len(groups(found, "core")) == 512
    assert groups(found, "package")[7] == "448-511,960-1023"
    assert found.warnings == ()


def test_two_nodes_with_cpus_and_32_with_memory_of_gpus_are_34(tmp_path: Path) -> None:
    """As on GB200: a node per GPU instance, most of them empty."""
    gpus = {f"{domain:04x}:01:00.0": 2 + 8 * domain for domain in range(4)}
    shape = Shape(
        packages=2,
        cores_per_l3=72,
        memory_only_nodes=range(2, 34),
        memory={node: 186 * GIB if node in gpus.values() else 0 for node in range(2, 34)},
        gpu_nodes=gpus,
    )
    nodes = read(build(tmp_path, shape)).numa_nodes
    assert [node.id for node in nodes] == list(range(34))
    assert {node.id: node.kind for node in nodes if node.kind != "none"} == {
        0: "dram",
        1: "dram",
        **dict.fromkeys(gpus.values(), "gpu"),
    }
    assert [str(node.cpus) for node in nodes[:3]] == ["0-71", "72-143", ""]
    assert nodes[33].distances[0] == 20
    assert nodes[33].distances[33] == 10


@pytest.mark.parametrize("ids", [(0, 8), (250, 251, 252, 253, 254, 255), (1, 17)])
def test_distances_are_keyed_by_node_id_whatever_the_ids(tmp_path: Path, ids: tuple[int, ...]) -> None:
    rows = [[10 if a == b else 11 + a + b for b in range(len(ids))] for a in range(len(ids))]
    nodes = read(build(tmp_path, Shape(packages=len(ids), node_ids=ids, distances=rows))).numa_nodes
    assert [node.id for node in nodes] == list(ids)
    assert [dict(node.distances) for node in nodes] == [dict(zip(ids, row, strict=True)) for row in rows]


def test_nodes_inside_a_package_share_no_cpus(tmp_path: Path) -> None:
    """Sub-NUMA clustering: four nodes under each package, one cache over all of them or one each."""
    found = read(build(tmp_path, Shape(packages=2, nodes_per_package=4, cores_per_l3=3, threads=2)))
    assert len(found.numa_nodes) == 8
    assert groups(found, "package") == ["0-11,24-35", "12-23,36-47"]
    assert node_cpus(found)[5] == "15-17,39-41"


def test_isolated_nohz_full_and_possible_cpus_are_told(tmp_path: Path) -> None:
    found = read(machine(tmp_path, "1s1n8c", isolated="2-3", nohz_full="3", possible="0-63"))
    assert (str(found.cpus_isolated), str(found.cpus_nohz_full)) == ("2-3", "3")
    assert [cpu.id for cpu in found.cpus if cpu.isolated] == [2, 3]
    assert str(found.cpus_possible) == "0-63"
    assert str(found.cpus_offline) == ""


def test_nohz_full_that_was_never_set_is_no_cpus(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n2c")
    (root / CPU / "nohz_full").write_text("  (null)\n")
    found = read(root)
    assert (str(found.cpus_nohz_full), found.warnings) == ("", ())


def test_clusters_are_the_kernels_and_absent_without_them(tmp_path: Path) -> None:
    found = read(build(tmp_path / "with", Shape(cores_per_l3=8, cluster_cores=4)))
    assert groups(found, "cluster") == ["0-3", "4-7"]
    without = read(build(tmp_path / "without", Shape(cores_per_l3=8)))
    assert {cpu.cluster for cpu in without.cpus} == {None}


@pytest.mark.parametrize("number", [-1, 65535])
def test_a_cluster_or_die_id_that_says_there_are_none_is_believed(tmp_path: Path, number: int) -> None:
    root = build(tmp_path, Shape(packages=2, cluster_cores=1))
    for cpu in range(8):
        folder = root / CPU / f"cpu{cpu}/topology"
        (folder / "die_cpus_list").write_text(str(cpu))
        for name in ("die_id", "cluster_id"):
            (folder / name).write_text(str(number))
    found = read(root)
    assert {cpu.cluster for cpu in found.cpus} == {None}
    assert groups(found, "die") == groups(found, "package") == ["0-3", "4-7"]


def test_caches_have_level_size_and_members(tmp_path: Path) -> None:
    found = read(build(tmp_path, Shape(cores_per_l3=4, l3_per_node=2, cores_per_l2=2, threads=2, adjacent=True)))
    assert [
        (group.level, group.index, str(group.cpus), group.size_bytes) for group in found.caches if group.level > 1
    ] == [
        (2, 0, "0-3", 2 * MIB),
        (2, 1, "4-7", 2 * MIB),
        (2, 2, "8-11", 2 * MIB),
        (2, 3, "12-15", 2 * MIB),
        (3, 0, "0-7", 32 * MIB),
        (3, 1, "8-15", 32 * MIB),
    ]
    assert [str(group.cpus) for group in found.caches if group.level == 1][:2] == ["0-1", "2-3"]


# ---------------------------------------------------------------- kinds

HYBRID = Shape(cores_per_l3=6, core_threads=(2, 2, 1, 1, 1, 1))
"""Two cores of two threads, four of one: CPUs 0-3 and 4-7."""


def kinds(root: Path) -> dict[str, str]:
    found: dict[str, list[int]] = {}
    for cpu in read(root).cpus:
        found.setdefault(cpu.kind, []).append(cpu.id)
    return {kind: str(CpuSet(cpus)) for kind, cpus in found.items()}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"pmus": {"cpu_core": "0-3", "cpu_atom": "4-7"}}, {"performance": "0-3", "efficiency": "4-7"}),
        (
            {"pmus": {"cpu_core": "0-3", "cpu_atom": "4-5", "cpu_lowpower": "6-7"}},
            {"performance": "0-3", "balanced": "4-5", "efficiency": "6-7"},
        ),
        ({"capacities": (1024, 1024, 446, 446, 446, 446)}, {"performance": "0-3", "efficiency": "4-7"}),
        (
            {"capacities": (1024, 1000, 400, 400, 160, 160)},
            {"performance": "0-3", "balanced": "4-5", "efficiency": "6-7"},
        ),
        ({"base_khz": (1_900_000,) * 2 + (1_400_000,) * 4}, {"performance": "0-3", "efficiency": "4-7"}),
        ({"max_khz": (5_200_000, 5_000_000) + (3_900_000,) * 4}, {"performance": "0-3", "efficiency": "4-7"}),
        ({"max_khz": (5_200_000, 4_900_000, 4_600_000, 4_300_000, 4_000_000, 3_700_000)}, {"": "0-7"}),
        ({"base_khz": (2_100_000,), "max_khz": (3_600_000, 3_800_000)}, {"": "0-7"}),
        ({"capacities": (1024,), "max_khz": (5_000_000, 2_000_000)}, {"": "0-7"}),
        ({"pmus": {"cpu_core": "0-7"}}, {"": "0-7"}),
        ({}, {"": "0-7"}),
    ],
)
def test_kinds_of_cpus_come_from_the_best_source_there_is(
    tmp_path: Path, more: dict[str, object], expected: dict[str, str]
) -> None:
    assert kinds(build(tmp_path, dataclasses.replace(HYBRID, **more))) == expected  # type: ignore[arg-type]


def test_speeds_stand_on_every_thread_of_their_core(tmp_path: Path) -> None:
    shape = Shape(cores_per_l3=2, threads=2, capacities=(1024, 512), base_khz=(2_000, 1_000), max_khz=(3_000, 1_500))
    found = read(build(tmp_path, shape))
    assert [(cpu.capacity, cpu.base_khz, cpu.max_khz) for cpu in found.cpus] == [
        (1024, 2_000, 3_000),
        (512, 1_000, 1_500),
    ] * 2


# ---------------------------------------------------------------- kinds of memory


def memory_kinds(root: Path) -> dict[int, str]:
    return {node.id: node.kind for node in read(root).numa_nodes}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"bandwidth": {0: 1000, 1: 1000, 2: 2000, 3: 1500}}, ["dram", "dram", "hbm", "dram"]),
        ({"bandwidth": {0: 1000, 1: 900, 2: 450, 3: 460}}, ["dram", "dram", "cxl", "dram"]),
        ({"bandwidth": {0: 4000, 1: 1000, 2: 1000}}, ["hbm", "dram", "dram", "dram"]),
        ({"tiers": {4: "0-1", 2: "2", 22: "3"}}, ["dram", "dram", "hbm", "cxl"]),
        ({"tiers": {2: "2-3"}}, ["dram"] * 4),
        ({"memory": {1: 0, 3: 0}}, ["dram", "none", "dram", "none"]),
        ({"gpu_nodes": {"0009:01:00.0": 3}, "bandwidth": {0: 100, 3: 4000}}, ["dram", "dram", "dram", "gpu"]),
        ({"gpu_nodes": {"0009:01:00.0": -1}}, ["dram"] * 4),
        ({"dax": {"dax0.0": ("LNXSYSTM:00/ACPI0012:00/ndbus0/region0/dax0.1", 2)}}, ["dram", "dram", "pmem", "dram"]),
        ({"dax": {"dax0.0": ("platform/ACPI0017:00/root0/region0/dax_region0", 2)}}, ["dram", "dram", "cxl", "dram"]),
        ({"dax": {"dax0.0": ("platform/hmem.0", 2)}}, ["dram", "dram", "special", "dram"]),
        ({"dax": {"dax0.0": ("platform/hmem.0", 2)}, "tiers": {4: "0-1", 22: "2"}}, ["dram", "dram", "cxl", "dram"]),
        ({"dax": {"dax0.0": ("platform/hmem.0", 2)}, "bandwidth": {0: 100, 2: 400}}, ["dram", "dram", "hbm", "dram"]),
        ({"dax": {"dax0.0": ("platform/hmem.0", 1)}}, ["dram"] * 4),
        ({"bandwidth": {0: 1000, 1: 1000, 2: 700}, "tiers": {4: "0-1", 5: "2"}}, ["dram", "dram", "cxl", "dram"]),
        ({"gpu_nodes": {"0009:01:00.0": 1}}, ["dram"] * 4),
        ({"dax": {"dax0.0": ("LNXSYSTM:00/ACPI0012:00/ndbus0/region0/dax0.1", 0)}}, ["dram"] * 4),
    ],
)
def test_kinds_of_memory_follow_the_evidence(tmp_path: Path, more: dict[str, object], expected: list[str]) -> None:
    root = machine(tmp_path, "2s2n4c", memory_only_nodes=(2, 3), **more)
    assert memory_kinds(root) == dict(enumerate(expected))


@pytest.mark.parametrize(
    ("normal", "more", "expected"),
    [
        ("0-1,3", {}, ["dram", "dram", "special", "dram"]),
        ("0-1", {}, ["dram", "dram", "special", "special"]),
        ("0-1", {"gpu_nodes": {"0009:01:00.0": 2}}, ["dram", "dram", "gpu", "special"]),
        ("0-1", {"tiers": {4: "0-1", 22: "2", 2: "3"}}, ["dram", "dram", "cxl", "hbm"]),
        ("0-1", {"memory": {3: 0}}, ["dram", "dram", "special", "none"]),
        ("0,2-3", {}, ["dram"] * 4),
        ("", {}, ["dram"] * 4),
        ("garbage", {}, ["dram"] * 4),
    ],
)
def test_a_node_without_cpus_and_normal_memory_is_special(
    tmp_path: Path, normal: str, more: dict[str, object], expected: list[str]
) -> None:
    """Nodes with CPUs are not: with movable_node, all of their memory can be removed."""
    root = machine(tmp_path, "2s2n4c", memory_only_nodes=(2, 3), **more)
    (root / NODE / "has_normal_memory").write_text(f"{normal}\n")
    assert memory_kinds(root) == dict(enumerate(expected))


def test_a_dax_device_that_is_not_used_as_memory_shows_nothing(tmp_path: Path) -> None:
    folder = "LNXSYSTM:00/ACPI0012:00/ndbus0/region0/dax0.1"
    root = machine(tmp_path, "2s2n4c", memory_only_nodes=(2, 3), dax={"dax0.0": (folder, 2), "dax0.1": (folder, 3)})
    for name, driver in {"dax0.0": "device_dax", "dax0.1": "kmem"}.items():
        (root / f"sys/devices/{folder}/{name}/driver").symlink_to(f"/sys/bus/dax/drivers/{driver}")
    assert memory_kinds(root) == {0: "dram", 1: "dram", 2: "dram", 3: "pmem"}


# ---------------------------------------------------------------- machines that lack files


def test_without_lists_of_cpus_the_folders_say_which_are_online(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n6c-offline3")
    for name in ("online", "offline", "present", "possible", "isolated", "nohz_full"):
        (root / CPU / name).unlink()
    (root / CPU / "cpu0/online").unlink()
    found = read(root)
    assert (str(found.cpus_online), str(found.cpus_offline), str(found.cpus_possible)) == ("0-2,4-5", "3", "0-5")
    assert found.warnings == ()


def test_without_sysfs_proc_says_which_are_online_and_what_memory_there_is(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n3c")
    shutil.rmtree(root / "sys")
    found = read(root)
    assert str(found.cpus_online) == "0-2"
    assert groups(found, "core") == ["0", "1", "2"]
    assert groups(found, "package") == ["0-2"]
    assert [(node.id, str(node.cpus), node.memory_bytes) for node in found.numa_nodes] == [(0, "0-2", 16 * GIB)]


def test_processors_of_s390_are_found_in_proc(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "vendor_id : IBM/S390\n# processors : 2\nprocessor 0: version = FF\nprocessor 4: v\n"
    )
    assert str(read(tmp_path).cpus_online) == "0,4"


def test_an_empty_root_gives_an_empty_machine_that_says_so(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.cpus == ()
    assert found.numa_nodes == (NumaNode(id=0, kind="none"),)
    assert any("proc/cpuinfo" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "gone",
    [
        ("package_cpus_list", "die_cpus_list", "core_cpus_list"),
        ("package_cpus_list", "core_siblings_list", "die_cpus_list", "core_cpus_list", "thread_siblings_list"),
        (
            "package_cpus_list",
            "core_siblings_list",
            "package_cpus",
            "core_cpus_list",
            "thread_siblings_list",
            "core_cpus",
        ),
        (
            *("package_cpus_list", "core_siblings_list", "package_cpus", "core_siblings", "die_cpus_list", "die_cpus"),
            *("core_cpus_list", "thread_siblings_list", "core_cpus", "thread_siblings"),
        ),
    ],
    ids=["names-before-5.3", "masks-only", "masks-before-5.3", "ids-only"],
)
def test_older_files_say_the_same(tmp_path: Path, gone: tuple[str, ...]) -> None:
    root = machine(tmp_path, "2s4n16c-smt-offline7")
    expected = read(root)
    for folder in (root / CPU).glob("cpu*/topology"):
        for name in gone:
            (folder / name).unlink()
    assert same_machine(read(root), expected)


def test_core_ids_that_repeat_on_each_package_are_different_cores(tmp_path: Path) -> None:
    found = read(machine(tmp_path, "4s4n8c-smt"))
    assert len(groups(found, "core")) == 8


def without_lists(root: Path, **numbers: Callable[[int], int]) -> Path:
    """Leave only ids in the topology of each CPU: what `numbers` gives for a CPU replaces the number of that name."""
    for folder in (root / CPU).glob("cpu*/topology"):
        for path in folder.iterdir():
            if not path.name.endswith("_id"):
                path.unlink()
        for name, number in numbers.items():
            (folder / name).write_text(f"{number(int(folder.parent.name[3:]))}\n")
    return root


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("1s2n4c", {}, ["0", "1", "2", "3"]),
        ("1s2n4c-smt", {}, ["0,4", "1,5", "2,6", "3,7"]),
        ("1s1n4c", {"die_id": lambda cpu: cpu // 2}, ["0", "1", "2", "3"]),
        ("1s1n4c", {"cluster_id": lambda cpu: cpu // 2}, ["0", "1", "2", "3"]),
        ("1s1n4c-smt", {"die_id": lambda cpu: cpu % 4 // 2}, ["0,4", "1,5", "2,6", "3,7"]),
        ("1s1n4c", {"die_id": lambda _: -1, "cluster_id": lambda _: -1}, ["0", "1", "2", "3"]),
        ("1s1n4c-smt", {"die_id": lambda _: -1}, ["0,4", "1,5", "2,6", "3,7"]),
    ],
    ids=["nodes", "nodes-smt", "dies", "clusters", "dies-smt", "caches", "caches-smt"],
)
def test_equal_core_ids_are_one_core_only_where_nothing_tells_them_apart(
    tmp_path: Path, name: str, numbers: dict[str, Callable[[int], int]], expected: list[str]
) -> None:
    """Core ids 0, 1, 0, 1 within one package, and no sibling lists."""
    found = read(without_lists(machine(tmp_path, name), core_id=lambda cpu: cpu % 2, **numbers))
    assert groups(found, "core") == expected
    assert len(groups(found, "package")) == 1


def test_without_caches_equal_core_ids_on_two_nodes_are_two_cores(tmp_path: Path) -> None:
    root = without_lists(machine(tmp_path, "1s2n4c-smt"), core_id=lambda cpu: cpu % 2)
    for folder in (root / CPU).glob("cpu*/cache"):
        shutil.rmtree(folder)
    assert groups(read(root), "core") == ["0,4", "1,5", "2,6", "3,7"]


def test_a_cpu_without_a_node_is_no_sibling_of_one_with_a_node(tmp_path: Path) -> None:
    root = without_lists(machine(tmp_path, "1s2n4c"), core_id=lambda cpu: cpu % 2)
    shutil.rmtree(root / NODE / "node1")
    for cpu in (2, 3):
        (root / CPU / f"cpu{cpu}/node1").unlink()
    for folder in (root / CPU).glob("cpu*/cache"):
        shutil.rmtree(folder)
    assert groups(read(root), "core") == ["0", "1", "2", "3"]


def test_dies_without_lists_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    root = without_lists(machine(tmp_path, "2s2n8c"), die_id=lambda cpu: cpu % 4 // 2)
    assert groups(read(root), "die") == ["0-1", "2-3", "4-5", "6-7"]


def test_packages_with_id_minus_one_are_told_apart_by_siblings(tmp_path: Path) -> None:
    root = machine(tmp_path, "4s4n8c")
    for folder in (root / CPU).glob("cpu*/topology"):
        (folder / "physical_package_id").write_text("-1")
    assert groups(read(root), "package") == ["0-1", "2-3", "4-5", "6-7"]


def described(root: Path, cpu: int, caches: list[tuple[int, str, str]]) -> None:
    """Replace the caches of a CPU: level, type and members of each, in the order of their folders."""
    folder = root / CPU / f"cpu{cpu}/cache"
    shutil.rmtree(folder, ignore_errors=True)
    for index, (level, kind, members) in enumerate(caches):
        (folder / f"index{index}").mkdir(parents=True)
        for name, text in {"level": f"{level}", "type": kind, "shared_cpu_list": members, "size": "32K"}.items():
            (folder / f"index{index}" / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("caches", "expected"),
    [
        (
            # As on RISC-V: the instruction cache comes first, and only the core is shared.
            {cpu: [(1, "Instruction", f"{cpu}"), (1, "Data", f"{cpu}"), (2, "Unified", f"{cpu}")] for cpu in (0, 1)},
            {1: ["0", "1"], 2: ["0", "1"]},
        ),
        (
            # As on AMD Bulldozer: two CPUs share the instruction cache and the second level, not the data cache.
            {cpu: [(1, "Instruction", "0-1"), (1, "Data", f"{cpu}"), (2, "Unified", "0-1")] for cpu in (0, 1)},
            {1: ["0", "1"], 2: ["0-1"]},
        ),
        (
            # The CPUs of one first-level cache have second-level caches of their own.
            {cpu: [(1, "Data", "0-1"), (2, "Unified", f"{cpu}"), (3, "Unified", "0-1")] for cpu in (0, 1)},
            {1: ["0-1"], 2: ["0", "1"], 3: ["0-1"]},
        ),
        (
            # Folders of one number are caches of different levels.
            {
                0: [(1, "Data", "0"), (1, "Instruction", "0"), (2, "Unified", "0"), (3, "Unified", "0-1")],
                1: [(3, "Unified", "0-1"), (2, "Unified", "1"), (1, "Data", "1")],
            },
            {1: ["0", "1"], 2: ["0", "1"], 3: ["0-1"]},
        ),
        (
            # Only one of the two has a second level.
            {
                0: [(1, "Data", "0"), (2, "Unified", "0"), (3, "Unified", "0-1")],
                1: [(1, "Data", "1"), (3, "Unified", "0-1")],
            },
            {1: ["0", "1"], 2: ["0"], 3: ["0-1"]},
        ),
    ],
    ids=["instruction-first", "shared-instruction-cache", "shared-first-level", "other-order", "missing-level"],
)
def test_caches_are_those_of_each_cpus_own_files(
    tmp_path: Path, caches: dict[int, list[tuple[int, str, str]]], expected: dict[int, list[str]]
) -> None:
    root = machine(tmp_path, "1s1n1c-smt")
    for cpu, mine in caches.items():
        described(root, cpu, mine)
    found = read(root)
    assert {level: [str(one.cpus) for one in found.caches if one.level == level] for level in expected} == expected
    assert {group.level for group in found.caches} == expected.keys()
    assert found.warnings == ()


class CountingSysFs(SysFs):
    """Knows which files were looked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def _bytes(self, path: str) -> bytes:
        self.read.append(path)
        return super()._bytes(path)


def test_what_threads_of_a_core_share_is_read_once(tmp_path: Path) -> None:
    """And levels that a kernel does not have are not looked for at every CPU: a scan of a large machine takes as long
    as it opens files."""
    root, cores = machine(tmp_path, "2s4n128c-smt"), named("2s4n128c-smt").cores()
    for file in (root / CPU).glob("cpu*/topology/cluster_*"):
        file.unlink()
    counting = CountingSysFs(root)
    found = topology.read(counting)
    assert not any("cluster" in path for path in counting.read)
    for name, level in (("core_cpus_list", "core"), ("die_cpus_list", "die"), ("package_cpus_list", "package")):
        assert sum(path.endswith(name) for path in counting.read) == len(groups(found, level)), name
    of_each = {path.rsplit("/", 2)[0] for path in counting.read if path.endswith("/type")}
    assert of_each == {f"{CPU}/cpu{core.cpus.first()}/cache" for core in cores}


def test_a_machine_without_cache_folders_has_no_caches(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    for folder in (root / CPU).glob("cpu*/cache"):
        shutil.rmtree(folder)
    found = read(root)
    assert found.caches == ()
    assert {(cpu.l2, cpu.l3) for cpu in found.cpus} == {(None, None)}
    assert found.warnings == ()


def test_caches_with_only_lists_are_read(tmp_path: Path) -> None:
    root = machine(tmp_path, "2s2n8c-smt")
    expected = read(root).caches
    for path in (root / CPU).glob("cpu*/cache/*/shared_cpu_map"):
        path.unlink()
    assert read(root).caches == expected


def test_without_node_folders_there_is_one_node_with_all_cpus(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c-offline2", memory={0: 2 * GIB})
    shutil.rmtree(root / NODE)
    (node,) = read(root).numa_nodes
    assert (node.id, str(node.cpus), node.memory_bytes) == (0, "0-1,3", 2 * GIB)
    assert node.distances == {}
    assert {cpu.numa_node for cpu in read(root).cpus} == {0}


def test_a_missing_list_of_online_nodes_leaves_the_folders(tmp_path: Path) -> None:
    root = build(tmp_path, Shape(packages=2, node_ids=(0, 8)))
    expected = read(root).numa_nodes
    (root / NODE / "online").unlink()
    assert read(root).numa_nodes == expected


def test_a_capture_without_all_nodes_still_keys_distances_by_id(tmp_path: Path) -> None:
    root = build(tmp_path, Shape(packages=3, node_ids=(1, 4, 9), distances=[[10, 14, 19], [14, 10, 49], [19, 49, 10]]))
    shutil.rmtree(root / NODE / "node4")
    nodes = {node.id: node for node in read(root).numa_nodes}
    assert nodes[9].distances == {1: 19, 9: 10}


# ---------------------------------------------------------------- broken files


def _write(text: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(text)

    return damage


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unreadable(path: Path) -> None:
    """A link to itself cannot be read by anyone, root included."""
    path.unlink()
    os.symlink(path.name, path)


DAMAGE = {
    "backwards": (_write("3-1"), "'3-1'"),
    "garbage": (_write("garbage"), "'garbage'"),
    "huge": (_write("99999999999999999999"), "99999999"),
    "empty": (_write(""), ""),
    "folder": (_folder, "Is a directory"),
    "unreadable": (_unreadable, "symbolic links"),
}
FILES = (
    f"{CPU}/online",
    f"{CPU}/cpu1/topology/package_cpus_list",
    f"{CPU}/cpu1/topology/die_cpus_list",
    f"{CPU}/cpu1/topology/core_cpus_list",
    f"{CPU}/cpu1/cache/index2/level",
    f"{CPU}/cpu1/cache/index2/type",
    f"{CPU}/cpu1/cache/index2/size",
    f"{NODE}/node0/meminfo",
    f"{NODE}/node0/distance",
)


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    """Two packages where CPU 1 is the lowest of its package, core and caches: no other file speaks for it first."""
    root = machine(tmp_path, "2s2n4c-smt-offline0,2")
    shutil.rmtree(root / CPU / "cpu0", ignore_errors=True)
    return root


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_gives_a_warning_with_its_path_and_value_and_leaves_the_rest(
    lone: Path, file: str, damage: str
) -> None:
    whole = read(lone)
    hurt, value = DAMAGE[damage]
    hurt(lone / file)
    found = read(lone)
    named_files = [warning for warning in found.warnings if f"{lone}/{file}" in warning]
    assert len(named_files) == 1, found.warnings
    assert value in named_files[0]
    assert found.cpus_online == whole.cpus_online
    assert found.cpus == whole.cpus
    assert node_cpus(found) == node_cpus(whole)
    assert found.numa_nodes[1] == whole.numa_nodes[1]


@pytest.mark.parametrize("file", [f"{CPU}/isolated", f"{CPU}/nohz_full", f"{CPU}/possible", f"{CPU}/present"])
@pytest.mark.parametrize("damage", ["backwards", "garbage", "huge", "folder", "unreadable"])
def test_a_broken_list_of_cpus_costs_only_itself(lone: Path, file: str, damage: str) -> None:
    whole = read(lone)
    hurt, value = DAMAGE[damage]
    hurt(lone / file)
    found = read(lone)
    assert [(file in warning, value in warning) for warning in found.warnings] == [(True, True)]
    assert (found.cpus, found.numa_nodes, found.caches) == (whole.cpus, whole.numa_nodes, whole.caches)


@pytest.mark.parametrize("damage", ["backwards", "garbage", "huge", "folder", "unreadable"])
def test_a_broken_list_of_a_node_leaves_its_mask_to_say_it(lone: Path, damage: str) -> None:
    whole = read(lone)
    hurt, value = DAMAGE[damage]
    hurt(lone / NODE / "node0/cpulist")
    found = read(lone)
    assert found.numa_nodes == whole.numa_nodes
    assert [(f"{NODE}/node0/cpulist" in warning, value in warning) for warning in found.warnings] == [(True, True)]


def test_a_node_without_any_good_list_is_known_by_the_links_of_its_cpus(lone: Path) -> None:
    whole = read(lone)
    (lone / NODE / "node0/cpulist").write_text("x")
    (lone / NODE / "node0/cpumap").write_text("y")
    found = read(lone)
    assert node_cpus(found) == node_cpus(whole)
    assert len(found.warnings) == 2


def test_a_broken_cache_mask_leaves_the_list_to_say_it(lone: Path) -> None:
    whole = read(lone)
    (lone / CPU / "cpu1/cache/index3/shared_cpu_map").write_text("xyz")
    found = read(lone)
    assert found.caches == whole.caches
    assert [("index3/shared_cpu_map" in warning, "'xyz'" in warning) for warning in found.warnings] == [(True, True)]


def test_a_cpu_whose_files_are_all_broken_is_placed_by_its_siblings(lone: Path) -> None:
    whole = read(lone)
    for path in (lone / CPU / "cpu1/topology").glob("*_*"):
        path.write_text("?")
    found = read(lone)
    assert groups(found, "core") == groups(whole, "core")
    assert groups(found, "package") == groups(whole, "package")
    assert found.warnings


def test_a_list_that_does_not_name_its_own_cpu_is_not_believed(lone: Path) -> None:
    whole = read(lone)
    (lone / CPU / "cpu1/topology/core_cpus_list").write_text("3,7")
    found = read(lone)
    assert groups(found, "core") == groups(whole, "core")
    assert "core_cpus_list: '3,7' does not name CPU 1" in found.warnings[0]


def test_overlapping_lists_give_disjoint_groups_and_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    (root / CPU / "cpu1/topology/core_cpus_list").write_text("0-1")
    found = read(root)
    assert groups(found, "core") == ["0", "1", "2", "3"]
    assert "core_cpus_list: '0-1' names CPUs 0 that share with others" in found.warnings[0]


def test_overlapping_caches_are_left_out_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    (root / CPU / "cpu1/cache/index2/shared_cpu_map").write_text("3")
    found = read(root)
    assert [cpu.l2 for cpu in found.cpus] == [0, None, 1, 2]
    assert "cpu1/cache/index2: '0-1' overlaps" in found.warnings[0]


def test_nodes_that_list_the_same_cpus_share_them_out_by_the_links(tmp_path: Path) -> None:
    root = machine(tmp_path, "2s2n8c")
    for node in (0, 1):
        (root / NODE / f"node{node}/cpulist").write_text("0-7")
    found = read(root)
    assert node_cpus(found) == {0: "0-3", 1: "4-7"}
    assert "node1/cpulist: '0-7' has CPUs 0-7 of another node" in found.warnings[0]


def test_nodes_that_list_the_same_cpus_without_links_leave_them_to_the_lowest(tmp_path: Path) -> None:
    root = machine(tmp_path, "2s2n8c")
    (root / NODE / "node1/cpulist").write_text("2-7")
    for cpu in range(8):
        for link in (root / CPU / f"cpu{cpu}").glob("node*"):
            link.unlink()
    assert node_cpus(read(root)) == {0: "0-3", 1: "4-7"}


def test_a_cpu_that_no_node_lists_has_none_and_that_is_said(tmp_path: Path) -> None:
    root = machine(tmp_path, "2s2n4c")
    (root / NODE / "node1/cpulist").write_text("3")
    (root / CPU / "cpu2/node1").unlink()
    found = read(root)
    assert [cpu.numa_node for cpu in found.cpus] == [0, 0, NO_NODE, 1]
    assert "cannot place CPUs 2" in found.warnings[0]


def test_a_folder_beyond_the_largest_id_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n2c")
    (root / NODE / "node99999999").mkdir()
    found = read(root)
    assert node_cpus(found) == {0: "0-1"}
    assert "'node99999999' is beyond" in found.warnings[0]


@pytest.mark.parametrize("value", ["garbage", "0", "-5", ""])
def test_a_speed_that_is_none_is_unknown(tmp_path: Path, value: str) -> None:
    root = build(tmp_path, Shape(max_khz=(3_000_000,)))
    (root / CPU / "cpu2/cpufreq/cpuinfo_max_freq").write_text(value)
    found = read(root)
    assert [cpu.max_khz for cpu in found.cpus] == [3_000_000, 3_000_000, None, 3_000_000]
    assert [("cpuinfo_max_freq" in warning, repr(value) in warning) for warning in found.warnings] == (
        [(True, True)] if value else []
    )


def test_a_distance_row_of_the_wrong_length_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "2s2n4c")
    (root / NODE / "node0/distance").write_text("10 20 30")
    nodes = read(root).numa_nodes
    assert nodes[0].distances == {}
    assert nodes[1].distances == {0: 20, 1: 10}
    assert "node0/distance: '10 20 30' has 3 distances for 2 nodes" in read(root).warnings[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("proc/driver/nvidia/gpus/0009:01:00.0/numa_status", "Nodes: many"),
        (f"{NODE}/node1/access0/initiators/read_bandwidth", "fast"),
        (f"{NODE}/has_normal_memory", "0-"),
        ("sys/devices/virtual/memory_tiering/memory_tier4/nodelist", "1-"),
        ("sys/devices/cpu_core/cpus", "0-"),
    ],
)
def test_bad_evidence_of_kinds_is_named_and_decides_nothing(tmp_path: Path, file: str, text: str) -> None:
    root = machine(tmp_path, "2s2n4c")
    whole = read(root)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
    found = read(root)
    assert [(file in warning, repr(text) in warning) for warning in found.warnings] == [(True, True)]
    assert (found.cpus, found.numa_nodes) == (whole.cpus, whole.numa_nodes)


def test_whatever_one_file_holds_the_scan_ends_and_names_it_or_needs_it_not(tmp_path: Path) -> None:
    """Every file of a machine in turn, in every way to be broken."""
    shape = Shape(
        cores_per_l3=2,
        core_threads=(2, 1),
        cluster_cores=1,
        capacities=(1024, 512),
        base_khz=(2, 1),
        max_khz=(2, 1),
        pmus={"cpu_core": "0-1", "cpu_atom": "2"},
        memory_only_nodes=(1,),
        bandwidth={0: 1, 1: 2},
        tiers={4: "0", 2: "1"},
        gpu_nodes={"0009:01:00.0": 7},
        dax={"dax0.0": ("ndbus0", 7)},
        hugepages={(0, GIB): (1, 1, 0)},
    )
    root = build(tmp_path, shape)
    whole = read(root)
    for path in [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]:
        for hurt, _ in DAMAGE.values():
            good = path.read_bytes()
            hurt(path)
            found = read(root)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.write_bytes(good)
            assert found.cpus_online == whole.cpus_online, path
            assert [node.id for node in found.numa_nodes] == [0, 1], path
            assert found.warnings == () or f"{path.parent.name}/{path.name}" in found.warnings[0], found.warnings
    assert same_machine(read(root), whole)
