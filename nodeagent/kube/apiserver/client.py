"""The Kubernetes API as the agent uses it: objects as plain dicts, a deadline on every call, faults as ApiError.

Nothing is retried here: the caller knows what is worth retrying. Building an ApiServer opens no connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from nodeagent.kube.apiserver.call import APPLY, MERGE, ApiError, Ask, Caller, Expired
from nodeagent.kube.apiserver.credentials import Access
from nodeagent.kube.apiserver.kubeconfig import access

__all__ = [
    "ADDED",
    "BOOKMARK",
    "CLAIMS",
    "CORE_EVENTS",
    "DELETED",
    "EVENTS",
    "LEASES",
    "MODIFIED",
    "NODES",
    "SLICES",
    "TOPOLOGIES",
    "Access",
    "ApiError",
    "ApiResource",
    "ApiServer",
    "Expired",
    "ObjectList",
    "WatchEvent",
    "access",
]

PAGE = 500
"""Items requested per page of a list."""
ADDED, MODIFIED, DELETED, BOOKMARK = "ADDED", "MODIFIED", "DELETED", "BOOKMARK"
_EVENTS = (ADDED, MODIFIED, DELETED, BOOKMARK)
_NO_FIELDS: Mapping[str, str] = MappingProxyType({})


class ApiResource(msgspec.Struct, frozen=True):
    """One kind of object as API paths name it. `group` is "" for the core group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        """Return GROUP/VERSION, or the version alone for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the path of a collection, an object, or a subresource."""
        root = ("apis", self.group, self.version) if self.group else ("api", self.version)
        place = ("namespaces", namespace) if namespace else ()
        return "/" + "/".join(quote(part, safe="") for part in (*root, *place, self.plural, name, subresource) if part)

    def shown(self, namespace: str = "", name: str = "") -> str:
        """Return the plural and the object name, for messages."""
        return f"{self.plural} {'/'.join(part for part in (namespace, name) if part)}".strip()


NODES = ApiResource("", "v1", "nodes", "Node", False)
SLICES = ApiResource("resource.k8s.io", "v1", "resourceslices", "ResourceSlice", False)
EVENTS = ApiResource("events.k8s.io", "v1", "events", "Event", True)
CORE_EVENTS = ApiResource("", "v1", "events", "Event", True)
TOPOLOGIES = ApiResource("topology.node.k8s.io", "v1alpha2", "noderesourcetopologies", "NodeResourceTopology", False)
LEASES = ApiResource("coordination.k8s.io", "v1", "leases", "Lease", True)
CLAIMS = ApiResource("resource.k8s.io", "v1", "resourceclaims", "ResourceClaim", True)


class ObjectList(msgspec.Struct, frozen=True):
    """Result of a list call and the revision it reflects; a watch continues from that revision."""

    items: tuple[dict[str, Any], ...]
    revision: str


class WatchEvent(msgspec.Struct, frozen=True):
    """One line of a watch. `type` is ADDED, MODIFIED, DELETED, or BOOKMARK (an object with only a revision)."""

    type: str
    object: dict[str, Any]


