"""`make image-lock`: pin the product's dependencies, for every Python and processor that images are made for.

Each version is the newest that fits pyproject.toml; each hash is that of a wheel that one of the images installs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from image.errors import ImageError
from image.product import LOCK
from image.programs import run
from image.recipe import CHECKOUT

PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
_HEAD = "# Written by `make image-lock` from pyproject.toml; do not edit.\n"


def main() -> int:
    """Write the lock file. Return the exit code."""
    try:
        LOCK.write_text(locked())
    except ImageError as error:
        print(f"cannot lock the dependencies: {error}", file=sys.stderr)
        return 1
    return 0


def locked() -> str:
    """Return the text of the lock file."""
    hashes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for python in PYTHONS:
        for machine in MACHINES:
            for name, version, digest in _resolved(python, machine):
                hashes[name][version].add(digest)
    return _HEAD + "".join(_pinned(name, versions) for name, versions in sorted(hashes.items()))


def _pinned(name: str, versions: dict[str, set[str]]) -> str:
    if len(versions) > 1:
        raise ImageError(f"{name} has no one version for all: {', '.join(sorted(versions))}")
    ((version, digests),) = versions.items()
    return " \\\n".join((f"{name}=={version}", *(f"    --hash=sha256:{one}" for one in sorted(digests)))) + "\n"


def _resolved(python: str, machine: str) -> Iterable[tuple[str, str, str]]:
    """Yield name, version and SHA-256 of each wheel that pip would install on such a machine."""
    wanted = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    platforms = [f"--platform=manylinux_{glibc}_{machine}" for glibc in ("2_17", "2_28", "2_34")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", report, "--target", folder]
        pip = [sys.executable, "-m", "pip", "-q", "install", "--python-version", python, *platforms, *options]
        run([*pip, f"--platform=manylinux2014_{machine}", *wanted])
        installed = json.loads(report.read_text())["install"]
    for one in installed:
        metadata = one["metadata"]
        yield metadata["name"].lower(), metadata["version"], one["download_info"]["archive_info"]["hashes"]["sha256"]


if __name__ == "__main__":
    raise SystemExit(main())
