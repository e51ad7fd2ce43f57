"""Which of the agents on a node leads: it alone serves the device plugin, publishes, and answers admins. The others
serve claims beside it and wait for its end.
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
"""In the state folder: held by the agent that leads; made and removed when another one has decided something."""
RETRY_S, LOST_S = 0.2, 3.0
"""How often an agent that waits looks; how long whoever leads has to put back its lock where somebody removed it."""
PRUNE_S = 3600.0
log = structlog.get_logger()


class Leader:
    """The lead of a node, taken and kept. Building it takes nothing."""

    def __init__(self, agent: Agent, store: Store, state_dir: Path, audit_days: Callable[[], int]) -> None:
        self.notes: list[str] = []
        """What was wrong with the ledger's file and was put right."""
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
        """Let the next one lead; StateError where this one had lost the lead."""
        self._lock.close()
        if self._lost.is_set():
            raise StateError(f"cannot go on: another agent has taken {self._lock.path}, which had been removed")

    async def lost(self) -> None:
        """Return when another agent leads, although this one did."""
        await self._lost.wait()

    async def take(self) -> None:
        """Return once no other agent leads on this node. Until then what it decides is heard: whoever remembers late
        would put a damaged ledger in order wrongly."""
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
        """Forget old audit lines; where somebody removes the ledger's folder, have the lock and the file put back. An
        agent that finds another one in its place has lost the lead: two must not have it."""
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
        """Whether this agent leads now, and knows all that was decided before."""
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
    """Have the agent that leads hear what another process has decided."""
    path = state_dir / NEWS
    with contextlib.suppress(OSError):
        path.touch()
        path.unlink()
