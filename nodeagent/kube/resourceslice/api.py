"""What the publisher needs of the API server and of this node's Node object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from nodeagent.kube.resourceslice.render import Object


class SliceList(Protocol):
    """The slices at one revision."""

    @property
    def items(self) -> Sequence[Object]:
        """Return the slices, as decoded JSON."""

    @property
    def revision(self) -> str:
        """Return the revision from which a watch continues."""


class SliceEvent(Protocol):
    """One line of a watch."""

    @property
    def type(self) -> str:
        """Return ADDED, MODIFIED, DELETED or BOOKMARK."""

    @property
    def object(self) -> Object:
        """Return the slice, as decoded JSON."""


class Api(Protocol):
    """What the publisher needs of the API server. Each call raises PeerError, preferably with `status`, `lasting` and
    `retry_after_s`."""

    async def get(self, resource: Any, name: str) -> Object | None: ...
    async def list(self, resource: Any, *, fields: Mapping[str, str]) -> SliceList: ...
    async def create(self, resource: Any, body: Object) -> Object: ...
    async def replace(self, resource: Any, body: Object) -> Object: ...
    async def delete(self, resource: Any, name: str, *, uid: str) -> bool: ...
    def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[SliceEvent]: ...
    async def version(self) -> str: ...


class NodeSight(Protocol):
    """What is known of this node's Node object."""

    @property
    def books(self) -> object:
        """Return what the pools depend on. What the server refused is tried again when this has changed."""

    def take(self, node: Object) -> None:
        """Take the Node object as it was just read."""


class Blind:
    """Knows nothing of the Node."""

    books: object = None

    def take(self, node: Object) -> None:
        pass
