# ruff: noqa: PTH100, PTH110, PTH115, PTH118, PTH119, PTH208
# Paths are strings here: a scan opens thousands of files, and building a Path costs more than a read.
"""The only access to /sys, /proc and /dev. It takes a root, so a captured tree reads like the machine itself.

Reading is strict here and only here: a value is valid, or HostError names the file and the value. Optional files are
read with a default, which applies only to a missing file, never to a malformed one.
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
_ATTRIBUTES = ("sys/devices/", "sys/class/", "sys/bus/")
"""Where each file is one attribute, which the kernel copies as far as the buffer goes (fs/kernfs/file.c); files of
/proc and of cgroups consist of records, and end a piece after the last whole one (fs/seq_file.c)."""
_REFUSE = object()
BOOT_ID = "proc/sys/kernel/random/boot_id"


class SysFs:
    """Files below a root. Paths are given without a leading slash: "sys/devices/system/cpu/online"."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = os.path.join(os.path.abspath(os.fspath(root)), "")

    def __repr__(self) -> str:
        return f"SysFs({self.root!r})"

    def path(self, path: str) -> str:
        """Return the full path of a file."""
        return self.root + path

    def exists(self, path: str) -> bool:
        """Return whether there is anything at a path."""
        return os.path.exists(self.root + path)

    @overload
    def text(self, path: str) -> str: ...
    @overload
    def text(self, path: str, default: T) -> str | T: ...
    def text(self, path: str, default: object = _REFUSE) -> object:
        """Return a file's text without surrounding white space (kernel files end in a newline, some in NUL).

        Raise HostError if it cannot be read; if it is missing, return the default if one is given."""
        try:
            return self._bytes(path).decode("utf-8", "backslashreplace").strip("\0 \t\r\n")
        except OSError as error:
            if default is not _REFUSE and error.errno in _MISSING:
                return default
            raise HostError(f"cannot read {self.root + path}: {error.strerror}") from None

    def content(self, path: str) -> bytes:
        """Return a file's raw bytes. Raise HostError if it cannot be read."""
        try:
            return self._bytes(path)
        except OSError as error:
            raise HostError(f"cannot read {self.root + path}: {error.strerror}") from None

    def _bytes(self, path: str) -> bytes:
        """Return a file's raw bytes. Raise OSError. Every read of a file passes here."""
        return _read(self.root + path, short_is_all=path.startswith(_ATTRIBUTES))

    def value(self, path: str, convert: Callable[[str], T], default: T | None = None) -> T | None:
        """Return a file's text through `convert`, or `default` if the file is missing or empty."""
        text = self.text(path, None)
        if not text:
            return default
        try:
            return convert(text)
        except ValueError as error:
            raise HostError(f"cannot read {self.path(path)}: {text[:80]!r} is not valid ({error})") from None

    def number(self, path: str, default: int | None = None) -> int | None:
        """Return a number, decimal or with a 0x prefix."""
        return self.value(path, _number, default)

    def cpus(self, path: str, default: CpuSet | None = None) -> CpuSet | None:
        """Return the CPUs in a list file ("0-3,8"). An empty file is the empty set, a missing one the default."""
        text = self.text(path, None)
        return default if text is None else _strictly(CpuSet.parse, text, self.path(path))

    def cpu_mask(self, path: str, default: CpuSet | None = None) -> CpuSet | None:
        """Return the CPUs in an older mask file ("ffffffff,00000001")."""
        text = self.text(path, None)
        return default if not text else _strictly(CpuSet.parse_mask, text, self.path(path))

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, sorted; empty if there is no such folder."""
        try:
            return sorted(os.listdir(self.root + path))
        except OSError as error:
            if error.errno in _MISSING:
                return []
            raise HostError(f"cannot list {self.root + path}: {error.strerror}") from None

    def numbered(self, path: str, prefix: str) -> Iterator[tuple[int, str]]:
        """Yield the entries "prefixN" of a folder as (N, path of the entry), by N."""
        found = []
        for name in self.names(path):
            tail = name[len(prefix) :]
            if name.startswith(prefix) and tail.isascii() and tail.isdigit():
                found.append((int(tail), f"{path}/{name}"))
        yield from sorted(found)

    def link_name(self, path: str) -> str | None:
        """Return the last part of a link's target ("driver" -> "ixgbe"), or None if there is no link."""
        target = self.link(path)
        return os.path.basename(target) if target is not None else None

    def link(self, path: str) -> str | None:
        """Return a link's target as written, or None if there is no link."""
        try:
            return os.readlink(self.root + path)
        except OSError as error:
            if error.errno in (*_MISSING, errno.EINVAL):
                return None
            raise HostError(f"cannot read link {self.root + path}: {error.strerror}") from None

    def entry(self, folder: str, name: str) -> str:
        """Return the real path of an entry of a class or bus folder ("sys/class/net", "eth0"), below the root.

        As `real`, with one call of the kernel instead of one for each part of the path: its links in these folders lead
        to the object's own folder, which has no links above it (fs/sysfs/symlink.c)."""
        path = f"{folder}/{name}"
        try:
            target = os.readlink(self.root + path)
        except OSError:
            return self.real(path)
        found = os.path.normpath(os.path.join(folder, target))
        return self.real(path) if target.startswith("/") or found.startswith("..") else found

    def real(self, path: str) -> str:
        """Return the path with links resolved, below the root; the path itself if it leaves the root."""
        full = os.path.realpath(self.root + path)
        return full[len(self.root) :] if full.startswith(self.root) else path


def _read(path: str, *, short_is_all: bool) -> bytes:
    """Return a whole file: the kernel delivers larger ones (/proc/cpuinfo, CPU lists of
    large machines) page by page. short_is_all: nothing follows a piece that is not full."""
    least = _PIECE_BYTES if short_is_all else 1
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        data = piece = os.read(handle, _PIECE_BYTES)
        while len(piece) >= least and len(data) < _LARGEST_FILE_BYTES:
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
