"""Keeps cache ways and memory bandwidth as the ledger and `pinning.resctrl` say: groups of resctrl for claims and for
shared classes, and the tasks of their containers in them.

A claim is answered when its group is there, and its group is gone before its release is answered. The runtime puts a
container into its group where it can; before the container's first instruction the agent reads that back, and does it
where the runtime did not. In between the leading agent repairs what other programs have changed, every
`pinning.verifySeconds`, and gives everything back once it is no longer wanted. All of it happens under one lock of the
node, and nothing is removed while the ledger may lack grants.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import run_to_end, supervise
from nodeagent.config.isolation import ResctrlConfig
from nodeagent.config.schema import Config
from nodeagent.core.model.container import STOPPED, Container, Pod
from nodeagent.core.model.grant import Grant
from nodeagent.core.resctrl.demand import claim_group, class_group, concerns, group_of, missing_class, unknown_group
from nodeagent.errors import HostError, InputError, StateError
from nodeagent.host.resctrl.monitor import LOCAL, OCCUPANCY, TOTAL
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.cache_groups import CacheAnswer
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.resctrl.rounds import ResctrlReport, ResctrlRounds, class_names
from nodeagent.managers.state_files import RESCTRL
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

LOCK = "resctrl.lock"
"""In the state folder."""
LOCK_S = 15.0
"""How long to wait for another change. Kubelet waits 45 s for a claim, of which reading it may take 25."""
NOT_ENABLED = "cache ways and memory bandwidth are not divided on this node (pinning.resctrl is not set)"
_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})
log = structlog.get_logger()
GrantsOf = Callable[[str], Sequence[str]]
"""Returns the ids of what a container holds, by its id."""


class Wanted(NamedTuple):
    """What a round is about."""

    config: ResctrlConfig | None
    grants: Sequence[Grant]
    """Those that ask for something."""
    containers: Mapping[str, str]
    """The group of each container that has one, by its cgroup."""


class ResctrlManager(Manager):
    """Keeps groups of resctrl. Building one starts nothing and reads nothing."""

    name = "resctrl"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        table: ContainerTable,
        grants_of: GrantsOf,
        news: Revision,
    ) -> None:
        """Set up. `table` has the containers. `news` rises with changes of the ledger, the configuration and the
        containers."""
        self._agent = agent
        self._config = config
        self._table = table
        self._grants_of = grants_of
        self._news = news
        self._rounds = ResctrlRounds(sysfs, state_dir / RESCTRL)
        self._turns = Turns(state_dir / LOCK, "cannot divide caches")
        self._annotations: dict[str, Mapping[str, str]] = {}
        """Of pods, by UID, as far as the runtime has shown them."""
        self._found = ResctrlReport()
        self._asked: Wanted | None = None
        """What the last round was about."""
        self._said = Once("caches-not-divided")

    # ---------------------------------------------------------------- for claims

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Make the groups of claims. Return, by UID, why one is not as its claim asks."""
        mine = {uid: [one for one in grants if concerns(one)] for uid, grants in claims.items()}
        mine = {uid: grants for uid, grants in mine.items() if grants}
        if not mine:
            return {}
        if self._config().pinning.resctrl is None:
            return dict.fromkeys(mine, NOT_ENABLED)
        if why := await run_to_end(self._keep()):
            return dict.fromkeys(mine, why)
        errors = {uid: self._missing(uid, grants) for uid, grants in mine.items()}
        return {uid: why for uid, why in errors.items() if why}

    def _missing(self, uid: str, grants: Sequence[Grant]) -> str:
        if why := missing_class(grants, self._classes()):
            return why
        try:
            group = group_of(grants, _NO_ANNOTATIONS, "", "")
        except InputError as error:
            return str(error)
        return self._found.why(group)

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Remove the groups of claims that were released. Return, by UID, why one is left."""
        if not any(map(concerns, (one for grants in claims.values() for one in grants))):
            return {}
        if why := await run_to_end(self._keep()):
            return {uid: why for uid, grants in claims.items() if any(map(concerns, grants))}
        left = {uid: self._found.kept.errors.get(claim_group(uid), "") for uid in claims}
        return {uid: why for uid, why in left.items() if why}

    # ---------------------------------------------------------------- for containers

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        """Return the group of a container that is about to be created."""
        self._annotations[pod.uid] = pod.annotations
        try:
            group = self._group(container, grants)
        except InputError as error:
            return CacheAnswer(error=str(error))
        if not group:
            return CacheAnswer()
        if why := await self._wanting(group, within_s):
            return CacheAnswer(error=f"it cannot be in its cache group {group}: {why}")
        return CacheAnswer(group=group if self._rounds.runtime_takes_classes() else "")

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put a container that does not run yet into its group and read back. Return why it is not in it, or ""."""
        try:
            group = self._group(container, grants)
            if not group:
                return ""
            if not cgroup:
                raise HostError("its control group is not known")
            async with asyncio.timeout(within_s):
                if why := await self._wanting(group, within_s):
                    raise HostError(why)
                moved = await asyncio.to_thread(self._rounds.assign, group, cgroup)
        except TimeoutError:
            return f"it cannot be in its cache group: not done within {within_s:.3g} s"
        except (HostError, InputError) as error:
            return f"it cannot be in its cache group: {error}"
        log.info("cache-group", container=container.id, name=str(container), group=group, moved=moved)
        return ""

    async def _wanting(self, group: str, within_s: float) -> str:
        """Return why a group is not there, or "". One that is not made yet is made within this time."""
        if unknown := unknown_group(group, self._classes()):
            return unknown
        if self._config().pinning.resctrl is None:
            return NOT_ENABLED
        if not self._found.why(group):
            return ""
        try:
            async with asyncio.timeout(within_s):
                return await run_to_end(self._keep()) or self._found.why(group)
        except TimeoutError:
            return f"it was not made within {within_s:.3g} s"

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        self._annotations = {one.uid: one.annotations for one in pods}

    def _group(self, container: Container, grants: Iterable[str]) -> str:
        ledger = self._agent.ledger.grants
        held = [ledger[one] for one in grants if one in ledger]
        config = self._config()
        annotations = self._annotations.get(container.pod_uid, _NO_ANNOTATIONS)
        if config.pinning.resctrl is None:  # as on nodes that never had it: pods of all nodes may have annotations
            annotations = _NO_ANNOTATIONS
        return group_of(held, annotations, config.domain, container.name)

    def _forget_pods(self) -> None:
        """Forget the annotations of pods that have no containers any longer."""
        live = {one.container.pod_uid for one in self._table.entries.values()}
        self._annotations = {uid: one for uid, one in self._annotations.items() if uid in live}

    def _containers(self) -> dict[str, str]:
        """Return the group of each container that has one and runs or may run, by its cgroup."""
        found = {}
        for id, entry in self._table.entries.items():
            if entry.path and entry.named and entry.container.name and entry.container.state != STOPPED:
                with contextlib.suppress(InputError):
                    if group := self._group(entry.container, self._grants_of(id)):
                        found[entry.path] = group
        return found

    def _classes(self) -> Sequence[str]:
        return list(class_names(self._config().pinning.resctrl))

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Compare everything at the start, after each change, and every `pinning.verifySeconds`."""
        while True:
            await supervise(self.name, self._keep_all)
            asked = self._asked
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().pinning.verify_seconds):
                    await self._differs(asked)

    async def close(self) -> None:
        """Wait for a step in progress. The groups stay: containers run on."""
        await self._turns.close()

    async def _keep_all(self) -> None:
        self._forget_pods()
        self._said.report(await run_to_end(self._keep()) or "; ".join(self._found.notes))

    async def _differs(self, asked: Wanted | None) -> None:
        """Return when what is wanted differs from `asked`."""
        seen = self._news.value
        while self._wanted() == asked:
            seen = await self._news.changed(seen)

    def _wanted(self) -> Wanted:
        grants = tuple(one for one in self._agent.ledger.grants.values() if concerns(one))
        return Wanted(self._config().pinning.resctrl, grants, self._containers())

    async def _keep(self) -> str:
        """Do one round. Return why it was not done, or ""."""
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                self._asked = asked = self._wanted()
                found = await self._turns.in_thread(self._rounds.keep, *asked, ended=not self._agent.loss)
                self._found = found
        except (HostError, StateError) as error:
            return str(error)
        self._count(found)
        return ""

    def _count(self, found: ResctrlReport) -> None:
        for name in found.kept.repaired:
            log.warning("cache-group-repaired", group=name or "default")
        metrics.CACHE_GROUPS_REPAIRED.inc(len(found.kept.repaired))
        metrics.CACHE_TASKS_MOVED.inc(found.moved)

    # ---------------------------------------------------------------- what admins see

    def notes(self) -> list[str]:
        """Return what is not as configured, one sentence each."""
        return [f"pinning.resctrl: {one}" for one in self._found.notes]

    def document(self) -> dict[str, Any]:
        """Return the groups and what was counted for them, in plain types."""
        found, tree = self._found, self._found.tree
        return {
            "groups_used": len(tree.groups.keys() | found.kept.made) if tree.groups else 0,
            "groups_most": tree.closids,
            "aside": {str(domain): f"{mask:x}" for domain, mask in found.plan.aside.items()},
            "groups": [self._group_document(name) for name in found.plan.groups],
            "errors": {name: why for name, why in found.kept.errors.items() if name},
            "notes": list(found.notes),
        }

    def _group_document(self, name: str) -> dict[str, Any]:
        planned, claim = self._found.plan.groups[name], self._found.claims.get(name)
        counted = self._found.counted.get(name, {})
        return {
            "group": name,
            "claim": claim.holder.partition(" ")[2] if claim is not None else "",
            "class": name.removeprefix(class_group("")) if claim is None else "",
            "in_force": name in self._found.kept.made,
            "exclusive": planned.exclusive,
            "ways": {str(domain): f"{mask:x}" for domain, mask in planned.own.items()},
            "schemata": {key: {str(d): value for d, value in some.items()} for key, some in planned.schemata.items()},
            **{
                event: {str(d): n for (e, d), n in counted.items() if e == event} for event in (OCCUPANCY, TOTAL, LOCAL)
            },
        }
