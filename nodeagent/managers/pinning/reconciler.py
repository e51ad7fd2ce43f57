"""Enforces the ledger for CPUs, memory and pages: plans, has cgroups written, read back and repaired.

Only one turn at a time touches cgroups, in a worker thread. Each turn makes a new plan from what is known by then.
Changes are written; what is already in force is only read back, when another process has written there and
periodically.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import run_to_end
from nodeagent.config.isolation import PinningConfig
from nodeagent.core.events.happenings import PodRef, Report, unreported
from nodeagent.core.events.happenings import drift as drifted
from nodeagent.core.model.container import Container, Update
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.pinning.plan import NO_PIN, Pin, PinPlan, Rules, Situation
from nodeagent.errors import HostError, NodeagentError
from nodeagent.host.cgroup.enforcer import Enforcer, Finding, Target
from nodeagent.host.cgroup.read import CgroupState
from nodeagent.host.cgroup.write import Drift
from nodeagent.host.systemd.slice_drop_ins import SliceDropins
from nodeagent.managers.pinning.containers import ContainerEntry, ContainerTable
from nodeagent.managers.pinning.drifts import Drifts, elsewhere
from nodeagent.managers.pinning.ownership import GrantOwnership
from nodeagent.managers.pinning.pod_pages import PodPages
from nodeagent.state.agent import Agent
from nodeagent.state.audit import DRIFT, Happening

PACK = 32
"""Number of cgroups read back in one turn."""
NO_QUOTAS: Mapping[str, float] = MappingProxyType({})
log = structlog.get_logger()


class CgroupReconciler:
    """The plan, and how much of it is in force."""

    def __init__(
        self,
        agent: Agent,
        table: ContainerTable,
        enforcer: Enforcer | None,
        ownership: GrantOwnership,
        config: Callable[[], PinningConfig],
        began: Callable[[CgroupState], bool] = lambda state: state.populated,
        dropins: Sequence[SliceDropins] = (),
        report: Report = unreported,
        kubelet_counts_claims: Callable[[], bool] = lambda: False,
    ) -> None:
        """Set up without touching cgroups.

        `enforcer` is None if cgroups cannot be written. `began` returns whether anything in a cgroup has run; it may
        block. `dropins` hold what systemd knows; empty if systemd does not create the pods' cgroups.
        `kubelet_counts_claims` returns whether kubelet's limits of pages may include what claims hold.
        """
        self.table = table
        self._pages = PodPages(table, kubelet_counts_claims)
        self._report = report
        self.drifts = Drifts()
        self.enforcer = enforcer
        self.ownership = ownership
        self._cpus_served = False
        self._kubelet_confines = False
        self._kubelet_cpus: CpuSet | None = None
        self._has_confined = False
        """Whether this agent or one before it has confined pods as a whole: they have to get CPUs back once kubelet
        confines their containers, which cannot run elsewhere than their pod."""
        self._dropins = tuple(dropins)
        self.news = Revision()
        """Increases whenever cgroups were written."""
        self.errors: Mapping[str, str] = MappingProxyType({})
        """Why some cgroups are not in their desired state, by path."""
        self.quotas = NO_QUOTAS
        """CPU time that containers may use, in CPUs, if that is less than the CPUs they are pinned to, by container
        id."""
        self._agent = agent
        self._config = config
        self._began = began
        self._judged: dict[str, bool] = {}
        """Paths of cgroups that were checked for where their processes ran before they were first confined, and whether
        their grants were known by then."""
        self._turn = asyncio.Lock()
        self._situation = Situation(inventory=agent.inventory, ledger=agent.ledger)
        self._planned_of: Situation | None = None
        self._planned = config(), -1
        self._plan = PinPlan()
        self._targets: Mapping[str, Target] = MappingProxyType({})
        self._applied: dict[str, Target] = {}
        self._told: tuple[CpuSet, Mapping[str, CpuSet]] | None = None
        self._untold = ""
        self._updates: dict[str, tuple[CpuSet | None, CpuSet | None]] = {}
        """What the runtime was last asked to set, by container id."""

    def configure(self, *, cpus_served: bool, kubelet_confines: bool, kubelet_cpus: CpuSet | None) -> None:
        """Set what is confined.

        `cpus_served`: a container may come to hold CPUs, so all others are confined. `kubelet_confines`: kubelet's own
        CPU manager confines them, to `kubelet_cpus`, or None if that is unknown.
        """
        self._cpus_served, self._kubelet_confines, self._kubelet_cpus = cpus_served, kubelet_confines, kubelet_cpus

    # ---------------------------------------------------------------- desired state

    def plan(self) -> PinPlan:
        """Return the plan for what is currently known; computed once per state."""
        situation, config = self._situation_now(), self._config()
        now = config, self.table.revision
        if self._planned_of is not situation or now != self._planned:
            self._planned_of, self._planned = situation, now
            self._plan = situation.plan(self.table.containers(), self.table.pods, self.table.unnamed())
            self._targets = self.table.targets(self._plan, self._agent.inventory, config)
        return self._plan

    def _situation_now(self) -> Situation:
        """Return the same object as long as nothing in it changes: it caches what was computed."""
        agent, config, given, known = self._agent, self._config(), self.ownership.given, self._situation
        confine = not self._kubelet_confines and (self._cpus_served or bool(agent.ledger.cpus_held))
        rules = Rules(
            memory=config.memory,
            confine_others=confine,
            kubelet_cpus=self._kubelet_cpus if self._has_confined and not confine else None,
            strict_reservation=config.strict_reservation,
        )
        allowed = self._pages.allowed
        same = known.inventory is agent.inventory and known.ledger is agent.ledger and known.given is given
        if not same or known.rules != rules or known.allowed is not allowed:
            self._situation = Situation(
                inventory=agent.inventory, ledger=agent.ledger, given=given, rules=rules, allowed=allowed
            )
        return self._situation

    def crowded(self) -> bool:
        """Return whether others must be kept off the CPUs that containers hold, and no CPU is left for them."""
        situation = self._situation_now()
        return situation.rules.confine_others and bool(situation.ledger.cpus_held) and not situation.shared

    def pin(self, container_id: str) -> Pin:
        """Return the pin of a container; empty if the container is unknown."""
        return self.plan().containers.get(container_id, Pin())

    async def doubt(self, container: Container) -> str:
        """Return why it cannot be determined whether what a container names belongs to its pod, or ""."""
        return await self.ownership.doubt(container, lambda: self.pin(container.id))

    async def prove(self, containers: Iterable[Container]) -> None:
        """Determine concurrently whether what containers name belongs to their pods.

        What is learned is enforced, and what cannot be determined is logged.
        """
        before, every = self._agent.ledger, list(containers)
        for one, why in zip(every, await asyncio.gather(*map(self.doubt, every)), strict=True):
            if why:
                log.warning("holder-unknown", container=one.id, error=why)
        if self._agent.ledger is not before:
            await self.enforce()

    # ---------------------------------------------------------------- enforcing

    async def enforce(self) -> Mapping[str, str]:
        """Enforce the plan. Return why parts of it are not in force, by path."""
        await self.ownership.hear_kubelet()
        await run_to_end(self._enforce())
        return self.errors

    async def _enforce(self) -> None:
        async with self._turn:
            self.plan()
            if self.enforcer is None:
                return
            await self._look_for_confined()
            await self._pages.learn(self.enforcer, self._situation)
            self.plan()
            await self._tell_systemd()
            targets = self._targets
            self._applied = {path: one for path, one in self._applied.items() if path in targets}
            changed = {path: one for path, one in targets.items() if self._applied.get(path) != one}
            await self._apply(self.enforcer, changed)

    async def _look_for_confined(self) -> None:
        """Note that pods are confined: by this plan, or by an earlier agent, which has left drop-ins."""
        if self._plan.shared:
            self._has_confined = True
        elif not self._has_confined and self._told is None:
            with contextlib.suppress(HostError):  # reported when they are written
                self._has_confined = any([await asyncio.to_thread(one.written) for one in self._dropins])

    async def _tell_systemd(self) -> None:
        """Update the drop-ins before the kernel, so that anything systemd writes meanwhile is up to date too."""
        shared, pods = self._plan.shared, self.table.pods
        own = {pods[uid]: pin.cpus for uid, pin in self._plan.pods.items() if uid in pods and pin.cpus}
        wanted = shared, {path: cpus for path, cpus in own.items() if cpus != shared}
        if wanted == self._told:
            return
        try:
            for one in self._dropins:
                await asyncio.to_thread(one.keep, *wanted)
            self._told = wanted
        except HostError as error:
            if str(error) != self._untold:
                log.warning("systemd-not-told", error=str(error))
            self._untold = str(error)

    async def confirm(self, container_id: str) -> str:
        """Confine a container that exists but does not run yet, and its pod; return why it is not confined, or ""."""
        return await run_to_end(self._confirm(container_id))

    async def _confirm(self, container_id: str) -> str:
        async with self._turn:
            self.plan()
            entry = self.table.entries.get(container_id)
            if self.enforcer is None or entry is None:
                return ""
            if await self._pages.learn(self.enforcer, self._situation):
                self.plan()
            pod = self.table.pods.get(entry.container.pod_uid, "")
            some = {path: self._targets[path] for path in (pod, entry.path) if path in self._targets}
            await self._apply(self.enforcer, some)
            return "; ".join(self.errors[path] for path in some if path in self.errors) or self._missing(entry)

    async def end(self, container_id: str) -> None:
        """Kill every process of a container. Raise HostError if that is not possible."""
        entry = self.table.entries.get(container_id)
        if self.enforcer is None or entry is None or not entry.path:
            raise HostError(f"cannot end container {container_id}: its cgroup is not known or cannot be written")
        await asyncio.to_thread(self.enforcer.kill, entry.path)

    def _missing(self, entry: ContainerEntry) -> str:
        """Return why a container cannot be confined because its cgroup is not at its reported path, or ""."""
        pin = self._plan.containers.get(entry.container.id, Pin())
        if not pin.grants or self.enforcer is None or entry.path in self.enforcer.states:
            return ""
        where = f"{self.enforcer.mount}/{entry.path}" if entry.path else "the cgroup hierarchy"
        return f"cannot confine container {entry.container}: it is not at {where}"

    async def _apply(self, enforcer: Enforcer, some: Mapping[str, Target]) -> None:
        if not some:
            return
        fresh = self._unjudged(some)
        wrong = await self._wrong_before(enforcer, some, fresh)
        errors = await asyncio.to_thread(enforcer.apply, some)
        self._applied.update({path: one for path, one in some.items() if path not in errors})
        # A cgroup that does not exist yet is checked when it does.
        self._judged.update({path: bool(pin.grants) for path, pin in fresh.items() if path in enforcer.states})
        for path, drift in wrong.items():
            self._ran_elsewhere(path, drift, errors.get(path, ""))
        for path in some.keys() - errors.keys():
            self.drifts.record_repaired(path)
        for path in errors:
            self._applied.pop(path, None)
            if self.errors.get(path) != errors[path]:
                log.error("not-confined", path=path, error=errors[path], container=self._whose(path))
        others = {path: why for path, why in self.errors.items() if path in self._targets and path not in some}
        self.errors = MappingProxyType({**others, **errors})
        self.news.bump()

    def _unjudged(self, paths: Iterable[str]) -> dict[str, Pin]:
        """Return the pins for paths that were never checked, or not with all their grants known."""
        entries, found = self.table.by_path(), {}
        for path in paths:
            entry, known = entries.get(path), self._judged.get(path)
            pin = self._plan.containers.get(entry.container.id, NO_PIN) if entry is not None else NO_PIN
            if known is None or (pin.grants and not known):
                found[path] = pin
        return found

    async def _wrong_before(
        self, enforcer: Enforcer, some: Mapping[str, Target], fresh: Mapping[str, Pin]
    ) -> Mapping[str, Drift]:
        """Return which of the cgroups about to be confined for the first time ran elsewhere until now, and where."""
        entries = self.table.by_path()
        ran = [path for path in fresh if self.table.ran_before(path, entries.get(path))]
        if not ran:
            return {}
        held, states = self._agent.ledger.cpus_held, await asyncio.to_thread(self._look, enforcer, ran)
        own = {path: pin.exclusive and not pin.lost for path, pin in fresh.items()}
        found = {path: elsewhere(state, some[path], own=own[path], held=held) for path, state in states.items()}
        return {path: drift for path, drift in found.items() if drift is not None}

    def _look(self, enforcer: Enforcer, paths: Iterable[str]) -> dict[str, CgroupState]:
        """Return the state of those cgroups in which something has run."""
        return {path: state for path, state in enforcer.look(paths).items() if self._began(state)}

    def _ran_elsewhere(self, path: str, drift: Drift, error: str) -> None:
        self.drifts.ran_elsewhere(path, drift, repaired=not error)
        what = {"file": drift.file, "found": drift.found, "wanted": drift.wanted}
        log.warning("ran-unpinned", whose=self._whose(path), path=path, **what, error=error)

    def applied(self) -> list[str]:
        """Return the paths whose desired state is in force."""
        return list(self._applied)

    def slices(self) -> dict[str, CpuSet]:
        """Return the CPUs of pods' cgroups that are in force, by path."""
        some = {path: self._applied.get(path) for path in self.table.pods.values()}
        return {path: one.cpus for path, one in some.items() if one is not None and one.cpus}

    async def unchanged(self, path: str, tell: Callable[[str, CpuSet], None]) -> None:
        """Call `tell` with a pod's cgroup path and the CPUs it is confined to, while nothing else changes them."""
        await run_to_end(self._unchanged(path, tell))

    async def _unchanged(self, path: str, tell: Callable[[str, CpuSet], None]) -> None:
        async with self._turn:
            if (cpus := self.slices().get(path)) is not None:
                await asyncio.to_thread(tell, path, cpus)

    async def forget(self, path: str) -> None:
        """Drop a cgroup that is gone."""
        self._applied.pop(path, None)
        self._judged.pop(path, None)
        self.drifts.forget(path)
        self.news.bump()
        await run_to_end(self._forget(path))

    async def _forget(self, path: str) -> None:
        async with self._turn:
            if self.enforcer is not None:
                try:
                    await asyncio.to_thread(self.enforcer.forget, path)
                except NodeagentError as error:
                    log.warning("partition-not-released", path=path, error=str(error))

    async def tidy(self) -> None:
        """Undo leftovers of an earlier agent. Called once everything that exists has been enforced."""
        await run_to_end(self._tidy())

    async def _tidy(self) -> None:
        async with self._turn:
            if self.enforcer is not None:
                await asyncio.to_thread(self.enforcer.tidy)

    def again(self, path: str) -> None:
        """Treat the cgroup at a path as new, so it is written in any case, unless the agent has written there
        already."""
        if self.enforcer is None or path not in self.enforcer.states:
            self._applied.pop(path, None)

    # ---------------------------------------------------------------- reading back

    async def verify(self, paths: Iterable[str] | None = None, *, noticed_s: float | None = None) -> Sequence[Finding]:
        """Read back and repair what is in force at some paths, or everywhere if None; return what differed.

        noticed_s: when something was written there (time.monotonic); None if nothing is known of that.

        Works on a few paths at a time, so that calls of the runtime can run in between.
        """
        every = list(self._applied if paths is None else paths)
        packs = [every[start : start + PACK] for start in range(0, len(every), PACK)]
        return [found for pack in packs for found in await run_to_end(self._verify(pack, noticed_s))]

    async def _verify(self, paths: Sequence[str], noticed_s: float | None) -> Sequence[Finding]:
        if self.enforcer is None:
            return ()
        async with self._turn:
            wanted = {path: self._applied[path] for path in paths if path in self._applied}
            began_s = time.monotonic()
            found = await asyncio.to_thread(self.enforcer.verify, wanted)
            noted = [self._found(one, began_s if noticed_s is None else noticed_s) for one in found]
            self._agent.record_happenings(noted)
        return found

    def _found(self, one: Finding, noticed_s: float) -> Happening:
        """Count and report a drift; return it for the audit, in the same words each time: equal ones are counted."""
        self.drifts.found(one.path, one.drift, repaired=not one.error, noticed_s=noticed_s)
        if one.error:
            self.errors = MappingProxyType({**self.errors, one.path: one.error})
            self._applied.pop(one.path, None)
        files = [f"{drift.file}: {drift.found!r}, not {drift.wanted!r}" for drift in one.drift]
        whose = self._whose(one.path)
        log.warning("drift", whose=whose, path=one.path, files=files, error=one.error)
        pod = self._pod_at(one.path)
        self._report(drifted(whose, [drift.file for drift in one.drift], pod, one.error))
        named = f"pod {pod.namespace}/{pod.name}" if pod is not None and whose.startswith("pod ") else whose
        return Happening(action=DRIFT, what=f"{named}: {'; '.join(files)}", why=one.error or "repaired")

    async def look_at_quotas(self) -> None:
        """Find containers whose CPU time is limited below the CPUs they are pinned to."""
        plan, enforcer = self.plan(), self.enforcer
        exclusive = [one for id, one in self.table.entries.items() if plan.containers.get(id, Pin()).exclusive]
        if enforcer is None or not exclusive:
            self.quotas = NO_QUOTAS
            return
        quotas: dict[str, float] = {}
        limits = await asyncio.to_thread(lambda: [self._quota(enforcer, entry) for entry in exclusive])
        for entry, limit in zip(exclusive, limits, strict=True):
            pin = plan.containers[entry.container.id]
            used = pin.held - pin.hidden
            if limit is None or limit >= len(used):
                continue
            quotas[entry.container.id] = limit
            if self.quotas.get(entry.container.id) != limit:
                log.warning("throttled", container=str(entry.container), quota_cpus=limit, cpus=str(used))
        self.quotas = MappingProxyType(quotas)

    def _quota(self, enforcer: Enforcer, entry: ContainerEntry) -> float | None:
        """Return the CPU time that a container may use, in CPUs: the lower of the container's limit and the pod's, or
        None."""
        paths = (entry.path, self.table.pods.get(entry.container.pod_uid, ""))
        return min((one for path in paths if path and (one := enforcer.quota_cpus(path)) is not None), default=None)

    def overlapping(self, container_id: str) -> list[str]:
        """Return which other containers or pods that could not be confined may be on a container's exclusive CPUs."""
        entry, held = self.table.entries.get(container_id), self.pin(container_id).alone
        if self.enforcer is None or entry is None:
            return []
        own = {entry.path, self.table.pods.get(entry.container.pod_uid, "")}
        states = [(path, self.enforcer.states.get(path)) for path in self.errors if path not in own]
        return [
            self._whose(path)
            for path, state in states
            if state is not None and state.cpus_effective is not None and not state.cpus_effective.isdisjoint(held)
        ]

    def trespasses(self, container_id: str) -> bool:
        """Return whether a container may run on CPUs held by others, by the last reading of its cgroup or its pod."""
        entry, pin = self.table.entries.get(container_id), self.pin(container_id)
        if self.enforcer is None or entry is None:
            return False
        paths = (entry.path, self.table.pods.get(entry.container.pod_uid, ""))
        state = next((one for path in paths if (one := self.enforcer.states.get(path)) is not None), None)
        others = self._agent.ledger.cpus_held - pin.held - pin.pool_cpus
        return state is None or state.cpus_effective is None or not state.cpus_effective.isdisjoint(others)

    def _pod_at(self, path: str) -> PodRef | None:
        """Return the pod of a cgroup, or None if its name is not known."""
        entry = self.table.by_path().get(path)
        uids = (uid for uid, one in self.table.pods.items() if one == path)
        return self.table.pod_of(entry.container.pod_uid if entry is not None else next(uids, ""))

    def _whose(self, path: str) -> str:
        entry = self.table.by_path().get(path)
        if entry is not None:
            return str(entry.container)
        return next((f"pod {uid}" for uid, one in self.table.pods.items() if one == path), path)

    # ---------------------------------------------------------------- what the runtime has to set

    def by_runtime(self, container_id: str) -> CpuSet | None:
        """Return the CPUs that the runtime has to set for a container because its pod's cgroup cannot be written.

        None if it can be written, or if the container is left as it is.
        """
        entry = self.table.entries.get(container_id)
        if entry is not None and not self._helpless(entry):
            return None
        return self.pin(container_id).cpus or self.plan().shared or None

    def _helpless(self, entry: ContainerEntry) -> bool:
        """Return whether the container's pod cgroup cannot be written."""
        pod = self.table.pods.get(entry.container.pod_uid, "")
        return self.enforcer is None or not pod or pod in self.errors

    def updates(self, but: str = "", *, resend: bool = False) -> list[Update]:
        """Return the changes for the runtime to make that it has not received yet.

        `but` is the id of a container being created. `resend`: the runtime has lost what it received.
        """
        known = {} if resend else self._updates
        entries = self.table.entries.items()
        named = [id for id, one in entries if one.container.name and id != but and self._helpless(one)]
        wanted = {id: (self.by_runtime(id), self.pin(id).mems) for id in named}
        self._updates = {id: one for id, one in wanted.items() if one[0] is not None}
        changed = [(id, one) for id, one in self._updates.items() if known.get(id) != one]
        return [Update(container_id=id, cpus=cpus, mems=mems) for id, (cpus, mems) in changed]
