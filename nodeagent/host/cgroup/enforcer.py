"""Makes cgroups agree with the decisions, and reads back that they do.

A target is the complete desired state of one cgroup; what it does not name is left alone. Every write is read back: a
value that the kernel accepted without putting it into effect is an error, just like one that it refused. CPUs are first
taken from every cgroup that loses some, and only then given to others.
Every call blocks; use an `Enforcer` from one thread at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import BEST_EFFORT, BURSTABLE, GUARANTEED, CgroupLayout
from nodeagent.host.cgroup.read import MEMBER, CgroupPart, CgroupReader, CgroupState
from nodeagent.host.cgroup.write import CgroupTarget, Drift, Writer, drift

CLASSES = (GUARANTEED, BURSTABLE, BEST_EFFORT)


def _none() -> Mapping[int, int]:
    return MappingProxyType({})


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The desired state of one cgroup. Fields that are None and page sizes that are left out stay unchanged."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    hugepage_limits: Mapping[int, int] = msgspec.field(default_factory=_none)
    """Exact limits in bytes, by page_bytes."""
    hugepages_at_least: Mapping[int, int] = msgspec.field(default_factory=_none)
    """Least limits in bytes, by page_bytes, that it must allow."""
    hugepages_above: Mapping[int, int] = msgspec.field(default_factory=_none)
    """Least limits in bytes, by page_bytes, that the cgroups above it must allow."""
    within: CpuSet | None = None
    """CPUs that the effective CPUs must stay within, whatever is written: for cgroups below a confined one."""
    partition: str = MEMBER
    let_go: CpuSet = EMPTY
    """CPUs of which partitions below may take any: those that they take are in effect there and not here."""

    @property
    def wanted(self) -> CgroupTarget:
        """Return the values to write."""
        return CgroupTarget(cpus=self.cpus, mems=self.mems, hugetlb=self.hugepage_limits)

    @property
    def parts(self) -> CgroupPart:
        """Return which files of the cgroup have to be read back."""
        limits = self.hugepage_limits or self.hugepages_at_least
        return CgroupPart.LIMITS if limits else CgroupPart.CPUSET


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One cgroup that was not in its desired state."""

    path: str
    drift: tuple[Drift, ...] = ()
    """Empty if the cgroup could not even be read."""
    error: str = ""
    """Why it is still not in its desired state; empty if it was repaired and read back."""


