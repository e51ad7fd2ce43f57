"""Writes a capture: complete, readable by its owner alone, and never in place of another file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from nodeagent.errors import InputError

MODE = 0o600
LEVEL = 3
"""zstd's own default: a machine of 256 CPUs takes a fraction of a second."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class Members(msgspec.Struct):
    """What a capture consists of."""

    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    folders: set[str] = msgspec.field(default_factory=set)
    links: dict[str, str] = msgspec.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files) + len(self.folders) + len(self.links)

    def infos(self) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Yield every member, folders before what is in them."""
        for name in sorted(self.folders):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            yield info, b""
        for name in sorted(self.files):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(self.files[name]), 0o644
            yield info, self.files[name]
        for name in sorted(self.links):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, self.links[name]
            yield info, b""


def write(path: str, first: tuple[str, bytes], members: Members, at_s: float) -> None:
    """Write a capture to a new file, or to standard output for "-". Raise InputError if there is such a file already,
    or it cannot be written: then there is none."""
    if path == "-":
        if sys.stdout.isatty():
            raise InputError("cannot write a capture to a terminal: expected -o FILE, or standard output into a file")
        _stream(sys.stdout.buffer, first, members, at_s)
        sys.stdout.buffer.flush()
        return
    try:
        _write_new(Path(path), first, members, at_s)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _write_new(path: Path, first: tuple[str, bytes], members: Members, at_s: float) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "it exists, and a capture never replaces a file")
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, MODE)
            _stream(file, first, members, at_s)
            file.flush()
            os.fsync(handle)
        _name(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(draft).unlink()


def _name(draft: str, path: Path) -> None:
    """Give the draft its name unless there is such a file meanwhile; where files cannot have two names, a moment too
    late to be sure."""
    try:
        path.hardlink_to(draft)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        Path(draft).rename(path)


def _stream(out: BinaryIO, first: tuple[str, bytes], members: Members, at_s: float) -> None:
    import zstandard

    with (
        zstandard.ZstdCompressor(level=LEVEL).stream_writer(out, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        info = tarfile.TarInfo(first[0])
        info.size = len(first[1])
        for one, content in ((info, first[1]), *members.infos()):
            one.mtime = int(at_s)
            tar.addfile(one, io.BytesIO(content))
