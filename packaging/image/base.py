"""The base layer: Debian packages unpacked into a tree, without what nothing needs at run time.

No package's script runs, so no privilege is needed; what the scripts would make and the agent needs is made here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from image.debs import Deb, available, closure, download
from image.errors import ImageError
from image.programs import run
from image.pyc import compile_tree
from image.recipe import DROPPED, NOT_NEEDED, PACKAGES, PYTHON, SYSTEM_PACKAGES

_WRITTEN = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_LINKS = {"var/run": "/run", "usr/bin/python3": PYTHON}


def make_base(tree: Path, downloads: Path) -> tuple[Deb, ...]:
    """Fill an empty folder with the base. Return its packages, by name."""
    debs = closure((*PACKAGES, *SYSTEM_PACKAGES), NOT_NEEDED, available)
    for deb, path in download(debs, downloads).items():
        run(["dpkg-deb", "-x", path, tree])
        _record(tree, deb, path)
    _drop(tree)
    _write(tree)
    _cache_libraries(tree)
    compile_tree(tree, f"usr/lib/{PYTHON}")
    return debs


def _record(tree: Path, deb: Deb, path: Path) -> None:
    """Name the package where scanners look for it in an image without dpkg's database."""
    folder = tree / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / deb.name).write_text(run(["dpkg-deb", "-f", path]))


def _drop(tree: Path) -> None:
    for path in matches(tree, DROPPED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def matches(tree: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the paths below a tree that one of the patterns names."""
    return sorted({path for pattern in patterns for path in tree.glob(pattern)})


def _write(tree: Path) -> None:
    for name, text in _WRITTEN.items():
        (tree / name).write_text(text)
    for name, target in _LINKS.items():
        link = tree / name
        if link.is_dir() and not link.is_symlink():
            link.rmdir()
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _cache_libraries(tree: Path) -> None:
    """Write etc/ld.so.cache with the tree's own ldconfig: ctypes asks it where a library is."""
    programs = matches(tree, ("sbin/ldconfig", "usr/sbin/ldconfig"))
    if not programs:
        raise ImageError("libc-bin has no ldconfig")
    run([programs[0], "-r", tree, "-X"])
    shutil.rmtree(tree / "var/cache/ldconfig", ignore_errors=True)
