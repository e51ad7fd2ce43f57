"""One agent from its start to its end. `build` reads the machine and opens the ledger but starts nothing; `run` is one
TaskGroup with one stop order: serving parts end before deciding ones, and the store closes last. The managers and what
they know of each other: `wiring.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from nodeagent.admin.metrics_endpoint import MetricsEndpoint
from nodeagent.admin.metrics_page import MetricsPage
from nodeagent.admin.reasons import merged
from nodeagent.admin.status import Status
from nodeagent.admin.status_endpoint import StatusEndpoint
from nodeagent.aio.supervise import cancel_all, race, supervise
from nodeagent.config.schema import Config
from nodeagent.core.events.states import Node
from nodeagent.daemon.foundation import Foundation
from nodeagent.daemon.observed import observed
from nodeagent.daemon.paths import STATUS_SOCKET, Paths, checked, damaged_records, log_start
from nodeagent.daemon.reload import Configuration
from nodeagent.daemon.wiring import Wiring
from nodeagent.errors import LedgerTooNewError, NodeagentError, StateError
from nodeagent.host.devices import all_kinds
from nodeagent.host.systemd.notify import Notifier
from nodeagent.kube.kubelet.registration import Registration
from nodeagent.managers.deviceplugin.kubelet_starts import kubelets
from nodeagent.managers.kubelet_conflicts import undetermined, unprotected
from nodeagent.resources.catalog import THROUGH_DRA
from nodeagent.resources.offer import Offer
from nodeagent.state.leader import Leader
from nodeagent.state.store import Store

LOCKED_RETRY_S = 2.0
READ_BACK_S, UNSHOWN_POLL_S, SETTLE_S = 30.0, 1.0, 0.2
"""Intervals of reading back what kubelet shows: without news; while it differs from what was sent; after news."""
SWITCH_S = 0.001
"""The interpreter's switch interval: how long a busy thread may delay the loop, and so kubelet's answer, each time."""
Parts = Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
log = structlog.get_logger()


def build(config: Config, where: Paths, families: Sequence[all_kinds.Kind]) -> Daemon:
    """Read the machine and open the ledger, but start nothing. Raise StateError if another
    agent has the ledger. Blocks."""
    store = Store(where.state_dir, accept_loss=where.accept_loss)
    try:
        return Daemon(Foundation(config, where, families, store))
    except BaseException:
        store.close()
        raise


class Daemon:
    """One running agent, and what its pages show of it."""

    def __init__(self, base: Foundation) -> None:
        self.agent = base.agent
        self.config_file = str(base.where.config_file or "")
        self.started_at = time.time()
        self._base = base
        self._leader = Leader(base.agent, base.store, base.where.state_dir, lambda: base.config.audit_days)
        self._parts = Wiring(base, lambda: self._leader.held)
        page = MetricsPage(self)
        status = StatusEndpoint(base.where.runtime_dir / STATUS_SOCKET, Status(self, page).handle, base.config)
        self._managers = self._parts.in_start_order(self._observed, (status, MetricsEndpoint(page, self.not_ready)))
        self._notifier = Notifier()
        self._configuration = Configuration(base, self._managers, self._parts.scanner.rescan, self._notifier)
        self._parts.recovery.look_for_losses(base.store, base.resources())

    # ---------------------------------------------------------------- what status reads

    @property
    def config_error(self) -> str:
        """Return why the newest configuration is not in force, or ""."""
        return self._configuration.error

    @property
    def notes(self) -> list[str]:
        by_managers = [note for one in self._managers for note in one.notes()]
        return merged(
            (*self._leader.notes, *damaged_records(self._base.where), *self._base.kubelet.notes, *by_managers)
        )

    @property
    def refused(self) -> Mapping[str, str]:
        return {
            **self._parts.device_plugin.refused,
            **{f"{name}{THROUGH_DRA}": why for name, why in self._parts.dra.refused.items()},
        }

    def offers(self) -> tuple[Offer, ...]:
        return self._parts.device_plugin.offers()

    def configured(self) -> tuple[Offer, ...]:
        return self._base.configured()

    def registrations(self) -> tuple[Registration, ...]:
        return self._parts.device_plugin.registrations()

    def health_readings(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        return self._parts.scanner.health_readings()

    async def clear_health(self, device: str, who: str) -> bool:
        return await self._parts.scanner.clear_health(device, who)

    async def reload(self) -> list[str]:
        return await self._configuration.reload()

    def not_ready(self) -> list[str]:
        """Return why nothing can be granted, kubelet or the API server does not show what was sent, containers may not
        be pinned, what was granted is not exclusive, or resources are refused because kubelet's files cannot be
        read."""
        not_exclusive = unprotected(self._base.kubelet.kubelet, self.agent.ledger)
        unread = undetermined(self._base.kubelet.kubelet, self._base.config)
        by_managers = [why for one in self._managers for why in one.not_ready()]
        return merged((*by_managers, *([not_exclusive] if not_exclusive else []), *unread))

    def _not_shown(self) -> list[str]:
        return [*self._parts.device_plugin.not_ready(), *self._parts.dra.not_ready()]

    def _observed(self) -> Node:
        now = self._configuration
        return observed(self.agent, self._base.kubelet, self.configured(), now.refused, self._leader.notes, now.error)

    def kubelet_document(self) -> dict[str, Any]:
        return self._base.kubelet.document()

    def dra_document(self) -> dict[str, Any]:
        return self._parts.dra.document()

    def gpus_document(self) -> dict[str, Any]:
        return {**self._parts.gpus.document(), "fabrics": self._parts.fabrics.document()}

    def pinning_document(self) -> dict[str, Any]:
        return {**self._parts.pinning.document(), **self._parts.exclusive.document(), **self._parts.divided.document()}

    # ---------------------------------------------------------------- running

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop`, then stop in order. Raise StateError if another agent has taken
        over the lead from this one."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._configuration.asked.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._configuration.apply(self._base.config)
                serving = self._begin(tasks, self._always())
                await race(self._leader.take(), stop.wait())
                leading = await self._begin_to_lead(tasks) if self._leader.held else []
                await race(stop.wait(), self._leader.lost())
                log.info("stopping")
                self._notifier.stopping()
                for one in self._managers:
                    await one.withdraw()
                await cancel_all(leading)
                await cancel_all(serving)
        finally:
            for one in reversed(self._managers):
                await one.close()
            await self.agent.close()
            self._base.pods.close()
        self._leader.close()

    async def _begin_to_lead(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        self._base.others.learn(await self._parts.device_plugin.read_back(self._base.pods))
        await self._configuration.apply_kubelet_settings()
        leading = self._begin(tasks, self._while_leading())
        self._notifier.ready()
        return leading

    def _begin(self, tasks: asyncio.TaskGroup, parts: Parts) -> list[asyncio.Task[None]]:
        return [tasks.create_task(supervise(name, part), name=name) for name, part in parts.items()]

    def _always(self) -> Parts:
        """Return the parts that every agent runs, even while another one leads."""
        own = {"kubelet's starts": self._follow_starts, "configuration": self._configuration.follow}
        return {one.name: one.serve for one in self._managers} | own

    def _while_leading(self) -> Parts:
        """Return the parts that only one agent on a node may run."""
        own = {
            "kubelet": self._follow_kubelet,
            "housekeeping": self._leader.keep,
            "watchdog": self._notifier.keep_alive,
        }
        return {one.name: one.lead for one in self._managers} | own

    async def _follow_starts(self) -> None:
        """Apply the settings of each kubelet as soon as it starts."""
        async with contextlib.aclosing(kubelets(self._base.plugins)) as starts:
            async for _ in starts:
                await self._configuration.apply_kubelet_settings()

    async def _follow_kubelet(self) -> None:
        """Read back what kubelet shows; report the status to systemd."""
        while True:
            seen = self._parts.news.value
            self._base.others.learn(await self._parts.device_plugin.read_back(self._base.pods))
            if self._configuration.is_outdated():
                await self._configuration.apply_kubelet_settings()
            self._base.kubelet.watch(self.agent.ledger)
            self._notifier.status(self._summary())
            await self._news_since(seen)

    async def _news_since(self, seen: int) -> None:
        """Return when kubelet may show something else: after news from here or the poll interval, plus the moment that
        kubelet needs to show it."""
        waits = [one.ready for one in self.registrations()]
        soon = self._parts.device_plugin.awaited or (self._not_shown() and all(waits))
        poll_s = UNSHOWN_POLL_S if soon else READ_BACK_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(poll_s):
                await self._parts.news.changed(seen)
        await asyncio.sleep(SETTLE_S)

    def _summary(self) -> str:
        reasons = self.not_ready()
        state = f"{len(self.offers())} resources, {len(self.agent.ledger.grants)} grants"
        return f"{state}; {reasons[0]}" if reasons else state


async def run(config: Config, where: Paths) -> None:
    """Build, waiting while another agent still has the ledger, and run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    sys.setswitchinterval(SWITCH_S)
    loop.set_exception_handler(_log_unhandled)
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # must not kill the process while nothing can be reloaded yet
    daemon = await _built(config, where, stop)
    # Existing objects are permanent: collecting them again and again would occasionally cost a call 20 ms.
    gc.collect()
    gc.freeze()
    if daemon is not None:
        log_start(where)
        await daemon.run(stop)


async def _built(config: Config, where: Paths, stop: asyncio.Event) -> Daemon | None:
    """Return a daemon that can run, or None if `stop` is set first."""
    said, families = "", checked(config, where)
    while not stop.is_set():
        try:
            return build(config, where, families)
        except LedgerTooNewError:
            raise
        except StateError as error:
            if str(error) != said:
                log.error("cannot-start-yet", error=str(error), retry_s=LOCKED_RETRY_S)
            said = str(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOCKED_RETRY_S):
                await stop.wait()
    return None


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    error = context.get("exception")
    log.error("unforeseen", what=context.get("message", ""), exc_info=error, known=isinstance(error, NodeagentError))
