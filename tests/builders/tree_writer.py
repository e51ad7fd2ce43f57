"""Writes files below a root, for the builders of trees."""

from __future__ import annotations

import os
from pathlib import Path


class TreeWriter:
    """Writes below a root, each folder made once: paths are strings here, for there are thousands of files."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.folders: set[str] = set()

    def write(self, path: str, text: str) -> None:
        with open(self._at(path), "w") as file:
            file.write(f"{text}\n")

    def link(self, path: str, target: str) -> None:
        """target: as in the link, relative to its folder."""
        os.symlink(target, self._at(path))

    def folder(self, path: str) -> None:
        if path not in self.folders:
            os.makedirs(f"{self.root}/{path}", exist_ok=True)
            self.folders.add(path)

    def _at(self, path: str) -> str:
        self.folder(os.path.dirname(path))
        return f"{self.root}/{path}"
