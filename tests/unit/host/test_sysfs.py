"""The one entry point to the machine: strict, bounded by its root, whole files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], SysFs]:
    def write(name: str, text: str) -> SysFs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return SysFs(tmp_path)

    return write


def test_text_comes_without_the_white_space_and_nul_around_it(put: Callable[[str, str], SysFs]) -> None:
    assert put("a", " 0-3\n\0").text("a") == "0-3"


def test_a_missing_file_is_refused_with_its_path_unless_a_default_is_given(tmp_path: Path) -> None:
    sysfs = SysFs(tmp_path)
    with pytest.raises(HostError, match=f"cannot read {tmp_path}/nothing: No such file"):
        sysfs.text("nothing")
    assert sysfs.text("nothing", None) is None
    assert sysfs.text("nothing", "") == ""
    assert sysfs.number("nothing", 7) == 7


@pytest.mark.parametrize(("text", "number"), [("12\n", 12), ("-1", -1), ("0x1f", 31), ("0X1F", 31)])
def test_numbers_are_decimal_or_marked_hexadecimal(put: Callable[[str, str], SysFs], text: str, number: int) -> None:
    assert put("n", text).number("n") == number


@pytest.mark.parametrize("text", ["garbage", "1_000", "12 kB", "1.5", "٣"])
def test_a_malformed_number_names_file_and_value(put: Callable[[str, str], SysFs], text: str) -> None:
    sysfs = put("n", text)
    with pytest.raises(HostError) as refused:
        sysfs.number("n", 5)
    assert sysfs.path("n") in str(refused.value)
    assert repr(text) in str(refused.value)


def test_lists_and_masks_of_cpus_say_the_same(put: Callable[[str, str], SysFs]) -> None:
    put("list", "0,32-33\n")
    sysfs = put("mask", "00000003,00000001\n")
    assert sysfs.cpus("list") == sysfs.cpu_mask("mask") == CpuSet((0, 32, 33))


@pytest.mark.parametrize("text", ["3-1", "0-", "a", "99999999", "0-3,,5"])
def test_a_malformed_list_names_file_and_value(put: Callable[[str, str], SysFs], text: str) -> None:
    sysfs = put("list", text)
    with pytest.raises(HostError) as refused:
        sysfs.cpus("list")
    assert sysfs.path("list") in str(refused.value)
    assert repr(text) in str(refused.value)


def test_an_empty_list_is_no_cpus_and_a_missing_one_the_default(put: Callable[[str, str], SysFs]) -> None:
    sysfs = put("list", "\n")
    assert sysfs.cpus("list") == CpuSet()
    assert sysfs.cpus("nothing") is None


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(HostError, match="folder: Is a directory"):
        SysFs(tmp_path).text("folder", None)


def test_a_file_that_comes_in_pieces_is_read_to_its_end(put: Callable[[str, str], SysFs]) -> None:
    text = "".join(f"processor\t: {cpu}\n" for cpu in range(5000))
    assert put("proc/cpuinfo", text).text("proc/cpuinfo") == text.strip()


def test_a_file_of_the_kernel_larger_than_a_page_is_read_to_its_end() -> None:
    """The kernel gives /proc/kallsyms page by page; its last line is there all the same, or the 1 MiB limit is met."""
    text = SysFs("/").text("proc/kallsyms", None)
    if not text:
        pytest.skip("no /proc/kallsyms")
    assert len(text) > 1 << 16


def test_the_longest_attributes_are_read_to_their_end(put: Callable[[str, str], SysFs]) -> None:
    """Also those of exactly a page, after which nothing follows."""
    for length in (0, 1, 4095, 4096, 4097, 8192, 20000):
        path = f"sys/devices/system/cpu/of{length}"
        assert put(path, "1" * length).text(path) == "1" * length


def test_files_of_records_are_read_to_their_end() -> None:
    """The kernel ends a piece after the last whole record: a short one is not the end of /proc/self/maps."""
    assert len(SysFs("/").text("proc/self/maps")) > 2 * 4096


def test_a_pipe_without_a_writer_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert SysFs(tmp_path).text("pipe") == ""


def test_numbered_entries_come_by_number(tmp_path: Path) -> None:
    for name in ("cpu10", "cpu2", "cpufreq", "cpu", "node1", "cpu١"):
        (tmp_path / "cpu" / name).mkdir(parents=True)
    assert list(SysFs(tmp_path).numbered("cpu", "cpu")) == [(2, "cpu/cpu2"), (10, "cpu/cpu10")]


def test_names_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    assert SysFs(tmp_path).names("nothing") == []


def test_links_are_read_and_followed_only_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "devices/pci").mkdir(parents=True)
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus/inside").symlink_to("../devices/pci")
    (tmp_path / "bus/outside").symlink_to("/etc")
    sysfs = SysFs(tmp_path)
    assert sysfs.link_name("bus/inside") == "pci"
    assert sysfs.link("bus/nothing") is None
    assert sysfs.link("devices/pci") is None
    for real in (sysfs.real, lambda path: sysfs.entry(*path.split("/"))):
        assert real("bus/inside") == "devices/pci"
        assert real("bus/outside") == "bus/outside"
        assert real("devices/pci") == "devices/pci"
        assert real("bus/nothing") == "bus/nothing"
