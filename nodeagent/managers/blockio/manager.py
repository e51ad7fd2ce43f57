"""Keeps limits of disk I/O as the ledger, `pinning.io` and pods' annotations say: lines in the io files of cgroups.

A claim is answered once it is known that its disks, the kernel and the configuration can have its limits. They are
written before a container's first instruction and read back; in between the leading agent repairs what other processes
have changed, as soon as the kernel reports a write and every `pinning.verifySeconds`, and takes out what is no longer
wanted. All of it happens under one lock of the node. Nothing is taken out of a cgroup while it is not known what its
containers ask for.
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
from nodeagent.config.schema import Config
from nodeagent.core.blockio.demand import Classes, IoAsk, asks_of_claims, asks_of_pod, concerned
from nodeagent.core.events.happenings import Report
from nodeagent.core.events.happenings import drift as drifted
from nodeagent.core.model.container import STOPPED, Container, Pod
from nodeagent.core.model.grant import Grant
from nodeagent.core.pinning.plan import Pin
from nodeagent.errors import HostError, InputError, StateError
from nodeagent.host.cgroup.write import Drift
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.blockio.rounds import Asking, IoReport, IoRounds, Paths, classes_of
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.cache_groups import CacheAnswer
from nodeagent.managers.pinning.containers import ContainerEntry, ContainerTable
from nodeagent.managers.state_files import IO
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.state.audit import DRIFT, Happening
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

LOCK = "io.lock"
"""In the state folder."""
LOCK_S = 15.0
"""How long to wait for another change."""
START_S = 1.0
"""How long a container waits for its limits: the runtime waits 2 s for everything."""
_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})
log = structlog.get_logger()


class Wanted(NamedTuple):
    """What a round is about."""

    asking: tuple[Asking, ...]
    errors: tuple[tuple[str, str], ...]
    """(path, why) of containers whose asks cannot be understood."""
    known: frozenset[str]
    """Paths of cgroups of which it is known what they are to have."""
    paths: Paths


class IoManager(Manager):
    """Keeps limits of I/O. Building one starts nothing and reads nothing."""

    name = "io"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        table: ContainerTable,
        pin_of: Callable[[str], Pin],
        news: Revision,
        written: Revision,
        report: Report,
    ) -> None:
        """Set up. `table` has the containers, `pin_of` returns what one holds by its id. `news` rises with changes of
        the ledger, the configuration and the containers, and with `written`, which rises with each write of an io file
        by any process."""
        self._agent = agent
        self._config = config
        self._table = table
        self._pin_of = pin_of
        self._news = news
        self._written = written
        self._report = report
        self._rounds = IoRounds(sysfs, table.layouts, state_dir / IO)
        self._turns = Turns(state_dir / LOCK, "cannot limit I/O")
        self._annotations: dict[str, Mapping[str, str]] = {}
        """Of pods, by UID, as far as the runtime has shown them."""
        self._found = IoReport()
        self._asked: Wanted | None = None
        """What the last round was about."""
        self._said = Once("io-not-limited")

    # ---------------------------------------------------------------- for claims

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Return, by UID, why the limits that a claim asks for cannot be set here."""
        errors = {uid: await self._impossible(grants) for uid, grants in claims.items() if any(map(concerned, grants))}
        return {uid: why for uid, why in errors.items() if why}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Do nothing: limits end with the control groups of the claim's containers, or in a round."""
        return {}

    async def _impossible(self, grants: Sequence[Grant]) -> str:
        if self._config().pinning.mode == "off":
            return "cannot limit I/O: nothing is written to control groups on this node (pinning.mode is off)"
        try:
            asks = list(asks_of_claims(grants, self._classes()))
        except InputError as error:
            return f"cannot limit I/O: {error}"
        return await asyncio.to_thread(self._rounds.check, asks, self._nodes(asks))

    # ---------------------------------------------------------------- for containers

    async def created(self, pod: Pod, container: Container, grants: Sequence[str]) -> CacheAnswer:
        """Take the annotations of a pod. Return why a container that is about to be created cannot have its limits."""
        self._annotations[pod.uid] = pod.annotations
        try:
            self._asks(container, grants)
        except InputError as error:
            return CacheAnswer(error=f"cannot limit its I/O: {error}")
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str]) -> str:
        """Put the limits of a container that does not run yet in force, and those of its pod. Return why they are not,
        or ""."""
        try:
            if not self._asks(container, grants):
                return ""
            if not cgroup:
                raise HostError("its control group is not known")
            async with asyncio.timeout(START_S):
                found = await run_to_end(self._put_pod(container.pod_uid))
        except TimeoutError:
            return f"cannot limit its I/O: not done within {START_S:g} s"
        except (HostError, InputError, StateError) as error:
            return f"cannot limit its I/O: {error}"
        why = found.error or found.errors.get(cgroup, "")
        pod = self._table.pods.get(container.pod_uid, "")
        if absent := [one for one in (pod, cgroup) if one in found.wanted and one not in found.kept.made]:
            why = why or f"cannot limit its I/O: there is no control group {absent[0]}"
        log.info("io-limited", container=container.id, name=str(container), limits=found.wanted.get(cgroup), error=why)
        return why

    async def _put_pod(self, uid: str) -> IoReport:
        """Put what the containers of a pod ask for in force; nothing is taken out."""
        async with self._turns.alone(START_S):
            wanted = self._wanted(uid)
            found = await self._turns.in_thread(self._rounds.keep, wanted.asking, wanted.paths, lambda path: True)
        self._count(found)
        return found

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        self._annotations = {one.uid: one.annotations for one in pods}

    def _classes(self) -> Classes | None:
        return classes_of(self._config().pinning.io)

    def _asks(self, container: Container, grants: Iterable[str]) -> tuple[IoAsk, ...]:
        ledger, config, classes = self._agent.ledger.grants, self._config(), self._classes()
        found = list(asks_of_claims((ledger[one] for one in grants if one in ledger), classes))
        if classes is not None:  # otherwise as on nodes that never had it: pods of all nodes may have annotations
            annotations = self._annotations.get(container.pod_uid, _NO_ANNOTATIONS)
            found += asks_of_pod(annotations, config.domain, container.name, classes)
        return tuple(found)

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Compare everything at the start, after each change and write, and every `pinning.verifySeconds`."""
        while True:
            written = self._written.value
            await supervise(self.name, self._keep_all)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config().pinning.verify_seconds):
                    await self._due(written)

    async def close(self) -> None:
        """Wait for a step in progress. The limits stay: containers run on."""
        await self._turns.close()

    async def _due(self, written: int) -> None:
        """Return when something else is wanted than in the last round, or an io file was written to since then."""
        seen = self._news.value
        while self._written.value == written and self._wanted() == self._asked:
            seen = await self._news.changed(seen)

    async def _keep_all(self) -> None:
        live = {one.container.pod_uid for one in self._table.entries.values()}
        self._annotations = {uid: one for uid, one in self._annotations.items() if uid in live}
        self._said.report(await run_to_end(self._keep()) or "; ".join(self._notes()))

    async def _keep(self) -> str:
        """Do one round. Return why it was not done, or ""."""
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                self._asked = asked = self._wanted()
                whole = not self._agent.loss

                def leave(path: str) -> bool:
                    return not whole or path not in asked.known

                self._found = await self._turns.in_thread(self._rounds.keep, asked.asking, asked.paths, leave)
        except (HostError, StateError) as error:
            return str(error)
        self._count(self._found)
        return self._found.error

    def _wanted(self, uid: str = "") -> Wanted:
        """Return what the containers of one pod, or of all, are to have."""
        asking: list[Asking] = []
        errors: list[tuple[str, str]] = []
        known: set[str] = set()
        unknown: set[str] = set()
        for id, entry in self._table.entries.items():
            if uid not in ("", entry.container.pod_uid) or not entry.path:
                continue
            pod_path = self._table.pods.get(entry.container.pod_uid, entry.path.rpartition("/")[0])
            pin = self._pin_of(id)
            (known if self._is_known(entry, pin) else unknown).update((entry.path, pod_path))
            if not entry.container.name or entry.container.state == STOPPED:
                continue
            try:
                asks = self._asks(entry.container, pin.grants)
            except InputError as error:
                errors.append((entry.path, f"{entry.container}: {error}"))
                continue
            if asks:
                asking.append(Asking(whose=str(entry.container), path=entry.path, pod_path=pod_path, asks=asks))
        every = [ask for one in asking for ask in one.asks]
        return Wanted(tuple(asking), tuple(errors), frozenset(known - unknown), self._nodes(every))

    def _is_known(self, entry: ContainerEntry, pin: Pin) -> bool:
        """Return whether it is known what a container asks for: its name, what it holds, its pod's annotations."""
        annotated = self._config().pinning.io is None or entry.container.pod_uid in self._annotations
        return entry.named and not pin.unproven and annotated

    def _nodes(self, asks: Iterable[IoAsk]) -> Paths:
        devices = self._agent.inventory.device_by_id
        return {id: devices[id].paths for ask in asks for id in ask.devices if id in devices}

    def _count(self, found: IoReport) -> None:
        """Count and report what other processes had changed."""
        entries = self._table.by_path()
        happened = []
        for path, drifts in found.kept.drifts.items():
            error = found.kept.errors.get(path, "")
            for one in drifts:
                metrics.DRIFT.labels(one.file).inc()
                if error:
                    metrics.DRIFT_UNREPAIRED.labels(one.file).inc()
            entry = entries.get(path)
            uid = entry.container.pod_uid if entry is not None else self._uid_at(path)
            whose = str(entry.container) if entry is not None else f"pod {uid}"
            happened.append(self._drift(whose, uid, path, drifts, error))
        self._agent.record_happenings(happened)

    def _uid_at(self, path: str) -> str:
        return next((uid for uid, one in self._table.pods.items() if one == path), path)

    def _drift(self, whose: str, uid: str, path: str, drifts: Sequence[Drift], error: str) -> Happening:
        files = [f"{one.file}: {one.found!r}, not {one.wanted!r}" for one in drifts]
        log.warning("drift", whose=whose, path=path, files=files, error=error)
        self._report(drifted(whose, [one.file for one in drifts], self._table.pod_of(uid), error))
        return Happening(action=DRIFT, what=f"{whose}: {'; '.join(files)}", why=error or "repaired")

    # ---------------------------------------------------------------- what admins see

    def _notes(self) -> list[str]:
        whose = {one.path: one.whose for one in self._asked.asking} if self._asked is not None else {}
        found = [f"{whose.get(path, path)}: {why}" for path, why in self._found.errors.items()]
        others = [why for path, why in self._found.kept.errors.items() if path not in self._found.errors]
        unclear = [why for _, why in self._asked.errors] if self._asked is not None else []
        first = [self._found.error] if self._found.error else []
        return list(dict.fromkeys([*first, *unclear, *found, *others, *self._found.kept.notes]))

    def notes(self) -> list[str]:
        """Return what is not in force, one sentence each."""
        return [f"pinning.io: {one}" for one in self._notes()]

    def document(self) -> dict[str, Any]:
        """Return the limits in force, in plain types."""
        entries, kept = self._table.by_path(), self._found.kept
        return {
            "cgroups": [
                {
                    "path": path,
                    "container": str(entries[path].container) if path in entries else "",
                    "pod_uid": entries[path].container.pod_uid if path in entries else self._uid_at(path),
                    "in_force": path in kept.made,
                    "files": {file: dict(lines) for file, lines in files.items()},
                }
                for path, files in sorted(self._found.wanted.items())
            ],
            "errors": dict(self._found.errors),
        }
