"""What systemd is told of the CPUs of pods' slices: drop-ins, in the folder of runtime units.

systemd writes `cpuset.cpus` of a slice itself, from what its units say: when the first scope in it starts, and at each
daemon-reload. Where no unit says anything it writes that every CPU may be used, over whatever was there. So it is told
the same as the kernel: the shared pool in a drop-in for every slice whose name begins with kubepods, which new pods
have from their first moment on, also while no agent runs; another one for each pod with CPUs of its own; and none for
the slices of QoS classes, which hold both. Files in /run are gone with the next boot.
Source: systemd.unit(5) on drop-ins of prefixes, systemd.resource-control(5) AllowedCPUs=.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.cgroup.layout import BEST_EFFORT, BURSTABLE, SYSTEMD, CgroupLayout
from nodeagent.host.sysfs import atomic_file as files

FILE = "50-nodeagent.conf"
_HEAD = "# Kept by nodeagent: the CPUs of pods (docs/pinning.md). Changed at any time.\n[Slice]\n"
_ONLY = f"{_HEAD}AllowedCPUs=\nAllowedCPUs="
"""What several files assign adds up; an empty assignment forgets what was before."""
_CPUS = f"{_HEAD}AllowedCPUs=\nAllowedCPUs={{}}\n"
"""Lists add up unless an empty one comes first: what was set before, by name of the file, counts no more."""


class SliceDropins:
    """The drop-ins below one folder. What is on disk already is not written again."""

    def __init__(self, folder: Path, layout: CgroupLayout) -> None:
        """folder: of systemd's runtime units, /run/systemd/system."""
        self._folder = folder
        self._classes = [layout.qos(qos).rpartition("/")[2] for qos in (BURSTABLE, BEST_EFFORT)]
        self._every = layout.top.rpartition("/")[2].removesuffix(".slice") + "-.slice"
        self._there: dict[str, str] | None = None
        self._applies = layout.driver == SYSTEMD

    def keep(self, shared: CpuSet | None, pods: Mapping[str, CpuSet]) -> None:
        """Have systemd know the shared pool, and the CPUs of pods that have others, by the path of their cgroup. None:
        pods are not confined. HostError where a file cannot be written or removed."""
        if not self._applies or not self._folder.is_dir():
            return
        wanted = self._wanted(shared, pods) if shared else {}
        known = self._found() if self._there is None else self._there
        # The classes come first: theirs is what keeps the one for all from them.
        for unit, text in wanted.items():
            if known.get(unit) != text:
                self._write(unit, text)
                known[unit] = text
        for unit in [unit for unit in reversed(known) if unit not in wanted]:
            self._remove(unit)
            del known[unit]
        self._there = known

    def _wanted(self, shared: CpuSet, pods: Mapping[str, CpuSet]) -> dict[str, str]:
        """Text by unit. A file of the same name in a folder that is named more exactly takes the place of another."""
        own = {path.rpartition("/")[2]: cpus for path, cpus in pods.items() if path.endswith(".slice")}
        return {
            **dict.fromkeys(self._classes, _HEAD),
            **{unit: _CPUS.format(cpus) for unit, cpus in sorted(own.items())},
            self._every: _CPUS.format(shared),
        }

    def _found(self) -> dict[str, str]:
        """What an agent before this one has left."""
        head = self._every.removesuffix(".slice")
        try:
            return {
                path.parent.name.removesuffix(".d"): path.read_text(errors="replace")
                for path in sorted(self._folder.glob(f"{head}*.slice.d/{FILE}"))
            }
        except OSError as error:
            raise HostError(f"cannot read {error.filename}: {error.strerror}") from None

    def _write(self, unit: str, text: str) -> None:
        files.replace(self._folder / f"{unit}.d" / FILE, text.encode())

    def _remove(self, unit: str) -> None:
        path = self._folder / f"{unit}.d" / FILE
        files.remove(path)
        # What somebody else has put there keeps the folder.
        with contextlib.suppress(OSError):
            path.parent.rmdir()
