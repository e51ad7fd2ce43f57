"""Which CPUs of a hybrid machine are fast and which are efficient.

The first source that covers every online CPU decides: the PMUs cpu_core, cpu_atom and cpu_lowpower (Intel
hybrid), cpu_capacity (Arm, and newer kernels elsewhere), the base frequency, the maximum frequency. Numbers
start a new tier only where the next slower CPU is more than 15 % slower: cores of one kind differ by less
("favoured" cores turbo higher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.topology import BALANCED, EFFICIENCY, PERFORMANCE
from nodeagent.host.sysfs.lists import ListReader

_SAME_KIND_PERCENT = 85
_PMUS = ("cpu_core", "cpu_atom", "cpu_lowpower")
"""Fastest first."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of one CPU, as far as the kernel reports it."""

    capacity: int | None = None
    base_khz: int | None = None
    max_khz: int | None = None


def speeds(reader: ListReader, cores: Iterable[CpuSet]) -> dict[int, Speed]:
    """Return the speed of each CPU, read once per core: the threads of a core run at the same clock."""
    found: dict[int, Speed] = {}
    for core in cores:
        found.update(dict.fromkeys(core, _speed(reader, f"sys/devices/system/cpu/cpu{core.first()}")))
    return found


def _speed(reader: ListReader, folder: str) -> Speed:
    return Speed(
        capacity=_positive(reader, f"{folder}/cpu_capacity"),
        base_khz=_positive(reader, f"{folder}/cpufreq/base_frequency"),
        max_khz=_positive(reader, f"{folder}/cpufreq/cpuinfo_max_freq"),
    )


def _positive(reader: ListReader, path: str) -> int | None:
    number = reader.number(path)
    if number is not None and number <= 0:
        reader.refuse(path, str(number), "is not a speed")
        return None
    return number


def kinds(reader: ListReader, online: CpuSet, speed: Mapping[int, Speed]) -> dict[int, str]:
    """Return the kind of each CPU; empty if all are alike or cannot be distinguished."""
    tiers = _pmu_tiers(reader, online) or _speed_tiers(online, speed)
    if len(tiers) < 2:
        return {}
    middle = [BALANCED] * (len(tiers) - 2)
    names = [PERFORMANCE, *middle, EFFICIENCY]
    return {cpu: name for tier, name in zip(tiers, names, strict=True) for cpu in tier}


def _pmu_tiers(reader: ListReader, online: CpuSet) -> list[CpuSet]:
    found = [(reader.given(f"sys/devices/{pmu}/cpus", CpuSet.parse) or EMPTY) & online for pmu in _PMUS]
    tiers = [tier for tier in found if tier]
    whole = union(tiers) == online and sum(map(len, tiers)) == len(online)
    return tiers if whole else []


def _speed_tiers(online: CpuSet, speed: Mapping[int, Speed]) -> list[CpuSet]:
    by_capacity = _tiers(online, lambda cpu: speed[cpu].capacity)
    if by_capacity:
        return by_capacity
    by_base = _tiers(online, lambda cpu: speed[cpu].base_khz)
    return by_base if len(by_base) > 1 else _tiers(online, lambda cpu: speed[cpu].max_khz)


def _tiers(online: CpuSet, ask: Callable[[int], int | None]) -> list[CpuSet]:
    """Return groups of CPUs with similar numbers, the largest numbers first; empty if any CPU's number is unknown."""
    numbers = {cpu: number for cpu in online if (number := ask(cpu)) is not None}
    if len(numbers) < len(online):
        return []
    tiers: list[list[int]] = []
    slowest = 0
    for cpu in sorted(numbers, key=lambda cpu: (-numbers[cpu], cpu)):
        if not tiers or numbers[cpu] * 100 < slowest * _SAME_KIND_PERCENT:
            tiers.append([])
        tiers[-1].append(cpu)
        slowest = numbers[cpu]
    return [CpuSet(tier) for tier in tiers]
