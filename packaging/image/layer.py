"""A tree as a layer of an image: the same tree gives the same bytes for every user and machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_LEVEL = 9
_PLAIN, _FOR_ALL = 0o755, 0o1777
"""The most that a mode allows: no file runs as another user, and only root writes, but in folders such as /tmp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A file of an image, named by what it contains."""

    path: Path
    digest: str
    """sha256:…"""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A packed layer, and what it is once unpacked."""

    blob: Blob
    diff_id: str
    """The digest of the archive before it is compressed."""
    unpacked_bytes: int
    """Of its files."""


def entries(tree: Path) -> frozenset[str]:
    """Return the paths in a tree, relative to it."""
    return frozenset(str(path.relative_to(tree)) for path in _walk(tree))


def write_layer(tree: Path, path: Path, *, mtime_s: int, without: frozenset[str] = frozenset()) -> Layer:
    """Pack a tree: sorted, owned by root, every entry of one time. without: paths of the layers below."""
    with path.open("wb") as raw:
        packed = _Hashing(raw)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=packed, mtime=0) as compressed:
            plain = _Hashing(compressed)
            unpacked_bytes = _archive(tree, plain, mtime_s, without)
    blob = Blob(path=path, digest=packed.digest(), size_bytes=path.stat().st_size)
    return Layer(blob=blob, diff_id=plain.digest(), unpacked_bytes=unpacked_bytes)


def _archive(tree: Path, out: _Hashing, mtime_s: int, without: frozenset[str]) -> int:
    total = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for path in _walk(tree):
            name = str(path.relative_to(tree))
            if name not in without:
                total += _add(archive, path, name, mtime_s)
    return total


def _add(archive: tarfile.TarFile, path: Path, name: str, mtime_s: int) -> int:
    """Add one entry. Return how many bytes its content has."""
    found = path.lstat()
    entry = tarfile.TarInfo(name)
    entry.mode = found.st_mode & (_FOR_ALL if found.st_mode & stat.S_ISVTX else _PLAIN)
    entry.mtime = mtime_s
    if path.is_symlink():
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
    elif path.is_dir():
        entry.type = tarfile.DIRTYPE
    else:
        entry.size = found.st_size
        with path.open("rb") as content:
            archive.addfile(entry, content)
        return entry.size
    archive.addfile(entry)
    return 0


def _walk(tree: Path) -> Iterator[Path]:
    """Yield all paths below a folder, each folder before its content, in the order of their names' bytes."""
    with os.scandir(tree) as found:
        names = sorted(os.fsencode(one.name) for one in found)
    for path in (tree / os.fsdecode(name) for name in names):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


class _Hashing:
    """A file to write to that hashes what goes through it."""

    def __init__(self, out: BinaryIO | gzip.GzipFile) -> None:
        self._out, self._hash = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._out.write(data)

    def flush(self) -> None:
        self._out.flush()

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"
