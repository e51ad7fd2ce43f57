"""What of CPUs can be set on this machine: cpufreq policies, and the tolerated wake-up latency.

Sources: Documentation/admin-guide/pm/cpufreq.rst, Documentation/ABI/testing/sysfs-devices-power.
"""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.tuning.plan import FrequencyPolicy, Tunables
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

_POLICIES, _CPUS = "sys/devices/system/cpu/cpufreq", "sys/devices/system/cpu"
_LATENCY = "power/pm_qos_resume_latency_us"


def read(sysfs: SysFs) -> Tunables:
    """Return what can be set; a policy that cannot be read is named and affects no other. Raise HostError if the CPUs
    cannot be listed. Takes about 0.1 ms for each CPU."""
    cpus = ((cpu, f"{folder}/{_LATENCY}") for cpu, folder in sysfs.numbered(_CPUS, "cpu"))
    policies, unread = list[FrequencyPolicy](), dict[str, str]()
    for _, path in sysfs.numbered(_POLICIES, "policy"):
        try:
            policies += _policy(sysfs, path)
        except HostError as error:
            unread[path] = str(error)
    latency_paths = {cpu: path for cpu, path in cpus if sysfs.exists(path)}
    return Tunables(policies=tuple(policies), latency_paths=latency_paths, unread=unread)


def _policy(sysfs: SysFs, path: str) -> Iterator[FrequencyPolicy]:
    """Yield a policy, unless all of its CPUs are offline: it keeps its folder then and covers none."""
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
