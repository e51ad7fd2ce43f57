"""Reads cgroups of pods: which ones exist and what the kernel confines them to.

Only the unified hierarchy (cgroup v2) can be enforced; `hierarchy` reports what a machine has. A value is None if the
kernel does not show the file because the controller is off; unreadable content is a HostError with file and value. If a
cgroup vanishes while it is read, its whole state is None: containers end, so that is no error.
No file stays open between two calls. Paths are strings because one round reads thousands of files.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import CONTAINER, LEAVES, POD, Cgroup, CgroupLayout, layouts
from nodeagent.host.sysfs.sysfs import SysFs

V2, HYBRID, V1, NONE = "v2", "hybrid", "v1", "none"
"""Values of Hierarchy.mode."""
MEMBER, ROOT, ISOLATED = "member", "root", "isolated"
"""Values of CgroupState.partition: no partition, a partition, a partition without load balancing."""

_MOUNT = "sys/fs/cgroup"
_NEEDED = "cpuset"
_PAGES = "sys/kernel/mm/hugepages"
_VANISHED = (errno.ENOENT, errno.ENODEV, errno.ENOTDIR)
_UNSAID = (*_VANISHED, errno.EOPNOTSUPP)
"""Errors that mean "no value". EOPNOTSUPP: cgroup.procs of a threaded cgroup, cpu.max of
one without bandwidth control."""
_PIECE_BYTES = 1 << 12
_UNLIMITED = "max"
_WAITING = ("runc:[", "crun")
"""Prefixes of the names of OCI runtimes' own processes."""
INNER = "container"
"""The cgroup below a container's scope into which crun puts the processes, with a copy of what it sets for the scope
(src/libcrun/cgroup-systemd.c)."""
_BEYOND_LIMITS = (1 << 63) - (1 << 36)
"""The kernel shows a limit that was never set as a number just below 2**63, rounded to the page size."""


class CgroupPart(enum.Flag):
    """What to read of a cgroup. LIMITS is what a check of pins and limits needs."""

    CPUSET = enum.auto()
    HUGETLB_LIMITS = enum.auto()
    HUGETLB_USE = enum.auto()
    CPU_TIME = enum.auto()
    PROCESSES = enum.auto()
    LIMITS = CPUSET | HUGETLB_LIMITS
    ALL = LIMITS | HUGETLB_USE | CPU_TIME | PROCESSES


class Hierarchy(msgspec.Struct, frozen=True, kw_only=True):
    """The cgroup hierarchies of a machine."""

    mode: str
    mount: str = ""
    """Full path of the unified hierarchy; empty if there is none."""
    controllers: frozenset[str] = frozenset()
    """Controllers of the unified hierarchy."""
    unsupported: str = ""
    """Why nothing can be enforced here; empty if it can."""
    namespaced: bool = False
    """The mount shows only part of the hierarchy, as in a container with a cgroup namespace."""


class Hugetlb(msgspec.Struct, frozen=True, kw_only=True):
    """Hugepages of one size in one cgroup, in bytes. A limit of None is "max"; what was not requested is None too."""

    max_bytes: int | None = None
    rsvd_max_bytes: int | None = None
    has_rsvd: bool = False
    """Kernels before 5.7 have no limit on reservations."""
    current_bytes: int | None = None
    failures: int | None = None
    """How often a limit was hit (hugetlb.SIZE.events, "max")."""


class CgroupState(msgspec.Struct, frozen=True, kw_only=True):
    """One cgroup as the kernel shows it. If `cpus` or `mems` is empty, nothing is set and the parent's apply."""

    path: str
    parts: CgroupPart
    """What was read; everything else is None."""
    cpus: CpuSet | None = None
    cpus_effective: CpuSet | None = None
    mems: CpuSet | None = None
    mems_effective: CpuSet | None = None
    inner_cpus: CpuSet | None = None
    inner_mems: CpuSet | None = None
    """What crun has set in the cgroup below a container's scope (INNER); None if there is no such cgroup."""
    partition: str | None = None
    partition_invalid: str = ""
    """Why the kernel does not honour the partition; empty if it does or none is requested."""
    hugetlb: Mapping[int, Hugetlb] | None = None
    """By page_bytes, or None if the controller is off."""
    quota_us: int | None = None
    """CPU time in a period, or None if unlimited or if `period_us` is None too."""
    period_us: int | None = None
    used_us: int | None = None
    """CPU time of all its processes, ended ones too."""
    throttled_count: int | None = None
    throttled_us: int | None = None
    processes: int | None = None
    populated: bool = False
    """A live process is in it or below it."""


