"""Keeps the pools of NVMe targets in the API server that nodes share: one agent of the cluster writes them, and each
agent taints the devices that its claims hold and that it cannot reach.

The pools stay when agents end: other nodes use them. The agent that holds the Lease deletes them once its configuration
names no target any longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import race, supervise
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import Features, Pool, Taint
from nodeagent.core.fabrics.pool import lost_paths, taint_value
from nodeagent.core.fabrics.target import device_id
from nodeagent.errors import PeerError
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.kube.resourceslice.pool_writer import PUBLISHED, PublishPace
from nodeagent.kube.resourceslice.publisher import Publisher
from nodeagent.kube.resourceslice.shared_slices import is_shared, tainting_nodes, with_taints
from nodeagent.managers.fabrics.lease import ClusterLease
from nodeagent.managers.manager import Manager
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
USUAL_NAMESPACE = "kube-system"
AGAIN_S, RESYNC_S = 10.0, 60.0
"""Until what could not be written or withdrawn is tried again, and until taints are looked at again although nothing
has changed."""
GONE_S = 300.0
"""How often the agent that holds the Lease looks for taints of Nodes that no longer exist."""
CONFLICT = 409
log = structlog.get_logger()


def lease_namespace(configured: str, file: Path = NAMESPACE_FILE) -> str:
    """Return where the Lease is: as configured, in the pod's namespace, or in kube-system."""
    if configured:
        return configured
    if said := os.environ.get("POD_NAMESPACE", ""):
        return said
    with contextlib.suppress(OSError):
        return file.read_text().strip() or USUAL_NAMESPACE
    return USUAL_NAMESPACE