class Enforcer:
    """Writes cgroups below one mount and reads them back. `states` has the last state read of each cgroup."""

    def __init__(self, reader: CgroupReader, layouts: Iterable[CgroupLayout]) -> None:
        self.states: dict[str, CgroupState] = {}
        self._reader = reader
        self._writer = Writer(reader)
        self._layouts = tuple(layouts)
        self._partitions: dict[str, CpuSet] = {}

    @property
    def mount(self) -> str:
        """Return the mount point of the hierarchy."""
        return self._reader.mount

    def apply(self, targets: Mapping[str, Target]) -> dict[str, str]:
        """Bring cgroups into their desired state. Return by path why some could not be. Missing cgroups are skipped."""
        errors: dict[str, str] = {}
        for path, target in targets.items():
            self._noted(errors, path, self._take_away, target)
        for path, target in targets.items():
            if path not in errors:
                self._noted(errors, path, self._confine, target)
        return errors

    def look(self, paths: Iterable[str]) -> dict[str, CgroupState]:
        """Return the current state of cgroups. Those that are gone or cannot be read are left out."""
        found: dict[str, CgroupState] = {}
        for path in paths:
            with contextlib.suppress(HostError):
                if (state := self._read(path, CgroupPart.CPUSET)) is not None:
                    found[path] = state
        return found

    def verify(self, targets: Mapping[str, Target]) -> tuple[Finding, ...]:
        """Read back, repair what differs, and return what was found."""
        return tuple(found for path, target in targets.items() if (found := self._verify(path, target)) is not None)

    def quota_cpus(self, path: str) -> float | None:
        """Return the CPU time that a cgroup may use, in CPUs, or None if it is unlimited or the cgroup is gone."""
        state = self._reader.read(path, CgroupPart.CPU_TIME)
        if state is None or state.quota_us is None or not state.period_us:
            return None
        return state.quota_us / state.period_us

    def page_limits(self, path: str) -> dict[int, int]:
        """Return how many bytes of hugepages a cgroup may use, by page_bytes; sizes without a limit are left out.

        Raise HostError if that cannot be read. A cgroup that is gone has no limits.
        """
        state = self._reader.read(path, CgroupPart.HUGETLB_LIMITS)
        pages = (state.hugetlb if state is not None else None) or {}
        return {size: one.max_bytes for size, one in pages.items() if one.max_bytes is not None}

    def kill(self, path: str) -> None:
        """Kill every process in a cgroup and below it (Linux 5.14). Raise HostError if the kernel refuses."""
        cgroupset.put(f"{self.mount}/{path}/cgroup.kill", "1")

    def forget(self, path: str) -> None:
        """Note that a cgroup is gone, and stop passing CPUs on to its partition."""
        self.states.pop(path, None)
        if (cpus := self._partitions.pop(path, None)) and (layout := self._layout(path)):
            self._writer.release(layout, path, cpus)

    def tidy(self) -> None:
        """Stop passing CPUs on to partitions that are gone: a previous agent may have died before doing so. Call this
        once all existing cgroups are in their desired state."""
        held = union(self._partitions.values())
        for layout in self._layouts:
            for above in dict.fromkeys(layout.qos(one) for one in CLASSES):
                with contextlib.suppress(HostError):  # it does not exist, or the kernel lacks remote partitions
                    self._writer.keep_back(above, held)

    # ---------------------------------------------------------------- one cgroup

    def _noted(self, errors: dict[str, str], path: str, work: object, target: Target) -> None:
        try:
            work(path, target)  # type: ignore[operator]
        except HostError as error:
            if self._read(path, CgroupPart.CPUSET) is not None:
                errors[path] = str(error)

    def _take_away(self, path: str, target: Target) -> None:
        """Take CPUs away before any cgroup is given some."""
        if target.cpus is None or (state := self.states.get(path) or self._read(path, CgroupPart.CPUSET)) is None:
            return
        now = state.cpus_effective or target.cpus
        if now - target.cpus and target.cpus - now:
            self._writer.write(path, CgroupTarget(cpus=(now & target.cpus) or target.cpus))

    def _moved(self, path: str, target: Target) -> bool:
        """Write only the CPUs if nothing else differs, and return whether that sufficed. When a container takes
        exclusive CPUs, this applies to every other pod: one write and one read are enough."""
        known = self.states.get(path)
        if known is None or known.cpus in (None, target.cpus) or target != Target(cpus=target.cpus) or not target.cpus:
            return False
        if known.inner_cpus is not None:
            return False
        cgroupset.put(f"{self.mount}/{path}/cpuset.cpus", str(target.cpus))
        if self._reader.effective(path) != target.cpus:
            return False
        self.states[path] = replace(known, cpus=target.cpus, cpus_effective=target.cpus)
        return True

    def _confine(self, path: str, target: Target) -> None:
        if self._moved(path, target) or (state := self._read(path, target.parts)) is None:
            return
        if target.hugepages_above and (layout := self._layout(path)) is not None:
            self._writer.raise_limits(layout, path, target.hugepages_above)
        if not _drifts(state, target):
            if target.partition != MEMBER and target.cpus:
                self._partitions[path] = target.cpus  # also one made by a previous agent
            return
        self._write(path, target, state)
        if (state := self._read(path, target.parts)) is not None and (left := _drifts(state, target)):
            raise HostError(f"cannot confine {self.mount}/{path}: {'; '.join(map(_sentence, left))}")

    def _write(self, path: str, target: Target, state: CgroupState) -> None:
        layout = self._layout(path)
        if layout is not None and _is_needless(state, target):
            self._writer.release(layout, path, self._partitions.pop(path, EMPTY) or state.cpus or EMPTY)
        if layout is not None and target.wanted != CgroupTarget():
            self._writer.enable(layout, path, _controllers(target))
        if layout is not None and target.hugepages_at_least:
            # The cgroup's own limits are raised as those above a path inside it.
            self._writer.raise_limits(layout, f"{path}/-", target.hugepages_at_least)
        self._writer.write(path, target.wanted)
        if target.partition != MEMBER and layout is not None and target.cpus:
            self._partitions[path] = target.cpus
            self._writer.isolate(layout, path, target.cpus, target.partition)

    def _verify(self, path: str, target: Target) -> Finding | None:
        found: tuple[Drift, ...] = ()
        try:
            state = self._read(path, target.parts)
            found = _drifts(state, target) if state is not None else ()
            if not found:
                return None
            self._confine(path, target)
        except HostError as error:
            gone = self._reader.read(path, CgroupPart.CPUSET) is None
            return None if gone else Finding(path=path, drift=found, error=str(error))
        return Finding(path=path, drift=found)

    def _read(self, path: str, parts: CgroupPart) -> CgroupState | None:
        state = self._reader.read(path, parts)
        if state is None:
            self.states.pop(path, None)
        else:
            self.states[path] = state
        return state

    def _layout(self, path: str) -> CgroupLayout | None:
        return next((one for one in self._layouts if path.startswith(f"{one.top}/")), None)