def hierarchy(sysfs: SysFs) -> Hierarchy:
    """Return the cgroup hierarchies of the machine. Raise HostError if the files that show them cannot be read."""
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
    # Only the true root has no cgroup.type.
    namespaced = sysfs.exists(f"{_MOUNT}/cgroup.type")
    return Hierarchy(mode=V2, mount=mount, controllers=controllers, unsupported=lacking, namespaced=namespaced)


def page_sizes(sysfs: SysFs) -> tuple[int, ...]:
    """Return the hugepage sizes that the kernel supports, in bytes, smallest first."""
    found = (name.removeprefix("hugepages-").removesuffix("kB") for name in sysfs.names(_PAGES))
    return tuple(sorted(int(kib) << 10 for kib in found if kib.isascii() and kib.isdigit()))


def find(mount: str, cgroup_root: str = "/", kinds: Collection[str] = (POD, CONTAINER)) -> tuple[Cgroup, ...]:
    """Return the cgroups of some kinds, for both drivers, in order of path. Cgroups that vanish meanwhile do no harm.
    Raise HostError if a folder cannot be listed, InputError if `cgroup_root` is invalid."""
    found = (one for layout in layouts(cgroup_root) for one in below(mount, layout, layout.top))
    return tuple(sorted((one for one in found if one.kind in kinds), key=lambda one: one.path))


def below(mount: str, layout: CgroupLayout, path: str) -> Iterator[Cgroup]:
    """Yield a cgroup of kubelet's and those below it, down to containers and monitors; nothing if it does not exist."""
    here = layout.parse(path)
    if here is None:
        return
    names = () if here.kind in LEAVES else folders(f"{mount}/{path}")
    if names is None:
        return
    yield here
    for name in names:
        yield from below(mount, layout, f"{path}/{name}")


