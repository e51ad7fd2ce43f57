# ruff: noqa: PTH113, PTH208
# Paths are strings here, as in SysFs.
"""Finds the files of the NVIDIA driver that is loaded, and of no other version.

Promises: reading is bounded: some folders are listed, and of each library of the driver the header is read; it happens
once per inventory, never for a claim. What is missing is a warning. A library is known by its name, NAME.so.VERSION,
and given under the names by which programs ask for it: its SONAME and the links to it in its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import msgspec

from nodeagent.core.model.device import DriverFile, DriverFiles, DriverUse, Hook
from nodeagent.host.driver_root import elf
from nodeagent.host.driver_root.roots import (
    FIRMWARE_FOLDERS,
    PROGRAM_FOLDERS,
    Root,
    library_folders,
    roots,
)
from nodeagent.host.driver_root.uses import ALSO_ASKED, EXPECTED, PROGRAMS, SETTINGS, SOCKETS, use_of
from nodeagent.host.sysfs.sysfs import SysFs

CONTAINER_FOLDERS = (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64")
"""Where a container gets libraries: Debian's loader looks into the first without a cache, Red Hat's and SUSE's into the
second (docs/decisions/0013-driver-files-without-a-hook.md)."""
_HOOKS = (
    ("usr/bin/nvidia-cdi-hook", ()),
    ("usr/local/nvidia/toolkit/nvidia-cdi-hook", ()),
    ("usr/bin/nvidia-ctk", ("hook",)),
    ("usr/local/nvidia/toolkit/nvidia-ctk", ("hook",)),
)
"""NVIDIA's programs that renew a container's loader cache, with their first arguments."""
_VDPAU = "vdpau"
_BITS = 64


class Search(msgspec.Struct):
    """What was found in one root."""

    root: Root
    folders: list[str] = msgspec.field(default_factory=list)
    files: list[DriverFile] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)

    @property
    def has_cuda(self) -> bool:
        """Return whether the library that every CUDA program needs is among the files."""
        return any(one.has_cuda for one in self.files)


def find(
    sysfs: SysFs, version: str, configured: str = "", *, own: bool | None = None
) -> tuple[DriverFiles, tuple[str, ...]]:
    """Return the files of the driver of a version, and warnings.

    configured: the root to search, or "". own: whether / is the host's; None: unless this process runs in a pod.
    """
    if own is None:
        own = sysfs.root != "/" or not os.environ.get("KUBERNETES_SERVICE_HOST")
    searched = [_search(sysfs, root, version) for root in roots(sysfs.root, configured, own=own)]
    best = next((one for one in searched if one.has_cuda), None) or next((one for one in searched if one.files), None)
    if best is None:
        return DriverFiles(version=version, searched=_told(searched)), ()
    _add_others(sysfs, best, version)
    found = DriverFiles(
        version=version,
        root=best.root.host or "/",
        searched=_told([best] if best.has_cuda else searched),
        files=tuple(best.files),
        hook=_hook(sysfs, own=own),
    )
    return found, tuple(best.warnings)


def _told(searched: list[Search]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.root.on_host(folder) for one in searched for folder in one.folders))


def _search(sysfs: SysFs, root: Root, version: str) -> Search:
    found, seen = Search(root), set[str]()
    for folder in library_folders(root):
        names = _names(root, folder)
        if _seen(sysfs, root, folder):
            found.folders.append(folder)
            found.files += _libraries(sysfs, root, folder, names, version, seen)
        if _VDPAU in names:
            below = f"{folder}/{_VDPAU}"
            found.files += _libraries(sysfs, root, below, _names(root, below), version, seen)
    return found


def _libraries(
    sysfs: SysFs, root: Root, folder: str, names: Sequence[str], version: str, seen: set[str]
) -> Iterator[DriverFile]:
    """Yield the libraries of a version in a folder, except those that another folder had."""
    tail = f".so.{version}"
    mine = {name: name.removesuffix(tail) for name in names if name.endswith(tail)}
    links: dict[str, list[str]] = {}
    begins = tuple(f"{stem}.so" for stem in mine.values())
    for name in names:
        if name.startswith(begins) and name not in mine:
            links.setdefault(root.resolved(name, folder), []).append(name)
    for name, stem in mine.items():
        real = root.resolved(name, folder)
        shown = elf.read(root.at(real))
        if stem in seen or not os.path.isfile(root.at(real)) or (shown is not None and shown.bits != _BITS):
            continue
        seen.add(stem)
        for one in (name, *links.get(real, ())):
            _seen(sysfs, root, f"{folder}/{one}")
        own = shown.soname if shown is not None else ""
        asked = {*links.get(real, ()), *([own] if own else [])} or {name}
        asked |= {ALSO_ASKED[stem]} if stem in ALSO_ASKED else set()
        below = f"/{_VDPAU}" if folder.endswith(f"/{_VDPAU}") else ""
        paths = tuple(f"{to}{below}/{one}" for to in CONTAINER_FOLDERS for one in sorted(asked))
        yield DriverFile(host_path=root.on_host(real), container_paths=paths, use=use_of(name))


def _names(root: Root, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(root.at(folder)))
    except OSError:
        return []


def _add_others(sysfs: SysFs, found: Search, version: str) -> None:
    """Add what is not a library, and the warnings about what is missing."""
    have = [path.rpartition("/")[2] for one in found.files for path in one.container_paths]
    place = ", ".join(map(found.root.on_host, found.folders))
    for name in EXPECTED:
        if not any(one.startswith(name) for one in have):
            found.warnings.append(f"cannot find {name}.{version} of NVIDIA's driver: not in {place}")
    found.files += [*_programs(sysfs, found, version), *_firmware(sysfs, found.root, version)]
    found.files += _at_same_path(sysfs, found.root, SOCKETS, DriverUse.COMPUTE)
    found.files += _at_same_path(sysfs, found.root, SETTINGS, DriverUse.GRAPHICS)


def _programs(sysfs: SysFs, found: Search, version: str) -> Iterator[DriverFile]:
    for name in PROGRAMS:
        folder = next((one for one in PROGRAM_FOLDERS if _is_there(sysfs, found.root, f"{one}/{name}")), None)
        if folder is not None:
            real = found.root.resolved(f"{folder}/{name}")
            yield DriverFile(host_path=found.root.on_host(real), container_paths=(f"/usr/bin/{name}",))
        elif name == PROGRAMS[0]:
            places = ", ".join(found.root.on_host(one) for one in PROGRAM_FOLDERS)
            found.warnings.append(f"cannot find {name} of NVIDIA's driver {version}: not in {places}")


def _firmware(sysfs: SysFs, root: Root, version: str) -> Iterator[DriverFile]:
    """Yield the firmware of the GPUs' own processor, from the first folder that has any."""
    for top in FIRMWARE_FOLDERS:
        folder = root.resolved(f"{top}/{version}")
        names = [name for name in _names(root, folder) if name.startswith("gsp") and name.endswith(".bin")]
        for name in names:
            if _is_there(sysfs, root, f"{folder}/{name}"):
                path = f"/lib/firmware/nvidia/{version}/{name}"
                yield DriverFile(host_path=root.on_host(f"{folder}/{name}"), container_paths=(path,))
        if names:
            return


def _at_same_path(sysfs: SysFs, root: Root, paths: tuple[str, ...], use: DriverUse) -> Iterator[DriverFile]:
    for path in paths:
        if _is_there(sysfs, root, path):
            host = root.on_host(root.resolved(path))
            yield DriverFile(host_path=host, container_paths=(f"/{path}",), use=use)


def _is_there(sysfs: SysFs, root: Root, path: str) -> bool:
    _seen(sysfs, root, path)
    return _seen(sysfs, root, root.resolved(path))


def _seen(sysfs: SysFs, root: Root, path: str) -> bool:
    """Return whether there is something at a path. A recording remembers the name, and not hundreds of megabytes."""
    return sysfs.exists(root.at(path)[len(sysfs.root) :])


def _hook(sysfs: SysFs, *, own: bool) -> Hook | None:
    """Return what renews a container's loader cache, if NVIDIA's program is on the host and visible."""
    folders = tuple(word for folder in CONTAINER_FOLDERS for word in ("--folder", folder))
    for path, first in _HOOKS if own else ():
        if sysfs.exists(path):
            args = (path.rpartition("/")[2], *first, "update-ldcache", *folders)
            return Hook(path=f"/{path}", args=args)
    return None
