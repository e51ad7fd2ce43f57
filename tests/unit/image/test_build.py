"""A build that cannot be made says why, and leaves nothing under the final names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT


def program(folder: Path, name: str, script: str) -> None:
    """A program in a folder that is the whole PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def apt(folder: Path, **scripts: str) -> None:
    """The four programs that a build needs, on a machine without a network unless the scripts say otherwise."""
    usual = {
        "dpkg": "echo amd64",
        "dpkg-deb": "exit 1",
        "apt-cache": 'shift 2; for name; do printf "Package: $name\\nVersion: 1\\nSHA256: 00\\n\\n"; done',
        "apt-get": "echo 'E: Failed to fetch: Temporary failure resolving the address' >&2; exit 100",
    }
    for name, script in {**usual, **{key.replace("_", "-"): text for key, text in scripts.items()}}.items():
        program(folder, name, script)


def make(tmp_path: Path, env: Mapping[str, str] | None = None) -> str:
    """What a build prints that fails."""
    (tmp_path / "programs").mkdir(exist_ok=True)
    script = (
        "import sys; from pathlib import Path; import image.build as build, image.__main__ as program\n"
        f"build.DOWNLOADS = Path({str(tmp_path / 'downloads')!r})\n"
        "sys.exit(program.main())"
    )
    given = {"PATH": str(tmp_path / "programs"), "PYTHONPATH": f"{CHECKOUT / 'packaging'}:{CHECKOUT}"}
    command = [sys.executable, "-c", script, "--out", str(tmp_path / "dist")]
    environment = {**given, "SOURCE_DATE_EPOCH": "0", **(env or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("cannot build the image: ")
    return done.stderr.removeprefix("cannot build the image: ")


def test_a_machine_without_apt_is_told_what_is_missing(tmp_path: Path) -> None:
    program(tmp_path / "programs", "dpkg", "")
    said = make(tmp_path)
    assert said.startswith("apt-cache, apt-get, dpkg-deb not found: the image is made of Debian packages")
    assert not (tmp_path / "dist").exists()


def test_a_machine_without_network_is_told_so_and_keeps_its_last_image(tmp_path: Path) -> None:
    """With apt's own words; neither the draft nor half a download stays."""
    apt(tmp_path / "programs")
    kept = tmp_path / "dist" / "nodeagent-0.1.0-linux-amd64.oci.tar"
    kept.parent.mkdir()
    kept.write_text("the last one")
    said = make(tmp_path)
    assert "Temporary failure resolving" in said and "run apt-get update" in said
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert not [*(tmp_path / "downloads").iterdir()]


def test_a_download_that_is_not_the_one_of_the_signed_list_is_refused(tmp_path: Path) -> None:
    apt(tmp_path / "programs", apt_get="echo forged > forged.deb")
    assert "with SHA-256 00" in make(tmp_path)


def test_apt_without_lists_is_told_to_read_them(tmp_path: Path) -> None:
    apt(tmp_path / "programs", apt_cache="echo 'E: No packages found' >&2; exit 100")
    assert "apt knows no package" in make(tmp_path)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SOURCE_DATE_EPOCH": "yesterday"}, "SOURCE_DATE_EPOCH is 'yesterday', not a number of seconds"),
        ({"SOURCE_DATE_EPOCH": ""}, "SOURCE_DATE_EPOCH is '', not a number of seconds"),
    ],
)
def test_a_time_that_is_none_is_refused(tmp_path: Path, env: Mapping[str, str], says: str) -> None:
    apt(tmp_path / "programs")
    assert make(tmp_path, env).startswith(says)


def test_another_processor_is_refused(tmp_path: Path) -> None:
    apt(tmp_path / "programs", dpkg="echo riscv64")
    assert make(tmp_path).startswith("this machine is riscv64; images are made for amd64 and arm64")
