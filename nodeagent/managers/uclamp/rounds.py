"""One round over the cpu.uclamp files of cgroups: work out the values, also of the cgroups above, and have them kept.
All of it blocks, in one thread at a time.

A minimum counts only as far as every cgroup above has one too, so these are raised to the highest that is needed below
them: pods, QoS classes, kubepods and what is above it. That changes nothing for other pods, which have a minimum of 0
themselves. A value that an admin has set there is never lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nodeagent.config.isolation import UclampConfig
from nodeagent.core.model.quantity import WHOLE_HUNDREDTHS, parse_percent
from nodeagent.core.uclamp.clamps import CAPACITY, MAX, MIN, UNLIMITED, Clamp, alike, hundredths_of, text_of
from nodeagent.core.uclamp.demand import Classes
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import POD, QOS, TOP, CgroupLayout
from nodeagent.host.cgroup.line_journal import CgroupLine
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uclamp.keeper import ACT, CONTROLLER, OPTION, WHOLE, UclampKeeper
from nodeagent.managers.cgroup_limits import Asking, LimitsReport, Wanted

_HIGHEST_MINIMUM = "proc/sys/kernel/sched_util_clamp_min"
"""What no cgroup's minimum in effect exceeds, of CAPACITY."""
Values = dict[str, dict[str, dict[str, str]]]
"""By cgroup, file and what of the file, which is all of it."""


class UclampRounds:
    """Does rounds. Building it reads nothing."""

    def __init__(self, sysfs: SysFs, layouts: Sequence[CgroupLayout], memory: Path) -> None:
        """memory: the record of what was done."""
        self._sysfs = sysfs
        self._layouts = tuple(layouts)
        self._memory = memory
        self._keeper: UclampKeeper | None = None

    def keep(self, asked: Wanted[Clamp], leave: Callable[[str], bool]) -> LimitsReport:
        """Put the clamps of all containers in force, and take out what no container asks for any longer, except in
        cgroups of containers for which `leave` returns True.

        A container of which it is not known what it asks for is kept at what it was given.
        """
        try:
            return self._kept(asked, leave)
        except (HostError, InputError) as error:
            return LimitsReport(error=str(error))

    def _kept(self, asked: Wanted[Clamp], leave: Callable[[str], bool]) -> LimitsReport:
        keeper = self._keeper_now()
        held, _ = keeper.held()
        given = {one.path for one in held}
        asking = [one for one in asked.asking if one.path in asked.known or one.path not in given]
        own = {one.path: _whole(clamp.values) for one in asking for clamp in one.asks}
        own |= self._left(held, lambda path: path not in own and leave(path))
        wanted = {**_above(keeper, own, held), **own}
        kept = keeper.keep(wanted, lambda path: not self._is_above(path) and leave(path))
        errors: dict[str, str] = {}
        for one in asking:
            if failed := [path for path in (one.path, *_parents(one.path)) if path in kept.errors]:
                errors[one.path] = kept.errors[failed[0]]
        notes = tuple(dict.fromkeys(self._caps(keeper, asking)))
        return LimitsReport(wanted=wanted, kept=kept, errors=MappingProxyType(errors), notes=notes)

    def unavailable(self) -> str:
        """Return why no cgroup can have a clamp on this machine, or "". Nothing is known of that while kubelet has made
        none of them. Raise HostError if it cannot be read."""
        found = hierarchy(self._sysfs)
        if found.unsupported:
            return found.unsupported
        for top in (f"{found.mount}/{one.top}" for one in self._layouts):
            inside = top.removeprefix(self._sysfs.root)
            controllers = self._sysfs.text(f"{inside}/cgroup.controllers", None)
            if controllers is None:
                continue
            if CONTROLLER not in controllers.split():
                return f"cgroup.controllers of {top} has no {CONTROLLER}, only {controllers!r}"
            if not self._sysfs.exists(f"{inside}/{MIN}"):
                return f"this kernel has no {MIN} ({OPTION})"
        return ""

    # ---------------------------------------------------------------- what is wanted

    def _left(self, held: Sequence[CgroupLine], leave: Callable[[str], bool]) -> Values:
        """Return what was given to containers that are left as they are."""
        found: Values = {}
        for one in held:
            if not self._is_above(one.path) and leave(one.path):
                found.setdefault(one.path, {})[one.file] = {one.number: one.wanted}
        return found

    def _is_above(self, path: str) -> bool:
        """Return whether a cgroup is one that containers' are in."""
        return any(
            layout.top == path or layout.top.startswith(f"{path}/") or _is_pods(layout, path)
            for layout in self._layouts
        )

    def _keeper_now(self) -> UclampKeeper:
        if self._keeper is None:
            found = hierarchy(self._sysfs)
            if found.unsupported:
                raise HostError(f"cannot {ACT}: {found.unsupported}")
            self._keeper = UclampKeeper(self._sysfs, found.mount, self._layouts, self._memory)
        return self._keeper

    # ---------------------------------------------------------------- what is in effect

    def _caps(self, keeper: UclampKeeper, asking: Iterable[Asking[Clamp]]) -> Iterator[str]:
        """Yield why minima are not in effect although they are set."""
        highest = self._sysfs.number(_HIGHEST_MINIMUM)
        for one in asking:
            need = max((clamp.min_hundredths or 0 for clamp in one.asks), default=0)
            if highest is not None and need * CAPACITY > highest * WHOLE_HUNDREDTHS:
                yield f"{one.whose}: kernel.sched_util_clamp_min is {highest} of {CAPACITY}, which caps its minimum"
            for path in _parents(one.path) if need else ():
                most = (keeper.text(path, MAX) or UNLIMITED).strip()
                if hundredths_of(most) < need:
                    yield f"{one.whose}: {MAX} of {path} is {most}, which caps its minimum"


def _above(keeper: UclampKeeper, own: Values, held: Sequence[CgroupLine]) -> Values:
    """Return the minima of the cgroups above those that have one."""
    needs: dict[str, int] = {}
    for path, some in own.items():
        for above in _parents(path) if MIN in some and keeper.exists(path) else ():
            needs[above] = max(needs.get(above, 0), hundredths_of(some[MIN][WHOLE]))
    known = {one.path: one for one in held if one.file == MIN}
    return {
        path: _whole({MIN: text_of(need)})
        for path, need in sorted(needs.items())
        if need > _theirs(keeper.text(path, MIN) or "0", known.get(path))
    }


def _theirs(now: str, held: CgroupLine | None) -> int:
    """Return the minimum that a cgroup has apart from the agent's. now: what its file says."""
    is_ours = held is not None and any(alike(now, own) for own in (held.wanted, *held.earlier))
    return hundredths_of((held.before or "0") if held is not None and is_ours else now)


def _parents(path: str) -> Iterator[str]:
    """Yield the cgroups that a cgroup is in, the highest first, without the root, which has no such files."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(1, len(parts)))


def _is_pods(layout: CgroupLayout, path: str) -> bool:
    found = layout.parse(path)
    return found is not None and found.kind in (TOP, QOS, POD)


def _whole(values: Mapping[str, str]) -> dict[str, dict[str, str]]:
    return {file: {WHOLE: text} for file, text in values.items()}


def classes_of(config: UclampConfig | None) -> Classes | None:
    """Return the configured classes, or None if there is no such configuration."""
    if config is None:
        return None
    clamps = {
        one.name: Clamp(
            min_hundredths=None if one.min is None else parse_percent(one.min),
            max_hundredths=None if one.max is None else parse_percent(one.max),
        )
        for one in config.classes
    }
    return Classes(clamps=clamps, default=config.default)
