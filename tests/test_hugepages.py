"""Pools of hugepages per node, with what the kernel promises only for the whole machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from machines import GIB, MIB, Shape, build, machine

from nodeagent.core.model import HugepagePool
from nodeagent.host import hugepages, topology
from nodeagent.host.sysfs import SysFs

_NODE0 = "sys/devices/system/node/node0/hugepages/hugepages-2048kB"


def pools(root: Path) -> dict[tuple[int, int], HugepagePool]:
    return {
        (node.id, pool.page_bytes): pool for node in topology.read(SysFs(root)).numa_nodes for pool in node.hugepages
    }


def test_total_free_and_surplus_pages_stand_on_their_node(tmp_path: Path) -> None:
    pages = {(0, 2 * MIB): (512, 500, 12), (1, 2 * MIB): (256, 0, 0), (1, GIB): (4, 3, 0)}
    found = pools(machine(tmp_path, "2s2n8c", hugepages=pages))
    assert found[0, 2 * MIB] == HugepagePool(
        node=0, page_bytes=2 * MIB, total_pages=512, free_pages=500, surplus_pages=12
    )
    assert found[1, 2 * MIB] == HugepagePool(node=1, page_bytes=2 * MIB, total_pages=256, free_pages=0)
    assert found[1, GIB] == HugepagePool(node=1, page_bytes=GIB, total_pages=4, free_pages=3)
    assert found[0, GIB] == HugepagePool(node=0, page_bytes=GIB, total_pages=0, free_pages=0)


def test_pools_of_a_node_come_by_page_size(tmp_path: Path) -> None:
    sizes = (64 << 10, 2 * MIB, 32 * MIB, GIB)
    root = machine(tmp_path, "1s1n2c", hugepages={(0, size): (1, 1, 0) for size in sizes})
    (node,) = topology.read(SysFs(root)).numa_nodes
    assert [pool.page_bytes for pool in node.hugepages] == list(sizes)


def test_reserved_pages_of_the_machine_stand_where_most_pages_are_free(tmp_path: Path) -> None:
    pages = {(0, 2 * MIB): (100, 10, 0), (1, 2 * MIB): (100, 90, 0)}
    found = pools(machine(tmp_path, "2s2n8c", hugepages=pages, reserved={2 * MIB: 40}, overcommit={2 * MIB: 7}))
    assert [found[node, 2 * MIB].reserved_pages for node in (0, 1)] == [0, 40]
    assert [found[node, 2 * MIB].overcommit_pages for node in (0, 1)] == [0, 7]


def test_no_node_holds_more_reserved_than_free_pages_and_none_is_lost(tmp_path: Path) -> None:
    pages = {(node, 2 * MIB): (100, free, 0) for node, free in enumerate((30, 50, 20, 50))}
    found = pools(machine(tmp_path, "2s4n8c", hugepages=pages, reserved={2 * MIB: 120}))
    assert [found[node, 2 * MIB].reserved_pages for node in range(4)] == [20, 50, 0, 50]


def test_a_machine_without_node_folders_has_its_pools_on_node_0(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={(0, MIB): (8, 6, 1)}, reserved={MIB: 2}, overcommit={MIB: 3})
    shutil.rmtree(root / "sys/devices/system/node")
    assert pools(root)[0, MIB] == HugepagePool(
        node=0, page_bytes=MIB, total_pages=8, free_pages=6, reserved_pages=2, surplus_pages=1, overcommit_pages=3
    )


def test_nodes_with_odd_ids_keep_their_pools(tmp_path: Path) -> None:
    root = build(tmp_path, Shape(packages=2, node_ids=(0, 8), hugepages={(8, GIB): (2, 2, 0)}))
    found = hugepages.read(SysFs(root), [0, 8], [])
    assert [pool.free_pages for pool in found[8]] == [0, 2]
    assert [pool.free_pages for pool in found[0]] == [0, 0]


def test_a_machine_without_hugepages_has_no_pools(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert hugepages.read(SysFs(tmp_path), [0, 1], warnings) == {0: (), 1: ()}
    assert warnings == []


@pytest.mark.parametrize("value", ["garbage", "", "-1", "1.5", "512 pages"])
@pytest.mark.parametrize("name", ["nr_hugepages", "free_hugepages"])
def test_a_pool_with_a_malformed_count_is_left_out_with_a_warning(tmp_path: Path, name: str, value: str) -> None:
    root = machine(tmp_path, "2s2n8c", hugepages={(0, 2 * MIB): (4, 4, 0), (1, 2 * MIB): (5, 5, 0)})
    (root / _NODE0 / name).write_text(value)
    warnings: list[str] = []
    found = hugepages.read(SysFs(root), [0, 1], warnings)
    assert found[0] == ()
    assert [pool.total_pages for pool in found[1]] == [5]
    assert len(warnings) == 1
    assert f"{_NODE0}/{name}" in warnings[0]
    assert repr(value) in warnings[0]


def test_a_malformed_surplus_counts_as_none_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={(0, 2 * MIB): (4, 3, 1)})
    (root / _NODE0 / "surplus_hugepages").write_text("many")
    warnings: list[str] = []
    (pool,) = hugepages.read(SysFs(root), [0], warnings)[0]
    assert (pool.total_pages, pool.free_pages, pool.surplus_pages) == (4, 3, 0)
    assert [("surplus_hugepages" in warning, "'many'" in warning) for warning in warnings] == [(True, True)]


def test_more_free_than_there_are_is_cut_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={(0, 2 * MIB): (4, 9, 0)})
    warnings: list[str] = []
    (pool,) = hugepages.read(SysFs(root), [0], warnings)[0]
    assert pool.free_pages == 4
    assert "free_hugepages: '9' is more than the 4 pages" in warnings[0]


def test_a_folder_that_names_no_page_size_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    (root / "sys/devices/system/node/node0/hugepages/hugepages-bigkB").mkdir()
    warnings: list[str] = []
    assert [pool.page_bytes for pool in hugepages.read(SysFs(root), [0], warnings)[0]] == [2 * MIB]
    assert "'hugepages-bigkB' names no page size" in warnings[0]


def test_global_pools_of_several_nodes_are_laid_on_none(tmp_path: Path) -> None:
    """Nobody can say on which node those pages are."""
    root = machine(tmp_path, "2s2n4c", hugepages={(0, 2 * MIB): (4, 4, 0)})
    for node in (0, 1):
        shutil.rmtree(root / f"sys/devices/system/node/node{node}/hugepages")
    warnings: list[str] = []
    assert hugepages.read(SysFs(root), [0, 1], warnings) == {0: (), 1: ()}
    assert "sys/kernel/mm/hugepages" in warnings[0]