def _drifts(state: CgroupState, target: Target) -> tuple[Drift, ...]:
    own = tuple(one for one in drift(state, target.wanted) if not _is_let_go(one, target))
    return (*own, *_beyond(state, target), *_too_low(state, target), *_no_partition(state, target))


def _is_let_go(one: Drift, target: Target) -> bool:
    if target.cpus is None or not target.let_go or one.file != "cpuset.cpus.effective":
        return False
    found = CpuSet.parse(one.found)
    return target.cpus - target.let_go <= found <= target.cpus


def _beyond(state: CgroupState, target: Target) -> Iterator[Drift]:
    """Yield a drift if CPUs outside `within` are in effect."""
    now = state.cpus_effective
    if target.within is not None and now is not None and now - target.within:
        yield Drift(file="cpuset.cpus.effective", found=str(now), wanted=f"within {target.within}")


def _too_low(state: CgroupState, target: Target) -> Iterator[Drift]:
    for page_bytes, least in target.hugepages_at_least.items():
        pages = (state.hugetlb or {}).get(page_bytes)
        limits = (pages.max_bytes, pages.rsvd_max_bytes if pages.has_rsvd else None) if pages is not None else ()
        low = [one for one in limits if one is not None and one < least]
        if low:
            yield Drift(file=f"hugetlb of {page_bytes} bytes", found=str(min(low)), wanted=f"at least {least}")


def _is_needless(state: CgroupState, target: Target) -> bool:
    """Return whether the cgroup is a partition although its target no longer is one."""
    return target.partition == MEMBER and target.cpus is not None and state.partition not in (None, MEMBER)


def _no_partition(state: CgroupState, target: Target) -> Iterator[Drift]:
    if _is_needless(state, target):
        yield Drift(file="cpuset.cpus.partition", found=state.partition or "", wanted=MEMBER)
    if target.partition != MEMBER and target.cpus and (state.partition != target.partition or state.partition_invalid):
        found = f"{state.partition} {state.partition_invalid}".strip()
        yield Drift(file="cpuset.cpus.partition", found=found, wanted=target.partition)


def _sentence(one: Drift) -> str:
    return f"{one.file} is {one.found!r}, not {one.wanted!r}"


def _controllers(target: Target) -> tuple[str, ...]:
    return ("cpuset", "hugetlb") if target.hugepage_limits else ("cpuset",)
