"""The enforcing side of the agent: connected to the container runtime, watching cgroups, reading back.

Only the leading agent does this: a runtime accepts one answer per container, not two. Without cgroup v2 nothing is
enforced, which the status reports; if cgroups cannot be written, the runtime has to apply everything.

Cgroups do not wait for the runtime: whatever the ledger, kubelet's record and the containers' bundles prove is enforced
at once, and a container not identified yet is left unchanged if it may hold something.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import run_to_end, supervise
from nodeagent.config.isolation import PinningConfig
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report, unreported
from nodeagent.core.ledger.offline import held_outside, narrowed
from nodeagent.core.model.container import Container
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.quantity import format_size
from nodeagent.core.pinning.plan import Pin
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup import oci_bundle as bundles
from nodeagent.host.cgroup.enforcer import Enforcer
from nodeagent.host.cgroup.layout import CONTAINER, QOS, TOP, Cgroup, CgroupLayout
from nodeagent.host.cgroup.pods_cpus import pods_cgroup
from nodeagent.host.cgroup.read import CgroupReader, Hierarchy, has_begun, hierarchy, page_sizes
from nodeagent.host.cgroup.watch import CAME, GONE, LIMIT_FILES, LOOK, WRITTEN, CgroupChange, Watch
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.systemd.slice_drop_ins import SliceDropins
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.cache_groups import NO_CACHE_GROUPS, CacheGroups
from nodeagent.managers.pinning.containers import ContainerEntry, ContainerTable
from nodeagent.managers.pinning.nri_hooks import NriHooks
from nodeagent.managers.pinning.ownership import Fetch, GrantOwnership, List
from nodeagent.managers.pinning.pod_hooks import NO_POD_NETWORKS, PodHooks, PodNetworks
from nodeagent.managers.pinning.reconciler import CgroupReconciler
from nodeagent.managers.pinning.slices import SliceNotifier
from nodeagent.managers.pinning.unasked import unasked
from nodeagent.nri.plugin import NriPlugin
from nodeagent.resources.offer import CPU
from nodeagent.state.agent import Agent

NAME = "nodeagent"
"""Name of this NRI plugin."""
UNITS = "run/systemd/system"
"""systemd's folder of runtime units."""
GRACE_S = 5.0
"""How long the runtime may be disconnected before the agent is not ready: it may be restarting or reconnecting."""
LOOK_S = 5.0
"""How long the first look at all cgroups may take before the plan is enforced for the known ones."""
RESCAN_S = 2.0
"""How long cgroups wait for a rescan of the machine; later results are enforced later."""
_OF_CPUS = ("cpuset.cpus", "cpuset.cpus.partition")
OFF, NRI, CGROUP = "off", "nri", "cgroup"
log = structlog.get_logger()


