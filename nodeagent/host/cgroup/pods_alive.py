"""Whether a pod is alive, by its cgroup: kubelet creates it before the sandbox and removes it after the pod ends.

Reads cgroup v2 and, on nodes that still use it, v1. Keeps no state; a cgroup that cannot be read proves nothing.
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
"""cgroup v1 hierarchies in which kubelet creates a pod's cgroup."""
_LEAST_CPU = {"cpu.weight": "1", "cpu.shares": "2"}
_QOS = (GUARANTEED, BURSTABLE, BEST_EFFORT)


class PodCgroups:
    """Looks up the cgroups of pods. Kubelet may start after the agent, so each lookup detects the hierarchy again."""

    def __init__(self, sysfs: SysFs, cgroup_root: str = "/") -> None:
        """cgroup_root: kubelet's cgroupRoot."""
        self._sysfs = sysfs
        self._layouts = layouts(cgroup_root)

    def sights(self, uids: Iterable[str]) -> Mapping[str, Sighting]:
        """Return for each pod LIVES, EMPTY or ABSENT, or UNSEEN if kubelet's cgroups cannot be read. Blocks."""
        try:
            tops = list(self._tops())
            return {uid: self._sighting(uid, tops) if tops else NOT_SEEN for uid in uids}
        except HostError:
            return dict.fromkeys(uids, NOT_SEEN)

    def requests_cpus(self, uid: str) -> bool | None:
        """Return whether kubelet gave a pod CPU time by its requests, or None if its cgroup is not there. Blocks.

        Without a request it has the least that there is: 2 shares, which are weight 1. In cgroup v2, requests below 28m
        are weight 1 too (ResourceConfigForPod in pkg/kubelet/cm/helpers_linux.go, Kubernetes 1.37).
        """
        try:
            paths = [path for base, layout in self._tops() for path in _paths(base, layout, uid)]
            files = [f"{path}/{file}" for path in paths for file in _LEAST_CPU]
            found = {file: text for file in files if (text := self._sysfs.text(file, None)) is not None}
        except HostError:
            return None
        if not found:
            return None
        return all(text.strip() != _LEAST_CPU[file.rpartition("/")[2]] for file, text in found.items())

    def _tops(self) -> Iterator[tuple[str, CgroupLayout]]:
        """Yield each hierarchy that has kubelet's top cgroup, with kubelet's naming in it. All of them are needed:
        after a change of cgroup driver, older pods still run under the old names."""
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
        """Return whether a process runs in a cgroup or below it. A cgroup that vanishes meanwhile counts as empty."""
        events = self._sysfs.text(f"{path}/cgroup.events", None)
        if events is not None:
            return "populated 1" in events.splitlines()
        return any(self._sysfs.text(f"{one}/cgroup.procs", "") for one in self._below(path))

    def _below(self, path: str) -> Iterator[str]:
        """Yield a v1 cgroup and everything below it: in v1, a pod's own cgroup does not
        show whether it is populated."""
        full, root = self._sysfs.path(path), self._sysfs.root
        yield from (folder[len(root) :] for folder, _, _ in os.walk(full))


def _paths(base: str, layout: CgroupLayout, uid: str) -> list[str]:
    """Return the possible paths of a pod's cgroup, one per QoS class."""
    try:
        return [f"{base}/{layout.pod(uid, qos)}" for qos in _QOS]
    except InputError:
        return []
