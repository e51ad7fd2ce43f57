# ruff: noqa: PTH112, PTH115, PTH123
# Paths are strings here, as in SysFs.
"""Where the files of a driver may be: the roots of file systems that have one, and the folders in each.

A root is a file system with its own absolute links, such as that of a driver container, so links are followed as if it
were mounted at /. Nothing of another root is reached.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

import msgspec

from nodeagent.host.nvml.library import FOLDERS, ROOTS

LIBCUDA, LIBNVML = "libcuda.so.1", "libnvidia-ml.so.1"
PROGRAM_FOLDERS = ("usr/bin", "usr/sbin", "usr/local/bin", "bin", "sbin", "opt/bin")
FIRMWARE_FOLDERS = ("lib/firmware/nvidia", "usr/lib/firmware/nvidia")
_BELOW = ("", "/nvidia/current", "/nvidia")
"""Where distributions put the driver's libraries below a library folder: Debian has one folder per driver."""
_CACHE = "etc/ld.so.cache"
_CACHE_MAGIC = (b"ld.so-1.7.0", b"glibc-ld.so.cache1.1")
_LARGEST_CACHE_BYTES = 8 << 20
_MOST_LINKS = 40
_HOST = "host"
"""Below this a container sees the host's own root: the host knows the files by the rest of the path."""


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The root of a file system that may contain a driver."""

    base: str
    """Its path for this process, without a slash at the end; "" is /."""
    host: str
    """Its path on the host, without a slash at the end; "" is /."""

    def at(self, path: str) -> str:
        """Return the path for this process of a path below the root."""
        return f"{self.base}/{path}"

    def on_host(self, path: str) -> str:
        """Return the path on the host of a path below the root."""
        return f"{self.host}/{path}"

    def resolved(self, path: str, folder: str = "") -> str:
        """Return a path below a folder of the root with links followed; links that form a loop are left. The folder has
        none on its way."""
        left, done, links = deque(path.split("/")), folder.split("/") if folder else [], 0
        while left:
            part = left.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                done = done[:-1]
                continue
            try:
                target = os.readlink(self.at("/".join((*done, part)))) if links < _MOST_LINKS else ""
            except OSError:
                target = ""
            if not target:
                done.append(part)
                continue
            links += 1
            done = [] if target.startswith("/") else done
            left.extendleft(reversed(target.split("/")))
        return "/".join(done)


def roots(top: str, configured: str, *, own: bool) -> tuple[Root, ...]:
    """Return the roots to search, in order.

    top: what this process takes for / (another folder for a captured tree). configured: the only root to search, a path
    on the host, or ""; a container may see it at the first of ROOTS. own: whether / is the host's root, and not that of
    a container.
    """
    top = top.rstrip("/")
    if configured:
        path = configured.rstrip("/")
        there = f"{top}{path}"
        return (Root(base=there if os.path.isdir(there) else f"{top}/{ROOTS[0]}", host=path),)
    found = [Root(base=f"{top}/{one}", host="" if one == _HOST else f"/{one}") for one in ROOTS]
    return (*found, *([Root(base=top, host="")] if own else []))


def library_folders(root: Root) -> Iterator[str]:
    """Yield the folders below a root in which to look for libraries, each once, links followed: first those of which
    the loader's cache says that the driver is there, then the usual ones."""
    seen: set[str] = set()
    for folder in (*_cached(root), *(f"{one}{below}" for one in FOLDERS for below in _BELOW)):
        real = root.resolved(folder)
        if real not in seen:
            seen.add(real)
            yield real


def _cached(root: Root) -> Iterator[str]:
    """Yield the folders of the driver's two main libraries in the loader's cache (ld.so(8)), and those to which their
    links lead. The cache's strings end in NUL, and those with a slash are paths."""
    try:
        with open(root.at(_CACHE), "rb") as file:
            data = file.read(_LARGEST_CACHE_BYTES)
    except OSError:
        return
    if not data.startswith(_CACHE_MAGIC):
        return
    for name in (LIBCUDA, LIBNVML):
        for path in _strings(data, f"/{name}".encode() + b"\0"):
            yield path.rpartition("/")[0]
            yield root.resolved(path).rpartition("/")[0]


def _strings(data: bytes, tail: bytes) -> Iterator[str]:
    at = data.find(tail)
    while at >= 0:
        start = data.rfind(b"\0", 0, at) + 1
        yield data[start : at + len(tail) - 1].decode("utf-8", "surrogateescape")
        at = data.find(tail, at + 1)
