"""What the Node object says of the scheduler's books: read with the slices' owner, then watched.

Kubelet can gain and lose a feature with each restart, and tells it in the Node object alone. Where the Node may be read
but not watched, it is read again every NOT_ALLOWED_S. What was last known holds while the API server is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import structlog

from nodeagent.core.dra.node_allocatable import NO_BOOKS, NodeBooks
from nodeagent.errors import InputError, PeerError
from nodeagent.kube.node import read_books
from nodeagent.telemetry.once import Once

AGAIN_S, AWAY_S, NOT_ALLOWED_S = 1.0, 30.0, 600.0
"""How long to wait after a watch has ended; after an error; after it was forbidden."""
log = structlog.get_logger()


class Api(Protocol):
    """The calls that are needed. Each raises PeerError."""

    async def get(self, resource: Any, name: str) -> dict[str, Any] | None: ...
    def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[Any]: ...


class NodeWatch:
    """Follows this node's Node object."""

    def __init__(self, api: Api, name: str, changed: Callable[[], None]) -> None:
        """Start nothing. `name` is the Node's; `changed` is called after each change of `books`."""
        self.books: NodeBooks = NO_BOOKS
        self._api = api
        self._name = name
        self._changed = changed
        self._failing = Once("node-not-watched")
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
        while True:
            rest_s = AGAIN_S
            try:
                await self._follow()
                self._failing.clear()
            except PeerError as error:
                self._failing.report(str(error))
                rest_s = NOT_ALLOWED_S if error.status == 403 else AWAY_S
            await asyncio.sleep(rest_s)

    async def _follow(self) -> None:
        """Read the Node and take its changes until the server ends the watch."""
        from nodeagent.kube.apiserver.client import ADDED, MODIFIED, NODES

        if (node := await self._api.get(NODES, self._name)) is None:
            return
        self.take(node)
        revision = node["metadata"].get("resourceVersion", "")
        async for event in self._api.watch(NODES, fields={"metadata.name": self._name}, revision=revision):
            if event.type in (ADDED, MODIFIED):
                self.take(event.object)
