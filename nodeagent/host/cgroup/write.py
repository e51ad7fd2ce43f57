"""Writes cgroups of pods: pins, hugepage limits, controllers, partitions. What to write is decided elsewhere.

Only what differs is written, in an order in which no step allows more than both the old and the new state: falling
limits, then memory nodes, then CPUs, then rising limits. Of the two limits of a page size, the one on reservations
falls first and rises last, so a page that could be reserved can also be allocated (the other order ends in SIGBUS).

If the kernel refuses a write, the error is "cannot write PATH: CAUSE, value V". In cgroup v2 the kernel accepts CPUs
and nodes that the parent does not have and then uses others: `drift` after a write shows this. Nothing above kubepods
is written, except the cgroups of cgroupRoot where they must pass CPUs on to a partition.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError, InputError, cause_of
from nodeagent.host.cgroup.layout import CgroupLayout
from nodeagent.host.cgroup.read import (
    INNER,
    ISOLATED,
    MEMBER,
    ROOT,
    CgroupPart,
    CgroupReader,
    CgroupState,
    Hugetlb,
    size_name,
)

CONTROLLERS = ("cpuset", "hugetlb")
_UNLIMITED = "max"


class CgroupTarget(msgspec.Struct, frozen=True, kw_only=True):
    """What to confine a cgroup to. Fields that are None and page sizes that are left out stay unchanged."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugetlb: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Limits in bytes, by page_bytes, for used and reserved pages alike; multiples of page_bytes."""

    def __post_init__(self) -> None:
        for page_bytes, limit in self.hugetlb.items():
            if limit < 0 or limit % page_bytes:
                raise InputError(
                    f"cannot limit hugepages of {size_name(page_bytes)}: {limit} bytes are not whole pages"
                )


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was changed."""

    path: str
    """Full path."""
    before: str
    value: str


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One cgroup file whose content differs from what is wanted."""

    file: str
    found: str
    """Empty if there is no value or no such file."""
    wanted: str


def drift(state: CgroupState, wanted: CgroupTarget) -> tuple[Drift, ...]:
    """Return where a cgroup differs from what is wanted, in configured or effective values (the parent has too little,
    or a CPU is gone). `state` must have been read with CgroupPart.LIMITS."""
    cpus = _sets("cpuset.cpus", state.cpus, state.cpus_effective, wanted.cpus)
    mems = _sets("cpuset.mems", state.mems, state.mems_effective, wanted.mems)
    return (*cpus, *mems, *(one for size, limit in wanted.hugetlb.items() for one in _limits(state, size, limit)))


def _sets(file: str, found: CpuSet | None, effective: CpuSet | None, wanted: CpuSet | None) -> Iterator[Drift]:
    if wanted is None:
        return
    for name, one in ((file, found), (f"{file}.effective", effective if wanted else wanted)):
        if one != wanted:
            yield Drift(file=name, found="" if one is None else str(one), wanted=str(wanted))


def _limits(state: CgroupState, page_bytes: int, limit: int) -> Iterator[Drift]:
    pages = (state.hugetlb or {}).get(page_bytes)
    for name, found in _limit_files(page_bytes, pages or Hugetlb(has_rsvd=True)):
        if pages is None or found != limit:
            yield Drift(file=name, found="" if pages is None else _limit(found), wanted=str(limit))


def _limit_files(page_bytes: int, pages: Hugetlb) -> Iterator[tuple[str, int | None]]:
    """Yield the limit files of a page size with their values, in the order in which limits rise."""
    stem = f"hugetlb.{size_name(page_bytes)}"
    yield f"{stem}.max", pages.max_bytes
    if pages.has_rsvd:
        yield f"{stem}.rsvd.max", pages.rsvd_max_bytes


def _limit(value: int | None) -> str:
    return _UNLIMITED if value is None else str(value)


