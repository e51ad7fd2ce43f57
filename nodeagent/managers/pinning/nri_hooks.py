"""The agent's answers to the container runtime over NRI.

A container that holds CPUs, pages or memory is created confined to them, and no other container is left on its CPUs by
then: the answer waits until the other cgroups have been written and read back. If they cannot be written, the same
answer makes the runtime update the other containers. Before the first instruction, what the kernel applied is read
back. A container that is not confined by then does not start, unless configured otherwise; a container that holds
nothing is prevented from starting only if it would run on CPUs held by another.

The runtime waits at most two seconds and then drops the plugin. So every wait here is limited. After that the answer
follows from what is known, and unfinished work is completed in the background.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog
from msgspec.structs import replace

from nodeagent.config.isolation import PinningConfig
from nodeagent.core.events.happenings import Report, container_refused, unreported
from nodeagent.core.ledger.offline import outside_of
from nodeagent.core.model.container import (
    CREATED,
    RUNNING,
    Adjustment,
    Container,
    PageLimits,
    Pod,
    Resources,
    Update,
)
from nodeagent.core.opaque.device import OWN_VARIABLES
from nodeagent.core.pinning.plan import Pin, named_by
from nodeagent.errors import HostError
from nodeagent.managers.pinning.cache_groups import NO_CACHE_GROUPS, CacheGroups, deadline_s, left_s
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pinning.reconciler import CgroupReconciler
from nodeagent.state.agent import Agent

STARTS_ANYWAY = frozenset({"cri-o"})
"""Names of the runtimes that only log why a plugin refuses a start (CRI-O, server/container_start.go: 1.26 to 1.36)."""
CHECK = 1.2
"""How long the check of a start may take, in units of how long one thing may be waited for: a container is refused, and
killed if need be, before the service gives up on the answer (nri/service.py: 0.7 and 0.9 of the runtime's limit)."""
DIVIDED = 1.1
"""By when caches, disk I/O and clamps have to be in force, from the beginning of a call and in the same units: what is
late is named, and may be something without which a container starts."""
log = structlog.get_logger()


class NriHooks:
    """Implements the handler of nri.service."""

    def __init__(
        self,
        agent: Agent,
        table: ContainerTable,
        reconciler: CgroupReconciler,
        config: Callable[[], PinningConfig],
        kubelet_counts_claims: Callable[[], bool] = lambda: False,
        report: Report = unreported,
        caches: CacheGroups = NO_CACHE_GROUPS,
        runtime: Callable[[], str] = lambda: "",
    ) -> None:
        """Set up. `kubelet_counts_claims` returns whether kubelet's limits of pages may include what claims hold,
        `runtime` the name of the runtime that calls."""
        self._runtime = runtime
        self._kubelet_counts_claims = kubelet_counts_claims
        self._report = report
        self._caches = caches
        self._agent = agent
        self._table = table
        self._reconciler = reconciler
        self._config = config
        self._refused: dict[str, str] = {}
        """Why containers that have not started were refused to, by id."""

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Sequence[Update]:
        self._caches.learn(pods)
        self._table.tell_all(containers)
        await self._reconciler.enforce()
        await self._reconciler.prove(containers)
        return self._reconciler.updates(resend=True)

    async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        limits = PageLimits.COUNTED if self._kubelet_counts_claims() else PageLimits.ASKED
        asked = replace(container, state=CREATED, page_limits=limits)
        with self._table.asking(asked):
            return await self._created(pod, asked, within_s)

    async def _created(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        until_s = deadline_s(DIVIDED * within_s)
        if late := await _within(within_s, self._make_way(container)):
            self._go_on(container, late)
        pin, updates = self._reconciler.pin(container.id), self._reconciler.updates(but=container.id)
        if pin.exclusive and pin.alone <= pin.lost:
            where = outside_of(self._agent.inventory) if pin.outside else "offline"
            self._refuse(container, f"its CPUs {pin.held} are {where}")
        if pin.grants:
            log.info("pinned", container=container.id, name=str(container), **_said(pin))
        cpus = pin.cpus or self._reconciler.by_runtime(container.id)
        caches = await self._caches.created(pod, container, pin.grants, left_s(until_s))
        if caches.error:
            self._refuse(container, caches.error)
        limits, group = pin.hugepage_limits, caches.group
        return Adjustment(cpus=cpus, mems=pin.mems, hugepage_limits=limits, rdt_class=group), updates

    async def _make_way(self, container: Container) -> None:
        """Learn everything about what the container holds, including recent decisions of another agent, and move all
        other containers off it."""
        await self._reconciler.ownership.hear_kubelet()
        if any(one not in self._agent.ledger.grants for one in named_by(container)):
            await self._agent.refresh()
        if why := await self._reconciler.doubt(container):
            self._refuse(container, why)
        await self._reconciler.enforce()

    def _go_on(self, container: Container, late: str) -> None:
        """Answer from what is known. That suffices for a container that holds nothing and does not claim to hold
        anything."""
        pin = self._reconciler.pin(container.id)
        if pin.grants or any(name.startswith(OWN_VARIABLES) for name in container.env):
            self._refuse(container, f"others are not known to be off what it holds: {late}")
        else:
            log.warning("answered-from-what-is-known", container=str(container), why=late)

    async def starting(self, pod: Pod, container: Container, within_s: float) -> None:
        """Check the confinement at the last moment before its first instruction."""
        self._refused.pop(container.id, None)
        try:
            if late := await _within(CHECK * within_s, self._check(container, within_s)):
                self._refuse(container, f"its confinement was {late}")
        except Exception as error:  # whatever it is, the runtime is asked to refuse the start
            self._refused[container.id] = str(error) or type(error).__name__
            if self._runtime() in STARTS_ANYWAY:
                await self._end(container)
            raise

    async def _end(self, container: Container) -> None:
        """Kill a container before its first instruction, as its runtime would start it all the same."""
        try:
            await self._reconciler.end(container.id)
        except HostError as error:
            log.error("not-kept-from-starting", container=str(container), error=str(error))

    async def _check(self, container: Container, within_s: float) -> None:
        until_s = deadline_s(DIVIDED * within_s)
        why = await _within(within_s, self._reconciler.confirm(container.id))
        pin = self._reconciler.pin(container.id)
        if why and not pin.grants and not self._reconciler.trespasses(container.id):
            log.warning("shared-container-unconfined", container=container.id, why=why)
        elif why:
            self._refuse(container, why)
        if pin.exclusive and (others := self._reconciler.overlapping(container.id)):
            self._refuse(container, f"its CPUs {pin.alone} are used by {', '.join(others)} too")
        entry = self._reconciler.table.entries.get(container.id)
        path = entry.path if entry is not None else ""
        if why := await self._caches.starting(container, path, pin.grants, left_s(until_s)):
            self._refuse(container, why)

    async def update(self, pod: Pod, container: Container, resources: Resources) -> Sequence[Update]:
        """Pass kubelet's changes of CPU time and memory; CPU and NUMA node sets are the agent's."""
        pin = self._reconciler.pin(container.id)
        cpus = pin.cpus or self._reconciler.by_runtime(container.id)
        if cpus is None and pin.mems is None:
            return []
        limits = pin.hugepage_limits
        return [Update(container_id=container.id, cpus=cpus, mems=pin.mems, hugepage_limits=limits)]

    async def started(self, pod: Pod, container: Container) -> None:
        if why := self._refused.pop(container.id, ""):
            log.error("started-unconfined", container=str(container), why=f"the runtime started it all the same: {why}")
        self._table.tell(replace(container, state=RUNNING))

    async def stopped(self, pod: Pod, container: Container) -> Sequence[Update]:
        self._table.stopped(container.id)
        return self._reconciler.updates()

    async def removed(self, pod: Pod, container: Container) -> None:
        self._refused.pop(container.id, None)
        self._table.forget(container.id)

    def _refuse(self, container: Container, why: str) -> None:
        if self._config().on_failure == "refuse":
            error = HostError(f"cannot start container {container}: {why}")
            self._report(container_refused(str(container), self._table.pod_of(container.pod_uid), str(error)))
            raise error
        log.error("started-unconfined", container=str(container), why=why)


async def _within(limit_s: float, work: Awaitable[str | None]) -> str:
    """Return the result of `work`, or that it did not finish in time."""
    try:
        async with asyncio.timeout(limit_s) as deadline:
            return await work or ""
    except TimeoutError:
        if not deadline.expired():
            raise
        return f"not done within {limit_s:.3g} s"


def _said(pin: Pin) -> dict[str, object]:
    return {"grants": pin.grants, "cpus": str(pin.cpus or ""), "mems": str(pin.mems or ""), "lost": str(pin.lost)}
