"""Control groups of pods, read: which there are and what the kernel confines them to.

Only the unified hierarchy (cgroup v2) can be enforced on; `hierarchy` says what a machine has. A value of None stands
for a file that the kernel does not show because the controller is off; content that cannot be read is a HostError with
file and value. A cgroup that vanished while it was read is None as a whole: that is no error, containers end.
No file stays open between two calls; paths are strings, as a round reads thousands of files.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import CONTAINER, POD, Cgroup, CgroupLayout, layouts
from nodeagent.host.sysfs.sysfs import SysFs

V2, HYBRID, V1, NONE = "v2", "hybrid", "v1", "none"
"""Hierarchy.mode."""
MEMBER, ROOT, ISOLATED = "member", "root", "isolated"
"""CgroupState.partition: no partition; one; one without load balancing."""

_MOUNT = "sys/fs/cgroup"
_NEEDED = "cpuset"
_PAGES = "sys/kernel/mm/hugepages"
_VANISHED = (errno.ENOENT, errno.ENODEV, errno.ENOTDIR)
_UNSAID = (*_VANISHED, errno.EOPNOTSUPP)
"""EOPNOTSUPP: cgroup.procs of a threaded cgroup, cpu.max of one without bandwidth control."""
_PIECE_BYTES = 1 << 12
_UNLIMITED = "max"
_WAITING = ("runc:[", "crun")
"""How the names of OCI runtimes' own processes begin."""
_BEYOND_LIMITS = (1 << 63) - (1 << 36)
"""The kernel shows a limit that was never set as a number just below 2**63, as sizes of pages let it round."""


class CgroupPart(enum.Flag):
    """What of a cgroup to read. LIMITS is what a check of pins and limits needs."""

    CPUSET = enum.auto()
    HUGETLB_LIMITS = enum.auto()
    HUGETLB_USE = enum.auto()
    CPU_TIME = enum.auto()
    PROCESSES = enum.auto()
    LIMITS = CPUSET | HUGETLB_LIMITS
    ALL = LIMITS | HUGETLB_USE | CPU_TIME | PROCESSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """What control groups a machine has."""

    mode: str
    mount: str = ""
    """Full path of the unified hierarchy; "": there is none."""
    controllers: frozenset[str] = frozenset()
    """What the unified hierarchy can control."""
    unsupported: str = ""
    """Why nothing can be enforced here; "": it can."""
    namespaced: bool = False
    """The mount shows a part of the hierarchy only, as in a container with a cgroup namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hugetlb:
    """Hugepages of one size in one cgroup, in bytes; a limit of None is "max". What was not asked for is None too."""

    max_bytes: int | None = None
    rsvd_max_bytes: int | None = None
    has_rsvd: bool = False
    """Kernels before 5.7 have no limit of reservations."""
    current_bytes: int | None = None
    rsvd_current_bytes: int | None = None
    failures: int | None = None
    """How often a limit was hit (hugetlb.SIZE.events, "max")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupState:
    """One cgroup as the kernel shows it. An empty `cpus` or `mems`: nothing is written there, the parent's apply."""

    path: str
    parts: CgroupPart
    """What was read; everything else is None."""
    cpus: CpuSet | None = None
    cpus_effective: CpuSet | None = None
    mems: CpuSet | None = None
    mems_effective: CpuSet | None = None
    partition: str | None = None
    partition_invalid: str = ""
    """Why the kernel does not honour the partition; "": it does, or none is asked for."""
    hugetlb: Mapping[int, Hugetlb] | None = None
    """By page_bytes; None: the controller is off."""
    quota_us: int | None = None
    """CPU time in a period; None: unlimited, or `period_us` is None too."""
    period_us: int | None = None
    throttled_count: int | None = None
    throttled_us: int | None = None
    processes: int | None = None
    populated: bool = False
    """There is a live process in it or below."""