def put(path: str, value: str) -> None:
    """Write a value to a kernel file in one write; never create the file. Raise HostError
    with path, cause and value."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(handle, value.encode() + b"\n")
        finally:
            os.close(handle)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}, value {value!r}") from None


class Writer:
    """Writes cgroups below the reader's mount."""

    def __init__(self, reader: CgroupReader) -> None:
        self._reader = reader

    def write(self, path: str, wanted: CgroupTarget) -> tuple[Written, ...]:
        """Confine a cgroup to what is wanted. Return what was changed, in order.

        Raise HostError if the cgroup is gone, a controller is off in it (see `enable`) or the kernel refuses. Earlier
        writes are not undone."""
        state = self._there(path)
        changes = [*_falling(state, wanted), *confining(state, wanted), *_rising(state, wanted.hugetlb)]
        return tuple(self._put(path, changes))

    def raise_limits(self, layout: CgroupLayout, path: str, at_least: Mapping[int, int]) -> tuple[Written, ...]:
        """Raise hugepage limits above a cgroup, kubepods first, to at least the given bytes by page_bytes:
        kubelet limits page sizes that a pod does not request to 0 in the pod's cgroup. Never lower a
        limit. Return what was changed."""
        written: list[Written] = []
        for above in _above(layout, path):
            written += self._put(above, list(_rising(self._there(above), at_least)))
        return tuple(written)

    def enable(self, layout: CgroupLayout, path: str, controllers: Iterable[str] = CONTROLLERS) -> tuple[Written, ...]:
        """Enable controllers in a cgroup: switch them on in cgroup.subtree_control of kubepods and every cgroup in
        between. Return what was changed.

        Raise HostError if kubepods itself lacks one; only the cgroups above it can provide it.
        """
        written: list[Written] = []
        for above in _above(layout, path):
            folder = f"{self._reader.mount}/{above}"
            have = _words(f"{folder}/cgroup.controllers")
            on = _words(f"{folder}/cgroup.subtree_control")
            for controller in (one for one in controllers if one not in on):
                if controller not in have:
                    raise HostError(
                        f"cannot enable {controller} in {folder}: cgroup.controllers has only {' '.join(have)!r}"
                    )
                written += self._put(above, [("cgroup.subtree_control", " ".join(on), f"+{controller}")])
        return tuple(written)

    def isolate(self, layout: CgroupLayout, path: str, cpus: CpuSet, partition: str = ISOLATED) -> tuple[Written, ...]:
        """Make a cgroup a partition with exclusive CPUs ("isolated", or "root" with load
        balancing). Return what was changed.

        The cgroups above are not partitions, so this is a remote partition: each of them first passes the CPUs on
        (cpuset.cpus.exclusive, Linux 6.7 and later). Raise HostError, after undoing it, if the kernel refuses or
        reports the partition as invalid.
        """
        if partition not in (ROOT, ISOLATED):
            raise InputError(f"cannot make a partition of {path}: {partition!r} is not {ROOT} or {ISOLATED}")
        try:
            return tuple(self._isolate(layout, path, cpus, partition))
        except HostError:
            with contextlib.suppress(HostError):
                self.release(layout, path, cpus)
            raise

    def _isolate(self, layout: CgroupLayout, path: str, cpus: CpuSet, partition: str) -> list[Written]:
        written: list[Written] = []
        for above in _path_to(layout, path):
            written += self._let_through(above, cpus | self._exclusive(above))
        written += self._let_through(path, cpus)
        written += self._partition(path, partition)
        if why := self._invalid(path, partition):
            hint = "; it needs CAP_SYS_ADMIN" if "not permitted" in why else ""
            raise HostError(f"cannot make a partition of {self._reader.mount}/{path}: {why}, value {partition!r}{hint}")
        return written

    def release(self, layout: CgroupLayout, path: str, cpus: CpuSet) -> tuple[Written, ...]:
        """Undo `isolate`: end the partition and stop passing these CPUs on in the cgroups above. Return what was
        changed. If the cgroup is gone, the kernel has ended the partition, and only the cgroups above are written."""
        written: list[Written] = []
        if self._reader.read(path, CgroupPart.CPUSET) is not None:
            written += self._partition(path, MEMBER)
            written += self._let_through(path, EMPTY)
        for above in reversed(_path_to(layout, path)):
            if self._reader.read(above, CgroupPart.CPUSET) is not None:
                written += self._let_through(above, self._exclusive(above) - cpus)
        return tuple(written)

    def keep_back(self, path: str, but: CpuSet) -> tuple[Written, ...]:
        """Pass no CPUs except `but` on to partitions below a cgroup. Raise HostError if
        it cannot be read or written."""
        return tuple(self._let_through(path, self._exclusive(path) & but))

    def _there(self, path: str, parts: CgroupPart = CgroupPart.LIMITS) -> CgroupState:
        state = self._reader.read(path, parts)
        if state is None:
            raise HostError(f"cannot write {self._reader.mount}/{path}: the cgroup is gone")
        return state

    def _put(self, path: str, changes: Iterable[tuple[str, str, str]]) -> list[Written]:
        written = []
        for file, before, value in changes:
            full = f"{self._reader.mount}/{path}/{file}"
            put(full, value)
            written.append(Written(path=full, before=before, value=value))
        return written

    def _partition(self, path: str, partition: str) -> list[Written]:
        now = self._there(path, CgroupPart.CPUSET).partition or ""
        return self._put(path, [("cpuset.cpus.partition", now, partition)] if now != partition else [])

    def _invalid(self, path: str, partition: str) -> str:
        state = self._there(path, CgroupPart.CPUSET)
        now = f"cpuset.cpus.partition says {state.partition or 'nothing'}"
        return state.partition_invalid or ("" if state.partition == partition else now)

    def _exclusive(self, path: str) -> CpuSet:
        file = f"{self._reader.mount}/{path}/cpuset.cpus.exclusive"
        return CpuSet.parse(_text(file), source=file)

    def _let_through(self, path: str, cpus: CpuSet) -> list[Written]:
        now = self._exclusive(path)
        return self._put(path, [("cpuset.cpus.exclusive", str(now), str(cpus))] if now != cpus else [])


