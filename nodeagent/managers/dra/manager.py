"""The DRA side of the agent: the driver's sockets, its claims, device health, and the slices in the API server.

Two instances may serve at once, as during a rolling upgrade: each answers kubelet on its own sockets. Only one leads:
it publishes, maintains files and releases forgotten claims.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import race, supervise
from nodeagent.config.schema import Config
from nodeagent.config.validate import endpoint_fault
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.dra.node_allocatable import NO_BOOKS, NodeBooks, counted, uncounted
from nodeagent.core.dra.pool import ALL_FEATURES, Features, Pool
from nodeagent.core.events.happenings import Report
from nodeagent.core.ledger.offline import lost_cpus
from nodeagent.core.model.claim import ClaimRef, DeviceHealth
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.core.sharing.mps import DAEMONS
from nodeagent.errors import ConfigError
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.kube.kubelet.plugin_registration import DraPlugin
from nodeagent.kube.kubelet.plugin_sockets import other_instance_serves, plugin_sockets, remove_stale
from nodeagent.kube.kubelet.pod_resources import PodResources
from nodeagent.kube.resourceslice.pool_writer import PUBLISHED, PublishPace
from nodeagent.kube.resourceslice.publisher import Publisher
from nodeagent.managers.dra.claim_binding import ClaimBinder
from nodeagent.managers.dra.claim_files import ClaimRenderer, claims_held
from nodeagent.managers.dra.cpu_requests import CpuRequests
from nodeagent.managers.dra.device_setup import (
    NO_INSTANCES,
    NOTHING_BOUND,
    NOTHING_SHARED,
    Instances,
    Passthrough,
    Sharing,
)
from nodeagent.managers.dra.garbage_collector import ClaimGarbageCollector, StatusWriter, keep_rendered
from nodeagent.managers.dra.node_watch import NodeWatch
from nodeagent.managers.dra.prepare import ClaimPreparer, Grow, never_grow
from nodeagent.managers.manager import Followed, Manager, nothing_follows
from nodeagent.resources.catalog import Dra, dra_of
from nodeagent.resources.offer import misspelt
from nodeagent.state.agent import Agent
from nodeagent.telemetry.event_timer import EventTimer

CLAIMS = "claims"
"""In the runtime folder: what containers may read about their claims."""
_NONE: frozenset[str] = frozenset()
LINGER_S = 2.0
"""How long kubelet is still answered after the last claim is gone and nothing is served any longer."""
log = structlog.get_logger()


def node_name(config: Config) -> str:
    """Return the Node's name: as configured, from NODE_NAME in the environment, or kubelet's default."""
    return config.dra.node_name or os.environ.get("NODE_NAME", "") or socket.gethostname().lower()


def check(config: Config, kubelet_dir: Path) -> None:
    """Raise ConfigError if something is to be served through DRA and kubelet would not take the driver's endpoint."""
    if config.served_by_dra and (why := endpoint_fault(str(kubelet_dir))):
        raise ConfigError(f"cannot serve DRA from kubelet's folder {kubelet_dir}: {why}")


