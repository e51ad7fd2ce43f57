"""Pools of hugepages per node, with what the kernel promises only for the whole machine: read, changed, and told
apart from what others use."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.core.model.topology import HugepagePool
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.hugepages import pools as hugepages
from nodeagent.host.hugepages import resize as hugepageset
from nodeagent.host.hugepages import use as hugepageuse
from nodeagent.host.hugepages.available import available_bytes
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import cpus as topology
from nodeagent.managers.inventory.scanner import InventoryScanner
from tests.builders.machines import GIB, MIB, Shape, build, machine
from tests.doubles.hugepage_kernel import PageKernel
from tests.support.claim_node import claim_room

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
    found = pools(machine(tmp_path, "2s2n8c", hugepages=pages, reserved={2 * MIB: 40}))
    assert [found[node, 2 * MIB].reserved_pages for node in (0, 1)] == [0, 40]


def test_no_node_holds_more_reserved_than_free_pages_and_none_is_lost(tmp_path: Path) -> None:
    pages = {(node, 2 * MIB): (100, free, 0) for node, free in enumerate((30, 50, 20, 50))}
    found = pools(machine(tmp_path, "2s4n8c", hugepages=pages, reserved={2 * MIB: 120}))
    assert [found[node, 2 * MIB].reserved_pages for node in range(4)] == [20, 50, 0, 50]


def test_a_machine_without_node_folders_has_its_pools_on_node_0(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={(0, MIB): (8, 6, 1)}, reserved={MIB: 2})
    shutil.rmtree(root / "sys/devices/system/node")
    assert pools(root)[0, MIB] == HugepagePool(
        node=0, page_bytes=MIB, total_pages=8, free_pages=6, reserved_pages=2, surplus_pages=1
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
    """On which node those pages are is not known."""
    root = machine(tmp_path, "2s2n4c", hugepages={(0, 2 * MIB): (4, 4, 0)})
    for node in (0, 1):
        shutil.rmtree(root / f"sys/devices/system/node/node{node}/hugepages")
    warnings: list[str] = []
    assert hugepages.read(SysFs(root), [0, 1], warnings) == {0: (), 1: ()}
    assert "sys/kernel/mm/hugepages" in warnings[0]


# ---------------------------------------------------------------- changing a pool

POOL = (0, 2 * MIB)


def kernel_of(tmp_path: Path, counts: tuple[int, int, int] = (4, 4, 0), **more: Any) -> PageKernel:
    reserved = more.pop("reserved", 0)
    return PageKernel(machine(tmp_path, "1s1n4c", hugepages={POOL: counts}, reserved={2 * MIB: reserved}), **more)


def set_pages(kernel: PageKernel, pages: int, **more: Any) -> int:
    return hugepageset.set_pages(SysFs(kernel.root), *POOL, pages, put=kernel.put, **more)


def test_a_pool_grows_in_steps_of_one_gibibyte(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path)
    assert set_pages(kernel, 1100) == 1100
    assert kernel.sizes == [516, 1028, 1100]
    assert kernel.counts(POOL) == (1100, 1100, 0)


def test_a_pool_that_has_what_is_asked_is_not_written(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path)
    assert set_pages(kernel, 4) == 4
    assert kernel.written == []


def test_what_the_kernel_gives_is_what_is_said(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, memory={POOL: 9})
    assert set_pages(kernel, 20) == 9
    assert kernel.counts(POOL) == (9, 9, 0)


def test_memory_is_compacted_and_asked_again_while_that_brings_more(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, fragmented={POOL: [6, 9, 20]})
    assert set_pages(kernel, 20) == 20
    assert [path.rpartition("/")[2] for path, _ in kernel.written] == ["nr_hugepages", "compact"] * 2 + ["nr_hugepages"]


def test_a_kernel_that_gives_one_page_a_try_is_not_asked_for_ever(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, fragmented={POOL: list(range(5, 100))})
    assert set_pages(kernel, 100) == 9
    assert len(kernel.sizes) == hugepageset.TRIES + 1


def test_a_machine_that_cannot_compact_gives_what_it_has(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, memory={POOL: 9})

    def put(path: str, value: str) -> None:
        if path.endswith("compact"):
            raise HostError(f"cannot write {path}: No such file or directory, value {value!r}")
        kernel.put(path, value)

    assert hugepageset.set_pages(SysFs(kernel.root), *POOL, 20, put=put) == 9


def test_growing_ends_when_it_may_not_go_on(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path)
    answers = iter([True, False])
    assert set_pages(kernel, 5000, go_on=lambda: next(answers)) == 516


@pytest.mark.parametrize(("reserved", "left"), [(0, 6), (2, 8)])
def test_a_pool_shrinks_by_free_pages_that_nobody_waits_for(tmp_path: Path, reserved: int, left: int) -> None:
    """Otherwise the kernel would make surplus pages of those in use."""
    kernel = kernel_of(tmp_path, (10, 4, 0), reserved=reserved)
    assert set_pages(kernel, 0) == left
    assert kernel.counts(POOL) == (left, left - 6, 0)
    assert kernel.sizes == [left], "no surplus is made, not even for a moment"


def test_a_page_that_is_mapped_just_before_a_pool_shrinks_stays_a_lasting_one(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, (10, 10, 0))

    def put(path: str, value: str) -> None:
        if not kernel.sizes:
            kernel.use(POOL, 3)
        kernel.put(path, value)

    assert hugepageset.set_pages(SysFs(kernel.root), *POOL, 0, put=put) == 3
    assert kernel.counts(POOL) == (3, 0, 0)


def test_surplus_pages_are_no_part_of_the_size(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, (6, 0, 2))
    assert set_pages(kernel, 8) == 8
    assert kernel.counts(POOL) == (8, 2, 0)


@pytest.mark.parametrize("text", ["", "many", "-1"])
def test_a_pool_whose_size_cannot_be_read_is_not_written(tmp_path: Path, text: str) -> None:
    kernel = kernel_of(tmp_path)
    (kernel.root / _NODE0 / "nr_hugepages").write_text(text)
    with pytest.raises(HostError, match=f"cannot read .*{_NODE0}/nr_hugepages: '{text}' is not a count of pages"):
        set_pages(kernel, 8)
    assert kernel.written == []


def test_a_size_or_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    with pytest.raises(HostError, match=r"cannot read .*node7/hugepages/hugepages-2048kB/nr_hugepages: No such file"):
        hugepageset.set_pages(SysFs(root), 7, 2 * MIB, 1)


def meminfo(tmp_path: Path, *, node: str, machine: str = "MemAvailable: 1000 kB\n") -> SysFs:
    for path, text in (("sys/devices/system/node/node3/meminfo", node), ("proc/meminfo", machine)):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return SysFs(tmp_path)


@pytest.mark.parametrize(
    ("node", "available_kib"),
    [
        ("Node 3 MemTotal: 900 kB\nNode 3 MemFree:  100 kB\n", 100),
        ("Node 3 MemFree: 100 kB\nNode 3 Active(file): 30 kB\nNode 3 Inactive(file): 8 kB\n", 119),
        ("Node 3 MemFree: 100 kB\nNode 3 SReclaimable:       10 kB\nNode 3 Active(anon): 500 kB\n", 105),
        ("Node 3 MemFree: 5000 kB\n", 1000),
    ],
)
def test_what_is_available_on_a_node_is_free_or_half_of_what_can_be_reclaimed(
    node: str, available_kib: int, tmp_path: Path
) -> None:
    """And never more than the machine has, which may have promised it elsewhere."""
    assert available_bytes(meminfo(tmp_path, node=node), 3) == available_kib << 10


@pytest.mark.parametrize(
    ("node", "machine"), [("", "MemAvailable: 1 kB\n"), ("Node 3 MemFree: x kB\n", "MemAvailable: 1 kB")]
)
def test_memory_that_is_not_shown_is_not_available(node: str, machine: str, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot read .*node3/meminfo: expected a line MemFree: N kB"):
        available_bytes(meminfo(tmp_path, node=node, machine=machine), 3)
    with pytest.raises(HostError, match=r"cannot read .*proc/meminfo: expected a line MemAvailable: N kB"):
        available_bytes(meminfo(tmp_path, node="Node 3 MemFree: 1 kB\n", machine="MemFree: 1 kB\n"), 3)


def test_a_write_that_is_refused_is_named_with_its_value(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c")
    path = root / _NODE0 / "nr_hugepages"

    def put(path: str, value: str) -> None:
        cgroupset.put("/proc/version", value)  # as a read-only /sys: it cannot be written

    with pytest.raises(HostError, match=r"cannot write /proc/version: .*, value '3'"):
        hugepageset.set_pages(SysFs(root), *POOL, 3, put=put)
    assert path.read_text() == "0\n"


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9), st.integers(0, 60), st.integers(0, 60))
def test_no_size_takes_a_page_that_is_in_use_or_makes_it_surplus(
    free: int, used: int, reserved: int, pages: int, memory: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        counts = (free + used, free, 0)
        kernel = kernel_of(Path(folder), counts, reserved=min(reserved, free), memory={POOL: max(memory, free + used)})
        got = set_pages(kernel, pages)
        total, left, surplus = kernel.counts(POOL)
        assert (got, surplus) == (total, 0)
        assert total - left == used
        assert left >= min(reserved, free)
        assert got == pages or (got < pages and got == max(memory, free + used)) or left == min(reserved, free)


def test_the_machine_itself_gives_pages_and_takes_them_back() -> None:
    sysfs = SysFs()
    try:
        before = hugepageset.counts(sysfs, *POOL)
        cgroupset.put(sysfs.path(f"{_NODE0}/nr_hugepages"), str(before.persistent_pages))
    except HostError as error:
        pytest.skip(f"this machine's pools cannot be changed: {error}")
    try:
        assert hugepageset.set_pages(sysfs, *POOL, before.persistent_pages + 4) > before.persistent_pages
        after = hugepageset.counts(sysfs, *POOL)
        assert hugepageset.totals(sysfs, 0)[2 * MIB] == after.total_pages
    finally:
        assert hugepageset.set_pages(sysfs, *POOL, before.persistent_pages) == before.persistent_pages


# ---------------------------------------------------------------- whose pages are in use


def cgroup(root: Path, path: str, *, stat: str | None = None, current: int = 0, promised: int | None = None) -> None:
    """Pages of 2 MiB."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True)
    (folder / "hugetlb.2MB.current").write_text(f"{current * 2 * MIB}\n")
    (folder / "hugetlb.2MB.rsvd.current").write_text(f"{(current if promised is None else promised) * 2 * MIB}\n")
    if stat is not None:
        (folder / "hugetlb.2MB.numa_stat").write_text(stat)


