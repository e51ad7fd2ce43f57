"""An agent on a synthetic machine whose devices are looked at as the daemon does, with a clock that goes when told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from nodeagent.config.operation import HealthConfig
from nodeagent.config.schema import Config
from nodeagent.core.model.health import HEALTHY
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.health.source import Source
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.kernel_health import KernelHealth
from nodeagent.state.agent import Agent, AgentSettings
from nodeagent.state.store import Store
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine

DEADLINE_S = 5.0


@dataclass
class HealthNode:
    """What tests touch."""

    tree: DeviceTree
    agent: Agent
    sysfs: SysFs
    config: Config = field(default_factory=Config)
    now_s: float = 1000.0
    health: KernelHealth = field(init=False)

    def configure(self, **health: object) -> None:
        self.config = msgspec.structs.replace(self.config, health=msgspec.convert(health, HealthConfig))

    def rescan(self) -> None:
        self.agent.see(scan(self.sysfs, builtin_kinds()))

    async def look(self, after_s: float = 0.0) -> None:
        """Take a snapshot and look at every device, some time after the last look."""
        self.now_s += after_s
        self.rescan()
        await self.health.look()
        self.agent.recover_due()

    def known(self, device: str) -> tuple[str, str]:
        """State and reason of a device, without what it inherits."""
        state = self.agent.health.get(device)
        return (state.state, state.reason) if state is not None else (HEALTHY, "")

    def sources(self, device: str) -> set[str]:
        """The sources that have said something of a device."""
        state = self.agent.health.get(device)
        return set(state.seen) if state is not None else set()


@contextlib.asynccontextmanager
async def health_node(
    tree: DeviceTree, *, every: Sequence[Source] | None = None, deadline_s: float = DEADLINE_S
) -> AsyncIterator[HealthNode]:
    """The machine of `tree`, to which CPUs are added. every: the sources, or None for all of them."""
    if not (tree.root / "sys/devices/system").exists():
        machine(tree.root, "1s1n4c")
    sysfs, folder = SysFs(tree.root), Path(tree.root) / "state"
    agent = Agent(Store(folder), scan(sysfs, builtin_kinds()), AgentSettings(), _nothing, clock=lambda: node.now_s)
    node = HealthNode(tree, agent, sysfs)
    node.health = KernelHealth(agent, sysfs, lambda: node.config, every, deadline_s)
    try:
        yield node
    finally:
        await agent.close()


async def _nothing() -> tuple[()]:
    return ()
