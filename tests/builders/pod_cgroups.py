"""Pods' cgroups as kubelet makes them, in a folder that stands for the machine's root: there or not, with processes or
without. Nothing in it answers writes; tests/builders/cgroup_tree.py does that.
"""

from __future__ import annotations

import shutil
from pathlib import Path


class PodCgroupTree:
    """cgroup v2 of a kubelet with the cgroupfs driver; v1: the same pods in the hierarchy of one controller."""

    def __init__(self, root: Path, *, controller: str = "") -> None:
        self._v1 = bool(controller)
        self._mount = root / "sys/fs/cgroup" / controller
        self.top = self._mount / "kubepods"
        self.top.mkdir(parents=True)
        if not controller:
            (self._mount / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")

    def run(self, uid: str, *, qos: str = "burstable", container: str = "c1", shares: int = 1024) -> Path:
        """A pod with a container that runs; the pod's cgroup. shares: of CPU, as kubelet works them out."""
        pod = self.top / qos / f"pod{uid}"
        pod.mkdir(parents=True, exist_ok=True)
        weight = ("cpu.shares", shares) if self._v1 else ("cpu.weight", 1 + (shares - 2) * 9999 // 262142)
        (pod / weight[0]).write_text(f"{weight[1]}\n")
        (pod / container).mkdir(parents=True, exist_ok=True)
        self._populate(pod, container, alive=True)
        return pod

    def end(self, uid: str) -> None:
        """Nothing of the pod runs any longer."""
        for pod in self._pods(uid):
            for container in (one for one in pod.iterdir() if one.is_dir()):
                self._populate(pod, container.name, alive=False)

    def remove(self, uid: str) -> None:
        """Kubelet clears the pod away."""
        for pod in self._pods(uid):
            shutil.rmtree(pod)

    def _pods(self, uid: str) -> list[Path]:
        return [*self.top.glob(f"**/pod{uid}")]

    def _populate(self, pod: Path, container: str, *, alive: bool) -> None:
        if self._v1:
            (pod / "cgroup.procs").write_text("")
            (pod / container / "cgroup.procs").write_text("4711\n" if alive else "")
            return
        for folder in (pod, pod / container):
            (folder / "cgroup.events").write_text(f"populated {int(alive)}\nfrozen 0\n")
