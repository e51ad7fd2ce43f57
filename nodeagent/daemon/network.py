"""Wires what network adapters need; loads it where it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from nodeagent.config.schema import Config
from nodeagent.daemon.paths import Paths
from nodeagent.host.devices import all_kinds
from nodeagent.managers import state_files
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.network.device_info import DeviceInfoManager
    from nodeagent.managers.network.vfs import VfsManager


class Network:
    """Device information files, and virtual functions."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        families: Sequence[all_kinds.Kind],
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
    ) -> None:
        """config: returns the current configuration. rescan: reads the machine again."""
        memory = where.state_dir / state_files.DEVICE_INFO

        def device_info() -> DeviceInfoManager:
            from nodeagent.managers.network.device_info import DeviceInfoManager

            return DeviceInfoManager(agent, families, memory, config)

        def has_device_info() -> bool:
            return bool(config().network.device_info_dir) or memory.exists()

        def vfs() -> VfsManager:
            from nodeagent.managers.network.vfs import VfsManager

            return VfsManager(agent, where.sysfs, where.state_dir, config, rescan)

        def has_vfs() -> bool:
            return bool(config().network.vfs) or (where.state_dir / state_files.VFS).exists()

        ledger = agent.revisions.ledger
        self._vfs = OnDemand("virtual functions", vfs, has_vfs, ledger)
        self._device_info = OnDemand("device information", device_info, has_device_info, ledger)

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order."""
        return self._vfs, self._device_info

    async def granted(self) -> None:
        """Do what has to be done before a grant is answered."""
        if (one := self._device_info.loaded) is not None:
            await one.granted()
