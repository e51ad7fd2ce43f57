"""Publishes labels of the Node and its NodeResourceTopology where the configuration says so, and removes what it had
published where it no longer does. Both are off by default, and then nothing is asked or written.

A Node that is deleted takes both with it. So the Node is watched while something is published, and all of it is written
again for a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import race, supervise
from nodeagent.config.operation import PublishConfig
from nodeagent.config.schema import Config
from nodeagent.errors import HostError, NodeagentError, PeerError
from nodeagent.managers.manager import Manager
from nodeagent.managers.node_follower import NodeApi, NodeFollower
from nodeagent.managers.publish.journal import FILE, PublishJournal
from nodeagent.managers.publish.publications import Publication
from nodeagent.telemetry.once import Once

PACE_S = 10.0
"""Shortest time between two writes of one object, and between two looks at what it shall say."""
AGAIN_S, SLOWEST_S, LASTING_S = 10.0, 300.0, 600.0
"""Time until a retry: after a first failure, doubled with each more; at most; after one that lasts, such as a missing
permission or kind."""
RESYNC_S = 3600.0
"""How often an unchanged object is applied again, in case that it was changed or deleted."""
CONFLICT = 409
log = structlog.get_logger()


class PublishManager(Manager):
    """Keeps the publications. Only the leading agent does."""

    name = "published objects"

    def __init__(
        self,
        publications: Sequence[Publication],
        news: Revision,
        state_dir: Path,
        api: NodeApi,
        node: str,
        *,
        configured: bool,
        **timing: float,
    ) -> None:
        """news: rises with what they say. node: the Node's name. configured: whether there is an API server."""
        self._config = PublishConfig()
        self._node = NodeFollower(api, node, self._node_seen)
        self._node_uid = ""
        self._configured = configured
        self._news = Revision(news)
        journal = PublishJournal(state_dir / FILE)
        self._kept = [_Kept(one, journal, self._news, lambda: self._config, **timing) for one in publications]

    async def apply(self, config: Config) -> None:
        """Switch publications on or off."""
        if config.publish != self._config:
            self._config = config.publish
            for one in self._kept:
                one.hurry()
        self._news.bump()

    async def lead(self) -> None:
        """Keep all of them up to date, until cancelled."""
        if self._configured:
            async with asyncio.TaskGroup() as tasks:
                for one in self._kept:
                    tasks.create_task(supervise(one.key, one.run))
                tasks.create_task(supervise("published node", self._follow_node))

    async def _follow_node(self) -> None:
        """Follow the Node as long as something is published."""
        while True:
            await self._until(lambda: self._on)
            await race(self._node.follow(), self._until(lambda: not self._on))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._news.changed(self._news.value)

    def _node_seen(self, node: Mapping[str, Any]) -> None:
        """Have everything looked at again if this is another Node than before."""
        uid = str(node["metadata"].get("uid", ""))
        if uid != self._node_uid:
            self._node_uid = uid
            for one in self._kept:
                one.node_seen(uid)
            self._news.bump()

    @property
    def _on(self) -> bool:
        """Return whether anything is published."""
        return self._config.node_labels or self._config.node_resource_topology

    def notes(self) -> list[str]:
        """Return why something is not published, or not removed."""
        if self._on and not self._configured:
            return ["nothing is published: there is no API server, dra.kubeconfig is empty"]
        return [note for one in self._kept for note in one.notes()]


class _Kept:
    """One publication."""

    def __init__(
        self,
        publication: Publication,
        journal: PublishJournal,
        news: Revision,
        config: Callable[[], PublishConfig],
        pace_s: float = PACE_S,
        lasting_s: float = LASTING_S,
    ) -> None:
        self._publication = publication
        self._journal = journal
        self._news = news
        self._config = config
        self._pace_s, self._lasting_s = pace_s, lasting_s
        self._failing = Once("not-published")
        self._failures = 0
        self._written: Any = None
        self._written_s = 0.0
        self._node_uid = ""
        """Of the Node as it was last seen."""
        self._written_for: tuple[str, ...] = ()
        """The UID of the Node for which it was written, and the one that was seen by then, which may be older."""
        self._next_s = 0.0
        self._removed = False
        """Whether it is known to be removed."""

    @property
    def key(self) -> str:
        return self._publication.key

    def hurry(self) -> None:
        """Have the next step taken at once, whatever failed before."""
        self._next_s = 0.0

    def node_seen(self, uid: str) -> None:
        """Take the UID of the Node. What was written for another Node is gone with it."""
        self._node_uid = uid
        if uid not in self._written_for:
            self.hurry()

    def notes(self) -> list[str]:
        if not (why := self._failing.last):
            return []
        state = "is not in force" if self._publication.on(self._config()) else "was switched off and is not removed"
        return [f"{self.key} {state}: {why}"]

    async def run(self) -> None:
        """Write or remove it whenever that is needed, until cancelled."""
        while True:
            seen = self._news.value
            wait_s = await self._step() if time.monotonic() >= self._next_s else self._next_s - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.changed(seen)

    async def _step(self) -> float | None:
        """Do what is due. Return in how many seconds to look again without news, or None if only after news."""
        if self._publication.on(self._config()):
            self._removed = False
            return await self._tried(self._publish)
        self._written = None
        if self._removed:
            return None
        return await self._tried(self._remove)

    async def _publish(self) -> float:
        wanted = self._publication.wanted()
        age_s, seen = time.monotonic() - self._written_s, self._node_uid
        if self._written is None or wanted != self._written or seen not in self._written_for or age_s >= RESYNC_S:
            await asyncio.to_thread(self._journal.note, self.key, published=True)
            self._written_for = (await self._publication.write(wanted), seen)
            if self._written is None:
                log.info("published", what=self.key)
            self._written, self._written_s = wanted, time.monotonic()
            self._next_s = self._written_s + self._pace_s
            return RESYNC_S
        self._next_s = time.monotonic() + self._pace_s
        return RESYNC_S - age_s

    async def _remove(self) -> None:
        if self.key in await asyncio.to_thread(self._journal.read):
            await self._publication.remove()
            await asyncio.to_thread(self._journal.note, self.key, published=False)
            log.info("unpublished", what=self.key)
        self._removed = True

    async def _tried(self, work: Callable[[], Awaitable[float | None]]) -> float | None:
        try:
            wait_s = await work()
        except (PeerError, HostError) as error:
            return self._failed(error)
        self._failures = 0
        self._failing.clear()
        return wait_s

    def _failed(self, error: NodeagentError) -> float:
        self._failing.report(str(error), what=self.key)
        self._failures += 1
        wait_s: float = min(AGAIN_S * 2 ** min(self._failures - 1, 10), SLOWEST_S)
        if isinstance(error, PeerError):
            lasts = error.lasting or error.status == CONFLICT
            wait_s = self._lasting_s if lasts else max(wait_s, error.retry_after_s)
        self._next_s = time.monotonic() + wait_s
        return wait_s