def hierarchy(sysfs: SysFs) -> Hierarchy:
    """What control groups the machine has. HostError where the files that say so cannot be read."""
    if (controllers := sysfs.text(f"{_MOUNT}/cgroup.controllers", None)) is not None:
        return _unified(sysfs, frozenset(controllers.split()))
    if (controllers := sysfs.text(f"{_MOUNT}/unified/cgroup.controllers", None)) is not None:
        return Hierarchy(
            mode=HYBRID,
            mount=sysfs.path(f"{_MOUNT}/unified"),
            controllers=frozenset(controllers.split()),
            unsupported=f"{sysfs.path(_MOUNT)} is a hybrid of cgroup v1 and v2; enforcing needs v2 alone",
        )
    if sysfs.names(_MOUNT):
        return Hierarchy(mode=V1, unsupported=f"{sysfs.path(_MOUNT)} is cgroup v1; enforcing needs cgroup v2")
    return Hierarchy(mode=NONE, unsupported=f"no cgroup hierarchy is mounted at {sysfs.path(_MOUNT)}")


def _unified(sysfs: SysFs, controllers: frozenset[str]) -> Hierarchy:
    mount = sysfs.path(_MOUNT)
    lacking = "" if _NEEDED in controllers else f"{mount}/cgroup.controllers has no {_NEEDED}"
    # The true root alone has no cgroup.type.
    namespaced = sysfs.exists(f"{_MOUNT}/cgroup.type")
    return Hierarchy(mode=V2, mount=mount, controllers=controllers, unsupported=lacking, namespaced=namespaced)


def page_sizes(sysfs: SysFs) -> tuple[int, ...]:
    """Sizes of hugepages that the kernel knows, in bytes, smallest first."""
    found = (name.removeprefix("hugepages-").removesuffix("kB") for name in sysfs.names(_PAGES))
    return tuple(sorted(int(kib) << 10 for kib in found if kib.isascii() and kib.isdigit()))


def find(mount: str, cgroup_root: str = "/") -> tuple[Cgroup, ...]:
    """The cgroups of all pods and containers, of whichever driver, in order of path. Nothing that vanishes meanwhile
    fails it; HostError where a folder cannot be listed, InputError for a `cgroup_root` that cannot be one."""
    found = (one for layout in layouts(cgroup_root) for one in below(mount, layout, layout.top))
    return tuple(sorted((one for one in found if one.kind in (POD, CONTAINER)), key=lambda one: one.path))


def below(mount: str, layout: CgroupLayout, path: str) -> Iterator[Cgroup]:
    """A cgroup of kubelet's and those below it, down to containers; nothing where there is none."""
    here = layout.parse(path)
    if here is None:
        return
    names = () if here.kind == CONTAINER else folders(f"{mount}/{path}")
    if names is None:
        return
    yield here
    for name in names:
        yield from below(mount, layout, f"{path}/{name}")