class Pools:
    """The current pools, computed once per state of inventory, ledger, health, served kinds and the Node."""

    def __init__(
        self,
        agent: Agent,
        dra: Callable[[], Dra],
        books: Callable[[], NodeBooks] = lambda: NO_BOOKS,
        conditional: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """Store the sources. `conditional` returns the kinds whose claims are granted before their pods are bound."""
        self._agent = agent
        self._dra = dra
        self._books = books
        self._conditional = conditional
        self._now: tuple[object, ...] = (None,) * 6
        self._form: Features | None = None
        self._pools: tuple[Pool, ...] = ()
        """Computed from _now, in the form _form."""
        self._published = ALL_FEATURES
        self.timer = EventTimer("dra")
        """Times how long the events of the kernel take to the slices."""

    def published(self, features: Features) -> tuple[Pool, ...]:
        """Return the pools with the features that the API server keeps, and remember these features."""
        self._published = features
        self.timer.looked(self._agent.inventory.generation, self._agent.event_s)
        return tuple(one for one in self._of(features) if one.scope is None)

    def shared(self, features: Features) -> tuple[Pool, ...]:
        """Return the pools that several nodes share, with the features that the API server keeps."""
        every = self._dra().catalog
        kinds = (every.kinds[name] for name in sorted(every.shared))
        agent = self._agent
        return tuple(one.pool(agent.inventory, agent.ledger, agent.health, features) for one in kinds)

    def known(self) -> tuple[Pool, ...]:
        """Return every device under its published name, including those left out because they are unhealthy."""
        return self._of(replace(self._published, taints=True))

    def last(self) -> tuple[Pool, ...]:
        """Return the pools as they were last computed."""
        return self._pools

    def _of(self, features: Features) -> tuple[Pool, ...]:
        agent, every = self._agent, self._dra().catalog.kinds
        books = self._books() if features.allocatable else NO_BOOKS
        conditional = self._conditional() if features.conditions else _NONE
        now = (agent.inventory, agent.ledger, agent.health, every, books, conditional)
        if features != self._form or any(a is not b for a, b in zip(self._now, now, strict=True)):
            self._now, self._form = now, features
            pools = (one.pool(agent.inventory, agent.ledger, agent.health, features) for one in every.values())
            self._pools = tuple(replace(counted(one, books), conditional=one.kind in conditional) for one in pools)
        return self._pools


class DraHealth:
    """Health of every device of every pool, for the DRA plugin.

    A device of which some claims have lost CPUs is unhealthy for all of its claims, because kubelet tracks one state
    per device; the message says whose CPUs were lost.
    """

    def __init__(self, agent: Agent, dra: Callable[[], Dra], pools: Pools, revision: Revision) -> None:
        """Store the sources. `revision` increases with every change of the other three."""
        self._agent = agent
        self._dra = dra
        self._pools = pools
        self._revision = revision
        # Times are computed once, so that an unchanged list equals the previous one and is not sent again.
        self._clock_at_unix_s = time.time() - time.monotonic()
        self._began_unix_s = time.time()

    async def changed(self, seen: int) -> int:
        return await self._revision.changed(seen)

    def states(self) -> tuple[DeviceHealth, ...]:
        node = self._dra().catalog.node_name
        there = {
            (pool.name(node), device.name): device.part.device
            for pool in self._pools.known()
            for device in pool.devices
        }
        lost = lost_cpus(self._agent.inventory, self._agent.ledger)
        found = [self._state(*at, id, lost.get(at, "")) for at, id in there.items()]
        gone = (at for at in self._held() if at not in there)
        return (*found, *(self._unhealthy(*at, lost.get(at, "it is no longer there")) for at in gone))

    def _held(self) -> dict[tuple[str, str], None]:
        """Return the devices that claims hold, each once. A device that is gone is in no pool, but its pod must still
        be notified."""
        grants = sorted(self._agent.ledger.grants.values(), key=lambda grant: grant.id)
        results = (one.result for one in grants if one.holder.api == CLAIM and one.result is not None)
        return dict.fromkeys((one.pool, one.device) for one in results)

    def _unhealthy(self, pool: str, name: str, message: str) -> DeviceHealth:
        since_unix_s = self._began_unix_s
        return DeviceHealth(pool=pool, device=name, state=UNHEALTHY, since_unix_s=since_unix_s, message=message)

    def _state(self, pool: str, name: str, id: str, lost: str) -> DeviceHealth:
        if lost:
            return self._unhealthy(pool, name, lost)
        device = self._agent.inventory.device_by_id.get(id)
        ill = illness(device, self._agent.health) if device is not None else None
        if ill is None:
            return DeviceHealth(pool=pool, device=name, state=HEALTHY, since_unix_s=self._began_unix_s)
        since_unix_s = self._clock_at_unix_s + ill.since
        return DeviceHealth(pool=pool, device=name, state=ill.state, since_unix_s=since_unix_s, message=ill.reason)


class DraManager(Manager):
    """Serves the configured resources through DRA. Building it starts nothing."""

    name = "dra"

    def __init__(
        self,
        agent: Agent,
        config: Config,
        families: Sequence[all_kinds.Kind],
        sysfs: SysFs,
        kubelet_dir: Path,
        runtime_dir: Path,
        pods: PodResources,
        api: LazyApi,
        report: Report,
        refused: Callable[[Config], Mapping[str, str]] = lambda config: {},
        grow: Grow = never_grow,
        sharing: Sharing = NOTHING_SHARED,
        instances: Instances = NO_INSTANCES,
        passthrough: Passthrough = NOTHING_BOUND,
        followed: Followed = nothing_follows,
    ) -> None:
        """Set up. `refused` returns the resources of a configuration that cannot be served alongside kubelet's own
        managers and other device plugins, with the reason."""
        self._instances = instances
        self._refused = refused
        self.config = config
        self._agent = agent
        self._revision = Revision(*agent.revisions)
        """Increases with every change of what is served or reported: the state, and the configuration of what is
        served."""
        self._families = families
        self._kubelet_dir = kubelet_dir
        self._pods = pods
        self._node_name = node_name(config)
        self._dra = dra_of(config, families, self._node_name)
        self._sockets = plugin_sockets(kubelet_dir, config.dra.driver, os.environ.get("POD_UID", ""))
        self._cdi_dir = Path(config.dra.cdi_dir)
        self.api = api
        self._node = NodeWatch(self.api, self._node_name, self._revision.bump)
        self.pools = Pools(agent, self.dra, self._books, self._conditional)
        self._status = StatusWriter(self.api.tell, config.dra.driver, lambda: agent.inventory)
        folder, readable = CdiFolder(self._cdi_dir, config.dra.driver, sysfs), ClaimFiles(runtime_dir / CLAIMS)
        self._rendering = ClaimRenderer(agent, self.dra, folder, readable, runtime_dir / DAEMONS, instances.view)
        cgroups = PodCgroups(sysfs, config.pinning.cgroup_root)
        self._cpu_requests = CpuRequests(cgroups.requests_cpus, lambda: agent.ledger, report)
        self._claims = ClaimPreparer(
            agent,
            self.dra,
            self.api.claim,
            self._rendering,
            self._told,
            grow,
            self._cpu_requests.prepared,
            report,
            sharing,
            instances,
            passthrough,
            followed,
        )
        self.refused: Mapping[str, str] = {}
        """Resources that are configured for DRA but not served, with the reason."""
        self._health = DraHealth(agent, self.dra, self.pools, self._revision)
        self.plugin: DraPlugin | None = None
        self.publisher: Publisher | None = None
        self.binder: ClaimBinder | None = None

    def dra(self) -> Dra:
        """Return what is currently served."""
        return self._dra

    def kubelet_counts_claims(self) -> bool:
        """Return whether kubelet adds what claims hold to its own limits, if the scheduler counted it, as far as its
        Node tells."""
        return self._node.books.declared

    def _books(self) -> NodeBooks:
        """Return what is known of the scheduler's books, as far as claims shall be counted there."""
        return self._node.books if self._counts() else NO_BOOKS

    def _conditional(self) -> frozenset[str]:
        """Return the kinds whose claims are granted before their pods are bound."""
        return self._dra.conditional if self.binder is not None and self.binder.able else _NONE

    def _counts(self) -> bool:
        return self.config.dra.node_allocatable == "auto"

    # ---------------------------------------------------------------- what is served

    @property
    def needed(self) -> bool:
        """Return whether anything is served, or held by a claim that kubelet will unprepare."""
        return self._dra.served or any(one.holder.api == CLAIM for one in self._agent.ledger.grants.values())

    async def apply(self, config: Config) -> None:
        """Apply a configuration. The driver's name stays as at the start: its sockets, files and slices are named after
        it."""
        refused, counts = self._refused(config), self._counts()
        fixed = msgspec.structs.replace(config.dra, driver=self.config.dra.driver)
        self.config = config = msgspec.structs.replace(config, dra=fixed)
        mine = {one.name: refused[one.name] for one in config.served_by_dra if one.name in refused}
        for name in mine if mine != self.refused else ():
            log.warning("resource-refused", resource=name, api="dra", reason=mine[name])
        self.refused = mine
        after = dra_of(config, self._families, self._node_name, refused)
        if after != self._dra or counts != self._counts():
            self._dra = after
            self._revision.bump()

    def document(self) -> dict[str, Any]:
        """Return the status in plain types; empty if nothing is served."""
        if not self.needed:
            return {}
        registration = self.plugin.registration if self.plugin is not None else None
        standing = self.publisher.standing if self.publisher is not None else None
        return {
            "driver": self._dra.catalog.driver,
            "node": self._node_name,
            "registered": registration.ready if registration else False,
            "registration": registration.state if registration else "",
            "reason": registration.reason if registration else "",
            "health_watched": registration.connected if registration else False,
            "slices": msgspec.to_builtins(standing) if standing else {},
            "counted": sorted({name for pool in self.pools.last() for name in pool.counted}),
            "claims": len(claims_held(self._agent.ledger)),
        }

    def notes(self) -> list[str]:
        """Return what of the claims the scheduler does not count although it could, whose pods ask for no CPUs, and the
        keys of the configuration that no device of this machine has."""
        left_out = uncounted(self.pools.last(), self._books()) if self._dra.served else []
        return [
            *left_out,
            *self._not_bound(),
            *self._cpu_requests.notes(),
            *misspelt(self._dra.offers, self._agent.inventory),
        ]

    def _not_bound(self) -> list[str]:
        """Return why claims are not granted before their pods are bound although they shall be."""
        if not self._dra.conditional or self.binder is None or not self.binder.reason:
            return []
        return [f"dra.bindingConditions has no effect at present: {self.binder.reason}"]

    def not_ready(self) -> list[str]:
        """Return why pods cannot be scheduled here or have claims prepared, one sentence each."""
        plugin, publisher, driver = self.plugin, self.publisher, self.config.dra.driver
        if not self._dra.served or plugin is None or publisher is None:
            return []
        reasons = [] if plugin.registration.ready else [f"{driver}: {plugin.registration.reason or 'not registered'}"]
        standing = publisher.standing
        if standing.state != PUBLISHED:
            reasons.append(f"{driver}: slices not published: {standing.reason or standing.state}")
        return reasons

    def _told(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None:
        if self.config.dra.device_status:
            self._status.told(ref, grants, error)

    # ---------------------------------------------------------------- running

    async def serve(self) -> None:
        """Answer kubelet while needed."""
        await self._while_needed(self._serve)

    async def lead(self) -> None:
        """Publish and maintain claims while needed."""
        await self._while_needed(self._lead)

    async def close(self) -> None:
        await self.api.close()

    async def _while_needed(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._until(lambda: self.needed)
            await race(work(), self._needless())

    async def _needless(self) -> None:
        """Return when nothing has been needed for LINGER_S: kubelet's last call must still be answered."""
        while self.needed:
            await self._until(lambda: not self.needed)
            await asyncio.sleep(LINGER_S)

    async def _until(self, holds: Callable[[], bool]) -> None:
        seen = 0
        while not holds():
            seen = await self._revision.changed(seen or self._revision.value)

    async def _serve(self) -> None:
        for path in remove_stale(self._kubelet_dir, self.config.dra.driver, self._sockets):
            log.info("stale-socket-removed", path=str(path))
        self.plugin = DraPlugin(self._dra.catalog.driver, self._sockets, self._claims, self._health)
        try:
            await race(
                self.plugin.run(), self.api.keep_warm(), supervise("requests of pods", self._cpu_requests.follow)
            )
        finally:
            self.plugin = None

    async def _lead(self) -> None:
        from nodeagent.kube.apiserver.client import NODES, SLICES

        await self._instances.ready()
        driver, node = self._dra.catalog.driver, self._node_name
        self.publisher = Publisher(
            self.api,
            driver,
            node,
            self.pools.published,
            self._revision.changed,
            nodes=NODES,
            slices=SLICES,
            node=self._node,
            pace=PublishPace(start_jitter_s=self.config.dra.spread_seconds),
            timer=self.pools.timer,
        )
        forgotten = ClaimGarbageCollector(self._agent, self.api.claim, self._pods.claims, driver)
        self.binder = binder = ClaimBinder(
            self.api,
            self._agent,
            self._claims,
            self._status.answer,
            driver,
            node,
            changed=self._revision.bump,
            gone=forgotten.hint,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(supervise("slices", self.publisher.run))
                tasks.create_task(
                    supervise("claims", lambda: keep_rendered(self._revision, self._rendering, self._cdi_dir))
                )
                tasks.create_task(supervise("forgotten claims", forgotten.follow))
                tasks.create_task(supervise("claim status", self._status.follow))
                tasks.create_task(supervise("node", self._follow_node))
                tasks.create_task(supervise("allocated claims", lambda: self._bind_claims(binder)))
        finally:
            # During a rolling upgrade the other instance continues with the same slices.
            if not other_instance_serves(self._kubelet_dir, driver, self._sockets):
                await self.publisher.withdraw()
            self.publisher = self.binder = None

    async def render(self) -> None:
        """Bring the files of claims up to date now, instead of soon."""
        await self._rendering.restore(afresh=False)

    async def _bind_claims(self, binder: ClaimBinder) -> None:
        """Follow the claims of the cluster as long as some are to be granted before their pods are bound."""
        while True:
            await self._until(lambda: bool(self._dra.conditional))
            await race(binder.follow(), self._until(lambda: not self._dra.conditional))

    async def _follow_node(self) -> None:
        """Follow the Node as long as claims are to be counted."""
        while True:
            await self._until(self._counts)
            await race(self._node.follow(), self._until(lambda: not self._counts()))