class SharedPoolsManager(Manager):
    """Publishes and taints. Only the agent that leads its node does."""

    name = "shared pools"

    def __init__(
        self,
        agent: Agent,
        api: LazyApi,
        config: Callable[[], Config],
        node_name: str,
        pools: Callable[[Features], Sequence[Pool]],
        *,
        configured: bool,
        **timing: float,
    ) -> None:
        """pools: returns those that nodes share, as configured. configured: whether there is an API server. timing: of
        the Lease, as of ClusterLease."""
        self._agent, self._api, self._config = agent, api, config
        self._node_name, self._pools = node_name, pools
        self._configured = configured
        self._timing = timing
        self._news = Revision(*agent.revisions)
        self._lease: ClusterLease | None = None
        self._publisher: Publisher | None = None
        self._tainted: Mapping[tuple[str, str], Taint] | None = None
        """What this node has on its devices, as last written; None before the first write."""
        self._failing = Once("taints-not-written")
        self._withdrawn = False
        """Whether this agent has withdrawn the pools, as no target is configured any longer."""

    async def apply(self, config: Config) -> None:
        self._news.bump()

    def notes(self) -> list[str]:
        """Return why the pools are not published, or the taints not written."""
        if not self._configured:
            return ["shared pools: they are not published: there is no API server, dra.kubeconfig is empty"]
        found = [f"shared pools: {why}" for why in (self._failing.last, self._lease_fault()) if why]
        standing = self._publisher.standing if self._publisher is not None else None
        if standing is not None and standing.state != PUBLISHED and standing.reason:
            found.append(f"shared pools: not published: {standing.reason}")
        return found

    def _lease_fault(self) -> str:
        return self._lease.reason if self._lease is not None else ""

    def document(self) -> dict[str, Any]:
        """Return who publishes, and what is published by this agent, in plain types."""
        lease, publisher = self._lease, self._publisher
        return {
            "leader": lease.holder if lease is not None else "",
            "leads": lease.held if lease is not None else False,
            "pools": sorted(device_id(one.name) for one in self._config().targets),
            "slices": msgspec.to_builtins(publisher.standing) if publisher is not None else {},
        }

    async def lead(self) -> None:
        """Publish and taint, until cancelled."""
        if not self._configured:
            return
        from nodeagent.kube.apiserver.client import LEASES

        config = self._config().dra
        namespace = lease_namespace(config.lease_namespace)
        name = f"{config.driver}-shared-pools"
        self._lease = lease = ClusterLease(self._api, LEASES, name, namespace, self._node_name, **self._timing)  # type: ignore[arg-type]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise("shared pools", lambda: self._while_served(lease)))
            tasks.create_task(supervise("taints of shared devices", self._follow_taints))

    # ---------------------------------------------------------------- the pools

    async def _while_served(self, lease: ClusterLease) -> None:
        while True:
            await self._until(lambda: bool(self._config().targets))
            self._withdrawn = False
            await race(lease.while_held(self._publish), self._until(lambda: self._is_done(lease)))

    def _is_done(self, lease: ClusterLease) -> bool:
        """Return whether no target is configured any longer, and the pools are withdrawn if that is up to this agent:
        it is as long as no other one has the Lease, also while it cannot be renewed."""
        return not self._config().targets and (self._withdrawn or lease.holder != self._node_name)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._news.changed(self._news.value)

    async def _publish(self) -> None:
        """Publish as long as targets are configured, and withdraw the pools once there are none, until cancelled."""
        from nodeagent.kube.apiserver.client import NODES, SLICES

        dra = self._config().dra
        self._publisher = publisher = Publisher(
            self._api,
            dra.driver,
            "",
            self._pools,
            self._news.changed,
            nodes=NODES,
            slices=SLICES,
            pace=PublishPace(start_jitter_s=0.0),
        )
        try:
            while True:
                none = self._until(lambda: not self._config().targets)
                await race(publisher.run(), none, self._drop_taints_of_gone_nodes())
                await race(self._withdraw(publisher), self._until(lambda: bool(self._config().targets)))
                await self._until(lambda: bool(self._config().targets))
                self._withdrawn = False
        finally:
            self._publisher = None

    async def _withdraw(self, publisher: Publisher) -> None:
        """Withdraw the pools, however often that takes: no other agent would."""
        while True:
            if await publisher.withdraw():
                self._withdrawn = True
                self._news.bump()
                return
            await asyncio.sleep(AGAIN_S)

    # ---------------------------------------------------------------- taints

    async def _follow_taints(self) -> None:
        while True:
            seen = self._news.value
            rest_s = await self._settle_taints()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._news.changed(seen)

    async def _settle_taints(self) -> float | None:
        """Have this node's taints on the devices that it cannot reach, and on no others. Return after how many seconds
        to look again without news, or None if only after news."""
        agent, dra = self._agent, self._config().dra
        wanted = lost_paths(agent.ledger, agent.health, self._node_name, dra.unhealthy_effect)
        if not wanted and self._tainted == wanted:
            return None
        try:
            await self._have_taints(taint_value(self._node_name), wanted)
        except PeerError as error:
            self._tainted = None
            if error.status == CONFLICT:
                return 0.1
            self._failing.report(str(error))
            return AGAIN_S
        if self._tainted != wanted and (wanted or self._tainted):
            log.info("path-taints-written", devices=sorted(device for _, device in wanted))
        self._failing.clear()
        self._tainted = wanted
        return RESYNC_S

    async def _have_taints(self, node: str, wanted: Mapping[tuple[str, str], Taint]) -> None:
        from nodeagent.kube.apiserver.client import SLICES

        for one in await self._slices():
            if (changed := with_taints(one, node, wanted)) is not None:
                await self._api.replace(SLICES, changed)

    async def _slices(self) -> list[dict[str, Any]]:
        from nodeagent.kube.apiserver.client import SLICES

        fields = {"spec.nodeName": "", "spec.driver": self._config().dra.driver}
        return [one for one in (await self._api.list(SLICES, fields=fields)).items if is_shared(one)]

    async def _drop_taints_of_gone_nodes(self) -> None:
        """Take away the taints of Nodes that no longer exist: nothing else would."""
        while True:
            try:
                for node in await self._gone(sorted(tainting_nodes(await self._slices()))):
                    await self._have_taints(node, {})
                    log.info("path-taints-removed", node=node, why="there is no such Node")
            except PeerError as error:
                log.debug("taints-not-looked-at", error=str(error))
            await asyncio.sleep(GONE_S)

    async def _gone(self, nodes: Sequence[str]) -> list[str]:
        """Return which of some nodes, as their taints call them, no longer exist."""
        from nodeagent.kube.apiserver.client import NODES

        missing = [one for one in nodes if await self._api.get(NODES, one) is None]
        if not missing:
            return []
        every = (await self._api.list(NODES, fields={})).items  # a long name is not whole in a taint
        there = {taint_value(str(one["metadata"]["name"])) for one in every}
        return [one for one in missing if one not in there]
