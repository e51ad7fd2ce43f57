"""Unpacks a capture into an empty folder. A capture comes from elsewhere: nothing in it is trusted.

Every member is checked before it is written: only plain files, folders, and relative links of the tree that stay in it;
names that stay in the folder and do not lead through a link. Links are made last, so that nothing can be written
through one, and each is then followed as the kernel does. What is larger than a node can be is refused while it is
read, and so is what is not whole.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

import msgspec

from nodeagent.cli.shared.capture_format import FORMAT, MANIFEST, TREE, Manifest
from nodeagent.errors import InputError, cause_of
from nodeagent.version import VERSION

MOST_PACKED_BYTES = 256 << 20
MOST_BYTES = 1 << 30
MOST_FILE_BYTES = 64 << 20
MOST_MEMBERS = 500_000
MOST_RATIO, RATIO_FROM_BYTES = 400, 64 << 20
"""How many times as large as the file its content may be, once it is so large: a bomb has thousands."""
MOST_WINDOW_BYTES = 128 << 20
MOST_PATH = 1024


class BadCaptureError(Exception):
    """What is wrong with a capture."""


class _Bounded(io.RawIOBase):
    """What a compressed file contains, as far as the bounds allow."""

    def __init__(self, source: BinaryIO, packed_bytes: int) -> None:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES)
        self._stream = decompressor.stream_reader(source, read_across_frames=False)
        self._packed_bytes = packed_bytes
        self._read = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. Raise BadCaptureError if there are too many."""
        found = self._stream.read(size)
        self._read += len(found)
        if self._read > MOST_BYTES:
            raise BadCaptureError(f"it contains more than {MOST_BYTES >> 20} MiB")
        if self._read > RATIO_FROM_BYTES and self._read > MOST_RATIO * self._packed_bytes:
            raise BadCaptureError(f"it contains more than {MOST_RATIO} times its own size")
        return found


