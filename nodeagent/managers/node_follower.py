"""Follows this node's Node object in the API server: read once, then watched.

Where the Node may be read but not watched, it is read again every NOT_ALLOWED_S. While the API server is away nothing
is reported: silence is no change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from nodeagent.errors import PeerError
from nodeagent.telemetry.once import Once

AGAIN_S, AWAY_S, NOT_ALLOWED_S = 1.0, 30.0, 600.0
"""How long to wait after a watch has ended; after an error; after it was forbidden."""


class NodeApi(Protocol):
    """The calls that are needed. Each raises PeerError."""

    async def get(self, resource: Any, name: str) -> dict[str, Any] | None: ...
    def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[Any]: ...


class NodeFollower:
    """Reports every state of one Node."""

    def __init__(self, api: NodeApi, name: str, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Start nothing. `name` is the Node's; `take` is given the object as read, and again after each change."""
        self._api = api
        self._name = name
        self._take = take
        self._failing = Once("node-not-watched")

    async def follow(self) -> None:
        """Report every change of the Node, until cancelled."""
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
        """Read the Node and report its changes until the server ends the watch."""
        from nodeagent.kube.apiserver.client import ADDED, MODIFIED, NODES

        if (node := await self._api.get(NODES, self._name)) is None:
            return
        self._take(node)
        revision = node["metadata"].get("resourceVersion", "")
        async for event in self._api.watch(NODES, fields={"metadata.name": self._name}, revision=revision):
            if event.type in (ADDED, MODIFIED):
                self._take(event.object)
