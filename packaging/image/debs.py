"""Debian packages: which ones are needed, and their files, as apt offers them now.

Owns the folder of downloads: each file there is named after its SHA-256, which apt's signed lists have given.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from image.errors import ImageError
from image.programs import run

HINT = "run apt-get update as root, with the network up"
"""What to do where apt does not offer a package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deb:
    """One package in the version that apt would install."""

    name: str
    version: str
    architecture: str
    sha256: str = ""
    depends: tuple[tuple[str, ...], ...] = ()
    """Names only: one archive's versions fit each other. One of each group is enough."""


Lookup = Callable[[Iterable[str]], Mapping[str, Deb]]


def closure(wanted: Iterable[str], left_out: frozenset[str], lookup: Lookup) -> tuple[Deb, ...]:
    """Return the wanted packages and all that they depend on, by name.

    Of alternatives the first is taken that is there already, else the first that exists. A group with a member of
    left_out is taken as met. Raise ImageError for a package that does not exist."""
    found: dict[str, Deb] = {}
    groups: list[tuple[tuple[str, ...], str]] = [((name,), "the image") for name in wanted]
    while groups:
        open_groups = [(group, why) for group, why in groups if not left_out.intersection(group)]
        known = {**lookup(sorted({name for group, _ in open_groups for name in group} - found.keys())), **found}
        taken = [_choice(group, why, known, found) for group, why in open_groups]
        new = {deb.name: deb for deb in taken if deb.name not in found}
        found |= new
        groups = [(group, deb.name) for deb in new.values() for group in deb.depends]
    return tuple(found[name] for name in sorted(found))


def _choice(group: tuple[str, ...], why: str, known: Mapping[str, Deb], found: Mapping[str, Deb]) -> Deb:
    for table in (found, known):
        for name in group:
            if name in table:
                return table[name]
    raise ImageError(f"apt knows no package {' | '.join(group)}, which {why} needs: {HINT}")


def available(names: Iterable[str]) -> Mapping[str, Deb]:
    """Return what apt would install of the packages; one that it does not know is left out."""
    asked = tuple(names)
    if not asked:
        return {}
    try:
        shown = run(["apt-cache", "show", "--no-all-versions", *asked])
    except ImageError as error:
        if "No packages found" in str(error):
            return {}
        raise
    return {deb.name: deb for deb in map(_parse, shown.strip().split("\n\n")) if deb.name in asked}


def _parse(stanza: str) -> Deb:
    fields = {key: value for key, _, value in (line.partition(": ") for line in stanza.splitlines() if line[:1] != " ")}
    groups = ", ".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
    return Deb(
        name=fields.get("Package", ""),
        version=fields.get("Version", ""),
        architecture=fields.get("Architecture", ""),
        sha256=fields.get("SHA256", ""),
        depends=tuple(_names(group) for group in groups.split(",") if group.strip()),
    )


def _names(group: str) -> tuple[str, ...]:
    """Return the names in "a:any (>= 1) | b"."""
    return tuple(re.split(r"[\s:(]", one.strip(), maxsplit=1)[0] for one in group.split("|"))


def download(debs: Iterable[Deb], folder: Path) -> Mapping[Deb, Path]:
    """Return the file of each package, downloaded where the folder lacks it. Raise ImageError if apt cannot, or if a
    file is not the one that apt's list names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {deb: folder / f"{deb.sha256}.deb" for deb in debs}
    if missing := [deb for deb, path in files.items() if not path.exists()]:
        _fetch(missing, folder)
    for deb, path in files.items():
        if not path.exists():
            raise ImageError(f"apt-get gave no {deb.name} {deb.version} with SHA-256 {deb.sha256}: {HINT}")
    return files


def _fetch(debs: Iterable[Deb], folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as new:
        names = [f"{deb.name}={deb.version}" for deb in debs]
        try:
            run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *names], cwd=Path(new))
        except ImageError as error:
            raise ImageError(f"{error}; {HINT}") from error
        for path in Path(new).glob("*.deb"):
            shutil.move(path, folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.deb")
