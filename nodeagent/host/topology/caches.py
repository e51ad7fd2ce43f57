"""Data and unified caches of every level and the online CPUs that share them.

Machines that do not describe their caches (Arm with a device tree, ia64, some PowerPC and guests) have none here.
Source: Documentation/ABI/testing/sysfs-devices-system-cpu, "cache".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import CacheGroup
from nodeagent.host.sysfs.lists import ListReader

_CPU = "sys/devices/system/cpu"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def read(reader: ListReader, online: CpuSet, cores: Iterable[CpuSet]) -> tuple[CacheGroup, ...]:
    """Return all caches, by level, then by lowest member; `index` counts them within their level."""
    levels: dict[int, dict[CpuSet, str]] = {}
    core_of = {cpu: core for core in cores for cpu in core}
    for level, cpus, path in _entries(reader, online, core_of):
        _add(reader, levels.setdefault(level, {}), cpus, path)
    return tuple(
        CacheGroup(level=level, index=index, cpus=cpus, size_bytes=_size_bytes(reader, groups[cpus]))
        for level, groups in sorted(levels.items())
        for index, cpus in enumerate(sorted(groups, key=CpuSet.first))
    )


def _entries(reader: ListReader, online: CpuSet, core_of: Mapping[int, CpuSet]) -> Iterator[tuple[int, CpuSet, str]]:
    """Yield level, members and folder of each cache, once for all its members.

    Level and type come from the files of each CPU itself: neither the number of a folder nor sharing another cache
    shows which cache it is. The members are read from the first CPU that no cache of the level has named yet. A CPU
    that is named at every level so far shares the first-level cache of a core: it has no others.
    """
    known: dict[int, CpuSet] = {}
    for cpu in online:
        if 1 in known and all(cpu in named for named in known.values()):
            continue
        for path in _folders(reader, cpu):
            level = _level_of(reader, path)
            if level is None or cpu in known.get(level, EMPTY):
                continue
            members = _members(reader, cpu, core_of[cpu], path)
            if members is not None:
                known[level] = known.get(level, EMPTY) | members
                yield level, members & online, path


def _folders(reader: ListReader, cpu: int) -> list[str]:
    folder = f"{_CPU}/cpu{cpu}/cache"
    return [f"{folder}/{name}" for name in reader.names(folder) if name.startswith("index")]


def _level_of(reader: ListReader, path: str) -> int | None:
    """Return the level of a data or unified cache, or None for an instruction cache or if it cannot be read."""
    kind = reader.need(f"{path}/type", _kind)
    return None if kind in (None, "Instruction") else reader.need(f"{path}/level", _level)


def _members(reader: ListReader, cpu: int, core: CpuSet, path: str) -> CpuSet | None:
    """Return the CPUs that share a cache, or None if neither file is valid. The mask comes before the list: kernels
    before 5.16 truncate both at one page, and a list of every second CPU reaches that first.

    An empty mask (ia64) is a known cache that no other core shares; it belongs to this core.
    """
    for name in ("shared_cpu_map", "shared_cpu_list"):
        members = reader.cpus(f"{path}/{name}")
        if members is not None:
            if cpu in members or not members:
                return members or core
            reader.refuse(f"{path}/{name}", str(members), f"does not name CPU {cpu}")
    reader.warnings.append(f"cannot use {reader.sysfs.path(path)}: shared_cpu_map and shared_cpu_list name no CPUs")
    return None


def _add(reader: ListReader, groups: dict[CpuSet, str], cpus: CpuSet, path: str) -> None:
    """Add a cache unless it overlaps another of its level. The same cache found twice counts once."""
    if cpus in groups:
        return
    if all(cpus.isdisjoint(other) for other in groups):
        groups[cpus] = path
    else:
        reader.refuse(path, str(cpus), "overlaps another cache of the same level: it is left out")


def _kind(text: str) -> str:
    if text not in ("Data", "Instruction", "Unified"):
        raise ValueError("expected Data, Instruction or Unified")
    return text


def _level(text: str) -> int:
    if not re.fullmatch("[1-9]", text, re.ASCII):
        raise ValueError("expected a level of 1 to 9")
    return int(text)


def _size_bytes(reader: ListReader, path: str) -> int | None:
    return reader.given(f"{path}/size", _size)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})([KMG]?)", text, re.ASCII)
    if match is None:
        raise ValueError("expected a size such as 32K")
    return int(match[1]) << _UNITS[match[2]]
