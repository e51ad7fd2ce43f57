"""The image from `make image`: what is in it, and that the agent in it runs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nodeagent.version import VERSION
from tests.image.bundle import Bundle, answer
from tests.support.paths import CHECKOUT

if TYPE_CHECKING:
    from image.build import Image

LARGEST_PRODUCT_BYTES = 120 << 20
MODULES = ("ssl", "sqlite3", "ctypes", "zlib", "uuid", "lzma", "bz2", "h2", "pyudev", "asyncinotify", "pynvml")
LINKED = """
import json, os, subprocess
from pathlib import Path
loader = next(Path("/lib").glob("*/ld-linux-*.so.*"))
files = [Path(folder, name) for top in ("/usr", "/lib", "/opt") for folder, _, names in os.walk(top) for name in names]
lacking = {}
for path in files:
    if not path.is_symlink() and path.open("rb").read(4) == b"\\x7fELF":
        done = subprocess.run([loader, "--list", path], capture_output=True, text=True)
        if "not found" in done.stdout or "cannot open shared object" in done.stderr:
            lacking[str(path)] = done.stdout + done.stderr
print(json.dumps(lacking))
"""


def test_the_configuration_is_the_recipes(bundle: Bundle, image: Image, epoch: int) -> None:
    from image import recipe

    assert bundle.config["config"]["Entrypoint"] == ["nodeagent"]
    assert bundle.config["config"]["Cmd"] == ["run", "--config", "/etc/nodeagent/config.yaml"]
    assert bundle.config["config"]["User"] == "0:0"
    assert bundle.config["config"]["Labels"] == recipe.labels("https://sources.example/nodeagent")
    assert bundle.config["created"] == "2020-09-13T12:26:40Z"
    assert bundle.config["rootfs"]["diff_ids"] == [image.base.diff_id, image.product.diff_id]


def test_nothing_in_it_is_setuid_newer_than_its_time_or_anothers(bundle: Bundle, epoch: int) -> None:
    for one in bundle.entries():
        assert not one.mode & (stat.S_ISUID | stat.S_ISGID), one.name
        assert (one.mtime <= epoch, one.uid, one.gid) == (True, 0, 0), one.name
        assert one.isfile() or one.isdir() or one.issym(), one.name
        assert one.issym() or not one.mode & 0o022 or one.mode & stat.S_ISVTX, f"{one.name} can be written by anybody"


def test_there_is_no_compiler_no_shell_and_no_trace_of_the_machine_that_built_it(bundle: Bundle) -> None:
    names = {Path(one.name).name for one in bundle.entries() if not one.isdir()}
    assert not names & {"gcc", "cc", "sh", "bash", "dpkg", "apt-get", "pip", "direct_url.json"}
    traces = [str(CHECKOUT).encode(), b"/.image-", *([sys.base_prefix.encode()] if sys.base_prefix != "/usr" else [])]
    files = [path for path in (bundle.tree / "opt/nodeagent").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if any(trace in path.read_bytes() for trace in traces)]


def test_every_python_file_is_compiled_and_no_start_checks_its_source(bundle: Bundle) -> None:
    """The flags of PEP 552: hash-based and unchecked."""
    compiled = [*(bundle.tree / "opt").rglob("*.pyc"), *(bundle.tree / "usr/lib/python3").parent.rglob("*.pyc")]
    assert len(compiled) > 1000
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\1\0\0\0"}


def test_the_product_stays_within_its_size(image: Image) -> None:
    assert image.product.unpacked_bytes <= LARGEST_PRODUCT_BYTES
    assert image.product.blob.size_bytes < image.base.blob.size_bytes, "an upgrade fetches the smaller one"


def test_the_list_of_content_names_every_package_and_distribution(bundle: Bundle, image: Image) -> None:
    listed = json.loads(image.sbom.read_text())
    assert (listed["bomFormat"], listed["metadata"]["component"]["version"]) == ("CycloneDX", VERSION)
    purls = {one["purl"].partition("?")[0].partition("@")[0] for one in listed["components"]}
    debs = {path.name for path in (bundle.tree / "var/lib/dpkg/status.d").iterdir()}
    assert {one.rpartition("/")[2] for one in purls if one.startswith("pkg:deb/")} == debs >= {"libc6", "libsqlite3-0"}
    assert {"pkg:pypi/nodeagent", "pkg:pypi/h2", "pkg:pypi/pyyaml"} <= purls
    assert (bundle.tree / "opt/nodeagent/share/sbom/nodeagent.cdx.json").read_bytes() == image.sbom.read_bytes()
    licensed = {path.parent.name for path in (bundle.tree / "usr/share/doc").glob("*/copyright")}
    assert not {
        name for name in debs if name not in licensed and not (bundle.tree / "usr/share/doc" / name).is_symlink()
    }


def test_every_library_that_a_file_in_it_needs_is_in_it(bundle: Bundle) -> None:
    assert answer(bundle.run("python", "-c", LINKED)) == {}
    assert bundle.run("python", "-c", f"import {', '.join(MODULES)}; pyudev.Context()").stderr == ""


def test_the_agent_runs_in_it(bundle: Bundle) -> None:
    version = bundle.run("nodeagent", "--version")
    assert version.stdout.startswith(f"nodeagent {VERSION} (core: compiled, /opt/nodeagent/lib/"), version.stderr
    assert answer(bundle.run("nodeagent", "inventory", "-o", "json"))["cpus"]
    without = bundle.run(*bundle.config["config"]["Entrypoint"], *bundle.config["config"]["Cmd"])
    assert "cannot read /etc/nodeagent/config.yaml" in without.stderr


def test_a_second_build_gives_the_same_image(image: Image, tmp_path: Path, epoch: int) -> None:
    """In another folder, with another mask and another seed of hashes."""
    env = {**os.environ, "PYTHONPATH": f"{CHECKOUT / 'packaging'}:{CHECKOUT}", "PYTHONHASHSEED": "7"}
    words = [sys.executable, "-m", "image", "--out", str(tmp_path), "--source", "https://sources.example/nodeagent"]
    done = subprocess.run(words, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert image.digest in done.stdout
    (archive,) = tmp_path.glob("*.oci.tar")
    assert archive.read_bytes() == image.archive.read_bytes()
