"""The kernel's side of CPU frequencies and wake-up latencies, as strict as the kernel: what it refuses, and what it
makes of what it takes.

Sources: drivers/cpufreq/cpufreq.c (store_scaling_governor, store_scaling_min_freq, cpufreq_verify_within_limits: a
lower end above the upper one becomes the upper one), drivers/cpufreq/intel_pstate.c
(store_energy_performance_preference: EBUSY alongside the governor performance), drivers/base/power/sysfs.c
(pm_qos_resume_latency_us), Linux 6.12.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from nodeagent.errors import HostError

GOVERNORS, PREFERENCES = ("performance", "powersave"), ("default", "performance", "balance_performance", "power")
LOWEST_KHZ, HIGHEST_KHZ = 800_000, 3_500_000


class FakeCpufreq:
    """Policies over groups of CPUs below a root; `put` stands for a write to a kernel file."""

    def __init__(self, root: Path, groups: Iterable[Iterable[int]], *, preferences: bool = True) -> None:
        self.root = root
        self.writes: list[tuple[str, str]] = []
        self.dies_after: int | None = None
        """After how many more writes the process that writes is dead."""
        self._asked: dict[Path, tuple[int, int]] = {}
        for number, group in enumerate(groups):
            policy = root / f"sys/devices/system/cpu/cpufreq/policy{number}"
            cpus = sorted(group)
            for name, text in {
                "affected_cpus": " ".join(map(str, cpus)),
                "related_cpus": " ".join(map(str, cpus)),
                "scaling_available_governors": " ".join(GOVERNORS),
                "scaling_governor": "powersave",
                "cpuinfo_min_freq": str(LOWEST_KHZ),
                "cpuinfo_max_freq": str(HIGHEST_KHZ),
                "scaling_min_freq": str(LOWEST_KHZ),
                "scaling_max_freq": str(HIGHEST_KHZ),
            }.items():
                self._make(policy / name, text)
            if preferences:
                self._make(policy / "energy_performance_available_preferences", " ".join(PREFERENCES))
                self._make(policy / "energy_performance_preference", "balance_performance")
            self._asked[policy] = LOWEST_KHZ, HIGHEST_KHZ
            for cpu in cpus:
                self._make(root / f"sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us", "0")
        self._make(root / "proc/sys/kernel/random/boot_id", "boot-1")

    def put(self, path: str, value: str) -> None:
        """Write a value. Raise HostError as host.cgroup.write.put does."""
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise Dead
            self.dies_after -= 1
        file = Path(path)
        if not file.exists():
            raise _refused(path, errno.ENOENT, value)
        self._take(file, value)
        self.writes.append((str(file.relative_to(self.root)), value))

    def values(self) -> dict[str, str]:
        """Every file that can be set."""
        files = [
            *self.root.glob("sys/devices/system/cpu/cpufreq/*/scaling_[gm]*"),
            *self.root.glob("sys/devices/system/cpu/cpufreq/*/energy_performance_preference"),
            *self.root.glob("sys/devices/system/cpu/cpu*/power/*"),
        ]
        return {str(one.relative_to(self.root)): one.read_text().strip() for one in sorted(files)}

    def reboot(self, boot_id: str) -> None:
        (self.root / "proc/sys/kernel/random/boot_id").write_text(boot_id)

    def _take(self, file: Path, value: str) -> None:
        policy = file.parent
        match file.name:
            case "scaling_governor":
                self._check(file, value, value in GOVERNORS)
            case "energy_performance_preference":
                self._check(file, value, value in PREFERENCES)
                if (policy / "scaling_governor").read_text().strip() == "performance" and value != "performance":
                    raise _refused(str(file), errno.EBUSY, value)
            case "scaling_min_freq" | "scaling_max_freq":
                self._check(file, value, value.isdigit())
                self._limit(policy, file.name, int(value))
                return
            case "pm_qos_resume_latency_us":
                self._check(file, value, value == "n/a" or (value.isdigit() and int(value) < 1 << 31))
            case _:
                raise _refused(str(file), errno.EACCES, value)
        file.write_text(f"{value}\n")

    def _limit(self, policy: Path, name: str, khz: int) -> None:
        low, high = self._asked[policy]
        low, high = (khz, high) if name == "scaling_min_freq" else (low, khz)
        self._asked[policy] = low, high
        top = min(max(high, LOWEST_KHZ), HIGHEST_KHZ)
        (policy / "scaling_max_freq").write_text(f"{top}\n")
        (policy / "scaling_min_freq").write_text(f"{min(max(low, LOWEST_KHZ), top)}\n")

    def _check(self, file: Path, value: str, right: bool) -> None:
        if not right:
            raise _refused(str(file), errno.EINVAL, value)

    def _make(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


class Dead(BaseException):
    """The process was killed: nothing after this runs."""


def _refused(path: str, number: int, value: str) -> HostError:
    return HostError(f"cannot write {path}: {os.strerror(number)}, value {value!r}")
