"""The picture as SVG: whole, without anything from elsewhere, and with every part named."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.cli.picture.svg import WIDTH, svg_of
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.picture.draw import draw
from tests.builders import docs_images
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pictures import large_machine, many_grants

NS = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> str:
    inventory = large_machine()
    return svg_of(draw(inventory, many_grants(inventory)))


def titles(svg: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).iter(f"{NS}title")]


def test_each_cpu_and_device_has_a_name_for_who_cannot_see_it(drawn: str) -> None:
    said = titles(drawn)
    cpus = [re.match(r"CPU (\d+): ", one) for one in said]
    assert sorted(int(one[1]) for one in cpus if one) == list(range(256))
    assert len([one for one in said if one.startswith(("gpu ", "nic "))]) == 64
    assert "CPU 0: claim team/claim-0" in said and "CPU 255: free" in said
    assert ET.fromstring(drawn).attrib["role"] == "img"


def test_nothing_comes_from_elsewhere_and_both_backgrounds_are_served(drawn: str) -> None:
    assert not re.search(r"href|url\(|@import|<script|<image|<foreignObject", drawn)
    assert set(re.findall(r"https?://[^\"]*", drawn)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme:dark" in drawn


def rectangles(svg: str) -> Iterator[tuple[float, float]]:
    for one in ET.fromstring(svg).iter(f"{NS}rect"):
        yield (
            float(one.get("x", "0")) + float(one.attrib["width"]),
            float(one.get("y", "0")) + float(one.attrib["height"]),
        )


def test_nothing_is_drawn_outside_of_the_image(drawn: str) -> None:
    height = float(ET.fromstring(drawn).attrib["height"])
    assert all(right <= WIDTH and below <= height for right, below in rectangles(drawn))


def test_a_name_cannot_add_elements() -> None:
    evil = "</text><script>alert(1)</script>&\x00"
    grant = Grant(id="g", holder=Holder(api=DEVICE_PLUGIN, namespace="n", pod=evil), cpus=CpuSet([0]))
    svg = svg_of(draw(inventory_of(even_rows(1, 1, 1, 1, 1)), [grant]))
    assert not list(ET.fromstring(svg).iter(f"{NS}script"))
    assert f"CPU 0: n/{evil[:-1]}\N{REPLACEMENT CHARACTER}" in titles(svg)


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_a_target_that_exists_is_refused_and_stays_as_it_is(tmp_path: Path, there: str) -> None:
    """--force replaces a file."""
    target = tmp_path / "map.svg"
    if there == "file":
        target.write_text("mine")
    elif there == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    words = [*docs_images.map_words(tmp_path / "root"), "--svg", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nodeagent: cannot write --svg {target}: it exists; --force replaces it\n"
    if there == "file":
        assert target.read_text() == "mine"
        subprocess.run([*words, "--force"], check=True)
        assert target.read_text().startswith("<svg ")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["map.svg", "root"], "no draft is left"


def test_a_folder_is_not_replaced_by_force(tmp_path: Path) -> None:
    words = [*docs_images.map_words(tmp_path / "root"), "--svg", str(tmp_path), "--force"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.skipif(not docs_images.FOLDER.exists(), reason="an installed package has no docs")
def test_the_image_in_the_documentation_is_what_the_makefile_makes(tmp_path: Path) -> None:
    docs_images.make(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == (docs_images.FOLDER / "map.svg").read_text(), "run make images"
