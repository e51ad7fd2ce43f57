"""Headless Chromium from Debian's packages, unpacked below .cache/web without installing anything.

    python -m tests.web.chromium        # prints the folder

Owns that folder: `debs` has the downloads, `root-HASH` the tree of one set of packages. Nothing of it needs root, where
apt knows the packages; as root, apt's lists are brought up to date if it does not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packaging"))

from image.debs import Deb, available, closure, download
from image.errors import ImageError
from tests.support.paths import CHECKOUT

CACHE = Path(os.environ.get("NODEAGENT_WEB_CACHE", CHECKOUT / ".cache" / "web"))
PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")
LEFT_OUT = frozenset({"libc6", "libgcc-s1", "debconf", "dpkg", "x11-utils", "xdg-utils"})
"""What every Debian has, and what a browser without a display does not use."""
TOOLS = ("apt-get", "apt-cache", "dpkg-deb")
PROGRAM = "usr/lib/chromium/chromium-headless-shell"
INSTALL_S = 600


class NoBrowserError(Exception):
    """Chromium cannot be had here; the message says why."""


def installed() -> Path:
    """The tree with the browser, made where it is not there yet. Raise NoBrowserError if it cannot be."""
    if absent := [name for name in TOOLS if shutil.which(name) is None]:
        raise NoBrowserError(f"{', '.join(absent)} not found: the browser comes from Debian's packages")
    try:
        return _unpacked(_offered())
    except (ImageError, OSError, subprocess.SubprocessError) as error:
        raise NoBrowserError(f"cannot get Chromium: {error}") from error


def _offered() -> Mapping[str, Deb]:
    """The wanted packages as apt offers them; its lists are brought up to date where it knows none."""
    found = available(PACKAGES)
    if len(found) < len(PACKAGES) and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=INSTALL_S, stdout=sys.stderr)
        found = available(PACKAGES)
    return found


def _unpacked(offered: Mapping[str, Deb]) -> Path:
    """The tree of these packages and of what they need, made again when apt offers another version of one of them."""
    versions = " ".join(deb.sha256 for deb in offered.values())
    root = CACHE / f"root-{hashlib.sha256(versions.encode()).hexdigest()[:16]}"
    if root.exists():
        return root
    files = download(closure(PACKAGES, LEFT_OUT, available), CACHE / "debs")
    for old in (*CACHE.glob("root*"), *(one for one in (CACHE / "debs").iterdir() if one not in files.values())):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    draft = CACHE / "root.new"
    for path in files.values():
        subprocess.run(["dpkg-deb", "-x", str(path), str(draft)], check=True, timeout=INSTALL_S)
    draft.rename(root)
    return root


def command(root: Path) -> list[str]:
    """The program in a tree, without the options of a session."""
    return [str(root / PROGRAM)]


def environment(root: Path) -> Mapping[str, str]:
    """What the program needs to find the libraries and fonts of its tree."""
    libraries = sorted(
        {str(path.parent) for path in root.glob("usr/lib/*/**/*.so*")}
        | {str(path.parent) for path in root.glob("lib/*/*.so*")}
    )
    return {"LD_LIBRARY_PATH": ":".join(libraries), "FONTCONFIG_FILE": str(root / "etc/fonts/fonts.conf")}


if __name__ == "__main__":
    print(installed())
