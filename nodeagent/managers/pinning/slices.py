"""Reports the CPUs of pods' slices to systemd: it resets what it does not know, see host.systemd.units.

A slice is reported while no one else changes it, and after its cgroup was written: the fast path first, this one in the
background. The newest pods come first, as systemd is about to start their first container.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.systemd.units import SOCKET, Systemd, is_slice

AT_ONCE = 16
"""Slices reported over one connection; after that the newest are determined again."""
RETRY_S = 1.0
log = structlog.get_logger()


class InForce(Protocol):
    """Provides the CPUs that pods' cgroups are confined to."""

    news: Revision

    def slices(self) -> Mapping[str, CpuSet]: ...
    async def unchanged(self, path: str, tell: Callable[[str, CpuSet], None]) -> None: ...


class SliceNotifier:
    """Reports slices to systemd. Building it starts nothing."""

    def __init__(self, reconciler: InForce, sysfs: SysFs) -> None:
        self._reconciler = reconciler
        self._sysfs = sysfs
        self._told: dict[str, CpuSet] = {}
        self._refused: dict[str, str] = {}

    async def run(self) -> None:
        """Report changes until cancelled; return if there is no systemd."""
        if not self._sysfs.exists(SOCKET):
            return
        while True:
            seen = self._reconciler.news.value
            if todo := self._untold():
                await self._tell(todo)
            else:
                await self._reconciler.news.changed(seen)

    def _untold(self) -> list[str]:
        """Return the paths of slices to report, those never reported first."""
        now: Mapping[str, CpuSet] = {path: cpus for path, cpus in self._reconciler.slices().items() if is_slice(path)}
        self._told = {path: cpus for path, cpus in self._told.items() if path in now}
        self._refused = {path: why for path, why in self._refused.items() if path in now}
        todo = [path for path, cpus in now.items() if self._told.get(path) != cpus]
        return sorted(todo, key=self._told.__contains__)[:AT_ONCE]

    async def _tell(self, paths: list[str]) -> None:
        try:
            with contextlib.closing(await asyncio.to_thread(Systemd, self._sysfs)) as systemd:
                for path in paths:
                    await self._tell_one(systemd, path)
        except HostError as error:
            log.warning("systemd-not-told", slices=len(paths), error=str(error))
            await asyncio.sleep(RETRY_S)

    async def _tell_one(self, systemd: Systemd, path: str) -> None:
        """Report one slice. If it is not loaded, it was not created through systemd, or is gone."""
        notified: list[tuple[CpuSet, str]] = []
        unit = path.rpartition("/")[2]
        await self._reconciler.unchanged(path, lambda path, cpus: notified.append((cpus, systemd.allow(unit, cpus))))
        for cpus, why in notified:
            self._told[path] = cpus
            if why and why != self._refused.get(path):
                log.info("slice-not-told", path=path, error=why)
            self._refused[path] = why
