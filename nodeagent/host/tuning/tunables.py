"""What of CPUs can be set on this machine: cpufreq policies, and the tolerated wake-up latency.

Sources: Documentation/admin-guide/pm/cpufreq.rst, Documentation/ABI/testing/sysfs-devices-power.
"""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.tuning.plan import FrequencyPolicy, Tunables
from nodeagent.host.sysfs.sysfs import SysFs

_POLICIES, _CPUS = "sys/devices/system/cpu/cpufreq", "sys/devices/system/cpu"
_LATENCY = "power/pm_qos_resume_latency_us"


def read(sysfs: SysFs) -> Tunables:
    """Return what can be set. Raise HostError if a file cannot be read. Takes about 0.1 ms for each CPU."""
    cpus = ((cpu, f"{folder}/{_LATENCY}") for cpu, folder in sysfs.numbered(_CPUS, "cpu"))
    return Tunables(
        policies=tuple(_policies(sysfs)), latency_paths={cpu: path for cpu, path in cpus if sysfs.exists(path)}
    )


def _policies(sysfs: SysFs) -> Iterator[FrequencyPolicy]:
    for _, path in sysfs.numbered(_POLICIES, "policy"):
        # A policy whose CPUs are all offline keeps its folder and covers none.
        if cpus := sysfs.value(f"{path}/affected_cpus", _listed):
            yield FrequencyPolicy(
                path=path,
                cpus=cpus,
                governors=_words(sysfs, f"{path}/scaling_available_governors"),
                preferences=_words(sysfs, f"{path}/energy_performance_available_preferences"),
                lowest_khz=sysfs.number(f"{path}/cpuinfo_min_freq"),
                highest_khz=sysfs.number(f"{path}/cpuinfo_max_freq"),
            )


def _listed(text: str) -> CpuSet:
    """Return the CPUs of a list that the kernel separates by spaces."""
    return CpuSet(int(one) for one in text.split())


def _words(sysfs: SysFs, path: str) -> tuple[str, ...]:
    return tuple(sysfs.text(path, "").split())
