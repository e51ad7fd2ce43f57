# ruff: noqa: PTH100, PTH110, PTH115, PTH118, PTH119, PTH208
# Paths are strings here: a scan opens thousands of files, and building a Path costs more than a read.
"""The one door to /sys, /proc and /dev. It takes a root, so a captured tree reads like the machine itself.

Reading is strict here and nowhere else: a value is what it must be, or HostError names the file and the value. What is
optional is asked for with a default; a default answers for a missing file only, never for a malformed one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TypeVar, overload

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError

T = TypeVar("T")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)
_LARGEST_FILE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 12
_REFUSE = object()
BOOT_ID = "proc/sys/kernel/random/boot_id"


class SysFs:
    """Files below a root. Paths are given without a leading slash: "sys/devices/system/cpu/online"."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = os.path.join(os.path.abspath(os.fspath(root)), "")

    def __repr__(self) -> str:
        return f"SysFs({self.root!r})"

    def path(self, path: str) -> str:
        """The full path of a file."""
        return self.root + path

    def exists(self, path: str) -> bool:
        """Return whether there is anything at a path."""
        return os.path.exists(self.root + path)

    @overload
    def text(self, path: str) -> str: ...
    @overload
    def text(self, path: str, default: T) -> str | T: ...
    def text(self, path: str, default: object = _REFUSE) -> object:
        """A file's text without the white space around it (kernel files end in a newline, some in NUL)."""
        try:
            return _read(self.root + path).decode("utf-8", "backslashreplace").strip("\0 \t\r\n")
        except OSError as error:
            if default is not _REFUSE and error.errno in _MISSING:
                return default
            raise HostError(f"cannot read {self.root + path}: {error.strerror}") from None

    def content(self, path: str) -> bytes:
        """A file's bytes as they are."""
        try:
            return _read(self.root + path)
        except OSError as error:
            raise HostError(f"cannot read {self.root + path}: {error.strerror}") from None

    def value(self, path: str, convert: Callable[[str], T], default: T | None = None) -> T | None:
        """A file's text through `convert`; None or `default` where the file is missing or empty."""
        text = self.text(path, None)
        if not text:
            return default
        try:
            return convert(text)
        except ValueError as error:
            raise HostError(f"cannot read {self.path(path)}: {text[:80]!r} is not valid ({error})") from None

    def number(self, path: str, default: int | None = None) -> int | None:
        """A decimal number, or one with 0x before it."""
        return self.value(path, _number, default)

    def cpus(self, path: str, default: CpuSet | None = None) -> CpuSet | None:
        """A list file ("0-3,8"); an empty file is the empty set, a missing one the default."""
        text = self.text(path, None)
        return default if text is None else _strictly(CpuSet.parse, text, self.path(path))

    def cpu_mask(self, path: str, default: CpuSet | None = None) -> CpuSet | None:
        """An older mask file ("ffffffff,00000001")."""
        text = self.text(path, None)
        return default if not text else _strictly(CpuSet.parse_mask, text, self.path(path))

    def names(self, path: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is no such folder."""
        try:
            return sorted(os.listdir(self.root + path))
        except OSError as error:
            if error.errno in _MISSING:
                return []
            raise HostError(f"cannot list {self.root + path}: {error.strerror}") from None

    def numbered(self, path: str, prefix: str) -> Iterator[tuple[int, str]]:
        """The entries "prefixN" of a folder as (N, path of the entry), by N."""
        found = []
        for name in self.names(path):
            tail = name[len(prefix) :]
            if name.startswith(prefix) and tail.isascii() and tail.isdigit():
                found.append((int(tail), f"{path}/{name}"))
        yield from sorted(found)

    def link_name(self, path: str) -> str | None:
        """The last part of where a link points ("driver" -> "ixgbe"); None where there is no link."""
        target = self.link(path)
        return os.path.basename(target) if target is not None else None

    def link(self, path: str) -> str | None:
        """Where a link points, as written."""
        try:
            return os.readlink(self.root + path)
        except OSError as error:
            if error.errno in (*_MISSING, errno.EINVAL):
                return None
            raise HostError(f"cannot read link {self.root + path}: {error.strerror}") from None

    def real(self, path: str) -> str:
        """The path with its links followed, still below the root; the path itself where it leaves the root."""
        full = os.path.realpath(self.root + path)
        return full[len(self.root) :] if full.startswith(self.root) else path


def _read(path: str) -> bytes:
    """The whole file: the kernel gives larger ones (/proc/cpuinfo, CPU lists of large machines) page by page."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        data = piece = os.read(handle, _PIECE_BYTES)
        while piece and len(data) < _LARGEST_FILE_BYTES:
            piece = os.read(handle, _PIECE_BYTES)
            data += piece
        return data
    finally:
        os.close(handle)


def _number(text: str) -> int:
    if not text.isascii() or "_" in text:
        raise ValueError("expected a number")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


def _strictly(parse: Callable[..., CpuSet], text: str, source: str) -> CpuSet:
    try:
        return parse(text, source=source)
    except InputError as error:
        raise HostError(str(error)) from None
