"""Undoes what confined pods and containers: partitions end, and cpusets become those of the parent.

Which cgroups those are: CONFINED in layout.py, and the copies that go with them: `confining` in write.py. A cgroup with
processes cannot get an empty cpuset back (ENOSPC), so it is given what its parent has in effect, in order from the top;
what crun has copied from a cgroup goes before it, as long as it is a copy. Hugepage limits stay: they only apply to
what a container was given, and end with it.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write
from nodeagent.host.cgroup.layout import BEST_EFFORT, BURSTABLE, CONFINED, GUARANTEED, CgroupLayout, layouts
from nodeagent.host.cgroup.read import INNER, MEMBER, CgroupPart, CgroupReader, CgroupState, find

CPUS, MEMS = "cpuset.cpus", "cpuset.mems"
PARTITION, EXCLUSIVE = "cpuset.cpus.partition", "cpuset.cpus.exclusive"


class Widening(NamedTuple):
    """One file that has to change. `path` is the cgroup's, below the mount."""

    path: str
    file: str
    found: str
    wanted: str


class Widener:
    """Widens the cgroups of all pods below one mount. Every call blocks and reads the cgroups again."""

    def __init__(self, mount: str, cgroup_root: str, *, cpus: bool = True, mems: bool = True) -> None:
        """cpus, mems: whether these files are the agent's; kubelet's static managers write them too."""
        self.mount = mount
        self._cgroup_root = cgroup_root
        self._layouts = layouts(cgroup_root)
        self._files = [file for file, ours in ((CPUS, cpus), (MEMS, mems)) if ours]
        self._reader = CgroupReader(mount, ())

    def plan(self) -> list[Widening]:
        """Return what is narrower than its parent, parents first. Raise HostError if a cgroup cannot be read."""
        states = self._states()
        passed = [one for path in self._above() if (one := self._passed_on(path)) is not None]
        widened = (one for file in self._files for one in self._widened(file, states))
        return [*_partitions(states), *passed, *widened]

    def undo(self) -> Iterator[str]:
        """Widen everything, and yield why a cgroup is narrow still. Raise HostError if a cgroup cannot be read."""
        writer, refused = write.Writer(self._reader), dict[tuple[str, str], str]()
        for one in self.plan():
            if (one.path, f"{INNER}/{one.file}") in refused:
                continue  # its copy would be none any longer
            try:
                self._undo(writer, one)
            except HostError as error:
                refused[one.path, one.file] = str(error)
        for one in self.plan():
            differs = f"cannot widen {self.mount}/{one.path}: {one.file} is {one.found!r}, not {one.wanted!r}"
            yield refused.get((one.path, one.file), differs)

    def _undo(self, writer: write.Writer, one: Widening) -> None:
        layout = self._layout(one.path)
        if one.file == PARTITION and layout is not None and (state := self._read(one.path)) is not None:
            writer.release(layout, one.path, state.cpus or EMPTY)
        elif one.file == EXCLUSIVE:
            writer.keep_back(one.path, EMPTY)
        else:
            write.put(f"{self.mount}/{one.path}/{one.file}", one.wanted)

    def _states(self) -> dict[str, CgroupState]:
        found = {one.path: self._read(one.path) for one in find(self.mount, self._cgroup_root, CONFINED)}
        return {path: state for path, state in found.items() if state is not None}

    def _widened(self, file: str, states: Mapping[str, CgroupState]) -> Iterator[Widening]:
        """Yield the changes to one file. What partitions hold is missing from the cgroups above until they end."""
        held = (
            union(state.cpus or EMPTY for state in states.values() if _is_partition(state)) if file == CPUS else EMPTY
        )
        after: dict[str, CpuSet] = {}
        for path, state in states.items():
            parent = path.rpartition("/")[0]
            if parent not in after:
                after[parent] = self._effective(parent, file) | held
            own, _ = _values(state, file)
            wanted = after[path] = after[parent]
            if own and wanted - own:
                whole = write.CgroupTarget(cpus=wanted) if file == CPUS else write.CgroupTarget(mems=wanted)
                yield from (Widening(path, *one) for one in write.confining(state, whole))

    def _effective(self, path: str, file: str) -> CpuSet:
        state = self._read(path)
        return _values(state, file)[1] if state is not None else EMPTY

    def _above(self) -> list[str]:
        """Return the cgroups that pass CPUs on to partitions of pods, and exist."""
        every = (one.qos(qos) for one in self._layouts for qos in (BURSTABLE, BEST_EFFORT, GUARANTEED))
        return [path for path in dict.fromkeys(every) if Path(self.mount, path).is_dir()]

    def _passed_on(self, path: str) -> Widening | None:
        """Return how a cgroup stops passing CPUs on, or None if it passes none on or the kernel cannot (before 6.7)."""
        try:
            found = Path(self.mount, path, EXCLUSIVE).read_text().strip()
        except OSError:
            return None
        return Widening(path, EXCLUSIVE, found, "") if found else None

    def _read(self, path: str) -> CgroupState | None:
        return self._reader.read(path, CgroupPart.CPUSET)

    def _layout(self, path: str) -> CgroupLayout | None:
        return next((one for one in self._layouts if path.startswith(f"{one.top}/")), None)


def _partitions(states: Mapping[str, CgroupState]) -> Iterator[Widening]:
    for path, state in states.items():
        if _is_partition(state):
            yield Widening(path, PARTITION, state.partition or "", MEMBER)


def _is_partition(state: CgroupState) -> bool:
    return state.partition not in (None, MEMBER)


def _values(state: CgroupState, file: str) -> tuple[CpuSet, CpuSet]:
    """Return what is set in a file and what is in effect."""
    own, effective = (state.cpus, state.cpus_effective) if file == CPUS else (state.mems, state.mems_effective)
    return own or EMPTY, effective or EMPTY
