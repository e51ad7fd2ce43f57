"""The CPUs available to pods: those in effect in kubepods, the cgroup of all pods.

Confining that cgroup (`systemctl set-property kubepods.slice AllowedCPUs=…`, a partition made by another agent)
confines every pod: writes below it cannot exceed it. CPUs that kubepods passes on to partitions below it are in effect
there and not in kubepods itself, so they count too.
Source: Documentation/admin-guide/cgroup-v2.rst, cpuset.cpus.effective and cpuset.cpus.exclusive.
"""

from __future__ import annotations

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.inventory import PodsCgroup
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.read import CgroupPart, CgroupReader, hierarchy
from nodeagent.host.sysfs.sysfs import SysFs


def pods_cgroup(sysfs: SysFs, cgroup_root: str = "/") -> PodsCgroup | None:
    """Return the cgroup of all pods with its CPUs, or None if there is no such cgroup or no CPUs are in effect in it.
    cgroup_root is kubelet's cgroupRoot. Raise HostError if the cgroup cannot be read.

    If the cgroups of both drivers exist, those with processes count; one left over from a former driver has none.
    """
    found = hierarchy(sysfs)
    if found.unsupported:
        return None
    reader = CgroupReader(found.mount, ())
    tops = [layout.top for layout in layouts(cgroup_root)]
    states = {top: state for top in tops if (state := reader.read(top, CgroupPart.CPUSET)) is not None}
    used = [top for top, state in states.items() if state.populated] or list(states)
    cpus = union(_cpus(sysfs, reader, top) for top in used)
    return PodsCgroup(path=", ".join(used), cpus=cpus) if cpus else None


def _cpus(sysfs: SysFs, reader: CgroupReader, top: str) -> CpuSet:
    """Return the cgroup's CPUs. This read order misses no CPU that joins or leaves a partition in between."""
    before = reader.effective(top) or EMPTY
    file = f"sys/fs/cgroup/{top}/cpuset.cpus.exclusive"
    through = CpuSet.parse(sysfs.text(file, "") if before else "", source=sysfs.path(file))
    return before | through | (reader.effective(top) or EMPTY)
