"""Which kernel files must have which value so that exclusive CPUs run as configured. Pure.

A frequency policy covers one or more CPUs and has one governor, one preference and one range for all of them. It is set
only while all of its CPUs are exclusive: a CPU that others use stays as it is. How long a CPU may take to wake up is
set for each CPU by itself.
Sources: Documentation/admin-guide/pm/cpufreq.rst and intel_pstate.rst, Documentation/ABI/testing/sysfs-devices-power.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet

GOVERNOR, PREFERENCE = "scaling_governor", "energy_performance_preference"
HIGHEST, LOWEST = "scaling_max_freq", "scaling_min_freq"
NONE_TOLERATED = "n/a"
"""In pm_qos_resume_latency_us, where 0 means that any latency will do."""


class FrequencyPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs whose frequency is set together."""

    path: str
    """Its folder, such as "sys/devices/system/cpu/cpufreq/policy0"."""
    cpus: CpuSet
    """The online CPUs that it covers (affected_cpus)."""
    governors: tuple[str, ...] = ()
    preferences: tuple[str, ...] = ()
    """Energy performance preferences; empty if its driver has none."""
    lowest_khz: int | None = None
    highest_khz: int | None = None
    """What the hardware can do (cpuinfo_min_freq, cpuinfo_max_freq), or None if it is not known."""


class Tunables(msgspec.Struct, frozen=True, kw_only=True):
    """What can be set on a machine."""

    policies: tuple[FrequencyPolicy, ...] = ()
    latency_paths: Mapping[int, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """The file with the tolerated wake-up latency, by CPU."""
    unread: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why policies could not be read, by folder: what was set there stays."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """How exclusive CPUs should run. What is empty or None stays as it is."""

    governor: str = ""
    preference: str = ""
    min_khz: int | None = None
    max_khz: int | None = None
    wakeup_us: int | None = None
    """The longest tolerated wake-up latency in microseconds; 0 keeps a CPU out of all idle states but polling."""

    @property
    def of_policies(self) -> bool:
        """Return whether any of it is set for a frequency policy."""
        return bool(self.governor or self.preference) or self.min_khz is not None or self.max_khz is not None


class TuningPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to write. `wanted` has a value by path, in the order in which they are written."""

    wanted: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    cpus: CpuSet = EMPTY
    """The exclusive CPUs for which all that is configured can be set."""
    notes: tuple[str, ...] = ()
    """Why some of it cannot be set, one sentence each."""


def plan(machine: Tunables, exclusive: CpuSet, tuning: Tuning) -> TuningPlan:
    """Return what has to be set while these CPUs are exclusive."""
    wanted: dict[str, str] = {}
    notes: dict[str, CpuSet] = {}
    for policy in machine.policies if tuning.of_policies else ():
        if mine := policy.cpus & exclusive:
            for path, value, why in _of_policy(policy, mine, tuning):
                if why:
                    notes[why] = notes.get(why, EMPTY) | mine
                else:
                    wanted[path] = value
    if tuning.wakeup_us is not None:
        value = str(tuning.wakeup_us) if tuning.wakeup_us else NONE_TOLERATED
        wanted |= {path: value for cpu, path in sorted(machine.latency_paths.items()) if cpu in exclusive}
    notes |= _absent(machine, exclusive, tuning)
    lacking = CpuSet(cpu for some in notes.values() for cpu in some)
    said = tuple(f"{_cpus(some)}: {why}" for why, some in notes.items())
    unread = tuple(machine.unread.values()) if tuning.of_policies else ()
    return TuningPlan(wanted=MappingProxyType(wanted), cpus=exclusive - lacking, notes=(*unread, *said))


def _of_policy(policy: FrequencyPolicy, mine: CpuSet, tuning: Tuning) -> Iterator[tuple[str, str, str]]:
    """Yield (path, value, why it cannot be set, or "")."""
    if shared := policy.cpus - mine:
        yield "", "", f"they stay as they are: {_cpus(shared)} run at the same frequency and are not exclusive"
        return
    if tuning.governor:
        yield _chosen(policy, GOVERNOR, tuning.governor, policy.governors, "governor")
    if tuning.preference:
        kind = "energy performance preference"
        yield _chosen(policy, PREFERENCE, tuning.preference, policy.preferences, kind)
    # The upper end first: the kernel refuses a range that is upside down only in passing, and it is written again.
    for name, khz in ((HIGHEST, tuning.max_khz), (LOWEST, tuning.min_khz)):
        if khz is not None:
            yield f"{policy.path}/{name}", str(_clamped(policy, khz)), ""


def _chosen(policy: FrequencyPolicy, name: str, value: str, known: tuple[str, ...], kind: str) -> tuple[str, str, str]:
    if value in known:
        return f"{policy.path}/{name}", value, ""
    have = f"only {', '.join(known)}" if known else "none"
    return "", "", f"there is no {kind} {value!r}, {have}"


def _clamped(policy: FrequencyPolicy, khz: int) -> int:
    """Return the nearest frequency that the hardware can do: cores of another kind have other limits."""
    khz = khz if policy.highest_khz is None else min(khz, policy.highest_khz)
    return khz if policy.lowest_khz is None else max(khz, policy.lowest_khz)


def _absent(machine: Tunables, exclusive: CpuSet, tuning: Tuning) -> dict[str, CpuSet]:
    covered = CpuSet(cpu for policy in machine.policies for cpu in policy.cpus)
    found = {}
    if tuning.of_policies and (bare := exclusive - covered):
        found["the kernel does not control their frequency (there is no cpufreq policy)"] = bare
    if tuning.wakeup_us is not None and (bare := exclusive - CpuSet(machine.latency_paths)):
        found["the kernel does not limit their wake-up latency (there is no pm_qos_resume_latency_us)"] = bare
    return found


def _cpus(some: CpuSet) -> str:
    return f"CPU {some}" if len(some) == 1 else f"CPUs {some}"