def stat(*pages: int) -> str:
    by_node = " ".join(f"N{node}={count * 2 * MIB}" for node, count in enumerate(pages))
    return f"total={sum(pages) * 2 * MIB} {by_node}\n"


def used(root: Path, *paths: str) -> hugepageuse.Uses | None:
    return hugepageuse.uses(SysFs(root), paths, [2 * MIB])


def test_what_holders_have_faulted_is_counted_by_node(tmp_path: Path) -> None:
    cgroup(tmp_path, "kubepods/a", stat=stat(3, 1), current=4, promised=6)
    cgroup(tmp_path, "kubepods/b", stat=stat(0, 2), current=2)
    found = used(tmp_path, "/kubepods/a", "kubepods/b", "kubepods/gone")
    assert found == hugepageuse.Uses({(0, 2 * MIB): 3, (1, 2 * MIB): 3}, {2 * MIB: 2})


def test_a_cgroup_below_another_one_is_not_counted_twice(tmp_path: Path) -> None:
    cgroup(tmp_path, "pods/a", stat=stat(3), current=3)
    cgroup(tmp_path, "pods/a/b", stat=stat(2), current=2)
    cgroup(tmp_path, "pods/ab", stat=stat(1), current=1)
    found = used(tmp_path, "pods/a/b", "pods/a", "pods/ab")
    assert found is not None and found.used == {(0, 2 * MIB): 4}