def folders(path: str) -> tuple[str, ...] | None:
    """Return the names of a folder's subfolders, or None if the folder is gone. Raise
    HostError if it cannot be listed."""
    try:
        with os.scandir(path) as entries:
            return tuple(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise HostError(f"cannot list {path}: {error.strerror}") from None


class CgroupReader:
    """Reads cgroups below `mount`, not the root itself. sizes: the hugepage sizes to read, in bytes."""

    def __init__(self, mount: str, sizes: Iterable[int]) -> None:
        self.mount = mount
        self.sizes = {page_bytes: size_name(page_bytes) for page_bytes in sizes}

    def read(self, path: str, parts: CgroupPart = CgroupPart.ALL) -> CgroupState | None:
        """Return the state of a cgroup, or None if it is gone. Raise HostError, with path and
        value, for an unreadable file."""
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
        """Return only the effective CPUs, or None if the cgroup is gone. Raise HostError if they cannot be read."""
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
            used_us=stat.get("usage_usec"),
            throttled_count=stat.get("nr_throttled"),
            throttled_us=stat.get("throttled_usec"),
            processes=_lines(folder.text("cgroup.procs")) if CgroupPart.PROCESSES in parts else None,
            # Read last: if the cgroup vanished before, this file is gone too.
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
    """Return whether anything of a container has run. Before that, its first process, still part of the OCI runtime,
    waits in the container's cgroup: runc names it runc:[2:INIT] (libcontainer/nsenter/nsexec.c), crun's is a fork of
    crun, in a cgroup below. What cannot be read is assumed to have run."""
    if not state.populated:
        return False
    try:
        cgroups = (f"{_MOUNT}/{state.path}", f"{_MOUNT}/{state.path}/{INNER}")
        pids = [pid for one in cgroups for pid in sysfs.text(f"{one}/cgroup.procs", "").split()]
        names = [sysfs.text(f"proc/{pid}/comm", "") for pid in pids]
    except HostError:
        return True
    return not names or not all(name.startswith(_WAITING) for name in names)


def size_name(page_bytes: int) -> str:
    """Return the kernel's name of a size in hugetlb.SIZE.max: 2097152 is "2MB"."""
    for unit, shift in (("GB", 30), ("MB", 20)):
        if page_bytes >> shift:
            return f"{page_bytes >> shift}{unit}"
    return f"{page_bytes >> 10}KB"


class _Folder:
    """An open cgroup. Its files are opened relative to it, which is faster and never reaches a
    later cgroup of the same name."""

    __slots__ = ("handle", "path")

    def __init__(self, handle: int, path: str) -> None:
        self.handle = handle
        self.path = path

    def text(self, name: str) -> str | None:
        """Return a file's text without the trailing newline, or None if the file does not exist or is gone."""
        try:
            return _read(self.handle, name).decode("ascii", "backslashreplace").rstrip()
        except OSError as error:
            if error.errno in _UNSAID:
                return None
            raise HostError(f"cannot read {self.path}/{name}: {error.strerror}") from None

    def set(self, name: str) -> CpuSet | None:
        """Return the CpuSet in a list file, or None if there is no such file."""
        if (text := self.text(name)) is None:
            return None
        try:
            return CpuSet.parse(text)
        except InputError:
            raise self.bad(name, text, "a list such as 0-3,8") from None

    def limit(self, name: str) -> tuple[bool, int | None]:
        """Return whether a limit exists, and its value, or None for no limit."""
        text = self.text(name)
        if text is None or text == _UNLIMITED:
            return text is not None, None
        value = self.number(name, text)
        return True, value if value < _BEYOND_LIMITS else None

    def count(self, name: str) -> int | None:
        """Return the number in a file, or None if there is no such file. Raise HostError if it is not a number."""
        text = self.text(name)
        return None if text is None else self.number(name, text)

    def counts(self, name: str) -> dict[str, int]:
        """Return the "key number" lines of a file as a dict."""
        pairs = (line.rpartition(" ") for line in (self.text(name) or "").splitlines())
        return {key: self.number(name, value) for key, _, value in pairs}

    def number(self, name: str, text: str) -> int:
        """Return a text as a number. Raise HostError, naming the file, if it is not a number."""
        if not (text.isascii() and text.isdigit() and len(text) < 24):
            raise self.bad(name, text, "a number")
        return int(text)

    def bad(self, name: str, text: str, wanted: str) -> HostError:
        """Return the error for a file with unexpected content."""
        return HostError(f"cannot read {self.path}/{name}: {text[:80]!r} is not {wanted}")


def _read(folder: int, name: str) -> bytes:
    """Read a whole file. All files but cgroup.procs arrive in one piece (kernfs shows them at once)."""
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
        **(_inner(folder) if folder.path.endswith(".scope") else {}),
    }


def _inner(folder: _Folder) -> dict[str, CpuSet | None]:
    cpus = folder.set(f"{INNER}/cpuset.cpus")
    return {"inner_cpus": cpus, "inner_mems": folder.set(f"{INNER}/cpuset.mems")} if cpus is not None else {}


def _invalid(partition: str | None) -> str:
    """Return the reason in "isolated invalid (Parent is not a partition root)"."""
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
        failures=folder.counts(f"{stem}.events").get("max") if use else None,
    )


def _quota(folder: _Folder) -> tuple[int | None, int | None]:
    """Return quota and period, in microseconds, of cpu.max, "QUOTA PERIOD"."""
    if (text := folder.text("cpu.max")) is None:
        return None, None
    quota, _, period = text.partition(" ")
    if not period:
        raise folder.bad("cpu.max", text, "a quota and a period")
    return None if quota == _UNLIMITED else folder.number("cpu.max", quota), folder.number("cpu.max", period)


def _lines(text: str | None) -> int | None:
    return None if text is None else len(text.splitlines())
