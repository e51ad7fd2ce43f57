"""Decisions on the ledger: durable before they take effect, and in effect before they are announced.

One decision is made at a time, each on the result of the one before. Those that need the state only in order to decide
do not wait for each other's disk: while one is being written the next ones are decided, and all that are ready then are
written in one transaction. A decision is answered only once it and everything it was based on is durable; if a
transaction fails, nothing that was based on it is kept either.

Another process may decide on the same ledger, as during a rolling upgrade. Before the first of a series of decisions,
the agent takes the lock between processes and reads what the other process has decided.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Change, Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.errors import NodeagentError, StateError
from nodeagent.state.audit import Happening, Refusal
from nodeagent.state.store import Entry, Store

T = TypeVar("T")
P = ParamSpec("P")
TELL_S = 0.02
"""Delay of notifications about decisions: answers are sent first, and many decisions are announced as one."""
SERIES_S, YIELD_S = 1.0, 0.01
"""How long a series of decisions may keep the lock between processes, and how long it is left to the others then."""
log = structlog.get_logger()


class Revisions(NamedTuple):
    """One revision for each part of the state.

    They are bumped only in this package; each waiter waits for the ones it uses.
    """

    inventory: Revision
    ledger: Revision
    health: Revision


class Outcome(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A decision that is made but not yet durable."""

    result: T
    """What the requester is answered."""
    ledger: Ledger
    """The ledger with the decision."""
    changes: Sequence[Change] = ()
    then: Callable[[], None] | None = None
    """Called in the thread of the disk once the decision is durable and before it is answered."""
    effect: Callable[[], None] | None = None
    """Called at the moment that the decision takes effect; quick, and raises nothing."""


class _Staged(NamedTuple):
    """A decision on its way to the disk."""

    outcome: Outcome[Any]
    entry: Entry
    durable: asyncio.Future[None]


