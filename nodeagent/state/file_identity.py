"""Which file is at a path, and whether a folder has changed: how the store notices that its files were removed or
replaced."""

from __future__ import annotations

import os
from pathlib import Path


def identity(file: Path | int) -> tuple[int, int] | None:
    """Return which file is at a path or behind a handle, or None if there is none."""
    try:
        found = os.stat(file)  # noqa: PTH116 - a path or a handle
    except OSError:
        return None
    return found.st_dev, found.st_ino


def folder_stamp(folder: Path) -> tuple[int, ...] | None:
    """Return a value that changes if the folder at the path is another, or an entry of it was added, removed or
    replaced."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut. Raise OSError if that fails."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