class PinningManager(Manager):
    """Confines containers. Building it starts nothing and reads which cgroups exist."""

    name = "pins"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        table: ContainerTable,
        plugins: Path,
        config: Callable[[], PinningConfig],
        fetch: Fetch,
        listing: List,
        rescan: Callable[[], Coroutine[Any, Any, object]],
        *,
        kubelet_confines: Callable[[], bool] = lambda: False,
        kubelet_cpus: Callable[[], CpuSet | None] = lambda: EMPTY,
        kubelet_counts_claims: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        report: Report = unreported,
        caches: CacheGroups = NO_CACHE_GROUPS,
        networks: PodNetworks = NO_POD_NETWORKS,
    ) -> None:
        """Detect the cgroup hierarchy; nothing is written.

        `plugins` is kubelet's device-plugins folder. `fetch` returns a claim's object from the API server, `listing`
        what kubelet lists. `rescan` reads the machine again. `kubelet_confines` returns whether kubelet's own CPU
        manager confines all containers, `kubelet_cpus` to which CPUs, or None if that is unknown,
        `kubelet_counts_claims` whether its limits of pages may include what claims hold. `clock` is in seconds.
        """
        self._kubelet_confines = kubelet_confines
        self._kubelet_cpus = kubelet_cpus
        self._kubelet_counts_claims = kubelet_counts_claims
        self._report = report
        self._caches = caches
        self._networks = networks
        self._agent = agent
        self.revision = Revision(agent.revisions.inventory, agent.revisions.ledger)
        """Increases with every change that affects where containers should run."""
        self.limits_written = Revision()
        """Increases when any process has written a limit of I/O or a utilization clamp to a cgroup."""
        self._sysfs = sysfs
        self._config = config
        self._rescan = rescan
        self._clock = clock
        self._started_with = config()
        found = hierarchy(sysfs)
        self.unsupported = found.unsupported
        """Why nothing can be enforced here, or "" if it can."""
        self._mount = found.mount
        self._table = table
        self._layouts = table.layouts
        self._enforcer = _enforcer(sysfs, found, self._layouts)
        self.reconciler = self._reconciler(GrantOwnership(agent, plugins, fetch, listing))
        self._plugin: NriPlugin | None = None
        self._seen = asyncio.Event()
        """Set once all cgroups that existed at start have been handled."""
        self._tidied = False

    def _reconciler(self, ownership: GrantOwnership) -> CgroupReconciler:
        return CgroupReconciler(
            self._agent,
            self._table,
            self._enforcer,
            ownership,
            self._config,
            began=functools.partial(has_begun, self._sysfs),
            dropins=[SliceDropins(Path(self._sysfs.path(UNITS)), one) for one in self._layouts],
            report=self._report,
            kubelet_counts_claims=self._kubelet_counts_claims,
        )

    @property
    def mode(self) -> str:
        """Return how containers are confined: not at all, in the runtime's NRI calls, or as cgroups appear."""
        wanted = self._started_with.mode
        if self.unsupported or wanted == OFF:
            return OFF
        connected = self._plugin is not None and self._plugin.standing.connected
        return NRI if wanted == NRI or (wanted != CGROUP and connected) else CGROUP

    async def apply(self, config: Config) -> None:
        """Apply a configuration, or what another kubelet confines itself."""
        serves_cpus = any(one.kind == CPU for one in config.served)
        confines, cpus = self._kubelet_confines(), self._kubelet_cpus()
        self.reconciler.configure(cpus_served=serves_cpus, kubelet_confines=confines, kubelet_cpus=cpus)
        self.revision.bump()

    @property
    def shared_cpus(self) -> CpuSet:
        """Return the CPUs of containers without exclusive CPUs; empty if these are not confined."""
        return self.reconciler.plan().shared

    def page_holders(self) -> list[str] | None:
        """Return the cgroup paths of all containers that hold hugepages, or None if not all are known."""
        plan = self.reconciler.plan()
        if not self._seen.is_set() or plan.open:
            return None
        pins = plan.containers
        entries = [self._table.entries.get(id) for id, pin in pins.items() if any(pin.hugepage_limits.values())]
        return [one.path for one in entries if one is not None and one.path]

    # ---------------------------------------------------------------- running

    async def lead(self) -> None:
        """Enforce until cancelled; what was applied stays in place."""
        if self._started_with.mode == OFF:
            return
        if self.unsupported:
            log.warning("nothing-is-pinned", reason=self.unsupported)
            return
        async with asyncio.TaskGroup() as tasks:
            if self._started_with.mode != CGROUP:
                tasks.create_task(self._serve_runtime())
            tasks.create_task(supervise("pins", self._follow_agent))
            if self._enforcer is not None:
                tasks.create_task(supervise("control groups", self._follow_cgroups))
                tasks.create_task(supervise("systemd's slices", SliceNotifier(self.reconciler, self._sysfs).run))

    async def _serve_runtime(self) -> None:
        config = self._started_with
        counts, report, caches = self._kubelet_counts_claims, self._report, self._caches
        given = self._agent, self._table, self.reconciler, self._config, counts, report, caches, self._runtime_name
        handler = PodHooks(self._networks, *given) if self._networks.wanted else NriHooks(*given)
        self._plugin = NriPlugin(
            Path(config.nri_socket),
            NAME,
            config.nri_index,
            handler,
            on_change=self._runtime_news,
            clock=self._clock,
        )
        await self._plugin.run()

    def _runtime_name(self) -> str:
        return self._plugin.standing.runtime if self._plugin is not None else ""

    def _runtime_news(self) -> None:
        self._table.runtime_connected(self._plugin is not None and self._plugin.standing.connected)
        self.revision.bump()

    async def _follow_agent(self) -> None:
        """Enforce every change of the plan: ended grants give up their CPUs, new ones take theirs."""
        if self._enforcer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._seen.wait()
        while True:
            seen = self.revision.value
            await self.reconciler.enforce()
            await self.revision.changed(seen)

    async def _follow_cgroups(self) -> None:
        with Watch(self._mount, self._layouts, poll_s=self._config().verify_seconds) as watch:
            while True:
                await self._take(await watch.changes())
                if not self._tidied and not self.reconciler.plan().open:
                    await self.reconciler.tidy()
                    self._tidied = True
                self._seen.set()

    async def _take(self, changes: Sequence[CgroupChange]) -> None:
        """Confine what came and read back what was written to; periodically read back everything."""
        noticed_s = time.monotonic()
        look = any(one.what == LOOK for one in changes)
        if look or any(map(self._moves_all, changes)):
            await self._look_at_pods_cgroup()
        if any(one.file in LIMIT_FILES for one in changes):
            self.limits_written.bump()
        came = [one.cgroup for one in changes if one.what == CAME and one.cgroup is not None]
        ids = [one.container_id for one in came if one.kind == CONTAINER]
        known = await asyncio.to_thread(self._bundles, [*ids, *(self._table.unnamed() if look else ())])
        # No await until _note has run: a plan made in between must not treat a known container as unidentified.
        strangers = [one for one in came if one.kind == CONTAINER and one.container_id not in self._table.entries]
        self._note(changes, known)
        self._look_for_silence(strangers, known)
        for one in changes:
            if one.what == GONE:
                await self.reconciler.forget(one.path)
        await self.reconciler.enforce()
        await self.reconciler.prove(known.values())
        if look:
            await self.reconciler.verify()
            await self.reconciler.look_at_quotas()
            return
        # Writes to a new cgroup before its watch began went unnoticed, so new ones are read back as well.
        written = {one.path: None for one in changes if one.what in (CAME, WRITTEN)}
        found = {one.path for one in await self.reconciler.verify(written, noticed_s=noticed_s)}
        # Effective values below change without an event. Below a pod, read them back only if the pod had drifted.
        heads = tuple(f"{path}/" if path else "" for path in written if path in found or self._is_above_pods(path))
        if heads:
            below = [path for path in self.reconciler.applied() if path.startswith(heads)]
            await self.reconciler.verify(below, noticed_s=noticed_s)

    def _note(self, changes: Iterable[CgroupChange], known: Mapping[str, Container]) -> None:
        """Record what came and went. Containers that existed before the first look count as having run, and so do those
        that a runtime should have called about before."""
        old = not self._seen.is_set()
        for one in changes:
            if one.cgroup is not None and one.what == CAME:
                self.reconciler.again(one.path)
                self._table.came(one.cgroup, ran=old)
            elif one.cgroup is not None and one.what == GONE:
                self._table.gone(one.cgroup)
        ran = old or self._runtime_wanted()
        for container in known.values():
            self._table.tell(container, ran=ran and bool(container.name))

    def _moves_all(self, change: CgroupChange) -> bool:
        """Return whether a change may affect the CPUs available to all pods."""
        if change.what == WRITTEN:
            return change.file in _OF_CPUS and self._is_above_pods(change.path)
        return change.cgroup is not None and change.cgroup.kind == TOP

    async def _look_at_pods_cgroup(self) -> None:
        """Rescan the machine if the CPUs of all pods have changed; the scan reports what cannot be read."""
        root, known = self._started_with.cgroup_root, self._agent.inventory.pods_cgroup
        with contextlib.suppress(HostError, InputError, TimeoutError):
            if await asyncio.to_thread(pods_cgroup, self._sysfs, root) != known:
                async with asyncio.timeout(RESCAN_S):
                    await run_to_end(self._rescan())

    def _is_above_pods(self, path: str) -> bool:
        cgroup = next((found for one in self._layouts if (found := one.parse(path)) is not None), None)
        return cgroup is None or cgroup.kind in (TOP, QOS)

    def _bundles(self, ids: Iterable[str]) -> dict[str, Container]:
        """Return what is known about unannounced containers and sandboxes, by id."""
        found = {}
        for id in ids:
            try:
                container = bundles.read(self._sysfs, id) if self._table.is_unnamed(id) else None
            except HostError as error:
                log.warning("container-not-known", container=id, error=str(error))
                continue
            if container is not None:
                found[id] = container
        return found

    # ---------------------------------------------------------------- the runtime

    def _runtime_wanted(self) -> bool:
        """Return whether the runtime should call before it creates a container."""
        mode = self._started_with.mode
        if self.unsupported or mode in (OFF, CGROUP):
            return False
        return mode == NRI or Path(self._started_with.nri_socket).exists()

    def _look_for_silence(self, strangers: Sequence[Cgroup], known: Mapping[str, Container]) -> None:
        """Reconnect if containers start without a call from a runtime that is connected."""
        plugin = self._plugin
        if not self._seen.is_set() or plugin is None or not plugin.standing.connected:
            return
        if why := unasked(strangers, known, self._table, self.reconciler.plan()):
            plugin.reconnect(why)

    def not_ready(self) -> list[str]:
        """Return why containers may run elsewhere than on what they hold, one sentence each."""
        reasons = (self._runtime_missed(), held_outside(self._agent.inventory, self._agent.ledger))
        return [f"pinning: {why}" for why in reasons if why]

    def _runtime_missed(self) -> str:
        standing = self._plugin.standing if self._plugin is not None else None
        if standing is None or standing.connected or not self._runtime_wanted():
            return ""
        away_s = self._clock() - standing.since_s
        return f"the container runtime does not ask: {standing.reason}" if away_s > GRACE_S else ""

    def notes(self) -> list[str]:
        """Return what an admin may want to change, one sentence each."""
        crowded = "no CPU is left for pods without exclusive CPUs: they run on the exclusive CPUs of others"
        reasons = (
            narrowed(self._agent.inventory, self._agent.ledger),
            crowded if self._enforcer is not None and self.reconciler.crowded() else "",
        )
        return [f"pinning: {why}" for why in reasons if why]

    # ---------------------------------------------------------------- status

    def document(self) -> dict[str, Any]:
        """Return how containers are confined, in plain types."""
        plan, standing = self.reconciler.plan(), self._plugin.standing if self._plugin is not None else None
        entries = sorted(self._table.entries.values(), key=_by_name)
        pins = [(one, plan.containers.get(one.container.id, Pin())) for one in entries]
        drifts = self.reconciler.drifts.total()
        return {
            "mode": self.mode,
            "unsupported": self.unsupported,
            "runtime": f"{standing.runtime} {standing.version}".strip() if standing else "",
            "connected": standing.connected if standing else False,
            "reason": standing.reason if standing else "",
            "shared_cpus": str(plan.shared),
            "containers": len(entries),
            "drifts": drifts.found,
            "drifts_repaired": drifts.repaired,
            "drifts_not_repaired": drifts.open,
            "errors": dict(self.reconciler.errors),
            "pinned": [self._pin_document(one, pin) for one, pin in pins if pin.grants or pin.unproven],
        }

    def _pin_document(self, entry: ContainerEntry, pin: Pin) -> dict[str, Any]:
        state = self._enforcer.states.get(entry.path) if self._enforcer is not None else None
        pod = self._table.pods.get(entry.container.pod_uid, "")
        drifts = self.reconciler.drifts.of(entry.path, pod)
        return {
            "namespace": entry.container.namespace,
            "pod": entry.container.pod_name,
            "pod_uid": entry.container.pod_uid,
            "container": entry.container.name,
            "id": entry.container.id,
            "state": entry.container.state,
            "grants": list(pin.grants),
            "granted_cpus": str(pin.held),
            "hidden_cpus": str(pin.hidden),
            "pools": list(pin.pools),
            "pool_cpus": str(pin.pool_cpus),
            "effective_cpus": str(state.cpus_effective or "") if state is not None else "",
            "granted_mems": str(pin.mems or ""),
            "effective_mems": str(state.mems_effective or "") if state is not None else "",
            "hugepage_limits": {format_size(size): limit for size, limit in pin.hugepage_limits.items()},
            "lost_cpus": str(pin.lost),
            "outside_cpus": str(pin.outside),
            "drifts": drifts.found,
            "drifts_not_repaired": drifts.open,
            "ran_unpinned": msgspec.structs.asdict(drifts.elsewhere) if drifts.elsewhere is not None else None,
            "quota_cpus": self.reconciler.quotas.get(entry.container.id),
            "unproven": list(pin.unproven),
            "error": self.reconciler.errors.get(entry.path, "") or self.reconciler.errors.get(pod, ""),
        }


def _enforcer(sysfs: SysFs, found: Hierarchy, layouts: Sequence[CgroupLayout]) -> Enforcer | None:
    """Return what writes cgroups, or None where they cannot be written."""
    if found.unsupported or not found.mount or not os.access(f"{found.mount}/cgroup.procs", os.W_OK):
        return None
    return Enforcer(CgroupReader(found.mount, page_sizes(sysfs)), layouts)


def _by_name(entry: ContainerEntry) -> tuple[str, str, str, str]:
    one = entry.container
    return one.namespace, one.pod_name, one.name, one.id