class Decisions:
    """The ledger and its durable form."""

    def __init__(self, store: Store, reserved: CpuSet) -> None:
        """Load what the store has; blocks. Raise StateError if it cannot be read."""
        grants = MappingProxyType({one.id: one for one in store.load()})
        self.ledger = Ledger(grants=grants, reserved=reserved)
        """The durable ledger. Decisions on their way to the disk are not in it."""
        self.loss = store.loss
        """Why the ledger may lack decisions; until it is rebuilt nothing new is granted. "" if it is whole."""
        self.revisions = Revisions(Revision(), Revision(), Revision())
        self.on_decision: Callable[[], None] | None = None
        """Called after durable changes if another agent has to be notified."""
        self._store = store
        self._turn = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._disk = ThreadPoolExecutor(1, "store")
        self._deciding = 0
        """Number of decisions that the lock between processes is held for."""
        self._series_began_s = 0.0
        self._series_ended = asyncio.Event()
        self._staged: list[_Staged] = []
        """Decisions that wait for the disk."""
        self._tip: Ledger | None = None
        """The ledger with all that is on its way to the disk; None if nothing is."""
        self._settled = asyncio.Event()
        """Set while nothing is on its way to the disk."""
        self._settled.set()
        self._failures = 0
        """Number of transactions that failed."""
        self._announcement: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Accept no more decisions, wait for those under way, and close the store."""
        self._closing = True
        while self._under_way:
            await asyncio.wait(self._under_way)
        self._disk.shutdown(wait=True)
        self._store.close()

    # ---------------------------------------------------------------- making a decision

    async def _decided(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a decision in a turn of its own, from its beginning until it is durable, and return its result.

        If the peer hangs up, the decision is still completed and its result dropped; a failure is then only logged.
        """
        self._refuse_if_closing()
        return await _kept_on(self._begin(lambda: self._alone(lambda: work(*args, **kwargs))))

    async def _decided_in_group(self, decide: Callable[[Ledger], Awaitable[Outcome[T]]], op: str) -> T:
        """Make a decision on the newest ledger, as it will be once everything before is durable, and return its result
        when it is durable itself. A peer that hangs up is treated as in `_decided`."""
        self._refuse_if_closing()
        return await _kept_on(self._begin(lambda: self._in_group(decide, op)))

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise StateError(f"cannot decide: the agent is stopping, its ledger {self._store.path} is closed")

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Begin a decision, which `close` waits for."""
        task = asyncio.ensure_future(work())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def record_refusals(self, refusals: Sequence[Refusal], op: str) -> None:
        """Write to the audit, soon, what was refused; the caller does not wait. A failure is only logged."""
        if refusals and not self._closing:
            save = functools.partial(self._store.record_refusals, refusals, op=op, at=time.time())
            self._begin(lambda: self._alone(lambda: self._on_disk(save))).add_done_callback(_say_failure)

    def record_happenings(self, happenings: Sequence[Happening]) -> None:
        """Write to the audit, soon, what happened; the caller does not wait. A failure is only logged."""
        if happenings and not self._closing:
            save = functools.partial(self._store.record_happenings, happenings, at=time.time())
            self._begin(lambda: self._alone(lambda: self._on_disk(save))).add_done_callback(_say_failure)

    async def _alone(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._turn:
            await self._join_series()
            try:
                await self._settled.wait()
                return await work()
            finally:
                self._leave_series()

    async def _in_group(self, decide: Callable[[Ledger], Awaitable[Outcome[T]]], op: str) -> T:
        async with self._turn:
            await self._join_series()
            try:
                failures = self._failures
                outcome = await decide(self.newest)
                if failures != self._failures:
                    raise StateError(f"cannot decide: what it is based on could not be saved in {self._store.path}")
                durable = self._stage(outcome, op)
            except BaseException:
                self._leave_series()
                raise
        try:
            await durable
        finally:
            self._leave_series()
        return outcome.result

    # ---------------------------------------------------------------- other processes

    async def _join_series(self) -> None:
        """Hold the lock between processes, knowing what the others have decided."""
        if self._deciding and time.monotonic() - self._series_began_s > SERIES_S:
            while self._deciding:
                self._series_ended.clear()
                await self._series_ended.wait()
            await asyncio.sleep(YIELD_S)
        if not self._deciding:
            if not self._store.try_begin():
                await self._on_disk(self._store.begin)
            self._series_began_s = time.monotonic()
            try:
                self._hear(self._store.news(self.ledger.grants.values()))
                self._hear_loss()
            except BaseException:
                self._store.end()
                raise
        self._deciding += 1

    def _leave_series(self) -> None:
        self._deciding -= 1
        if not self._deciding:
            self._store.end()
            self._series_ended.set()

    def _hear(self, news: tuple[Grant, ...] | None) -> None:
        if news is not None:
            grants = MappingProxyType({one.id: one for one in news})
            self.ledger = replace(self.ledger, grants=grants)
            self.revisions.ledger.bump()

    def _hear_loss(self) -> None:
        if self._store.loss != self.loss:
            self.loss = self._store.loss
            log.log(logging.ERROR if self.loss else logging.INFO, "ledger-incomplete" if self.loss else "ledger-whole")
            self.revisions.ledger.bump()

    # ---------------------------------------------------------------- on the way to the disk

    @property
    def newest(self) -> Ledger:
        """Return the ledger with all decisions, durable or not yet."""
        tip = self._tip
        return self.ledger if tip is None else self._with_surroundings(tip)

    def _with_surroundings(self, ledger: Ledger) -> Ledger:
        """Return a ledger with what is reserved, and held by other plugins, at this moment."""
        ledger = ledger_of.with_reserved(ledger, self.ledger.reserved)
        return ledger_of.with_foreign(ledger, self.ledger.foreign)

    async def _save(self, changes: Sequence[Change], after: Ledger, op: str) -> None:
        """Make changes durable, then apply them in memory, then notify."""
        await self._stage(Outcome(result=None, ledger=after, changes=changes), op)

    def _stage(self, outcome: Outcome[Any], op: str) -> asyncio.Future[None]:
        """Send a decision to the disk. The future is done when everything up to it is durable and in effect."""
        durable = asyncio.get_running_loop().create_future()
        if not outcome.changes and outcome.then is None and self._settled.is_set():
            self._apply_effect(outcome)
            durable.set_result(None)
            return durable
        self._tip = outcome.ledger
        self._staged.append(_Staged(outcome, Entry(outcome.changes, op, time.time()), durable))
        if self._settled.is_set():
            self._settled.clear()
            self._write_staged()
        return durable

    def _write_staged(self) -> None:
        """Have all that waits for the disk written."""
        group, self._staged = self._staged, []
        loop = asyncio.get_running_loop()
        writing = self._disk.submit(self._write, group)
        writing.add_done_callback(lambda done: loop.call_soon_threadsafe(self._written, group, done))

    def _written(self, group: Sequence[_Staged], done: Future[list[Exception | None]]) -> None:
        if (error := done.exception()) is not None:
            self._fail(group, error)
        else:
            self._take_effect(group, done.result())
        if self._staged:
            self._write_staged()
        else:
            self._tip = None
            self._settled.set()

    def _write(self, group: Sequence[_Staged]) -> list[Exception | None]:
        """Write a group in one transaction, in the thread of the disk. Return what each one's `then` raised."""
        self._store.save_all([one.entry for one in group], held=self.ledger.grants.values())
        return [_raised_by(one.outcome.then) for one in group]

    def _take_effect(self, group: Sequence[_Staged], raised: Sequence[Exception | None]) -> None:
        if any(one.entry.changes for one in group):
            self.ledger = self._with_surroundings(group[-1].outcome.ledger)
            self._announce_soon()
        for one, error in zip(group, raised, strict=True):
            self._apply_effect(one.outcome)
            _resolve(one.durable, error)

    def _apply_effect(self, outcome: Outcome[Any]) -> None:
        if outcome.effect is not None:
            outcome.effect()

    def _fail(self, group: Sequence[_Staged], error: BaseException) -> None:
        """Drop a group and all that was decided on top of it."""
        self._failures += 1
        based, self._staged, self._tip = self._staged, [], None
        for one in (*group, *based):
            _resolve(one.durable, error)

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)

    # ---------------------------------------------------------------- announcements

    def _announce_soon(self) -> None:
        if self._announcement is None:
            self._announcement = asyncio.get_running_loop().call_later(TELL_S, self._announce)

    def _announce(self) -> None:
        self._announcement = None
        self.revisions.ledger.bump()
        if self.on_decision is not None:
            self.on_decision()

    def _tell(self, tell: Callable[..., object], *args: object) -> None:
        """Schedule a notification for a moment later, so that the requester is answered first."""
        asyncio.get_running_loop().call_later(TELL_S, tell, *args)


def _raised_by(work: Callable[[], None] | None) -> Exception | None:
    try:
        if work is not None:
            work()
    except Exception as error:
        return error
    return None


async def _kept_on(work: asyncio.Future[T]) -> T:
    """Return the result of work that goes on if the caller is cancelled; its failure is then only logged."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_say_failure)
        raise


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # cancelled with its task, as the loop ends
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _say_failure(task: asyncio.Future[Any]) -> None:
    """Log what work raised that has no waiter left."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        unforeseen = None if isinstance(error, NodeagentError) else error
        log.error("abandoned-decision-failed", error=str(error), exc_info=unforeseen)
