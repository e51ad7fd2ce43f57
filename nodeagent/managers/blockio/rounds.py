"""One round over the io files of cgroups: find the disks, work out the lines, have them kept. All of it blocks, in one
thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nodeagent.config.isolation import IoClassConfig, IoConfig
from nodeagent.core.blockio.demand import IoAsk, IoClass
from nodeagent.core.blockio.limits import LATENCY, NO_LIMITS, THROTTLE, WEIGHT, IoLimits, lines_of
from nodeagent.core.model.quantity import parse_size
from nodeagent.errors import HostError, InputError
from nodeagent.host.blockio.disks import Disk, check_queue, disk_at, disks_like, weight_file
from nodeagent.host.blockio.keeper import CONTROLLER, IoKeeper
from nodeagent.host.cgroup.layout import CgroupLayout
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.cgroup_limits import Asking, LimitsReport

Paths = Mapping[str, tuple[str, ...]]
"""Device nodes by the id of a device."""
Wanted = dict[str, dict[str, dict[str, str]]]
"""Lines by cgroup, file and disk."""


class IoRounds:
    """Does rounds. Building it reads nothing."""

    def __init__(self, sysfs: SysFs, layouts: Sequence[CgroupLayout], memory: Path) -> None:
        """memory: the record of what was done."""
        self._sysfs = sysfs
        self._layouts = tuple(layouts)
        self._memory = memory
        self._keeper: IoKeeper | None = None

    def keep(self, asking: Sequence[Asking[IoAsk]], paths: Paths, leave: Callable[[str], bool]) -> LimitsReport:
        """Put the limits of containers in force, and take out what no container asks for any longer, except in cgroups
        for which `leave` returns True. `paths` has the nodes of the devices that are asked for."""
        wanted: Wanted = {}
        errors: dict[str, str] = {}
        for one in asking:
            try:
                self._add(one, paths, wanted)
            except (HostError, InputError) as error:
                errors[one.path] = str(error)
        try:
            keeper = self._keeper_now()
            kept = keeper.keep(wanted, lambda path: path in errors or leave(path))
        except HostError as error:
            return LimitsReport(wanted=wanted, errors=errors, error=str(error))
        for one in asking:
            if why := errors.get(one.path) or kept.errors.get(one.path) or kept.errors.get(one.pod_path):
                errors[one.path] = why
        return LimitsReport(wanted=wanted, kept=kept, errors=MappingProxyType(errors))

    def check(self, asks: Iterable[IoAsk], paths: Paths) -> str:
        """Return why limits cannot be set on this machine, or "", before there is a container."""
        try:
            asks = list(asks)
            for ask in asks:
                for disk in self._disks(ask, paths):
                    self._lines(ask.limits, disk)
            self._check_kernel({file for ask in asks for file in _files(ask.limits)})
        except (HostError, InputError) as error:
            return str(error)
        return ""

    # ---------------------------------------------------------------- what is wanted

    def _add(self, one: Asking[IoAsk], paths: Paths, wanted: Wanted) -> None:
        """Add the lines of a container and of its pod. Raise HostError or InputError, and add none, if one cannot."""
        limits: dict[Disk, IoLimits] = {}
        for ask in one.asks:
            for disk in self._disks(ask, paths):
                limits[disk] = limits.get(disk, NO_LIMITS).with_both(ask.limits)
        found = [
            (path, file, disk.number, line)
            for disk, every in limits.items()
            for path, some in ((one.path, every.of_container), (one.pod_path, every.of_pod))
            for file, line in self._lines(some, disk).items()
        ]
        for path, file, number, line in found:
            lines = wanted.setdefault(path, {}).setdefault(file, {})
            lines[number] = _stricter(file, lines.get(number), line)

    def _disks(self, ask: IoAsk, paths: Paths) -> Iterator[Disk]:
        for device in ask.devices:
            nodes = [node for node in paths.get(device, ()) if not node.startswith("/dev/vfio/")]
            if not nodes:
                raise HostError(f"cannot limit I/O on {device}: it has no disk that this machine knows")
            yield from (disk_at(self._sysfs, node) for node in nodes)
        yield from disks_like(self._sysfs, ask.disks)

    def _lines(self, limits: IoLimits, disk: Disk) -> dict[str, str]:
        if limits.weight is None and limits.latency_us is None:
            return lines_of(limits, WEIGHT)
        check_queue(self._sysfs, disk)
        return lines_of(limits, weight_file(self._sysfs, disk) if limits.weight is not None else WEIGHT)

    # ---------------------------------------------------------------- what the kernel can do

    def _keeper_now(self) -> IoKeeper:
        if self._keeper is None:
            found = hierarchy(self._sysfs)
            if found.unsupported:
                raise HostError(f"cannot limit I/O: {found.unsupported}")
            self._keeper = IoKeeper(self._sysfs, found.mount, self._layouts, self._memory)
        return self._keeper

    def _check_kernel(self, files: Collection[str]) -> None:
        """Raise HostError if the pods' cgroups have no I/O controller, or it cannot do what is wanted. Nothing is known
        of that while kubelet has made none of them."""
        found = hierarchy(self._sysfs)
        if found.unsupported:
            raise HostError(f"cannot limit I/O: {found.unsupported}")
        for top in (f"{found.mount}/{one.top}" for one in self._layouts):
            inside = top.removeprefix(self._sysfs.root)
            controllers = self._sysfs.text(f"{inside}/cgroup.controllers", None)
            if controllers is None:
                continue
            if CONTROLLER not in controllers.split():
                raise HostError(f"cannot limit I/O: cgroup.controllers of {top} has no io, only {controllers!r}")
            for file in sorted(files):
                if not self._sysfs.exists(f"{inside}/{file}"):
                    raise HostError(f"cannot limit I/O: this kernel has no {file} ({_OPTIONS[file]})")


_OPTIONS = {THROTTLE: "CONFIG_BLK_DEV_THROTTLING", LATENCY: "CONFIG_BLK_CGROUP_IOLATENCY"}
"""What a kernel was built without that lacks a file."""


def _files(limits: IoLimits) -> Iterator[str]:
    if limits.of_container != NO_LIMITS:
        yield THROTTLE
    if limits.latency_us is not None:
        yield LATENCY


def _stricter(file: str, one: str | None, other: str) -> str:
    """Return the line that applies to a pod of which two containers ask for something. Only one container has a line of
    io.max."""
    if one is None or file == THROTTLE:
        return other
    pick = min if file == LATENCY else max
    return pick(one, other, key=lambda line: int(line.rpartition("=")[2]))


def io_class(config: IoClassConfig) -> IoClass:
    """Return a configured class as a core value."""
    limits = IoLimits(
        read_bps=_bytes(config.read_bytes_per_second),
        write_bps=_bytes(config.write_bytes_per_second),
        read_iops=config.read_iops,
        write_iops=config.write_iops,
        weight=config.weight,
        latency_us=config.latency_target_microseconds,
    )
    return IoClass(name=config.name, limits=limits, disks=tuple(config.disks))


def classes_of(config: IoConfig | None) -> Mapping[str, IoClass] | None:
    """Return the configured classes by name, or None if there is no such configuration."""
    return None if config is None else {one.name: io_class(one) for one in config.classes}


def _bytes(said: int | str | None) -> int | None:
    return parse_size(said) if isinstance(said, str) else said