class _Unpacking(msgspec.Struct):
    """A capture that is being unpacked."""

    folder: Path
    links: dict[str, str] = msgspec.field(default_factory=dict)
    files: set[str] = msgspec.field(default_factory=set)
    content_bytes: int = 0

    def member(self, tar: tarfile.TarFile, one: tarfile.TarInfo) -> None:
        """Write one member. Raise BadCaptureError if it may not be there."""
        name = _checked_name(one.name)
        self._check_way(name)
        if one.issparse():  # a few bytes of it may stand for any number
            raise BadCaptureError(f"{name!r} is a sparse file")
        if one.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            self._file(tar, one, name)
        elif one.isdir():
            if name in self.files:
                raise BadCaptureError(f"{name!r} is there twice")
            self._at(name).mkdir(parents=True, exist_ok=True)
        elif one.issym():
            self._link(name, one.linkname)
        else:
            raise BadCaptureError(f"{name!r} is neither a file nor a folder nor a link")

    def _check_way(self, name: str) -> None:
        """Nothing is written through a link, and nothing twice."""
        for parent in (name, *map(str, PurePosixPath(name).parents)):
            if parent in self.links or (parent in self.files and parent != name):
                raise BadCaptureError(f"{name!r} leads through {parent!r}")

    def _file(self, tar: tarfile.TarFile, one: tarfile.TarInfo, name: str) -> None:
        if one.size > MOST_FILE_BYTES:
            raise BadCaptureError(f"{name!r} is larger than {MOST_FILE_BYTES >> 20} MiB")
        self.content_bytes += one.size
        if self.content_bytes > MOST_BYTES:
            raise BadCaptureError(f"it contains more than {MOST_BYTES >> 20} MiB")
        content = tar.extractfile(one)
        assert content is not None
        path = self._at(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                file.write(content.read())
        except (FileExistsError, IsADirectoryError):
            raise BadCaptureError(f"{name!r} is there twice") from None
        self.files.add(name)

    def _link(self, name: str, target: str) -> None:
        inside = os.path.normpath(os.path.join(os.path.dirname(name), target))  # noqa: PTH118, PTH120 - not a path here
        if not name.startswith(f"{TREE}/") or target.startswith("/") or not f"{inside}/".startswith(f"{TREE}/"):
            raise BadCaptureError(f"{name!r} is a link out of the tree, to {target!r}")
        self.links[name] = target

    def finish(self) -> None:
        """Make the links. Raise BadCaptureError if one leads out of the tree, alone or through others."""
        for name, target in self.links.items():
            path = self._at(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.symlink_to(target)
            except FileExistsError:
                raise BadCaptureError(f"{name!r} is there twice") from None
        tree = os.path.realpath(self.folder / TREE)
        for name, target in self.links.items():
            if not f"{os.path.realpath(self._at(name))}/".startswith(f"{tree}/"):
                raise BadCaptureError(f"{name!r} is a link out of the tree, to {target!r}")

    def _at(self, name: str) -> Path:
        return self.folder / name


def _checked_name(name: str) -> str:
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in name or len(name) > MOST_PATH:
        raise BadCaptureError(f"{name[:80]!r} is no path below it")
    return name


def unpack(path: Path, folder: Path) -> Manifest:
    """Unpack a capture into an empty folder and return its manifest. Raise InputError if it is no capture, not whole,
    too large, made by a newer build in a newer form, or has a member that leads out of it."""
    try:
        with path.open("rb") as file:
            packed = os.fstat(file.fileno()).st_size
            if packed > MOST_PACKED_BYTES:
                raise BadCaptureError(f"it is larger than {MOST_PACKED_BYTES >> 20} MiB")
            return _unpack(file, packed, folder)
    except (BadCaptureError, OSError) as error:
        _refuse(path, cause_of(error))


def _refuse(path: Path, why: str) -> NoReturn:
    raise InputError(f"cannot replay {path}: {why}") from None


def _unpack(file: BinaryIO, packed: int, folder: Path) -> Manifest:
    import zstandard

    try:
        with tarfile.open(fileobj=_Bounded(file, packed), mode="r|") as tar:
            return _members(tar, folder)
    except zstandard.ZstdError as error:
        raise BadCaptureError(f"it is no capture, or damaged: {error}") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise BadCaptureError(f"it is no capture, or truncated: {error}") from None


def _members(tar: tarfile.TarFile, folder: Path) -> Manifest:
    unpacking = _Unpacking(folder)
    manifest, found = None, 0
    for one in tar:
        if manifest is None:
            manifest = _manifest(tar, one)
            continue
        found += 1
        if found > min(MOST_MEMBERS, manifest.members):
            raise BadCaptureError(f"it has more than the {manifest.members} members that it names")
        unpacking.member(tar, one)
        tar.members = []  # type: ignore[attr-defined]  # otherwise it remembers every member
    if manifest is None:
        raise BadCaptureError("it is empty")
    if found < manifest.members:
        raise BadCaptureError(f"it is truncated: {found} of {manifest.members} members are there")
    unpacking.finish()
    return manifest


class _Version(msgspec.Struct):
    format: int
    nodeagent: str = ""


def _manifest(tar: tarfile.TarFile, one: tarfile.TarInfo) -> Manifest:
    """Read the first member, which is the manifest."""
    if one.name != MANIFEST or one.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or one.size > 1 << 20:
        raise BadCaptureError(f"it is no capture: it begins with {one.name[:80]!r}, expected {MANIFEST}")
    content = tar.extractfile(one)
    assert content is not None
    text = content.read()
    try:
        version = msgspec.json.decode(text, type=_Version)
        if version.format > FORMAT:
            maker = f"nodeagent {version.nodeagent}" if version.nodeagent else "a newer nodeagent"
            made = f"{maker} made it in format {version.format}"
            raise BadCaptureError(f"{made}, and this one, {VERSION}, reads formats up to {FORMAT}")
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BadCaptureError(f"cannot read its {MANIFEST}: {error}") from None
