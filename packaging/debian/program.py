"""/usr/lib/nodeagent: a virtual environment of the distribution's Python with the wheel and its libraries.

The libraries are those of the environment that runs the build, file by file, so no network is needed and what was
tested is what is shipped. Left out is what differs from build to build or is of no use to a package: records of the
installation, bytecode (compiled when the package is installed), scripts. Compiled modules are stripped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

HOME = "usr/lib/nodeagent"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_RECORDS = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
_LAUNCHER = f"""\
#!/bin/sh
exec /{HOME}/bin/python3 -I -m nodeagent "$@"
"""
_ENVIRONMENT = f"""\
home = /usr/bin
include-system-site-packages = true
version = {sys.version_info.major}.{sys.version_info.minor}
"""
"""Packages of the distribution are found too, behind the libraries: a kind of devices may come as one."""


def write(tree: Path, wheel: Path) -> list[Distribution]:
    """Write the program below a root. Return the distributions of its libraries."""
    site = site_packages(tree)
    site.mkdir(parents=True)
    (tree / HOME / "pyvenv.cfg").write_text(_ENVIRONMENT)
    (tree / HOME / "bin").mkdir()
    (tree / HOME / "bin" / "python3").symlink_to(f"../../../bin/{PYTHON}")
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/nodeagent").write_text(_LAUNCHER)
    (tree / "usr/bin/nodeagent").chmod(0o755)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    for record in (one for info in site.glob("*.dist-info") for one in _records(info)):
        record.unlink(missing_ok=True)
    libraries = _closure(_requirements(site))
    for one in libraries:
        _copy(one, site)
    for module in compiled(tree):
        subprocess.run(["strip", "--strip-unneeded", module], check=True)
    return libraries


def site_packages(tree: Path) -> Path:
    """Return the folder of the modules below a root."""
    return tree / HOME / "lib" / PYTHON / "site-packages"


def compiled(tree: Path) -> list[Path]:
    """Return the compiled modules and the libraries that they bring, in order."""
    return sorted(path for path in site_packages(tree).rglob("*") if re.search(r"\.so(\.\d+)*$", path.name))


def _records(info: Path) -> Iterator[Path]:
    return (info / name for name in _RECORDS)


def _requirements(site: Path) -> list[str]:
    (info,) = site.glob("nodeagent-*.dist-info")
    return Distribution.at(info).requires or []


def _closure(requirements: list[str]) -> list[Distribution]:
    """Return what some requirements need on this machine, by name. Raise PackageNotFoundError for what is missing."""
    found: dict[str, Distribution] = {}
    due = [Requirement(one) for one in requirements]
    while due:
        one = due.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        known = distribution(one.name)
        if not one.specifier.contains(known.version, prereleases=True):
            raise SystemExit(f"build: cannot package {one}: the environment has {known.version}")
        if known.metadata["Name"] not in found:
            found[known.metadata["Name"]] = known
            due += [Requirement(more) for more in known.requires or []]
    return [found[name] for name in sorted(found, key=str.lower)]


def _copy(library: Distribution, site: Path) -> None:
    for file in library.files or []:
        if file.parts[0] == ".." or "__pycache__" in file.parts or file.name in _RECORDS:
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), target)