def folders(path: str) -> tuple[str, ...] | None:
    """Names of the folders in a folder; None where it is gone."""
    try:
        with os.scandir(path) as entries:
            return tuple(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise HostError(f"cannot list {path}: {error.strerror}") from None


class CgroupReader:
    """Reads cgroups below `mount`, not the root itself. sizes: the sizes of hugepages to look at, in bytes."""

    def __init__(self, mount: str, sizes: Iterable[int]) -> None:
        self.mount = mount
        self.sizes = {page_bytes: size_name(page_bytes) for page_bytes in sizes}

    def read(self, path: str, parts: CgroupPart = CgroupPart.ALL) -> CgroupState | None:
        """One cgroup; None where it is gone. HostError where a file cannot be read, with its path and value."""
        full = f"{self.mount}/{path}"
        try:
            folder = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _VANISHED:
                return None
            raise HostError(f"cannot open {full}: {error.strerror}") from None
        try:
            return self._state(_Folder(folder, full), path, parts)
        finally:
            os.close(folder)

    def effective(self, path: str) -> CpuSet | None:
        """The CPUs in effect alone; None where the cgroup is gone. HostError where they cannot be read."""
        full = f"{self.mount}/{path}"
        try:
            with open(f"{full}/cpuset.cpus.effective", encoding="ascii") as file:  # noqa: PTH123 - a Path costs more
                return CpuSet.parse(file.read().strip(), source=f"{full}/cpuset.cpus.effective")
        except OSError as error:
            if error.errno in _VANISHED:
                return None
            raise HostError(f"cannot read {full}/cpuset.cpus.effective: {error.strerror}") from None
        except (InputError, ValueError) as error:
            raise HostError(str(error)) from None

    def _state(self, folder: _Folder, path: str, parts: CgroupPart) -> CgroupState | None:
        partition = folder.text("cpuset.cpus.partition") if CgroupPart.CPUSET in parts else None
        time = CgroupPart.CPU_TIME in parts
        quota_us, period_us = _quota(folder) if time else (None, None)
        stat = folder.counts("cpu.stat") if time else {}
        state = CgroupState(
            path=path,
            parts=parts,
            **(_cpuset(folder) if CgroupPart.CPUSET in parts else {}),
            partition=partition.split(" ", 1)[0] if partition else None,
            partition_invalid=_invalid(partition),
            hugetlb=self._hugetlb(folder, parts),
            quota_us=quota_us,
            period_us=period_us,
            throttled_count=stat.get("nr_throttled"),
            throttled_us=stat.get("throttled_usec"),
            processes=_lines(folder.text("cgroup.procs")) if CgroupPart.PROCESSES in parts else None,
            # The last to be read: a cgroup that vanished before is gone for this file too.
            populated=bool((events := folder.counts("cgroup.events")).get("populated")),
        )
        return state if events else None

    def _hugetlb(self, folder: _Folder, parts: CgroupPart) -> Mapping[int, Hugetlb] | None:
        if not parts & (CgroupPart.HUGETLB_LIMITS | CgroupPart.HUGETLB_USE):
            return None
        found = {page_bytes: _pages(folder, f"hugetlb.{name}", parts) for page_bytes, name in self.sizes.items()}
        there = {page_bytes: pages for page_bytes, pages in found.items() if pages is not None}
        return MappingProxyType(there) if there else None


def has_begun(sysfs: SysFs, state: CgroupState) -> bool:
    """Whether anything of a container has run. Before that its first process, which is still one of the OCI runtime's
    own, waits in the container's cgroup: runc names it runc:[2:INIT] (libcontainer/nsenter/nsexec.c), crun's is a fork
    of crun. What cannot be seen is taken to have run."""
    if not state.populated:
        return False
    try:
        pids = sysfs.text(f"{_MOUNT}/{state.path}/cgroup.procs", "").split()
        names = [sysfs.text(f"proc/{pid}/comm", "") for pid in pids]
    except HostError:
        return True
    return not names or not all(name.startswith(_WAITING) for name in names)


def size_name(page_bytes: int) -> str:
    """How the kernel names a size in hugetlb.SIZE.max: 2097152 is "2MB"."""
    for unit, shift in (("GB", 30), ("MB", 20)):
        if page_bytes >> shift:
            return f"{page_bytes >> shift}{unit}"
    return f"{page_bytes >> 10}KB"


class _Folder:
    """An open cgroup: its files are opened relative to it, which is quicker and never reaches one of the same name
    that was made later."""

    __slots__ = ("handle", "path")

    def __init__(self, handle: int, path: str) -> None:
        self.handle = handle
        self.path = path

    def text(self, name: str) -> str | None:
        """A file's text without its line end; None where there is no such file (any more)."""
        try:
            return _read(self.handle, name).decode("ascii", "backslashreplace").rstrip()
        except OSError as error:
            if error.errno in _UNSAID:
                return None
            raise HostError(f"cannot read {self.path}/{name}: {error.strerror}") from None

    def set(self, name: str) -> CpuSet | None:
        """A list file."""
        if (text := self.text(name)) is None:
            return None
        try:
            return CpuSet.parse(text)
        except InputError:
            raise self.bad(name, text, "a list such as 0-3,8") from None

    def limit(self, name: str) -> tuple[bool, int | None]:
        """Whether there is such a limit, and its value; no limit is None."""
        text = self.text(name)
        if text is None or text == _UNLIMITED:
            return text is not None, None
        value = self.number(name, text)
        return True, value if value < _BEYOND_LIMITS else None

    def count(self, name: str) -> int | None:
        """Return the number in a file, or None if there is no such file. HostError if it is no number."""
        text = self.text(name)
        return None if text is None else self.number(name, text)

    def counts(self, name: str) -> dict[str, int]:
        """A file of "key number" lines."""
        pairs = (line.rpartition(" ") for line in (self.text(name) or "").splitlines())
        return {key: self.number(name, value) for key, _, value in pairs}

    def number(self, name: str, text: str) -> int:
        """Return a text as a number. HostError names the file if it is none."""
        if not (text.isascii() and text.isdigit() and len(text) < 24):
            raise self.bad(name, text, "a number")
        return int(text)

    def bad(self, name: str, text: str, wanted: str) -> HostError:
        """Return the error for a file with an unexpected content."""
        return HostError(f"cannot read {self.path}/{name}: {text[:80]!r} is not {wanted}")


def _read(folder: int, name: str) -> bytes:
    """The whole file; all but cgroup.procs are given in one piece (kernfs shows them at once)."""
    handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        data = piece = os.read(handle, _PIECE_BYTES)
        while piece and (len(piece) == _PIECE_BYTES or name == "cgroup.procs"):
            piece = os.read(handle, _PIECE_BYTES)
            data += piece
        return data
    finally:
        os.close(handle)


def _cpuset(folder: _Folder) -> dict[str, CpuSet | None]:
    return {
        "cpus": folder.set("cpuset.cpus"),
        "cpus_effective": folder.set("cpuset.cpus.effective"),
        "mems": folder.set("cpuset.mems"),
        "mems_effective": folder.set("cpuset.mems.effective"),
    }


def _invalid(partition: str | None) -> str:
    """ "isolated invalid (Parent is not a partition root)" -> the reason."""
    _, _, rest = (partition or "").partition(" ")
    return rest.removeprefix("invalid").strip(" ()") or rest


def _pages(folder: _Folder, stem: str, parts: CgroupPart) -> Hugetlb | None:
    there, max_bytes = folder.limit(f"{stem}.max")
    if not there:
        return None
    limits, use = CgroupPart.HUGETLB_LIMITS in parts, CgroupPart.HUGETLB_USE in parts
    has_rsvd, rsvd_max_bytes = folder.limit(f"{stem}.rsvd.max") if limits else (False, None)
    return Hugetlb(
        max_bytes=max_bytes if limits else None,
        rsvd_max_bytes=rsvd_max_bytes,
        has_rsvd=has_rsvd,
        current_bytes=folder.count(f"{stem}.current") if use else None,
        rsvd_current_bytes=folder.count(f"{stem}.rsvd.current") if use else None,
        failures=folder.counts(f"{stem}.events").get("max") if use else None,
    )


def _quota(folder: _Folder) -> tuple[int | None, int | None]:
    """cpu.max, "QUOTA PERIOD" in microseconds."""
    if (text := folder.text("cpu.max")) is None:
        return None, None
    quota, _, period = text.partition(" ")
    if not period:
        raise folder.bad("cpu.max", text, "a quota and a period")
    return None if quota == _UNLIMITED else folder.number("cpu.max", quota), folder.number("cpu.max", period)


def _lines(text: str | None) -> int | None:
    return None if text is None else len(text.splitlines())
