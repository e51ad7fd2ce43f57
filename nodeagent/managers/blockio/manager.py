"""Keeps limits of disk I/O as the ledger, `pinning.io` and pods' annotations say: lines in the io files of cgroups.

A claim is answered once it is known that its disks, the kernel and the configuration can have its limits. When they are
written, repaired and taken out: `managers/cgroup_limits.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nodeagent.core.blockio.demand import Classes, IoAsk, asks_of_claims, asks_of_pod, concerned
from nodeagent.core.model.container import Container
from nodeagent.core.model.grant import Grant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.blockio.rounds import IoRounds, classes_of
from nodeagent.managers.cgroup_limits import CgroupLimits, Followed, LimitsReport, Wanted
from nodeagent.managers.state_files import IO


class IoManager(CgroupLimits[IoAsk]):
    """Keeps limits of I/O. Building one starts nothing and reads nothing."""

    name = "io"
    key = "pinning.io"
    act, act_its = "limit I/O", "limit its I/O"
    done, not_done = "io-limited", "io-not-limited"
    lock = "io.lock"

    def __init__(self, sysfs: SysFs, state_dir: Path, followed: Followed) -> None:
        super().__init__(state_dir, followed)
        self._rounds = IoRounds(sysfs, followed.table.layouts, state_dir / IO)

    def _asks(self, container: Container, grants: Iterable[str]) -> tuple[IoAsk, ...]:
        config, classes = self._config(), self._classes()
        found = list(asks_of_claims(self._grants(grants), classes))
        if classes is not None:  # otherwise as on nodes that never had it: pods of all nodes may have annotations
            found += asks_of_pod(self._annotations_of(container), config.domain, container.name, classes)
        return tuple(found)

    def _concerned(self, grant: Grant) -> bool:
        return concerned(grant)

    async def _unavailable(self, grants: Sequence[Grant]) -> str:
        asks = list(asks_of_claims(grants, self._classes()))
        return await asyncio.to_thread(self._rounds.check, asks, self._devices(asks))

    def _is_configured(self) -> bool:
        return self._config().pinning.io is not None

    def _classes(self) -> Classes | None:
        return classes_of(self._config().pinning.io)

    def _round(self, wanted: Wanted[IoAsk], leave: Callable[[str], bool]) -> LimitsReport:
        return self._rounds.keep(wanted.asking, wanted.devices, leave)

    def _devices(self, asks: Iterable[IoAsk]) -> Mapping[str, tuple[str, ...]]:
        devices = self._agent.inventory.device_by_id
        return {id: devices[id].paths for ask in asks for id in ask.devices if id in devices}
