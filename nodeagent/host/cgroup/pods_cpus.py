"""The CPUs that pods can have at all: what is in effect in the control group of all pods, kubepods.

Whoever confines that cgroup (`systemctl set-property kubepods.slice AllowedCPUs=…`, another agent's partition) confines
every pod: what is written below has no effect beyond it. CPUs that kubepods lets through to partitions below it are in
effect there and not in kubepods itself, so these count too.
Source: Documentation/admin-guide/cgroup-v2.rst, cpuset.cpus.effective and cpuset.cpus.exclusive.
"""

from __future__ import annotations

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.inventory import PodsCgroup
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.read import CgroupPart, CgroupReader, hierarchy
from nodeagent.host.sysfs.sysfs import SysFs


def pods_cgroup(sysfs: SysFs, cgroup_root: str = "/") -> PodsCgroup | None:
    """The cgroup of all pods and its CPUs; None where there is none, or nothing that confines it. HostError where it
    cannot be read. cgroup_root: kubelet's cgroupRoot.

    Of the cgroups of both drivers, the ones that have processes count; one that a former driver left has none.
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
    """Read in this order, no CPU is missed that becomes part of a partition, or stops being it, in between."""
    before = reader.effective(top) or EMPTY
    file = f"sys/fs/cgroup/{top}/cpuset.cpus.exclusive"
    through = CpuSet.parse(sysfs.text(file, "") if before else "", source=sysfs.path(file))
    return before | through | (reader.effective(top) or EMPTY)
