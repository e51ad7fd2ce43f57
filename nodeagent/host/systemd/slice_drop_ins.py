"""Drop-ins in the folder of runtime units that give systemd the CPUs of pods' slices.

systemd itself writes `cpuset.cpus` of a slice, from its units: when the first scope in it starts, and at each
daemon-reload. Without a unit that sets CPUs it allows all of them, overwriting the current value. So systemd gets the
same values as the kernel: the shared pool in a drop-in for every slice whose name begins with kubepods, which applies
to new pods from their start, even while no agent runs; another drop-in for each pod with exclusive CPUs; and one
without CPUs for the slices of QoS classes, which hold both. Files in /run do not survive a reboot.
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
_CPUS = f"{_HEAD}AllowedCPUs=\nAllowedCPUs={{}}\n"
"""Lists add up unless an empty assignment comes first, which discards those of files earlier in name order."""


class SliceDropins:
    """The drop-ins below one folder. A file that is already up to date is not written again."""

    def __init__(self, folder: Path, layout: CgroupLayout) -> None:
        """folder: systemd's folder of runtime units, /run/systemd/system."""
        self._folder = folder
        self._classes = [layout.qos(qos).rpartition("/")[2] for qos in (BURSTABLE, BEST_EFFORT)]
        self._every = layout.top.rpartition("/")[2].removesuffix(".slice") + "-.slice"
        self._there: dict[str, str] | None = None
        self._applies = layout.driver == SYSTEMD

    def keep(self, shared: CpuSet | None, pods: Mapping[str, CpuSet]) -> None:
        """Write drop-ins for the shared pool and, by cgroup path, the CPUs of pods that have others. If `shared` is
        None, pods are not confined. Raise HostError if a file cannot be written or removed."""
        if not self._applies or not self._folder.is_dir():
            return
        wanted = self._wanted(shared, pods) if shared else {}
        known = self._found() if self._there is None else self._there
        # Classes come first: theirs override the one for all slices.
        for unit, text in wanted.items():
            if known.get(unit) != text:
                self._write(unit, text)
                known[unit] = text
        for unit in [unit for unit in reversed(known) if unit not in wanted]:
            self._remove(unit)
            del known[unit]
        self._there = known

    def written(self) -> list[Path]:
        """Return the drop-ins that exist, whichever agent wrote them. Raise HostError if they cannot be read."""
        return [self._path(unit) for unit in self._found()]

    def _wanted(self, shared: CpuSet, pods: Mapping[str, CpuSet]) -> dict[str, str]:
        """Return drop-in texts by unit. A drop-in of a more specific unit replaces one of the same name."""
        own = {path.rpartition("/")[2]: cpus for path, cpus in pods.items() if path.endswith(".slice")}
        return {
            **dict.fromkeys(self._classes, _HEAD),
            **{unit: _CPUS.format(cpus) for unit, cpus in sorted(own.items())},
            self._every: _CPUS.format(shared),
        }

    def _found(self) -> dict[str, str]:
        """Return the drop-ins that a previous agent left."""
        head = self._every.removesuffix(".slice")
        try:
            return {
                path.parent.name.removesuffix(".d"): path.read_text(errors="replace")
                for path in sorted(self._folder.glob(f"{head}*.slice.d/{FILE}"))
            }
        except OSError as error:
            raise HostError(f"cannot read {error.filename}: {error.strerror}") from None

    def _write(self, unit: str, text: str) -> None:
        files.replace(self._path(unit), text.encode())

    def _path(self, unit: str) -> Path:
        return self._folder / f"{unit}.d" / FILE

    def _remove(self, unit: str) -> None:
        path = self._path(unit)
        files.remove(path)
        # Files of other programs keep the folder.
        with contextlib.suppress(OSError):
            path.parent.rmdir()
