"""Whether a pod lives, by its cgroup: kubelet makes one for each pod before its sandbox and removes it after its end.

Reads cgroup v2 and, for nodes that still have it, v1. Nothing is kept; a cgroup that cannot be read is no answer.
Sources: Documentation/admin-guide/cgroup-v2.rst (cgroup.events), pkg/kubelet/cm/pod_container_manager_linux.go.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from nodeagent.core.ledger.witness import NOT_SEEN, Sight, Sighting
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import BEST_EFFORT, BURSTABLE, GUARANTEED, CgroupLayout, layouts
from nodeagent.host.cgroup.read import V2, hierarchy
from nodeagent.host.sysfs.sysfs import SysFs

_MOUNT = "sys/fs/cgroup"
_CONTROLLERS = ("pids", "cpuset", "memory", "cpu,cpuacct", "cpu", "systemd")
"""Hierarchies of cgroup v1 in which kubelet makes a pod's cgroup."""
_QOS = (GUARANTEED, BURSTABLE, BEST_EFFORT)


class PodCgroups:
    """Looks at pods' cgroups. A node's kubelet may start later than the agent: each look finds the hierarchy again."""

    def __init__(self, sysfs: SysFs, cgroup_root: str = "/") -> None:
        """cgroup_root: kubelet's cgroupRoot."""
        self._sysfs = sysfs
        self._layouts = layouts(cgroup_root)

    def sights(self, uids: Iterable[str]) -> Mapping[str, Sighting]:
        """Of each pod: LIVES, EMPTY or ABSENT; UNSEEN where kubelet's cgroups cannot be read. Blocks."""
        try:
            tops = list(self._tops())
            return {uid: self._sighting(uid, tops) if tops else NOT_SEEN for uid in uids}
        except HostError:
            return dict.fromkeys(uids, NOT_SEEN)

    def _tops(self) -> Iterator[tuple[str, CgroupLayout]]:
        """Hierarchies that have kubelet's top cgroup, each with the names that kubelet uses in it. None of them can be
        left out: after a change of the cgroup driver the pods of before still run below the old names."""
        unified = hierarchy(self._sysfs).mode == V2
        bases = (_MOUNT,) if unified else tuple(f"{_MOUNT}/{one}" for one in _CONTROLLERS)
        yield from (
            (base, layout) for base in bases for layout in self._layouts if self._sysfs.exists(f"{base}/{layout.top}")
        )

    def _sighting(self, uid: str, tops: Iterable[tuple[str, CgroupLayout]]) -> Sighting:
        there = [path for base, layout in tops for path in _paths(base, layout, uid) if self._sysfs.exists(path)]
        for path in there:
            if self._populated(path):
                return Sighting(Sight.LIVES, f"processes run in {self._sysfs.path(path)}")
        return Sighting(Sight.EMPTY if there else Sight.ABSENT)

    def _populated(self, path: str) -> bool:
        """Whether there is a process in a cgroup or below it. A cgroup that vanishes meanwhile has none."""
        events = self._sysfs.text(f"{path}/cgroup.events", None)
        if events is not None:
            return "populated 1" in events.splitlines()
        return any(self._sysfs.text(f"{one}/cgroup.procs", "") for one in self._below(path))

    def _below(self, path: str) -> Iterator[str]:
        """A cgroup of v1 and all below it: only there a pod's own cgroup does not say whether it is populated."""
        full, root = self._sysfs.path(path), self._sysfs.root
        yield from (folder[len(root) :] for folder, _, _ in os.walk(full))


def _paths(base: str, layout: CgroupLayout, uid: str) -> list[str]:
    """Where a pod's cgroup may be: its class of quality of service is in the path."""
    try:
        return [f"{base}/{layout.pod(uid, qos)}" for qos in _QOS]
    except InputError:
        return []
