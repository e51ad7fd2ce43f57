"""Layers and the archive: the same content gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.layer import entries, write_layer
from image.oci import REFERENCE, configuration, write_archive
from nodeagent.version import VERSION

EPOCH_S = 1_700_000_000


def plant(tree: Path, names: list[str]) -> Path:
    """A tree with a setuid program, a link, a folder for all and an empty one; files are written in the given order."""
    for name in names:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tree / "bin/su").chmod(0o6775)
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    (tree / "lib").symlink_to("usr/lib")
    return tree


def test_a_layer_does_not_depend_on_who_wrote_its_files_when_and_in_which_order(tmp_path: Path) -> None:
    files = ["bin/su", "etc/motd", "usr/lib/a.so", "usr/lib-64/b", "usr/ü"]
    first = write_layer(plant(tmp_path / "1", files), tmp_path / "1.gz", mtime_s=EPOCH_S)
    other = plant(tmp_path / "2", files[::-1])
    os.utime(other / "etc/motd", (1, 1))
    second = write_layer(other, tmp_path / "2.gz", mtime_s=EPOCH_S)
    assert (first.blob.digest, first.diff_id) == (second.blob.digest, second.diff_id)
    assert first.blob.digest == f"sha256:{hashlib.sha256((tmp_path / '1.gz').read_bytes()).hexdigest()}"


def test_the_entries_of_a_layer_are_roots_of_one_time_and_without_setuid(tmp_path: Path) -> None:
    made = write_layer(plant(tmp_path / "tree", ["bin/su", "x"]), tmp_path / "layer", mtime_s=EPOCH_S)
    with tarfile.open(made.blob.path) as layer:
        found = {one.name: one for one in layer}
    assert [*found] == ["bin", "bin/su", "lib", "tmp", "x"]
    assert {(one.uid, one.gid, one.uname, one.mtime) for one in found.values()} == {(0, 0, "", EPOCH_S)}
    assert [found[name].mode for name in ("bin/su", "tmp", "x")] == [0o755, 0o1777, 0o644]
    assert found["lib"].linkname == "usr/lib"
    assert made.unpacked_bytes == len("bin/su") + len("x")


def test_a_layer_leaves_out_what_the_one_below_has(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", ["bin/su", "usr/lib/a"])
    below = entries(tree)
    (tree / "usr/lib/b").write_text("b")
    made = write_layer(tree, tmp_path / "layer", mtime_s=EPOCH_S, without=below)
    with tarfile.open(made.blob.path) as layer:
        assert layer.getnames() == ["usr/lib/b"]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[tarfile.TarFile]:
    layer = write_layer(plant(tmp_path / "tree", ["bin/su"]), tmp_path / "layer", mtime_s=0)
    about = configuration([layer], architecture="arm64", epoch_s=EPOCH_S, source="https://sources.example")
    write_archive(tmp_path / "image.tar", [layer], about, mtime_s=EPOCH_S)
    with tarfile.open(tmp_path / "image.tar") as made:
        yield made


def read(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found is not None
    return found.read()


def test_every_blob_is_named_by_its_content_and_every_descriptor_names_a_blob(archive: tarfile.TarFile) -> None:
    blobs = {name.rpartition("/")[2]: read(archive, name) for name in archive.getnames() if name.startswith("blobs/")}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in blobs.items())
    assert json.loads(read(archive, "oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    (top,) = json.loads(read(archive, "index.json"))["manifests"]
    manifest = json.loads(blobs[top["digest"].removeprefix("sha256:")])
    for one in (top, manifest["config"], *manifest["layers"]):
        assert len(blobs.pop(one["digest"].removeprefix("sha256:"))) == one["size"]
    assert not blobs


def test_the_image_has_the_name_by_which_a_pod_finds_it(archive: tarfile.TarFile) -> None:
    """With its host: containerd looks a name without one up under that of a public registry."""
    (top,) = json.loads(read(archive, "index.json"))["manifests"]
    assert top["annotations"]["io.containerd.image.name"] == REFERENCE == f"localhost/nodeagent:{VERSION}"
    assert top["platform"] == {"architecture": "arm64", "os": "linux"}
