"""What the Node object says of the scheduler's books: read with the slices' owner, then watched.

Kubelet can gain and lose a feature with each restart, and tells it in the Node object alone. What was last known holds
while the API server is away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from nodeagent.core.dra.node_allocatable import NO_BOOKS, NodeBooks
from nodeagent.errors import InputError
from nodeagent.kube.node import read_books
from nodeagent.managers.node_follower import NodeApi, NodeFollower
from nodeagent.telemetry.once import Once

log = structlog.get_logger()


class NodeWatch:
    """Follows the scheduler's books of this node."""

    def __init__(self, api: NodeApi, name: str, changed: Callable[[], None]) -> None:
        """Start nothing. `name` is the Node's; `changed` is called after each change of `books`."""
        self.books: NodeBooks = NO_BOOKS
        self._changed = changed
        self._follower = NodeFollower(api, name, self.take)
        self._odd = Once("node-not-read")

    def take(self, node: Mapping[str, Any]) -> None:
        """Take the Node object as it was just read."""
        try:
            books = read_books(node)
        except InputError as error:
            self._odd.report(str(error))
            return
        self._odd.clear()
        if books != self.books:
            self.books = books
            log.info("node-books-changed", declared=books.declared, pages=dict(books.pages))
            self._changed()

    async def follow(self) -> None:
        """Take every change of the Node, until cancelled."""
        await self._follower.follow()