def test_a_kernel_that_does_not_say_on_which_node_leaves_it_unknown(tmp_path: Path) -> None:
    cgroup(tmp_path, "kubepods/a", current=4)
    assert used(tmp_path, "kubepods/a") is None


@pytest.mark.parametrize("text", ["", "4096", "total=1 N0=x", "total=1 N0", "hierarchical_total=0 N0=0"])
def test_a_malformed_count_of_a_cgroup_is_named(tmp_path: Path, text: str) -> None:
    cgroup(tmp_path, "kubepods/a", stat=text, current=4)
    with pytest.raises(HostError, match=r"cannot read .*kubepods/a/hugetlb.2MB.numa_stat: "):
        used(tmp_path, "kubepods/a")


def test_a_scan_tells_pages_of_holders_from_foreign_ones(tmp_path: Path) -> None:
    root = machine(
        tmp_path, "1s2n4c", hugepages={(0, 2 * MIB): (16, 8, 0), (1, 2 * MIB): (4, 4, 0)}, reserved={2 * MIB: 5}
    )
    cgroup(root, "kubepods/a", stat=stat(3, 0), current=3, promised=6)
    first, second = (node.hugepages[0] for node in scan(SysFs(root), [], holders=["kubepods/a"]).numa_nodes)
    assert (first.own_used_pages, first.foreign_pages, first.reserved_pages, first.own_reserved_pages) == (3, 5, 5, 3)
    assert (second.own_used_pages, second.foreign_pages) == (0, 0)


