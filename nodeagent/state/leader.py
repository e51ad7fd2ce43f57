"""Leadership among the agents of a node.

Only the leader serves the device plugin, publishes, and answers admins. The other agents serve claims alongside it and
wait for it to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.errors import StateError
from nodeagent.state.agent import Agent
from nodeagent.state.lock import FileLock
from nodeagent.state.store import Store

LOCK, NEWS = "leader.lock", "ledger.news"
"""Files in the state folder: held by the leader; touched and removed when another agent has made a decision."""
RETRY_S, LOST_S = 0.2, 3.0
"""How often a waiting agent checks; how long the leader has to restore its lock file if that was removed."""
PRUNE_S = 3600.0
log = structlog.get_logger()


class Leader:
    """The leadership of a node, acquired and kept. Constructing it acquires nothing."""

    def __init__(self, agent: Agent, store: Store, state_dir: Path, audit_days: Callable[[], int]) -> None:
        self.notes: list[str] = []
        """Damage to the ledger file that was found and repaired."""
        self._agent = agent
        self._store = store
        self._state_dir = state_dir
        self._audit_days = audit_days
        self._lock = FileLock(state_dir / LOCK)
        self._lost = asyncio.Event()
        self._not_durable = ""
        self._hear_store()

    @property
    def held(self) -> bool:
        """Return whether this agent leads."""
        return self._lock.held

    def close(self) -> None:
        """Let the next agent lead. Raise StateError if this one had lost the lead."""
        self._lock.close()
        if self._lost.is_set():
            raise StateError(f"cannot go on: another agent has taken {self._lock.path}, which had been removed")

    async def lost(self) -> None:
        """Return once another agent leads although this one did."""
        await self._lost.wait()

    async def take(self) -> None:
        """Return once no other agent leads on this node.

        Until then the other agent's decisions are read: an agent that learned of them only later would repair a damaged
        ledger wrongly.
        """
        said, lost_s = False, 0.0
        while not await self._leads(make=lost_s > LOST_S):
            if not said and not self._not_durable:
                log.warning("another-agent-leads", lock=str(self._lock.path), served="claims only, until it ends")
                self._agent.on_decision = lambda: tell(self._state_dir)
                said = True
            lost_s = 0.0 if self._lock.is_there() else lost_s + RETRY_S
            await asyncio.sleep(RETRY_S)
        self._agent.on_decision = None
        if said:
            log.info("leading")

    async def keep(self) -> None:
        """Delete old audit entries, and restore the lock and the ledger file if the folder is removed.

        An agent that finds another agent's lock in place of its own has lost the lead: there must not be two leaders.
        """
        with FolderWatch(self._state_dir, poll_s=PRUNE_S) as folder:
            while True:
                try:
                    if not self._lock.try_take():
                        self._lost.set()
                    await self._agent.prune(time.time() - self._audit_days() * 86_400)
                    self._not_durable = ""
                except StateError as error:
                    self._say_not_durable(error)
                self._hear_store()
                await folder.wait()

    async def _leads(self, *, make: bool) -> bool:
        """Return whether this agent leads now and knows everything that was decided before."""
        try:
            leads = self._lock.try_take(make=make)
            await self._agent.refresh()
        except StateError as error:
            self._say_not_durable(error)
            return False
        self._not_durable = ""
        return leads

    def _say_not_durable(self, error: StateError) -> None:
        if str(error) != self._not_durable:
            log.error("ledger-not-durable", error=str(error))
        self._not_durable = str(error)

    def _hear_store(self) -> None:
        if self._store.note and self._store.note not in self.notes:
            self.notes.append(self._store.note)
            log.error("ledger-replaced", note=self._store.note)


def tell(state_dir: Path) -> None:
    """Notify the leading agent that another process has made a decision."""
    path = state_dir / NEWS
    with contextlib.suppress(OSError):
        path.touch()
        path.unlink()
