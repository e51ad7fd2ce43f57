"""resctrl read and written: what a machine offers, what the kernel refuses and in whose words."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.resctrl.model import Mode, Tree, Unit
from nodeagent.errors import HostError
from nodeagent.host.resctrl import write
from nodeagent.host.resctrl.read import l3_domains, read
from nodeagent.host.resctrl.write import GroupWriter
from nodeagent.host.sysfs.sysfs import SysFs
from tests.doubles.resctrl import FakeResctrl, Ways

TWO = {0: range(4), 1: range(4, 8)}


class Stand:
    """A machine with two L3 caches of four CPUs each, and what writes to it."""

    def __init__(self, kernel: FakeResctrl, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.sysfs = kernel, SysFs(kernel.root)
        for name in ("put", "mkdir", "rmdir"):
            monkeypatch.setattr(write, name, getattr(kernel, name))
        self.writer = GroupWriter(self.sysfs)

    @property
    def tree(self) -> Tree:
        return read(self.sysfs)


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(FakeResctrl(tmp_path, domains=TWO, closids=3), monkeypatch)


def test_intel_s_tree_is_read(stand: Stand) -> None:
    stand.kernel.other("batch", L3={0: 0xF0, 1: 0xF})
    tree = stand.tree
    cache = tree.caches["L3"]
    assert (cache.full, cache.least_ways, cache.sparse, cache.domains) == (0xFFF, 1, False, (0, 1))
    assert tree.bandwidth is not None
    assert (tree.bandwidth.unit, tree.bandwidth.least, tree.bandwidth.step) == (Unit.PERCENT, 10, 10)
    assert tree.closids == 3 and tree.rmids == 32
    assert tree.events == ("llc_occupancy", "mbm_total_bytes", "mbm_local_bytes")
    assert tree.groups["batch"].schemata == {"L3": {0: 0xF0, 1: 0xF}, "MB": {0: 100, 1: 100}}
    assert tree.root.mode == Mode.SHAREABLE


def test_amd_s_tree_is_read(tmp_path: Path) -> None:
    kernel = FakeResctrl(
        tmp_path, domains=TWO, caches={"L3": Ways(full=0xFFFF, sparse=True)}, bandwidth="amd", closids=16
    )
    tree = read(SysFs(kernel.root))
    assert tree.caches["L3"].sparse and tree.caches["L3"].ways == 16
    assert tree.bandwidth is not None and tree.bandwidth.unit == Unit.EIGHTHS
    assert tree.root.schemata["MB"] == {0: 2048, 1: 2048}


def test_code_and_data_apart_and_limits_in_mb_are_read(tmp_path: Path) -> None:
    caches = {"L3": Ways(), "L2": Ways(full=0xFF)}
    kernel = FakeResctrl(tmp_path, domains=TWO, cdp=True, bandwidth="MBps", caches=caches)
    tree = read(SysFs(kernel.root))
    assert [one.name for one in tree.at_level(3)] == ["L3CODE", "L3DATA"]
    assert [one.name for one in tree.at_level(2)] == ["L2"] and tree.caches["L2"].domains == (0, 1, 2, 3)
    assert tree.bandwidth is not None and tree.bandwidth.unit == Unit.MIBPS


def test_a_machine_that_only_monitors_is_read(tmp_path: Path) -> None:
    kernel = FakeResctrl(tmp_path, domains=TWO, caches={}, bandwidth=None)
    tree = read(SysFs(kernel.root))
    assert not tree.caches and tree.bandwidth is None and tree.closids == 0 and tree.rmids == 32


def test_old_kernels_show_numbers_with_blanks_and_no_sparse_masks(stand: Stand) -> None:
    """Documentation/filesystems/resctrl.rst has "MB:0=2048;1=  16" as an example."""
    stand.kernel.mount.joinpath("info/L3/sparse_masks").unlink()
    stand.kernel.mount.joinpath("schemata").write_text("    MB:0=100;1=  10\n    L3:0=fff;1=fff\n")
    assert stand.tree.root.schemata["MB"] == {0: 100, 1: 10} and not stand.tree.caches["L3"].sparse


@pytest.mark.parametrize(
    ("there", "why"),
    [(False, "there is no /sys/fs/resctrl"), (True, "it is not mounted: mount -t resctrl resctrl /sys/fs/resctrl")],
)
def test_where_it_is_not_mounted_that_is_reported(tmp_path: Path, there: bool, why: str) -> None:
    if there:
        (tmp_path / "sys/fs/resctrl").mkdir(parents=True)
    with pytest.raises(HostError, match=why):
        read(SysFs(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("info/L3/cbm_mask", "xyz", "'xyz' is not valid"),
        ("info/L3/min_cbm_bits", "", "missing or empty"),
        ("schemata", "L3:0=zz", "'L3:0=zz' is no line of resources"),
        ("mode", "open", "'open' is no mode"),
    ],
)
def test_garbage_is_named_with_its_file(stand: Stand, file: str, text: str, why: str) -> None:
    stand.kernel.mount.joinpath(file).write_text(text)
    with pytest.raises(HostError, match=why) as error:
        read(stand.sysfs)
    assert str(stand.kernel.mount / file) in str(error.value)


def test_the_domains_of_cpus_are_the_ids_of_their_l3_caches(stand: Stand) -> None:
    assert l3_domains(stand.sysfs, [0, 3, 4, 99]) == {0: 0, 3: 0, 4: 1}


def test_a_group_is_made_written_and_read_back(stand: Stand) -> None:
    stand.writer.make("a", stand.tree)
    found = stand.writer.write("a", {"L3": {0: 0x3, 1: 0xC}, "MB": {0: 20}}, stand.tree)
    assert found.schemata == {"L3": {0: 0x3, 1: 0xC}, "MB": {0: 20, 1: 100}}
    stand.writer.make("a", stand.tree)
    stand.writer.remove("a")
    stand.writer.remove("a")
    assert set(stand.kernel.groups) == {""}


def test_a_refusal_has_the_kernels_words(stand: Stand) -> None:
    stand.writer.make("a", stand.tree)
    with pytest.raises(HostError, match=r"Invalid argument, value 'L3:0=5' \(The mask 5 has non-consecutive 1-bits\)"):
        stand.writer.write("a", {"L3": {0: 0x5}}, stand.tree)
    with pytest.raises(HostError, match=r"\(Unknown or unsupported resource name 'L2'\)"):
        stand.writer.write("a", {"L2": {0: 0x5}}, stand.tree)
    with pytest.raises(HostError, match=r"\(MB value 5 out of range \[10,100\]\)"):
        stand.writer.write("a", {"MB": {0: 5}}, stand.tree)
    with pytest.raises(HostError, match=r"\(Schemata overlaps\)"):
        stand.writer.set_mode("a", Mode.EXCLUSIVE)


def test_a_refused_line_changes_none_of_the_others(stand: Stand) -> None:
    stand.writer.make("a", stand.tree)
    before = stand.kernel.schemata("a")
    with pytest.raises(HostError):
        stand.writer.write("a", {"L3": {0: 0x3}, "MB": {0: 5}}, stand.tree)
    assert stand.kernel.schemata("a") == before


def test_where_no_group_is_left_it_says_how_many_there_are_and_whose(stand: Stand) -> None:
    stand.kernel.other("theirs")
    stand.writer.make("a", stand.tree)
    with pytest.raises(HostError) as error:
        stand.writer.make("b", stand.tree)
    assert str(error.value) == (
        f"cannot make {stand.kernel.mount / 'b'}: No space left on device (Out of CLOSIDs): all 3 groups that the "
        "hardware has are in use: the default one, a, theirs"
    )


def test_an_exclusive_group_keeps_the_masks_of_others_off(stand: Stand) -> None:
    stand.writer.write("", {"L3": {0: 0xFF0, 1: 0xFF0}}, stand.tree)
    stand.writer.make("a", stand.tree)
    stand.writer.write("a", {"L3": {0: 0xF, 1: 0xF}}, stand.tree)
    assert stand.writer.set_mode("a", Mode.EXCLUSIVE).mode == Mode.EXCLUSIVE
    with pytest.raises(HostError, match=r"\(Overlaps with exclusive group\)"):
        stand.writer.write("", {"L3": {0: 0xFFF}}, stand.tree)
    assert stand.kernel.mount.joinpath("info/L3/bit_usage").read_text() == "0=SSSSSSSSEEEE;1=SSSSSSSSEEEE\n"


def test_bandwidth_that_the_kernel_rounds_is_taken_and_anything_else_is_not(stand: Stand) -> None:
    stand.writer.make("a", stand.tree)
    assert stand.writer.write("a", {"MB": {0: 15}}, stand.tree).schemata["MB"][0] == 20
    stand.kernel._limit = lambda text: 100  # type: ignore[method-assign]
    with pytest.raises(HostError, match=r"it is MB:0=100, value 'MB:0=20'"):
        stand.writer.write("a", {"MB": {0: 20}}, stand.tree)
