"""Wires what network adapters need; loads it where it is used."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nodeagent.config.schema import Config
from nodeagent.core.dra.interfaces import interface_of, vf_of
from nodeagent.core.model.container import Pod
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.daemon.paths import Paths
from nodeagent.host.devices import all_kinds
from nodeagent.managers import state_files
from nodeagent.managers.dra.device_setup import Instances, Passthrough, Sharing
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.pinning.manager import NRI, PinningManager
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.network.device_info import DeviceInfoManager
    from nodeagent.managers.network.interfaces import InterfacesManager
    from nodeagent.managers.network.vf_properties import VfPropertiesManager
    from nodeagent.managers.network.vfs import VfsManager


def with_interfaces_in_pods(inventory: Inventory, where: Paths, boot_id: str) -> Inventory:
    """Return what an agent finds at its start with the interfaces that an earlier one moved into pods."""
    if not (where.state_dir / state_files.INTERFACES).exists():
        return inventory
    from nodeagent.managers.network.interface_journal import InterfaceJournal, as_on_host

    return as_on_host(inventory, InterfaceJournal(where.state_dir, boot_id).read())


def _device_info(
    agent: Agent, where: Paths, families: Sequence[all_kinds.Kind], config: Callable[[], Config]
) -> OnDemand[DeviceInfoManager]:
    """Return what writes device information files."""
    memory = where.state_dir / state_files.DEVICE_INFO

    def device_info() -> DeviceInfoManager:
        from nodeagent.managers.network.device_info import DeviceInfoManager

        return DeviceInfoManager(agent, families, memory, config)

    def is_needed() -> bool:
        return bool(config().network.device_info_dir) or memory.exists()

    return OnDemand("device information", device_info, is_needed, agent.revisions.ledger)


def _vfs(
    agent: Agent, where: Paths, config: Callable[[], Config], rescan: Callable[[], Awaitable[object]]
) -> OnDemand[VfsManager]:
    """Return what makes virtual functions. rescan: reads the machine again."""

    def vfs() -> VfsManager:
        from nodeagent.managers.network.vfs import VfsManager

        return VfsManager(agent, where.sysfs, where.state_dir, config, rescan)

    def is_needed() -> bool:
        return bool(config().network.vfs) or (where.state_dir / state_files.VFS).exists()

    return OnDemand("virtual functions", vfs, is_needed, agent.revisions.ledger)


def _vf_properties(agent: Agent, where: Paths, config: Callable[[], Config]) -> OnDemand[VfPropertiesManager]:
    """Return what sets virtual functions to what claims want."""

    def vf_properties() -> VfPropertiesManager:
        from nodeagent.managers.network.vf_properties import VfPropertiesManager

        return VfPropertiesManager(agent, where.state_dir)

    def is_needed() -> bool:
        if config().network.vf_properties or (where.state_dir / state_files.VF_PROPERTIES).exists():
            return True
        return any(vf_of(one) for one in agent.ledger.grants.values())  # as after a reboot

    return OnDemand("properties of virtual functions", vf_properties, is_needed, agent.revisions.ledger)


class Network:
    """Device information files, virtual functions and their properties, and interfaces in pods."""

    def __init__(
        self,
        agent: Agent,
        where: Paths,
        families: Sequence[all_kinds.Kind],
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        pinning: Callable[[], PinningManager],
    ) -> None:
        """config: returns the current configuration. rescan: reads the machine again. pinning: knows whether the
        runtime calls; asked once everything is built."""

        def interfaces() -> InterfacesManager:
            from nodeagent.kube.kubelet_files.claim_state import pods_of
            from nodeagent.managers.network.interfaces import InterfacesManager

            prepared_for = functools.partial(pods_of, where.kubelet_dir)
            return InterfacesManager(agent, where.sysfs, where.state_dir, is_called, prepared_for)

        def is_called() -> bool:
            return self.wanted and pinning().mode == NRI

        def is_needed() -> bool:
            recorded = where.state_dir / state_files.INTERFACES
            return config().network.move_interfaces or self.wanted or recorded.exists()

        self.wanted = config().network.move_interfaces or any(map(interface_of, agent.ledger.grants.values()))
        """Whether the runtime is to ask about pods: it learns that when the agent connects, so from the start. Claims
        that were granted while it was allowed keep what they were granted."""
        self._interfaces = OnDemand("interfaces", interfaces, is_needed, agent.revisions.ledger)
        self._vfs = _vfs(agent, where, config, rescan)
        self._vf_properties = _vf_properties(agent, where, config)
        self._device_info = _device_info(agent, where, families, config)

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order."""
        return self._vfs, self._vf_properties, self._device_info, self._interfaces

    async def granted(self) -> None:
        """Do what has to be done before a grant is answered."""
        if (one := self._device_info.loaded) is not None:
            await one.granted()

    # ---------------------------------------------------------------- for claims

    def with_interfaces(
        self, sharing: Sharing, instances: Instances, passthrough: Passthrough
    ) -> tuple[Sharing, Instances, Passthrough]:
        """Return what prepares claims, with their interfaces and the properties of their virtual functions. These are
        set first, before another driver meets them, and set back first: as long as a function has the address that its
        physical one gave it, its interface may be refused its own."""
        properties, interfaces = _IfNeeded(self._vf_properties.if_needed), _IfNeeded(self._interfaces.if_needed)
        return sharing, instances, _Both(properties, _Both(passthrough, interfaces))

    # ---------------------------------------------------------------- for pods

    async def started(self, pod: Pod) -> None:
        """Move what a pod's claims want in it."""
        await self._interfaces.load().started(pod)

    async def creating(self, pod: Pod) -> None:
        """Look at it again before a container is created."""
        await self._interfaces.load().creating(pod)

    async def stopped(self, pod: Pod) -> None:
        """Give back what a pod has."""
        await self._interfaces.load().stopped(pod)

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take all pods that exist."""
        self._interfaces.load().learn(pods)


class _IfNeeded:
    """Sets up devices for claims with a manager that is asked only where it is needed."""

    def __init__(self, manager: Callable[[], Passthrough | None]) -> None:
        self._manager = manager

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        one = self._manager()
        return one.concerned(uids) if one is not None else ()

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        one = self._manager()
        return await one.bind(claims) if one is not None else {}

    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]:
        one = self._manager()
        return await one.give_back(uids) if one is not None else {}


class _Both:
    """Sets up devices for claims in two ways."""

    def __init__(self, first: Passthrough, second: Passthrough) -> None:
        self._first, self._second = first, second

    def concerned(self, uids: Sequence[str]) -> Sequence[str]:
        return list(dict.fromkeys((*self._first.concerned(uids), *self._second.concerned(uids))))

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, str]:
        bound = await self._first.bind(claims)
        left = {uid: grants for uid, grants in claims.items() if not bound.get(uid)}
        return {**bound, **await self._second.bind(left)}

    async def give_back(self, uids: Sequence[str]) -> Mapping[str, str]:
        return {**await self._first.give_back(uids), **await self._second.give_back(uids)}