class ApiServer:
    """Client of one API server."""

    def __init__(self, access: Access, *, timeout_s: float = 10.0, watch_s: float = 300.0) -> None:
        """Set up the client without connecting.

        `timeout_s` is the deadline of a call; `watch_s` is how long a watch is asked to last. The deadline of a watch
        is their sum.
        """
        self._caller = Caller(access, timeout_s)
        self._timeout_s = timeout_s
        self._watch_s = watch_s

    async def get(
        self, resource: ApiResource, name: str, namespace: str = "", *, urgent: bool = False
    ) -> dict[str, Any] | None:
        """Return the object, or None if the server has none of this name. Raise ApiError, also if the server does not
        know the kind.

        urgent: a pod's start waits for it; see Ask.
        """
        what = f"get {resource.shown(namespace, name)}"
        ask = Ask("GET", resource.path(namespace, name), what, name, urgent=urgent)
        answer = await self._caller.call(ask)
        return None if answer is None else self._checked(ask, resource.kind, answer)

    async def version(self) -> str:
        """Return the server's version, such as "v1.37.2". Raise ApiError."""
        answer = await self._caller.call(Ask("GET", "/version", "get the version of the API server"))
        return str((answer or {}).get("gitVersion", ""))

    async def list(
        self, resource: ApiResource, *, namespace: str = "", fields: Mapping[str, str] = _NO_FIELDS
    ) -> ObjectList:
        """Return all matching objects, fetched page by page. Raise ApiError, or Expired if the continue token expires
        between pages."""
        items: list[dict[str, Any]] = []
        revision = ""
        async for page in self.pages(resource, namespace=namespace, fields=fields):
            items += page.items
            revision = page.revision
        return ObjectList(tuple(items), revision)

    async def pages(
        self, resource: ApiResource, *, namespace: str = "", fields: Mapping[str, str] = _NO_FIELDS
    ) -> AsyncGenerator[ObjectList, None]:
        """Yield all matching objects page by page, the same revision with each. Raise as list()."""
        query = {"limit": str(PAGE), **_selecting(fields)}
        while True:
            target = f"{resource.path(namespace)}?{urlencode(query)}"
            ask = Ask("GET", target, f"list {resource.shown(namespace)}")
            page = await self._object(ask, f"{resource.kind}List")
            yield ObjectList(tuple(self._items(ask, page)), self._revision(ask, page))
            if not (more := page["metadata"].get("continue")):
                return
            query["continue"] = str(more)

    async def create(self, resource: ApiResource, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object and return it as stored. Raise ApiError, with status 409 if it exists already."""
        return await self._write("POST", resource, body)

    async def replace(self, resource: ApiResource, body: Mapping[str, Any]) -> dict[str, Any]:
        """Replace an object and return it as stored. Raise ApiError, with status 409 if it has changed since or 404 if
        it is gone."""
        return await self._write("PUT", resource, body)

    async def delete(self, resource: ApiResource, name: str, *, namespace: str = "", uid: str = "") -> bool:
        """Delete an object and return whether it existed. Raise ApiError, with status 409 if `uid` is given and the
        name now belongs to another object."""
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid:
            options["preconditions"] = {"uid": uid}
        what, body = f"delete {resource.shown(namespace, name)}", msgspec.json.encode(options)
        return await self._caller.call(Ask("DELETE", resource.path(namespace, name), what, name, body)) is not None

    async def apply(
        self,
        resource: ApiResource,
        name: str,
        namespace: str,
        body: Mapping[str, Any],
        *,
        manager: str,
        force: bool,
        subresource: str = "",
    ) -> dict[str, Any]:
        """Apply an object or a subresource of it (server-side apply) and return the object as stored.

        force: take over fields that other managers own; without it they are a conflict. Raise ApiError, with status 409
        on a conflict.
        """
        query = urlencode({"fieldManager": manager, "force": "true" if force else "false"})
        target = f"{resource.path(namespace, name, subresource)}?{query}"
        what = f"apply {f'the {subresource} of ' if subresource else ''}{resource.shown(namespace, name)}"
        whole = {**_typed(resource, body), "metadata": {**body.get("metadata", {}), "name": name}}
        if namespace:
            whole["metadata"]["namespace"] = namespace
        return await self._object(Ask("PATCH", target, what, "", msgspec.json.encode(whole), APPLY), resource.kind)

    async def merge(
        self, resource: ApiResource, name: str, namespace: str, patch: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Apply a JSON merge patch (RFC 7396) and return the object as stored, or None if there is none of this name.

        An empty patch changes nothing and returns the object. Raise ApiError.
        """
        what = f"patch {resource.shown(namespace, name)}"
        ask = Ask("PATCH", resource.path(namespace, name), what, name, msgspec.json.encode(patch), MERGE)
        answer = await self._caller.call(ask)
        return None if answer is None else self._checked(ask, resource.kind, answer)

    async def watch(
        self, resource: ApiResource, *, fields: Mapping[str, str] = _NO_FIELDS, revision: str
    ) -> AsyncGenerator[WatchEvent, None]:
        """Yield the changes since `revision` until the server ends the watch.

        A responsive server ends it after watch_s at the latest. Raise ApiError, or Expired if the server no longer has
        the revision.
        """
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(max(1, round(self._watch_s)))}
        query |= {"resourceVersion": revision, **_selecting(fields)}
        ask = Ask("GET", f"{resource.path()}?{urlencode(query)}", f"watch {resource.shown()}")
        async with contextlib.aclosing(self._caller.lines(ask, self._watch_s + self._timeout_s)) as lines:
            async for line in lines:
                yield self._event(ask, line)

    async def warm(self) -> None:
        """Have a connection ready for the next call: opening one takes longer than the call. Raise ApiError."""
        await self._caller.warm()

    async def close(self) -> None:
        """Close the idle connections. Calls in progress finish on their own."""
        self._caller.close()

    async def _write(self, method: str, resource: ApiResource, body: Mapping[str, Any]) -> dict[str, Any]:
        name, namespace = (str(body["metadata"].get(key, "")) for key in ("name", "namespace"))
        verb, path = ("create", "") if method == "POST" else ("replace", name)
        raw = msgspec.json.encode(_typed(resource, body))
        what = f"{verb} {resource.shown(namespace, name)}"
        return await self._object(Ask(method, resource.path(namespace, path), what, "", raw), resource.kind)

    async def _object(self, ask: Ask, kind: str) -> dict[str, Any]:
        return self._checked(ask, kind, await self._caller.call(ask) or {})

    def _checked(self, ask: Ask, kind: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the response itself if it is of the requested kind, or raise ApiError."""
        if answer.get("kind") != kind:
            raise self._caller.error(ask, f"the answer is of kind {answer.get('kind')!r}, expected {kind!r}")
        if not isinstance(answer.get("metadata"), dict):
            raise self._caller.error(ask, "the answer has no metadata")
        return answer

    def _items(self, ask: Ask, page: dict[str, Any]) -> Sequence[dict[str, Any]]:
        items = page.get("items") or []
        if not isinstance(items, list) or not all(isinstance(one, dict) for one in items):
            raise self._caller.error(ask, "the answer's items are not a list of objects")
        return items

    def _revision(self, ask: Ask, page: dict[str, Any]) -> str:
        found = page["metadata"].get("resourceVersion")
        if not isinstance(found, str) or not found:
            raise self._caller.error(ask, f"the answer's resourceVersion is {found!r}")
        return found

    def _event(self, ask: Ask, line: bytes) -> WatchEvent:
        """Return one line of a watch. Raise Expired or ApiError if the line is an error that ends the watch."""
        said = self._caller.decoded(ask, line)
        kind, found = said.get("type"), said.get("object")
        if not isinstance(found, dict):
            raise self._caller.error(ask, f"an event {kind!r} without an object")
        if kind == "ERROR":
            code = found.get("code")
            raise self._caller.refused(ask, code if isinstance(code, int) else 0, found)
        if kind not in _EVENTS or not isinstance(found.get("metadata"), dict):
            raise self._caller.error(ask, f"an event of type {kind!r}, or without metadata")
        return WatchEvent(kind, found)


def _typed(resource: ApiResource, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": resource.api_version, "kind": resource.kind, **body}


def _selecting(fields: Mapping[str, str]) -> dict[str, str]:
    """Return a fieldSelector query. Commas, equals signs and backslashes in values are escaped for the server's
    parser."""
    terms = (f"{name}={_escaped(value)}" for name, value in fields.items())
    return {"fieldSelector": ",".join(terms)} if fields else {}


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")
