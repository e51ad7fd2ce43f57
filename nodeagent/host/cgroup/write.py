"""Control groups of pods, written: pins, hugepage limits, controllers, partitions. What to write is decided elsewhere.

Only what differs is written, and in an order in which no step allows more than both the old and the new state: limits
that fall, then memory nodes, then CPUs, then limits that rise. Of the two limits of a page size the one on reservations
falls first and rises last, so that a page that could be reserved can be had (the other way round ends in SIGBUS).

A write that the kernel refuses is "cannot write PATH: CAUSE, value V". In cgroup v2 the kernel takes CPUs and nodes
that the parent does not have and then gives others: `drift` after a write tells. Nothing above kubepods is
written, but for cgroupRoot's own cgroups where they have to let CPUs through to a partition.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError, InputError, cause_of
from nodeagent.host.cgroup.layout import CgroupLayout
from nodeagent.host.cgroup.read import ISOLATED, MEMBER, ROOT, CgroupPart, CgroupReader, CgroupState, Hugetlb, size_name

CONTROLLERS = ("cpuset", "hugetlb")
_UNLIMITED = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupTarget:
    """What a cgroup is to be confined to. None, or a page size left out: left as it is."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugetlb: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Bytes by page_bytes, for pages in use and reserved ones alike; a multiple of page_bytes."""

    def __post_init__(self) -> None:
        for page_bytes, limit in self.hugetlb.items():
            if limit < 0 or limit % page_bytes:
                raise InputError(
                    f"cannot limit hugepages of {size_name(page_bytes)}: {limit} bytes are not whole pages"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One file that was changed."""

    path: str
    """In full."""
    before: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One file of a cgroup that does not say what it is to say."""

    file: str
    found: str
    """"": nothing, or there is no such file."""
    wanted: str


def drift(state: CgroupState, wanted: CgroupTarget) -> tuple[Drift, ...]:
    """Where a cgroup differs from what is wanted, also where what is in effect does: the parent has too little, or a
    CPU is gone. `state` must have been read with Part.LIMITS."""
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
    """The limits of a page size and what they are, in the order in which they rise."""
    stem = f"hugetlb.{size_name(page_bytes)}"
    yield f"{stem}.max", pages.max_bytes
    if pages.has_rsvd:
        yield f"{stem}.rsvd.max", pages.rsvd_max_bytes


def _limit(value: int | None) -> str:
    return _UNLIMITED if value is None else str(value)


def put(path: str, value: str) -> None:
    """Write a value to a file of the kernel's, in one write; never makes a file. HostError names path, cause, value."""
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
        """Make a cgroup be what is wanted; what was changed, in order. HostError where the cgroup is gone, a
        controller is off in it (see `enable`) or the kernel refuses; what was written before that stays."""
        state = self._there(path)
        changes = [*_falling(state, wanted), *_confining(state, wanted), *_rising(state, wanted.hugetlb)]
        return tuple(self._put(path, changes))

    def raise_limits(self, layout: CgroupLayout, path: str, at_least: Mapping[int, int]) -> tuple[Written, ...]:
        """Raise hugepage limits above a cgroup, kubepods first, to at least so many bytes by page_bytes: kubelet
        limits what a pod does not ask of it to 0 in the pod's cgroup. Nothing is ever lowered."""
        written: list[Written] = []
        for above in _above(layout, path):
            written += self._put(above, list(_rising(self._there(above), at_least)))
        return tuple(written)

    def enable(self, layout: CgroupLayout, path: str, controllers: Iterable[str] = CONTROLLERS) -> tuple[Written, ...]:
        """Have controllers on in a cgroup: switch them on below kubepods and every cgroup between.

        HostError where kubepods itself does not have them, which is for those above it to give.
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
        """Make a cgroup a partition of its own CPUs ("isolated", or "root": with load balancing).

        The cgroups above are no partitions, so this is a remote one: each of them first lets the CPUs through
        (cpuset.cpus.exclusive, Linux 6.7 and later). HostError where the kernel refuses or says afterwards that it is
        invalid, and why; then it is undone.
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
        """Undo `isolate`: no partition any more, and the cgroups above keep these CPUs back no longer. A cgroup that
        is gone was released by the kernel; those above it are still told."""
        written: list[Written] = []
        if self._reader.read(path, CgroupPart.CPUSET) is not None:
            written += self._partition(path, MEMBER)
            written += self._let_through(path, EMPTY)
        for above in reversed(_path_to(layout, path)):
            if self._reader.read(above, CgroupPart.CPUSET) is not None:
                written += self._let_through(above, self._exclusive(above) - cpus)
        return tuple(written)

    def keep_back(self, path: str, but: CpuSet) -> tuple[Written, ...]:
        """Let no CPUs through to partitions below a cgroup but these. HostError where it cannot be read or written."""
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
    """Limits to be lowered, as (file, before, value); a limit that is missing is written so that the kernel says so."""
    for page_bytes, limit in wanted.hugetlb.items():
        pages = (state.hugetlb or {}).get(page_bytes, Hugetlb(has_rsvd=True))
        for file, now in reversed(list(_limit_files(page_bytes, pages))):
            if now is None or now > limit:
                yield file, _limit(now), str(limit)


def _rising(state: CgroupState, limits: Mapping[int, int]) -> Iterator[tuple[str, str, str]]:
    """Limits to be raised, as (file, before, value)."""
    for page_bytes, limit in limits.items():
        for file, now in _limit_files(page_bytes, (state.hugetlb or {}).get(page_bytes, Hugetlb())):
            if now is not None and now < limit:
                yield file, str(now), str(limit)


def _confining(state: CgroupState, wanted: CgroupTarget) -> Iterator[tuple[str, str, str]]:
    """Nodes before CPUs, so that memory follows to where the threads are about to run."""
    for file, now, want in (("cpuset.mems", state.mems, wanted.mems), ("cpuset.cpus", state.cpus, wanted.cpus)):
        if want is not None and now != want:
            yield file, "" if now is None else str(now), str(want)


def _above(layout: CgroupLayout, path: str) -> tuple[str, ...]:
    """kubepods and what lies between it and a cgroup, from the top. InputError where the path is not kubelet's."""
    top = layout.top
    if not path.startswith(f"{top}/"):
        raise InputError(f"cannot write above cgroup {path[:200]!r}: it is not below {top}")
    parts = path[len(top) + 1 :].split("/")
    return tuple("/".join((top, *parts[:end])) for end in range(len(parts)))


def _path_to(layout: CgroupLayout, path: str) -> tuple[str, ...]:
    """All cgroups above one but the root, which lets everything through."""
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
