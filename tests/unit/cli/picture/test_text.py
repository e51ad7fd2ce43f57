"""The picture as text: one character a CPU, as wide as the terminal and no wider, and nothing lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.cli.picture.lines import Span, plain, text_of, wrapped
from nodeagent.cli.picture.svg import svg_of
from nodeagent.cli.picture.text import picture_lines
from nodeagent.cli.shared.source import read_root
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.picture.draw import draw
from nodeagent.core.picture.values import Picture
from tests.builders import tables
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pictures import large_machine, many_grants, pod_grant


def lines_of(picture: Picture, width: int = 80) -> list[str]:
    return [text_of(line) for line in picture_lines(picture, width)]


def rows_of(lines: Sequence[str]) -> list[str]:
    """The rows of CPUs, without the number that each starts with."""
    parts = [part.splitlines() for part in "\n".join(lines).split("\n\n")]
    machine = [line for part in parts if part[0].startswith(("package", " ")) for line in part]
    found = [re.fullmatch(r" {3,6}\d+ ([^:]*)", line) for line in machine]
    return [one[1] for one in found if one]


def test_256_cpus_are_drawn_within_80_columns_with_one_character_each() -> None:
    inventory = large_machine()
    lines = lines_of(draw(inventory, many_grants(inventory)))
    drawn = "".join(rows_of(lines)).replace(" ", "")
    assert max(map(len, lines)) <= 80
    assert len(drawn) == 256
    assert drawn.count(".") == 256 - 200


def test_a_column_is_a_core_and_a_row_its_threads() -> None:
    """Cores with a common cache stand together, and a row starts with the number of its first CPU."""
    picture = draw(inventory_of(even_rows(1, 1, 2, 2, 2)), [pod_grant(1, CpuSet([0, 4])), pod_grant(2, CpuSet([3, 7]))])
    assert lines_of(picture)[3:6] == [" node 0: CPUs 0-7, 16Gi dram", "   0 A. .B", "   4 A. .B"]


LARGE = draw(large_machine(), many_grants(large_machine(), 60))


@given(width=st.integers(0, 200))
def test_no_line_is_wider_than_the_terminal_and_no_cpu_or_holder_is_lost(width: int) -> None:
    lines = lines_of(LARGE, width)
    assert max(map(len, lines)) <= max(width, 20)
    assert len("".join(rows_of(lines)).replace(" ", "")) == 256
    joined = "".join("".join(lines).split())
    assert all(holder.name.replace(" ", "") in joined for holder in LARGE.holders)


def test_each_package_node_device_and_holder_is_named() -> None:
    devices = [
        Device(kind="gpu", id="0000:17:00.0", numa_node=0, paths=("/dev/g",)),
        Device(kind="nic", id="eth9", attributes={"name": "e"}),
    ]
    inventory = inventory_of(even_rows(2, 1, 1, 2, 1), devices=devices)
    text = "\n".join(lines_of(draw(inventory, [pod_grant(1, CpuSet([0]), devices=("0000:17:00.0",))])))
    for part in ("package 0", "package 1", "node 1: CPUs 2-3", "gpu A 0000:17:00.0", "without a NUMA node", ". free"):
        assert part in text
    assert "A team/pod-1: CPUs 0, 0000:17:00.0" in text


def test_what_a_name_contains_cannot_move_the_cursor() -> None:
    grant = Grant(id="g", holder=Holder(api=DEVICE_PLUGIN, namespace="n", pod="\x1b[2Jp\n"), cpus=CpuSet([0]))
    text = "".join(lines_of(draw(inventory_of(even_rows(1, 1, 1, 1, 1)), [grant])))
    assert "\x1b" not in text and "\n" not in text and "n/\N{REPLACEMENT CHARACTER}" in text


@pytest.mark.parametrize("health", ["unhealthy", "unknown"])
def test_a_device_that_is_ill_has_a_mark_that_is_explained(health: str) -> None:
    picture = draw(inventory_of(even_rows(1, 1, 1, 1, 1), devices=[Device(kind="nic", id="x", numa_node=0)]), [])
    (package,) = picture.packages
    ill = tuple(replace(one, health=health) for one in package.nodes[0].devices)
    picture = replace(picture, packages=(replace(package, nodes=(replace(package.nodes[0], devices=ill),)),))
    lines = lines_of(picture)
    assert "   nic .! x" in lines and "! not healthy" in lines[-1]


@given(st.lists(st.text("ab", min_size=1, max_size=30), max_size=8), st.integers(3, 40))
def test_wrapping_keeps_every_character_and_the_width(texts: list[str], width: int) -> None:
    lines = [text_of(one) for one in wrapped([(plain(text),) for text in texts], width, first=">", rest="  ")]
    assert "".join("".join(lines).split()) == ">" + "".join(texts)
    assert max(map(len, lines)) <= max(width, 3)


def test_spans_keep_their_holders_when_a_word_is_cut() -> None:
    lines = list(wrapped([(Span("aaaa", 1), Span("bbbb", 2))], 3))
    assert [span for line in lines for span in line] == [Span("a", 1)] * 4 + [Span("b", 2)] * 4


@pytest.mark.parametrize("name", sorted(path.stem for path in tables.TABLES.glob("*.json")))
def test_every_recorded_machine_is_drawn_within_80_columns(name: str, recorded_tree: Callable[[str], Path]) -> None:
    """And as an SVG."""
    inventory = read_root(str(recorded_tree(name)))
    picture = draw(inventory, [])
    lines = lines_of(picture)
    assert max(map(len, lines)) <= 80
    assert len("".join(rows_of(lines)).replace(" ", "")) == len(inventory.cpus_online)
    svg = ElementTree.fromstring(svg_of(picture))
    titles = [one.text or "" for one in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len([one for one in titles if one.startswith("CPU ")]) == len(inventory.cpus_online)
