# ruff: noqa: PTH115, PTH118, PTH120
# Paths are strings here, as in SysFs.
"""Remembers everything that is read of /sys, /proc and /dev, so that it can be read again elsewhere with the same
answers.

What a recording contains is a tree without surprises: links are relative and stay below the root, a name that was only
listed is an empty file or folder, and a device node is a name with its numbers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from nodeagent.host.sysfs.sysfs import SysFs

_MOST_LINKS = 40
"""As many links in a row the kernel follows (path_resolution(7))."""


class DeviceNode(NamedTuple):
    """A device node: "c" or "b", and its numbers."""

    type: str
    major: int
    minor: int


class RecordingSysFs(SysFs):
    """A SysFs that remembers what was read. Paths are below the root, without links on the way."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        super().__init__(root)
        self.files: dict[str, bytes] = {}
        self.links: dict[str, str] = {}
        """Where each link leads, relative to its folder."""
        self.folders: set[str] = set()
        self.listed: set[str] = set()
        """Files of which only the name is known."""
        self.nodes: dict[str, DeviceNode] = {}
        self._real: dict[str, str] = {"": ""}

    def _bytes(self, path: str) -> bytes:
        found = super()._bytes(path)
        self.files[self._place(path)] = found
        return found

    def path(self, path: str) -> str:
        """Return the full path of a file, which is then read by other means: its name is remembered."""
        self._see(path)
        return super().path(path)

    def exists(self, path: str) -> bool:
        """Return whether there is anything at a path."""
        return self._see(path)

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, sorted; empty if there is no such folder."""
        found = super().names(path)
        if self._see(path):
            folder = self._place(path)
            for name in found:
                self._see(f"{folder}/{name}" if folder else name, through=False)
        return found

    def link(self, path: str) -> str | None:
        """Return a link's target as written, or None if there is no link."""
        self._see(path, through=False)
        return super().link(path)

    def entry(self, folder: str, name: str) -> str:
        """Return the real path of an entry of a class or bus folder, below the root."""
        self._see(f"{folder}/{name}")
        return super().entry(folder, name)

    def real(self, path: str) -> str:
        """Return the path with links resolved, below the root; the path itself if it leaves the root."""
        self._see(path)
        return super().real(path)

    def _see(self, path: str, *, through: bool = True) -> bool:
        """Remember what is at a path. through: also what a link leads to. Return whether there is something."""
        folder, _, name = path.rpartition("/")
        place = self._place(path) if through else os.path.join(self._place(folder), name)
        try:
            mode = os.lstat(self.root + place)
        except (OSError, ValueError):
            return False
        if stat.S_ISLNK(mode.st_mode):
            self._follow(place)
        elif stat.S_ISDIR(mode.st_mode):
            self.folders.add(place)
        else:
            self.listed.add(place)
            if stat.S_ISCHR(mode.st_mode) or stat.S_ISBLK(mode.st_mode):
                kind = "c" if stat.S_ISCHR(mode.st_mode) else "b"
                self.nodes[place] = DeviceNode(kind, os.major(mode.st_rdev), os.minor(mode.st_rdev))
        return True

    def _place(self, path: str, links: int = 0) -> str:
        """Return where a path leads, below the root, and remember the links on the way."""
        known = self._real.get(path)
        if known is not None or links > _MOST_LINKS:
            return known if known is not None else path
        head, _, name = path.rpartition("/")
        folder = self._place(head, links)
        if name in ("", "."):
            found = folder
        elif name == "..":
            found = os.path.dirname(folder)
        else:
            here = f"{folder}/{name}" if folder else name
            pointed = self._follow(here)
            found = here if pointed is None else self._place(pointed, links + 1)
        self._real[path] = found
        return found

    def _follow(self, here: str) -> str | None:
        """Remember a link. Return the path that it points to, below the root, or None if it is no link."""
        try:
            target = os.readlink(self.root + here)
        except (OSError, ValueError):
            return None
        folder = os.path.dirname(here)
        pointed = target.lstrip("/") if target.startswith("/") else f"{folder}/{target}" if folder else target
        self.links[here] = os.path.relpath(f"/{pointed}", f"/{folder}")
        return pointed

    def tree(self) -> Iterator[tuple[str, bytes]]:
        """Yield every file that was read or listed, in order of path."""
        for path in sorted(self.files.keys() | self.listed):
            if path not in self.folders:
                yield path, self.files.get(path, b"")