def test_where_nobody_knows_the_holders_no_page_is_called_foreign(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={POOL: (16, 8, 0)})
    (node,) = scan(SysFs(root), []).numa_nodes
    assert (node.hugepages[0].own_used_pages, node.hugepages[0].foreign_pages) == (None, None)


def test_a_cgroup_that_cannot_be_read_is_a_warning_and_leaves_the_rest(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={POOL: (16, 8, 0)})
    cgroup(root, "kubepods/a", stat="nonsense", current=4)
    found = scan(SysFs(root), [], holders=["kubepods/a"])
    assert any("hugetlb.2MB.numa_stat: 'nonsense' is not" in one for one in found.warnings)
    assert found.numa_nodes[0].hugepages[0].foreign_pages is None


async def test_a_rescan_asks_who_holds_pages_at_that_moment(folder: Path) -> None:
    async with claim_room(folder, hugepages={POOL: (16, 8, 0)}) as room:
        cgroup(room.tree.root, "kubepods/a", stat=stat(3), current=3)
        known: list[list[str] | None] = [None, ["kubepods/a"], []]
        sysfs = SysFs(room.tree.root)
        watched = InventoryScanner(
            room.agent, sysfs, builtin_kinds(), folder / "state", lambda: room.config, lambda: known.pop(0)
        )
        foreign = []
        while known:
            await watched.rescan()
            foreign.append(room.agent.inventory.numa_nodes[0].hugepages[0].foreign_pages)
        await watched.close()
        assert foreign == [None, 5, 8]


def test_what_is_known_of_users_stands_in_the_document_and_reads_back(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n4c", hugepages={POOL: (16, 8, 0)}, reserved={2 * MIB: 5})
    cgroup(root, "kubepods/a", stat=stat(3), current=3, promised=6)
    found = scan(SysFs(root), [], holders=["kubepods/a"])
    document = to_document(found)
    (pool,) = document["numa_nodes"][0]["hugepages"]
    assert [pool[name] for name in ("own_used_pages", "own_reserved_pages", "foreign_pages")] == [3, 3, 5]
    assert from_document(json.dumps(document), source="test").numa_nodes[0].hugepages == found.numa_nodes[0].hugepages