def _falling(state: CgroupState, wanted: CgroupTarget) -> Iterator[tuple[str, str, str]]:
    """Yield the limits to lower, as (file, before, value). A missing limit is included, so
    the kernel reports the error."""
    for page_bytes, limit in wanted.hugetlb.items():
        pages = (state.hugetlb or {}).get(page_bytes, Hugetlb(has_rsvd=True))
        for file, now in reversed(list(_limit_files(page_bytes, pages))):
            if now is None or now > limit:
                yield file, _limit(now), str(limit)


def _rising(state: CgroupState, limits: Mapping[int, int]) -> Iterator[tuple[str, str, str]]:
    """Yield the limits to raise, as (file, before, value)."""
    for page_bytes, limit in limits.items():
        for file, now in _limit_files(page_bytes, (state.hugetlb or {}).get(page_bytes, Hugetlb())):
            if now is not None and now < limit:
                yield file, str(now), str(limit)


def confining(state: CgroupState, wanted: CgroupTarget) -> Iterator[tuple[str, str, str]]:
    """Yield the cpusets to write, as (file, before, value), nodes before CPUs, so that memory moves to where the
    threads are about to run. The copy of crun goes before its scope: processes would not get what the scope is given
    later, and while the scope differs all of it is written again. What a container has set for itself stays."""
    for file, now, want, copy in (
        ("cpuset.mems", state.mems, wanted.mems, state.inner_mems),
        ("cpuset.cpus", state.cpus, wanted.cpus, state.inner_cpus),
    ):
        if want is not None and now != want:
            if now and copy == now:
                yield f"{INNER}/{file}", str(copy), str(want)
            yield file, "" if now is None else str(now), str(want)


def _above(layout: CgroupLayout, path: str) -> tuple[str, ...]:
    """Return kubepods and the cgroups between it and a path, top first. Raise InputError
    if the path is not kubelet's."""
    top = layout.top
    if not path.startswith(f"{top}/"):
        raise InputError(f"cannot write above cgroup {path[:200]!r}: it is not below {top}")
    parts = path[len(top) + 1 :].split("/")
    return tuple("/".join((top, *parts[:end])) for end in range(len(parts)))


def _path_to(layout: CgroupLayout, path: str) -> tuple[str, ...]:
    """Return all cgroups above a path except the root, which passes everything on."""
    roots = layout.top.split("/")[:-1]
    return (*("/".join(roots[: end + 1]) for end in range(len(roots))), *_above(layout, path))


def _words(path: str) -> list[str]:
    return _text(path).split()


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123 - a Path costs more than the read
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise HostError(f"cannot read {path}: {cause_of(error)}") from None
