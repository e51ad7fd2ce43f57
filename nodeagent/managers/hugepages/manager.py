"""Watches hugepage pools, grows them to the configured size, and shrinks them when claims no longer need them.

A pool is never made smaller than it was found. Pages that the kernel does not provide are reported, and requested again
after any change and periodically.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import structlog

from nodeagent.config.hugepages import HugepagesConfig
from nodeagent.config.schema import Config
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size, parse_size
from nodeagent.errors import HostError, StateError
from nodeagent.host.cgroup.write import put as put_value
from nodeagent.host.hugepages.resize import Put, totals
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.hugepages.growth import GrowthTiming, PoolGrowth
from nodeagent.managers.hugepages.journal import Key
from nodeagent.managers.hugepages.pool_resizer import PoolResizer
from nodeagent.managers.manager import Manager
from nodeagent.state.agent import Agent

PACE = GrowthTiming()
log = structlog.get_logger()


class HugepagesManager(Manager):
    """Provides the configured pools, and grows and shrinks pools for claims."""

    name = "hugepages"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        *,
        put: Put = put_value,
        pace: GrowthTiming = PACE,
    ) -> None:
        """Set up without changing anything. `rescan` makes the agent take a new snapshot of the machine."""
        self._agent = agent
        self._sysfs = sysfs
        self._config = config
        self._rescan = rescan
        self._pace = pace
        self._sizes = PoolResizer(sysfs, state_dir, agent.settings.boot_id, put=put)
        self._growth = PoolGrowth(agent, self._sizes, config, rescan, pace)
        self.growing = self._growth.growing
        self._problems: Mapping[Key, str] = {}
        self._provided: object = None
        self._again_at = 0.0
        self._unshown: object = None
        """Sizes that a scan did not pick up, from a pool that the inventory leaves out: another scan would not change
        that."""

    def notes(self) -> list[str]:
        """Return what the configuration demands and the kernel did not provide, one sentence each."""
        return list(self._problems.values())

    async def close(self) -> None:
        """Wait for a growth step in progress."""
        await self._sizes.close()

    # ---------------------------------------------------------------- what every agent does

    async def serve(self) -> None:
        """Trigger a rescan soon after any process changes a pool's size."""
        while True:
            config = self._config()
            if config.hugepages or any(one.kind == "hugepages" for one in config.served):
                await self._look()
            await asyncio.sleep(self._pace.poll_s)

    async def _look(self) -> None:
        found = await asyncio.to_thread(self._totals)
        if found == self._shown():
            self._unshown = None
        elif found != self._unshown:
            await self._rescan()
            self._unshown = found

    def _totals(self) -> dict[Key, int]:
        nodes = [node.id for node in self._agent.inventory.numa_nodes]
        return {(node, size): total for node in nodes for size, total in totals(self._sysfs, node).items()}

    def _shown(self) -> dict[Key, int]:
        return {key: pool.total_pages for key, pool in self._growth.pools().items()}

    # ---------------------------------------------------------------- what the leading agent does

    async def lead(self) -> None:
        """Provide what is configured; shrink pools that were grown for claims that are gone."""
        while True:
            await self._provide()
            await self._growth.give_back()
            await asyncio.sleep(self._pace.poll_s)

    async def _provide(self) -> None:
        config = self._config()
        # What is shown before counts: a pool that another process makes smaller meanwhile is provided again.
        state = self._state(config)
        if state == self._provided and time.monotonic() < self._again_at:
            return
        found = {_key(rule): (rule, await self._provide_one(rule)) for rule in config.hugepages}
        self._say({key: f"not provided: {_name(rule)}: {why}" for key, (rule, why) in found.items() if why})
        self._provided, self._again_at = state, time.monotonic() + config.resync_seconds

    def _state(self, config: Config) -> object:
        """Return what justifies another attempt when it changes: configuration, NUMA nodes, pool sizes."""
        shown = self._shown()
        nodes = [node.id for node in self._agent.inventory.numa_nodes]
        return list(config.hugepages), nodes, [shown.get(_key(rule)) for rule in config.hugepages]

    async def _provide_one(self, rule: HugepagesConfig) -> str:
        """Grow one pool, releasing the lock between steps; return why it is too small, or ""."""
        first: int | None = None
        before, now = -1, 0
        try:
            while before < now < rule.pages or first is None:
                async with self._sizes.alone(self._pace.lock_s):
                    before, now = await self._sizes.step(_key(rule), rule.pages)
                first = before if first is None else first
        except (HostError, StateError) as error:
            return lacking(rule, self._agent.inventory) or str(error)
        if now != first:
            log.info("pages-provided", pool=_name(rule), before=first, pages=now)
            await self._rescan()
        return "" if now >= rule.pages else f"{rule.pages} wanted, {now} given"

    def _say(self, problems: Mapping[Key, str]) -> None:
        for key, problem in problems.items():
            if problem != self._problems.get(key):
                log.warning("pages-not-provided", problem=problem)
        self._problems = problems


def lacking(rule: HugepagesConfig, inventory: Inventory) -> str:
    """Return what the machine lacks for a pool: the NUMA node, or pages of this size; "" if it has both."""
    node = inventory.node_by_id.get(rule.node)
    if node is None:
        nodes = CpuSet(inventory.node_by_id)
        return f"this machine has no NUMA node {rule.node}, it has {nodes or 'none'}"
    sizes = {pool.page_bytes for pool in node.hugepages}
    if parse_size(rule.page_size) in sizes:
        return ""
    there = ", ".join(map(format_size, sorted(sizes))) or "none"
    return f"NUMA node {rule.node} has no pages of that size, it has {there}"


def _key(rule: HugepagesConfig) -> Key:
    return rule.node, parse_size(rule.page_size)


def _name(rule: HugepagesConfig) -> str:
    return f"{rule.page_size} on node {rule.node}"
