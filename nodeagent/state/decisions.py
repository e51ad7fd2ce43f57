"""One decision on the ledger at a time: durable before it takes effect, and in effect before it is announced.

Another process may decide on the same ledger, as during a rolling upgrade. Each turn therefore starts by reading what
the other process has decided.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Change, Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.errors import NodeagentError, StateError
from nodeagent.state.audit import Refusal
from nodeagent.state.store import Store

T = TypeVar("T")
P = ParamSpec("P")
TELL_S = 0.001
"""Delay of notifications about a decision, so that its answer is sent first."""
log = structlog.get_logger()


class Revisions(NamedTuple):
    """One revision for each part of the state.

    They are bumped only in this package; each waiter waits for the ones it uses.
    """

    inventory: Revision
    ledger: Revision
    health: Revision


class Decisions:
    """The ledger and its durable form."""

    def __init__(self, store: Store, reserved: CpuSet) -> None:
        """Load what the store has; blocks. Raise StateError if it cannot be read."""
        grants = MappingProxyType({one.id: one for one in store.load()})
        self.ledger = Ledger(grants=grants, reserved=reserved)
        self.loss = store.loss
        """Why the ledger may lack decisions; until it is rebuilt nothing new is granted. "" if it is whole."""
        self.revisions = Revisions(Revision(), Revision(), Revision())
        self.on_decision: Callable[[], None] | None = None
        """Called after each durable change if another agent has to be notified."""
        self._store = store
        self._turn = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._disk = ThreadPoolExecutor(1, "store")

    async def close(self) -> None:
        """Accept no more decisions, wait for those under way, and close the store."""
        self._closing = True
        while self._under_way:
            await asyncio.wait(self._under_way)
        self._disk.shutdown(wait=True)
        self._store.close()

    async def _decided(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a decision in its turn and return its result.

        If the peer hangs up, the decision is still completed and its result dropped; a failure is then only logged.
        """
        if self._closing:
            raise StateError(f"cannot decide: the agent is stopping, its ledger {self._store.path} is closed")
        task = self._begin(lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_say_failure)
            raise

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Begin a decision, which `close` waits for."""
        task = asyncio.ensure_future(self._in_turn(work))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def record_refusals(self, refusals: Sequence[Refusal], op: str) -> None:
        """Write to the audit, soon, what was refused; nobody waits for it. A failure is only logged."""
        if refusals and not self._closing:
            save = functools.partial(self._store.record_refusals, refusals, op=op, at=time.time())
            self._begin(lambda: self._on_disk(save)).add_done_callback(_say_failure)

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` in a turn of this process alone, after reading what another process has decided."""
        async with self._turn:
            if not self._store.try_begin():
                await self._on_disk(self._store.begin)
            try:
                self._hear(self._store.news(self.ledger.grants.values()))
                self._hear_loss()
                return await work()
            finally:
                self._store.end()

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

    async def _save(self, changes: Sequence[Change], after: Ledger, op: str) -> None:
        """Make changes durable, then apply them in memory, then notify."""
        if not changes:
            return
        held = self.ledger.grants.values()
        await self._on_disk(lambda: self._store.save(changes, op=op, at=time.time(), held=held))
        after = ledger_of.with_reserved(after, self.ledger.reserved)
        self.ledger = ledger_of.with_foreign(after, self.ledger.foreign)
        self._tell(self.revisions.ledger.bump)
        if self.on_decision is not None:
            self._tell(self.on_decision)

    def _tell(self, tell: Callable[..., object], *args: object) -> None:
        """Schedule a notification for a moment later, so that the requester is answered first."""
        asyncio.get_running_loop().call_later(TELL_S, tell, *args)

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)


def _say_failure(task: asyncio.Task[Any]) -> None:
    """Log what a task raised that has no waiter left."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        unforeseen = None if isinstance(error, NodeagentError) else error
        log.error("abandoned-decision-failed", error=str(error), exc_info=unforeseen)
