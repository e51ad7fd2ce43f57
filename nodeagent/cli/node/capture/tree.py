"""What a capture reads of the machine: what a scan reads, what the kernel says of the pods' cgroups, and what other
verbs look at. All of it passes one SysFs, which remembers it; nothing is written."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nodeagent.config.schema import Config
from nodeagent.errors import HostError, NodeagentError
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.processes import running, sees_all
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.recording import RecordingSysFs
from nodeagent.managers.kubelet import look
from nodeagent.resources.offer import selectors

CGROUPS = "sys/fs/cgroup"
CGROUP_FILES = (
    *("cgroup.controllers", "cgroup.subtree_control", "cgroup.type", "cgroup.procs", "cgroup.events", "cpuset.*"),
    *("cpu.max", "cpu.weight", "cpu.stat", "memory.max", "memory.current", "memory.numa_stat", "hugetlb.*"),
)
PATTERNS = (
    *("proc/cmdline", "proc/meminfo", "proc/mounts", "proc/version", "proc/stat", "proc/swaps", "proc/uptime"),
    *("proc/interrupts", "proc/modules", "proc/sys/kernel/random/boot_id", "proc/sys/kernel/osrelease"),
    *("proc/sys/kernel/numa_balancing", "proc/sys/kernel/sched_rt_runtime_us", "proc/sys/vm/nr_hugepages*"),
    *("proc/irq/*/smp_affinity_list", "proc/irq/*/effective_affinity_list"),
    *("sys/devices/system/cpu/isolated", "sys/devices/system/cpu/nohz_full", "sys/devices/system/cpu/smt/*"),
    *("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor", "sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"),
    *("sys/devices/system/clocksource/clocksource0/*_clocksource", "sys/kernel/mm/transparent_hugepage/*"),
    *("sys/kernel/iommu_groups/*", "sys/module/vfio*/parameters/*", "sys/class/iommu/*"),
)
"""Read in addition to a scan."""
NOT_ENTERED = ("shm", "mqueue", "hugepages", "pts")
"""Folders of /dev with what programs put there."""
PROGRAMS = ("containerd", "crio", "irqbalance")
"""Programs besides kubelet whose command lines matter."""
MOST_NODES = 20_000


def record(sysfs: RecordingSysFs, config: Config) -> dict[str, str]:
    """Read all of it. Return what could not be read, with the reason."""
    missing: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {
        "scan": lambda: scan(sysfs, load_kinds(), selectors(config), cgroup_root=config.pinning.cgroup_root),
        "kubelet's process": lambda: look(sysfs, Path(config.kubelet_dir), config.kubelet_config),
        "cgroups": lambda: _cgroups(sysfs, config.pinning.cgroup_root),
        "other programs": lambda: (sees_all(sysfs), running(sysfs, lambda name: name in PROGRAMS)),
        "device nodes": lambda: _nodes(sysfs),
        "other files": lambda: _read(sysfs, (one for pattern in PATTERNS for one in matches(sysfs, pattern))),
    }
    for name, step in steps.items():
        try:
            step()
        except NodeagentError as error:
            missing[name] = str(error)
    return missing


def matches(sysfs: RecordingSysFs, pattern: str) -> list[str]:
    """Return the paths that match a pattern, in order."""
    found = [""]
    for part in pattern.split("/"):
        if any(mark in part for mark in "*?["):
            found = [_below(one, name) for one in found for name in fnmatch.filter(sysfs.names(one), part)]
        else:
            found = [_below(one, part) for one in found]
    return found


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _read(sysfs: RecordingSysFs, paths: Iterator[str]) -> None:
    """Read files; what is no file or cannot be read is left out."""
    for path in paths:
        try:
            if sysfs.exists(path) and not os.path.isdir(sysfs.root + path):  # noqa: PTH112 - paths are strings
                sysfs.content(path)
        except HostError:
            continue


def _cgroups(sysfs: RecordingSysFs, cgroup_root: str) -> None:
    """Read the root of the cgroups, and those of all pods."""
    _read(sysfs, (f"{CGROUPS}/{name}" for name in _cgroup_files(sysfs.names(CGROUPS))))
    for layout in layouts(cgroup_root):
        left = [f"{CGROUPS}/{layout.top}"]
        while left:
            folder = left.pop()
            names = sysfs.names(folder)
            _read(sysfs, (f"{folder}/{name}" for name in _cgroup_files(names)))
            left += [f"{folder}/{name}" for name in names if os.path.isdir(f"{sysfs.root}{folder}/{name}")]  # noqa: PTH112


def _cgroup_files(names: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, one) for one in CGROUP_FILES)]


def _nodes(sysfs: RecordingSysFs) -> None:
    """Note the names of /dev, with the numbers of device nodes."""
    left = ["dev"]
    while left and len(sysfs.nodes) < MOST_NODES:
        folder = left.pop()
        for name in sysfs.names(folder):
            path = f"{sysfs.root}{folder}/{name}"
            if os.path.isdir(path) and not os.path.islink(path) and name not in NOT_ENTERED:  # noqa: PTH112, PTH114
                left.append(f"{folder}/{name}")
