"""Keeps values in the control groups of containers as the ledger, the configuration and pods' annotations say: what all
managers of such values share, with a few words and rules of each in a subclass.

They are written before a container's first instruction and read back; in between the leading agent repairs what other
processes have changed, as soon as the kernel reports a write and every `pinning.verifySeconds`, and takes out what is
no longer wanted. All of it happens under one lock of the node. Nothing is taken out of a cgroup while it is not known
what its containers ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec
import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import run_to_end, supervise
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Report
from nodeagent.core.events.happenings import drift as drifted
from nodeagent.core.model.container import STOPPED, Container, Pod
from nodeagent.core.model.grant import Grant
from nodeagent.core.pinning.plan import Pin
from nodeagent.errors import HostError, InputError, StateError
from nodeagent.host.cgroup.line_keeper import KeptLines
from nodeagent.host.cgroup.write import Drift
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.cache_groups import CacheAnswer
from nodeagent.managers.pinning.containers import ContainerEntry, ContainerTable
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.state.audit import DRIFT, Happening
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

LOCK_S = 15.0
"""How long to wait for another change."""
_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})
Ask = TypeVar("Ask")
"""What a container asks for."""
log = structlog.get_logger()


class Asking(msgspec.Struct, Generic[Ask], frozen=True, kw_only=True):
    """A container that asks for something."""

    whose: str
    path: str
    """Of its cgroup."""
    pod_path: str
    asks: tuple[Ask, ...]


class Wanted(msgspec.Struct, Generic[Ask], frozen=True, kw_only=True):
    """What a round is about."""

    asking: tuple[Asking[Ask], ...] = ()
    errors: tuple[tuple[str, str], ...] = ()
    """(path, why) of containers whose asks cannot be understood."""
    known: frozenset[str] = frozenset()
    """Paths of cgroups of which it is known what they are to have."""
    devices: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Device nodes of what is asked about, by the id of a device."""


class LimitsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one round."""

    wanted: Mapping[str, Mapping[str, Mapping[str, str]]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Lines by cgroup, file and what of the file."""
    kept: KeptLines = msgspec.field(default_factory=KeptLines)
    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why what a container asks for is not in force, by the path of its cgroup."""
    error: str = ""
    """Why nothing was done."""
    notes: tuple[str, ...] = ()


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """What such values follow."""

    agent: Agent
    config: Callable[[], Config]
    table: ContainerTable
    """The containers."""
    pin_of: Callable[[str], Pin]
    """Returns what a container holds, by its id."""
    news: Revision
    """Rises with changes of the ledger, the configuration and the containers, and with `written`."""
    written: Revision
    """Rises with each write of a limit by any process."""
    report: Report


class CgroupLimits(Manager, Generic[Ask]):
    """Keeps such values. Building one starts nothing and reads nothing."""

    key: str
    """Of the configuration."""
    act: str
    """What is done, as errors have it, such as "limit I/O"."""
    act_its: str
    """The same of a container: "limit its I/O"."""
    done: str
    """The log event of a container whose values are in force."""
    not_done: str
    """The log event of what is not in force."""
    lock: str
    """Name of its lock in the state folder."""

    def __init__(self, state_dir: Path, followed: Followed) -> None:
        """Set up."""
        self._agent, self._config, self._table = followed.agent, followed.config, followed.table
        self._pin_of, self._report = followed.pin_of, followed.report
        self._news, self._written = followed.news, followed.written
        self._turns = Turns(state_dir / self.lock, f"cannot {self.act}")
        self._annotations: dict[str, Mapping[str, str]] = {}
        """Of pods, by UID, as far as the runtime has shown them."""
        self._found = LimitsReport()
        self._asked: Wanted[Ask] | None = None
        """What the last round was about."""
        self._said = Once(self.not_done)

    # ---------------------------------------------------------------- what a subclass knows

    @abstractmethod
    def _asks(self, container: Container, grants: Iterable[str]) -> tuple[Ask, ...]:
        """Return what a container asks for. Raise InputError if that cannot be understood."""

    @abstractmethod
    def _concerned(self, grant: Grant) -> bool:
        """Return whether a claim asks for something."""

    @abstractmethod
    async def _unavailable(self, grants: Sequence[Grant]) -> str:
        """Return why a claim cannot have what it asks for, or ""."""

    @abstractmethod
    def _is_configured(self) -> bool:
        """Return whether pods' annotations mean something."""

    @abstractmethod
    def _round(self, wanted: Wanted[Ask], leave: Callable[[str], bool]) -> LimitsReport:
        """Put it in force, and take out what no container asks for any longer, except in cgroups for which `leave`
        returns True. Blocks."""

    def _devices(self, asks: Iterable[Ask]) -> Mapping[str, tuple[str, ...]]:
        """Return the device nodes that asks are about."""
        return MappingProxyType({})

    def _reach(self, uid: str) -> str:
        """Return the UID of the pod that a round before a start is about, or "" if it is about all."""
        return uid

    # ---------------------------------------------------------------- for claims

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Return, by UID, why what a claim asks for cannot be had here."""
        asking = {uid: grants for uid, grants in claims.items() if any(map(self._concerned, grants))}
        errors = {uid: await self._impossible(grants) for uid, grants in asking.items()}
        return {uid: why for uid, why in errors.items() if why}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Do nothing: it ends with the control groups of the claim's containers, or in a round."""
        return {}

    async def _impossible(self, grants: Sequence[Grant]) -> str:
        if self._config().pinning.mode == "off":
            return f"cannot {self.act}: nothing is written to control groups on this node (pinning.mode is off)"
        try:
            return await self._unavailable(grants)
        except InputError as error:
            return f"cannot {self.act}: {error}"

    # ---------------------------------------------------------------- for containers

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        """Take the annotations of a pod. Return why a container that is about to be created cannot have what it asks
        for."""
        self._annotations[pod.uid] = pod.annotations
        try:
            self._asks(container, grants)
        except InputError as error:
            return CacheAnswer(error=f"cannot {self.act_its}: {error}")
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put what a container asks for that does not run yet in force, and what its pod has, within this time. Return
        why it is not, or ""."""
        try:
            if not self._asks(container, grants):
                return ""
            if not cgroup:
                raise HostError("its control group is not known")
            async with asyncio.timeout(within_s):
                found = await run_to_end(self._put_pod(container.pod_uid, within_s))
        except TimeoutError:
            return f"cannot {self.act_its}: not done within {within_s:.3g} s"
        except (HostError, InputError, StateError) as error:
            return f"cannot {self.act_its}: {error}"
        why = found.error or found.errors.get(cgroup, "")
        pod = self._table.pods.get(container.pod_uid, "")
        if absent := [one for one in (pod, cgroup) if one in found.wanted and one not in found.kept.made]:
            why = why or f"cannot {self.act_its}: there is no control group {absent[0]}"
        log.info(self.done, container=container.id, name=str(container), limits=found.wanted.get(cgroup), error=why)
        return why

    async def _put_pod(self, uid: str, within_s: float) -> LimitsReport:
        """Put what the containers of a pod ask for in force; nothing is taken out. within_s: how long to wait for
        another change."""
        async with self._turns.alone(within_s):
            wanted = self._wanted(self._reach(uid))
            found = await self._turns.in_thread(self._round, wanted, lambda path: True)
        self._count(found)
        return found

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""
        self._annotations = {one.uid: one.annotations for one in pods}

    def _annotations_of(self, container: Container) -> Mapping[str, str]:
        """Return the annotations of a container's pod, as far as they are known."""
        return self._annotations.get(container.pod_uid, _NO_ANNOTATIONS)

    def _grants(self, ids: Iterable[str]) -> list[Grant]:
        """Return the grants that there are, by their ids."""
        ledger = self._agent.ledger.grants
        return [ledger[one] for one in ids if one in ledger]

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
        """Wait for a step in progress. What is in force stays: containers run on."""
        await self._turns.close()

    async def _due(self, written: int) -> None:
        """Return when something else is wanted than in the last round, or a limit was written since then."""
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

                self._found = await self._turns.in_thread(self._round, asked, leave)
        except (HostError, StateError) as error:
            return str(error)
        self._count(self._found)
        return self._found.error

    def _wanted(self, uid: str = "") -> Wanted[Ask]:
        """Return what the containers of one pod, or of all, are to have."""
        asking: list[Asking[Ask]] = []
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
        return Wanted(
            asking=tuple(asking),
            errors=tuple(errors),
            known=frozenset(known - unknown),
            devices=self._devices(every),
        )

    def _is_known(self, entry: ContainerEntry, pin: Pin) -> bool:
        """Return whether it is known what a container asks for: its name, what it holds, its pod's annotations."""
        annotated = not self._is_configured() or entry.container.pod_uid in self._annotations
        return entry.named and not pin.unproven and annotated

    def _count(self, found: LimitsReport) -> None:
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
            whose = str(entry.container) if entry is not None else f"pod {uid}" if uid else f"cgroup {path}"
            happened.append(self._drift(whose, uid, path, drifts, error))
        self._agent.record_happenings(happened)

    def _uid_at(self, path: str) -> str:
        """Return the UID of the pod with a cgroup, or "" if it is no pod's."""
        return next((uid for uid, one in self._table.pods.items() if one == path), "")

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
        return list(dict.fromkeys([*first, *unclear, *found, *others, *self._found.notes, *self._found.kept.notes]))

    def notes(self) -> list[str]:
        """Return what is not in force, one sentence each."""
        return [f"{self.key}: {one}" for one in self._notes()]

    def document(self) -> dict[str, Any]:
        """Return what is in force, in plain types."""
        entries, kept = self._table.by_path(), self._found.kept
        return {
            "cgroups": [
                {
                    "path": path,
                    "container": str(entries[path].container) if path in entries else "",
                    "pod_uid": entries[path].container.pod_uid if path in entries else self._uid_at(path),
                    "in_force": path in kept.made,
                    "files": {file: lines[""] if "" in lines else dict(lines) for file, lines in files.items()},
                }
                for path, files in sorted(self._found.wanted.items())
            ],
            "errors": dict(self._found.errors),
        }
