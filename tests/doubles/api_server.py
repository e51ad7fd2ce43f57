"""FakeApiServer: the part of the Kubernetes API that a node agent meets, a real HTTP server, as strict as the real one.

Objects live in a Python store that tests read and change directly; every change has a revision and reaches the watches.
Bad days are asked for: faults in a queue, dropped fields, forgotten revisions, closed watches, refused tokens, absence.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import ssl
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import msgspec
import yaml

from tests.doubles import applied
from tests.oracles import api_rules as apirules
from tests.support.until import News

DRA, CORE, REPORTS = "resource.k8s.io/v1", "v1", "events.k8s.io/v1"
EVENTS, CORE_EVENTS = "events", "events of the core group"
"""Two groups have Events, and other permissions for each."""
SLICES, CLAIMS, CLASSES, TEMPLATES, NODES, PODS = (
    "resourceslices",
    "resourceclaims",
    "deviceclasses",
    "resourceclaimtemplates",
    "nodes",
    "pods",
)
LEASES = "leases"
TOPOLOGIES, TOPOLOGY = "noderesourcetopologies", "topology.node.k8s.io/v1alpha2"

CONSUMABLE, COUNTERS, TAINTS, CONDITIONS, LISTS = "consumable", "counters", "taints", "conditions", "lists"
"""What `dropped_fields` may hold: the fields that an older server, or one without the feature, drops without a word."""

ACCESS_REVIEWS, WHO_AM_I = "selfsubjectaccessreviews", "selfsubjectreviews"
_KINDS = {
    SLICES: (DRA, "ResourceSlice", False),
    CLAIMS: (DRA, "ResourceClaim", True),
    CLASSES: (DRA, "DeviceClass", False),
    TEMPLATES: (DRA, "ResourceClaimTemplate", True),
    NODES: (CORE, "Node", False),
    PODS: (CORE, "Pod", True),
    LEASES: ("coordination.k8s.io/v1", "Lease", True),
    TOPOLOGIES: (TOPOLOGY, "NodeResourceTopology", False),
    EVENTS: (REPORTS, "Event", True),
    CORE_EVENTS: (CORE, "Event", True),
    ACCESS_REVIEWS: ("authorization.k8s.io/v1", "SelfSubjectAccessReview", False),
    WHO_AM_I: ("authentication.k8s.io/v1", "SelfSubjectReview", False),
}
_SELECTABLE = {
    SLICES: ("spec.nodeName", "spec.driver"),
    PODS: ("spec.nodeName", "metadata.namespace"),
    CLAIMS: ("metadata.namespace",),
}
_VERBS = {"POST": "create", "PUT": "replace", "PATCH": "apply", "DELETE": "delete"}
_ITEM_KEY = ("driver", "pool", "device", "shareID")
_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
Object = dict[str, Any]


@dataclass
class Fault:
    """What goes wrong with the next request that matches; "" matches every verb and every resource.

    kind: "status" answers with `status`; "half" hangs up in the middle of a good answer, "close" before any; "hang"
    never answers; "garbage" answers what is no JSON; "slow" takes `pause_s` between pieces of a good answer. Where
    `done` is set the request is carried out first, so that only the answer is lost.
    A watch can be spoilt by all but "half" and "slow".
    """

    kind: str = "status"
    status: int = 500
    reason: str = ""
    message: str = "on purpose"
    retry_after_s: int | None = None
    verb: str = ""
    resource: str = ""
    body: bytes = b'{"kind": "Resource'
    pause_s: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Seen:
    """One request. verb: get, list, watch, create, replace, apply, delete or deletecollection."""

    verb: str
    resource: str
    namespace: str
    name: str
    subresource: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def writes(self) -> bool:
        return self.verb not in ("get", "list", "watch")


@dataclass(frozen=True)
class _Change:
    revision: int
    resource: str
    type: str
    object: Object
    before: Object | None


MERGE = "application/merge-patch+json"


def _merged_json(before: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    kept = {**before} if isinstance(before, dict) else {}
    for key, value in patch.items():
        kept.pop(key, None)
        if value is not None:
            kept[key] = _merged_json(before.get(key) if isinstance(before, dict) else None, value)
    return kept


class Refusal(Exception):  # noqa: N818
    """A request is answered with a Status."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        reason: str = "",
        details: Object | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason or _REASONS.get(code, "Unknown"),
            "details": details or {},
            "code": code,
        }


@dataclass(eq=False)
class _Watch:
    resource: str
    fields: Mapping[str, str]
    bookmarks: bool
    queue: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)


class FakeApiServer:
    """An async context manager: entered, it serves on a free port of 127.0.0.1; left, it stops."""

    def __init__(self, *, tls: Path | None = None, tokens: set[str] | None = None) -> None:
        """`tls`: a folder with tls.crt and tls.key, which are made now where they are not there (needs openssl).
        `tokens`: who may ask; None: anyone."""
        self.tokens = tokens
        self.clock: Callable[[], float] = time.time
        """Seconds since 1970 that this server takes for now, for what it dates."""
        self.demand_certificate = False
        self.dropped_fields: set[str] = set()
        self.version = "v1.37.2"
        """What it says of itself at /version; such requests are not among `requests`."""
        self.node_allocatable = False
        """Whether the gate DRANodeAllocatableResources is on: off in every version up to 1.38."""
        self.answers: deque[Fault] = deque()
        self.absent: set[str] = set()
        """Resources that this server has never heard of."""
        self.expired_in_stream = False
        """Which form 410 takes for a watch: an ERROR event, or the answer's status."""
        self.page: int | None = None
        """The most items in one page, whatever is asked."""
        self.user = "system:serviceaccount:nodeagent:nodeagent"
        self.denied: set[str] = set()
        """What the client may not do, as "VERB RESOURCE", by its own reviews alone."""
        self.requests: list[Seen] = []
        self.rejected: list[Object] = []
        """The Status of every object that broke the rules (422), so that a test can say there was none."""
        self.port = 0
        self.connections = 0
        """How many were ever accepted."""
        self._store: dict[tuple[str, str, str], Object] = {}
        self._owned: dict[tuple[str, str, str], dict[str, dict[tuple[str, ...], set[str]]]] = {}
        self._applied: dict[tuple[str, str, str], applied.Owned] = {}
        """Who has applied which fields of whole objects."""
        self._revision = 100
        self._oldest = 100
        self._history: list[_Change] = []
        self._watches: set[_Watch] = set()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._news = News()
        self.certificate = _certificate(tls) if tls is not None else None
        """Paths of certificate (its own authority) and key."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # Its life

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; a second time on the same port, with the store as it was."""
        context = None
        if self.certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.certificate[0])
            context.load_cert_chain(*self.certificate)
            context.verify_mode = ssl.CERT_OPTIONAL
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Hang up on everybody and listen no more."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        clients = [*self._clients]
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        self._news.tell()

    @contextlib.asynccontextmanager
    async def away(self) -> Any:
        """Stopped for a while."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    def kubeconfig(self, folder: Path, **user: Any) -> str:
        """The path of a kubeconfig for this server, with `user` as its user."""
        cluster: Object = {"server": self.url}
        if self.certificate is not None:
            cluster["certificate-authority"] = str(self.certificate[0])
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    # What tests see and do

    @property
    def revision(self) -> str:
        return str(self._revision)

    @property
    def writes(self) -> int:
        """How many requests there were that change something, refused ones too."""
        return sum(one.writes for one in self.requests)

    @property
    def reads(self) -> int:
        return len(self.requests) - self.writes

    @property
    def watching(self) -> int:
        """How many watches are open."""
        return len(self._watches)

    def count(self, verb: str, resource: str = "") -> int:
        return sum(one.verb == verb and resource in ("", one.resource) for one in self.requests)

    def slices(self, *, node: str = "", driver: str = "") -> list[Object]:
        """Copies of the stored slices, by name."""
        fields = {"spec.nodeName": node, "spec.driver": driver}
        return self.objects(SLICES, **{name: value for name, value in fields.items() if value})

    def objects(self, resource: str, **fields: str) -> list[Object]:
        """Copies of what is stored, by namespace and name."""
        found = [self._store[key] for key in sorted(self._store) if key[0] == resource]
        return [copy.deepcopy(one) for one in found if _selected(one, fields)]

    def find(self, resource: str, name: str, namespace: str = "") -> Object | None:
        return copy.deepcopy(self._store.get((resource, namespace, name)))

    def add(self, resource: str, body: Mapping[str, Any]) -> Object:
        """Store an object as it is, with its status, without checks; what the server fills in is filled in."""
        found = copy.deepcopy(dict(body))
        return copy.deepcopy(self._insert(resource, found["metadata"].get("namespace", ""), found))

    def add_node(self, name: str) -> Object:
        return self.add(NODES, {"metadata": {"name": name}})

    def add_claim(
        self,
        name: str,
        *,
        namespace: str = "default",
        uid: str = "",
        results: list[Object] | None = None,
        config: list[Object] | None = None,
        reserved_for: list[str] | None = None,
        spec: Object | None = None,
    ) -> Object:
        """A claim; `results` (request, driver, pool, device, …): what is allocated to it, None: nothing yet.

        reserved_for: UIDs of pods; none given where it is allocated: one pod.
        """
        status: Object = {}
        if results is not None:
            status["allocation"] = {"devices": {"results": results, **({"config": config} if config else {})}}
            pods = reserved_for if reserved_for is not None else [str(uuid.uuid4())]
            status["reservedFor"] = [{"resource": "pods", "name": f"pod-{pod[:8]}", "uid": pod} for pod in pods]
        metadata = {"name": name, "namespace": namespace, **({"uid": uid} if uid else {})}
        return self.add(CLAIMS, {"metadata": metadata, "spec": spec or {"devices": {}}, "status": status})

    def change(self, resource: str, name: str, namespace: str = "", **parts: Any) -> Object:
        """Set top-level parts (spec, status, …) of a stored object, without checks."""
        before = self._store[resource, namespace, name]
        return copy.deepcopy(self._update((resource, namespace, name), {**before, **copy.deepcopy(parts)}))

    def delete(self, resource: str, name: str, namespace: str = "") -> None:
        """Remove an object; KeyError where it is not there."""
        self._remove((resource, namespace, name))

    def wipe(self, node: str) -> None:
        """Delete all slices of a node, as kubelet does when it starts and when a driver is gone for 30 s."""
        for one in self.slices(node=node):
            self.delete(SLICES, one["metadata"]["name"])

    def forget(self) -> None:
        """Revisions before now are too old from now on: for watches that begin and for pages to be continued."""
        self._oldest = self._revision
        self._history.clear()

    def bookmark(self) -> None:
        """Tell every watch that wants it how far it is."""
        for watch in self._watches:
            if watch.bookmarks:
                watch.queue.put_nowait(self._event("BOOKMARK", watch.resource, self._marker()))

    def expire_watches(self) -> None:
        """Tell every open watch that it is too far behind, and end it."""
        for watch in self._watches:
            watch.queue.put_nowait(_line("ERROR", self._expired().status))
            watch.queue.put_nowait(None)

    def end_watches(self) -> None:
        """End every watch in order, as the server does after timeoutSeconds."""
        for watch in self._watches:
            watch.queue.put_nowait(None)

    async def cut(self) -> None:
        """Hang up on everybody without a word, still listening."""
        clients = [*self._clients]
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    def fail(
        self, status: int, *, times: int = 1, verb: str = "", resource: str = "", retry_after_s: int | None = None
    ) -> None:
        """Answer the next matching requests with a status."""
        for _ in range(times):
            self.answers.append(Fault(status=status, verb=verb, resource=resource, retry_after_s=retry_after_s))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`, which is asked after every change and every request."""
        await self._news.until(holds)

    # The store

    def _insert(self, resource: str, namespace: str, found: Object) -> Object:
        api_version, kind, _ = _KINDS[resource]
        metadata = found.setdefault("metadata", {})
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata["creationTimestamp"] = self._now()
        if resource == SLICES:
            metadata["generation"] = 1
        found = {"kind": kind, "apiVersion": api_version, **found}
        return self._put("ADDED", (resource, namespace, metadata["name"]), found)

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock()))

    def _update(self, key: tuple[str, str, str], found: Object) -> Object:
        """Store another state of an object; nothing happens where it is the same."""
        before = self._store[key]
        if _content(found) == _content(before):
            return before
        metadata = {**found["metadata"]}
        metadata |= {name: before["metadata"][name] for name in ("uid", "creationTimestamp", "name")}
        if key[0] == SLICES:
            metadata["generation"] = before["metadata"]["generation"] + (found["spec"] != before["spec"])
        return self._put("MODIFIED", key, {**found, "metadata": metadata})

    def _remove(self, key: tuple[str, str, str]) -> Object:
        before = self._store.pop(key)
        self._owned.pop(key, None)
        self._applied.pop(key, None)
        return self._record("DELETED", key[0], copy.deepcopy(before), before)

    def _put(self, kind: str, key: tuple[str, str, str], found: Object) -> Object:
        before = self._store.get(key)
        self._store[key] = found
        return self._record(kind, key[0], found, before)

    def _record(self, kind: str, resource: str, found: Object, before: Object | None) -> Object:
        self._revision += 1
        found["metadata"] = {**found["metadata"], "resourceVersion": str(self._revision)}
        change = _Change(self._revision, resource, kind, copy.deepcopy(found), before)
        self._history.append(change)
        for watch in self._watches:
            if (line := self._seen_by(watch, change)) is not None:
                watch.queue.put_nowait(line)
        self._news.tell()
        return found

    def _seen_by(self, watch: _Watch, change: _Change) -> bytes | None:
        """The event as this watch has it: what leaves its selection is deleted for it, what enters is added."""
        if change.resource != watch.resource:
            return None
        now = change.type != "DELETED" and _selected(change.object, watch.fields)
        before = change.before is not None and _selected(change.before, watch.fields)
        kind = {(False, True): "ADDED", (True, True): "MODIFIED", (True, False): "DELETED"}.get((before, now))
        return self._event(kind, change.resource, change.object) if kind else None

    def _event(self, kind: str, resource: str, found: Object) -> bytes:
        api_version, name, _ = _KINDS[resource]
        return _line(kind, {"kind": name, "apiVersion": api_version, **found})

    def _marker(self) -> Object:
        return {"metadata": {"resourceVersion": self.revision, "creationTimestamp": None}}

    def _expired(self) -> Refusal:
        return Refusal(410, f"too old resource version: ({self._oldest - 1} needed {self._oldest})")

    # One connection

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(OSError, h11.ProtocolError, asyncio.CancelledError):
                await _Client(self, reader, writer).converse()
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    def seen(self, request: h11.Request, body: bytes) -> Seen:
        """The request as the path means it; Refusal where it means nothing."""
        url = urlsplit(bytes(request.target).decode())
        headers = {bytes(name).decode(): bytes(value).decode() for name, value in request.headers}
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        if (bytes(request.method), url.path) == (b"GET", "/version"):
            return Seen("version", "", "", "", "", query, headers, body)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        core = parts[0] == "api"
        rest = parts[2:] if core else parts[3:]
        group = "/".join(parts[1:2] if core else parts[1:3])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        resource, name, subresource = (*rest, "", "", "")[:3]
        if (resource, group) == (EVENTS, CORE):
            resource = CORE_EVENTS
        method = bytes(request.method).decode()
        watch = query.get("watch") in ("true", "1")
        verb = _VERBS.get(method, method) if method != "GET" else "get" if name else "watch" if watch else "list"
        if verb == "delete" and not name:
            verb = "deletecollection"
        found = Seen(verb, resource, namespace, name, subresource, query, headers, body)
        self.requests.append(found)
        self._news.tell()
        if resource not in _KINDS or resource in self.absent or _KINDS[resource][0] != group:
            raise Refusal(404, "the server could not find the requested resource", details={})
        if bool(namespace) != _KINDS[resource][2] and (name or verb == "create"):
            raise Refusal(404, "the server could not find the requested resource", details={})
        return found

    def allow(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """Refusal 401 for an unknown client."""
        scheme, _, token = seen.headers.get("authorization", "").partition(" ")
        if self.tokens is not None and (scheme != "Bearer" or token not in self.tokens):
            raise Refusal(401, "Unauthorized")
        if self.demand_certificate and not writer.get_extra_info("peercert"):
            raise Refusal(401, "Unauthorized")

    def fault(self, seen: Seen) -> Fault | None:
        for fault in self.answers if seen.verb != "version" else ():
            if fault.verb in ("", seen.verb) and fault.resource in ("", seen.resource):
                self.answers.remove(fault)
                return fault
        return None

    def answer(self, seen: Seen) -> tuple[int, Object]:
        """Carry out anything but a watch; Refusal."""
        carry_out: Callable[[Seen], tuple[int, Object]] | None = getattr(self, f"_{seen.verb}", None)
        if carry_out is None or (seen.subresource and seen.verb not in ("get", "replace", "apply")):
            raise Refusal(405, f"the server does not allow this method: {seen.verb}")
        try:
            return carry_out(seen)
        except Refusal as refusal:
            if refusal.code == 422:
                self.rejected.append(refusal.status)
            raise

    # The verbs

    def _version(self, seen: Seen) -> tuple[int, Object]:
        return 200, {"major": "1", "gitVersion": self.version}

    def _get(self, seen: Seen) -> tuple[int, Object]:
        return 200, self._existing(seen)

    def _list(self, seen: Seen) -> tuple[int, Object]:
        fields = _selectors(seen)
        keys = [key for key in sorted(self._store) if key[0] == seen.resource and seen.namespace in ("", key[1])]
        matching = [key for key in keys if _selected(self._store[key], fields)]
        revision = self._revision
        if token := seen.query.get("continue"):
            after, revision = json.loads(base64.urlsafe_b64decode(token))
            if revision < self._oldest:
                raise Refusal(410, "The provided continue parameter is too old to display a consistent list result.")
            matching = [key for key in matching if list(key) > after]
        limit = min(int(seen.query.get("limit") or 0) or len(matching), self.page or len(matching))
        page, metadata = matching[:limit], {"resourceVersion": str(revision)}
        if len(matching) > limit:
            metadata["continue"] = base64.urlsafe_b64encode(json.dumps([page[-1], revision]).encode()).decode()
            metadata["remainingItemCount"] = len(matching) - limit  # type: ignore[assignment]
        api_version, kind, _ = _KINDS[seen.resource]
        items = [{k: v for k, v in self._store[key].items() if k not in ("kind", "apiVersion")} for key in page]
        return 200, {"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata, "items": items}

    def _create(self, seen: Seen) -> tuple[int, Object]:
        found = self._body(seen)
        if seen.resource in (ACCESS_REVIEWS, WHO_AM_I):
            return 201, {**found, "status": self._reviewed(seen.resource, found)}
        metadata = found["metadata"]
        if "name" not in metadata and "generateName" in metadata:
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        name = metadata.get("name", "")
        if metadata.get("resourceVersion"):
            raise Refusal(400, "resourceVersion should not be set on objects to be created")
        wrong = [*apirules._subdomain(name, "metadata.name")] if name else []
        self._check(seen, [*wrong, *self._wrong(seen.resource, found, None)], name)
        self._admit(seen, found)
        if (seen.resource, seen.namespace, name) in self._store:
            details = {"name": name, "kind": seen.resource}
            raise Refusal(409, f'{seen.resource} "{name}" already exists', reason="AlreadyExists", details=details)
        if seen.resource == CLAIMS:
            found["status"] = {}
        for given in ("uid", "creationTimestamp", "generation"):
            metadata.pop(given, None)
        if seen.namespace:
            metadata["namespace"] = seen.namespace
        return 201, self._insert(seen.resource, seen.namespace, found)

    def _reviewed(self, resource: str, found: Object) -> Object:
        """What reviews say of the client. They are not stored."""
        if resource == WHO_AM_I:
            return {"userInfo": {"username": self.user}}
        asked = found["spec"]["resourceAttributes"]
        assert asked.keys() <= {"verb", "group", "resource", "subresource", "name", "namespace"}
        what = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        allowed = f"{asked['verb']} {what}" not in self.denied
        return {"allowed": allowed, "reason": "" if allowed else "no role"}

    def _replace(self, seen: Seen) -> tuple[int, Object]:
        before, found = self._existing(seen), self._body(seen)
        given, stored = found["metadata"], before["metadata"]
        if given.get("name") != seen.name:
            raise Refusal(400, f"the name of the object ({given.get('name')}) does not match the name on the URL")
        for part in ("resourceVersion", "uid"):
            if given.get(part) and given[part] != stored[part]:
                raise self._conflict(
                    seen, "the object has been modified; please apply your changes to the latest version"
                )
        kept = "spec" if seen.subresource == "status" else "status"
        found.pop(kept, None)
        if kept in before:
            found[kept] = before[kept]
        self._check(seen, [*self._wrong(seen.resource, found, before)], seen.name)
        self._admit(seen, found)
        return 200, self._update((seen.resource, seen.namespace, seen.name), found)

    def _delete(self, seen: Seen) -> tuple[int, Object]:
        before = self._existing(seen)
        options = json.loads(seen.body) if seen.body else {}
        uid = (options.get("preconditions") or {}).get("uid")
        if uid and uid != before["metadata"]["uid"]:
            have = before["metadata"]["uid"]
            raise self._conflict(seen, f"Precondition failed: UID in precondition: {uid}, UID in object meta: {have}")
        self._remove((seen.resource, seen.namespace, seen.name))
        details = {"name": seen.name, "kind": seen.resource, "uid": before["metadata"]["uid"]}
        return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _deletecollection(self, seen: Seen) -> tuple[int, Object]:
        answer = self._list(seen)
        for one in answer[1]["items"]:
            self._remove((seen.resource, one["metadata"].get("namespace", ""), one["metadata"]["name"]))
        return answer

    def _apply(self, seen: Seen) -> tuple[int, Object]:
        """Server-side apply of a claim's status.devices, a list that is merged by driver, pool, device and share; a
        JSON merge patch of an Event."""
        if seen.resource in (EVENTS, CORE_EVENTS) and seen.headers.get("content-type") == MERGE:
            return self._merge(seen)
        if seen.headers.get("content-type") != "application/apply-patch+yaml":
            raise Refusal(415, "the body of the request was in an unknown format")
        if seen.resource in (NODES, TOPOLOGIES) and not seen.subresource:
            return self._apply_object(seen)
        if (seen.resource, seen.subresource) != (CLAIMS, "status"):
            raise Refusal(405, "this server applies nothing but the status of claims")
        manager = seen.query.get("fieldManager", "")
        if not manager or len(manager) > 128:
            raise Refusal(422, "fieldManager: Required value: is required for apply patch")
        body, before = self._body(seen), self._existing(seen)
        if body["metadata"].get("managedFields") or body["metadata"].get("name", seen.name) != seen.name:
            raise Refusal(400, "metadata.managedFields must be nil, and metadata.name the name on the URL")
        key = (seen.resource, seen.namespace, seen.name)
        owned = copy.deepcopy(self._owned.get(key, {}))
        found = copy.deepcopy(before)
        devices = _merged(found.get("status", {}).get("devices", []), body, manager, owned, seen.query.get("force"))
        found["status"] = {**found.get("status", {}), "devices": devices}
        if not devices:
            del found["status"]["devices"]
        self._check(seen, [*self._wrong(CLAIMS, found, before)], seen.name)
        self._owned[key] = owned
        return 200, self._update(key, found)

    def _apply_object(self, seen: Seen) -> tuple[int, Object]:
        """Create or change a whole object."""
        body, key = self._body(seen), (seen.resource, seen.namespace, seen.name)
        before, manager = self._store.get(key), seen.query.get("fieldManager", "")
        if not manager:
            raise Refusal(422, "fieldManager: Required value: is required for apply patch")
        uid = body["metadata"].get("uid")
        if uid and uid != (before or {"metadata": {}})["metadata"].get("uid"):
            raise self._conflict(seen, f"uid mismatch: the provided object specified uid {uid}")
        owned = copy.deepcopy(self._applied.get(key, {}))
        start = before or {"metadata": {"name": seen.name}}
        try:
            found = applied.merged(start, body, manager, owned, force=seen.query.get("force") == "true")
        except applied.AppliedConflictError as conflict:
            raise self._conflict(seen, f"Apply failed with 1 conflict: {conflict}") from None
        self._applied[key] = owned
        if before is None:
            return 201, self._insert(seen.resource, seen.namespace, found)
        return 200, self._update(key, found)

    def _merge(self, seen: Seen) -> tuple[int, Object]:
        before = self._existing(seen)
        found = _merged_json(before, json.loads(seen.body))
        self._check(seen, [*self._wrong(seen.resource, found, before)], seen.name)
        return 200, self._update((seen.resource, seen.namespace, seen.name), found)

    def _existing(self, seen: Seen) -> Object:
        found = self._store.get((seen.resource, seen.namespace, seen.name))
        if found is None:
            details = {"name": seen.name, "kind": seen.resource, "group": _KINDS[seen.resource][0].rpartition("/")[0]}
            raise Refusal(404, f'{seen.resource} "{seen.name}" not found', details=details)
        return found

    def _conflict(self, seen: Seen, why: str) -> Refusal:
        message = f'Operation cannot be fulfilled on {seen.resource} "{seen.name}": {why}'
        return Refusal(409, message, details={"name": seen.name, "kind": seen.resource})

    def _body(self, seen: Seen) -> Object:
        """The sent object without what this server's features drop, in the form in which it is stored."""
        api_version, kind, namespaced = _KINDS[seen.resource]
        try:
            found = json.loads(seen.body)
            assert (found["apiVersion"], found["kind"]) == (api_version, kind)
            assert isinstance(found["metadata"], dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise Refusal(400, f"the object provided is unrecognized, expected {api_version}, Kind={kind}") from None
        if namespaced and found["metadata"].get("namespace", seen.namespace) != seen.namespace:
            raise Refusal(400, "the namespace of the provided object does not match the namespace sent on the request")
        if seen.resource == SLICES:
            found["spec"] = self._stored_spec(found.get("spec", {}), self._store.get((SLICES, "", seen.name)))
        if seen.resource == CLAIMS:
            _typed(found.get("status", {}).get("devices"), list[apirules.DeviceStatus] | None)
        return found  # type: ignore[no-any-return]

    def _stored_spec(self, spec: Object, before: Object | None) -> Object:
        try:
            typed = apirules.read_slice(spec)
        except ValueError as error:
            raise Refusal(
                400, f"ResourceSlice in version v1 cannot be handled: strict decoding error: {error}"
            ) from None
        if COUNTERS in self.dropped_fields:
            typed.shared_counters = None
        counted = before is not None and any(map(_is_counted, before["spec"].get("devices", ())))
        for device in typed.devices or ():
            _drop(device, self.dropped_fields)
            if not self.node_allocatable and not counted:
                device.node_allocatable_resources = None
            for taint in device.taints or ():
                taint.time_added = taint.time_added or self._now()
        return msgspec.to_builtins(typed)  # type: ignore[no-any-return]

    def _wrong(self, resource: str, found: Object, before: Object | None) -> apirules.Causes:
        if resource == SLICES:
            old = apirules.read_slice(before["spec"]) if before is not None else None
            yield from apirules.wrong_with_slice(apirules.read_slice(found["spec"]), old)
        if resource in (EVENTS, CORE_EVENTS):
            yield from apirules.wrong_with_event(found, core=resource == CORE_EVENTS)
            if before is not None and {**found, "series": None} != {**before, "series": None}:
                yield "message", "FieldValueInvalid", "Invalid value: field is immutable"
        if resource == CLAIMS and before is not None:
            if found.get("spec") != before.get("spec"):
                yield "spec", "FieldValueInvalid", "Invalid value: field is immutable"
            status = found.get("status", {})
            results = status.get("allocation", {}).get("devices", {}).get("results", [])
            allocated = {tuple(one.get(part, "") for part in _ITEM_KEY) for one in results}
            devices = _typed(status.get("devices") or [], list[apirules.DeviceStatus])
            yield from apirules.wrong_with_statuses(devices, allocated)

    def _check(self, seen: Seen, wrong: list[tuple[str, str, str]], name: str) -> None:
        if not name:
            wrong = [
                ("metadata.name", "FieldValueRequired", "Required value: name or generateName is required"),
                *wrong,
            ]
        if wrong:
            causes = [{"field": path, "reason": reason, "message": text} for path, reason, text in wrong]
            lines = ", ".join(f"{path}: {text}" for path, _, text in wrong)
            kind = _KINDS[seen.resource][1]
            details = {"name": name, "kind": kind, "causes": causes}
            raise Refusal(422, f'{kind} "{name}" is invalid: {lines}', details=details)

    def _admit(self, seen: Seen, found: Object) -> None:
        """Refusal 403 as of the admission plugin NodeDeclaredFeatures: it looks at what would be stored alone."""
        if seen.resource != SLICES or not self.node_allocatable:
            return
        if not any(map(_is_counted, found["spec"].get("devices") or ())):
            return
        name, gate = found["spec"].get("nodeName", ""), "DRANodeAllocatableResources"
        node = self._store.get((NODES, "", name))
        if node is None or gate not in node.get("status", {}).get("declaredFeatures", ()):
            why = f'node "{name}" does not support {gate} feature'
            slice_name = found["metadata"].get("name", "")
            raise Refusal(403, f'resourceslices.resource.k8s.io "{slice_name}" is forbidden: {why}')

    # Watches

    @contextlib.contextmanager
    def watch(self, seen: Seen) -> Iterator[_Watch]:
        """A watch with what it has missed already in its queue; Refusal 410."""
        bookmarks = seen.query.get("allowWatchBookmarks") == "true"
        watch = _Watch(seen.resource, _selectors(seen), bookmarks)
        since = int(seen.query.get("resourceVersion") or 0)
        if 0 < since < self._oldest:
            if not self.expired_in_stream:
                raise self._expired()
            watch.queue.put_nowait(_line("ERROR", self._expired().status))
            watch.queue.put_nowait(None)
        elif since == 0:
            for one in self.objects(seen.resource):
                if _selected(one, watch.fields):
                    watch.queue.put_nowait(self._event("ADDED", seen.resource, one))
        for change in self._history:
            if change.revision > since > 0 and (line := self._seen_by(watch, change)) is not None:
                watch.queue.put_nowait(line)
        self._watches.add(watch)
        self._news.tell()
        try:
            yield watch
        finally:
            self._watches.discard(watch)
            self._news.tell()


class _Client:
    """One connection: requests one after the other, until someone hangs up."""

    def __init__(self, server: FakeApiServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._talk = h11.Connection(h11.SERVER)

    async def converse(self) -> None:
        while (request := await self._request()) is not None:
            try:
                await self._serve(*request)
            except Refusal as refusal:
                await self._refuse(refusal)
            if self._talk.our_state is not h11.DONE or self._talk.their_state is not h11.DONE:
                return
            self._talk.start_next_cycle()

    async def _request(self) -> tuple[h11.Request, bytes] | None:
        head, body = None, b""
        while True:
            event = self._talk.next_event()
            if event is h11.NEED_DATA:
                self._talk.receive_data(await self._reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return head, body
            else:
                return None

    async def _serve(self, request: h11.Request, body: bytes) -> None:
        server = self._server
        seen = server.seen(request, body)
        server.allow(seen, self._writer)
        fault = server.fault(seen)
        if fault is not None and not fault.done and await self._spoil(fault):
            return
        if seen.verb == "watch":
            await self._stream(seen)
            return
        status, answer = server.answer(seen)
        if fault is not None and fault.done and await self._spoil(fault):
            return
        raw = json.dumps(answer).encode()
        half = fault is not None and fault.kind == "half"
        await self._send(status, raw, only=len(raw) // 2 if half else None, pause_s=fault.pause_s if fault else 0.0)

    async def _spoil(self, fault: Fault) -> bool:
        """Do what needs no good answer; whether that was all."""
        if fault.kind == "status":
            reason = fault.reason or _REASONS.get(fault.status, "Unknown")
            raise Refusal(fault.status, fault.message, reason=reason, retry_after_s=fault.retry_after_s)
        if fault.kind == "hang":
            await self._reader.read()
        elif fault.kind == "garbage":
            await self._send(200, fault.body)
        elif fault.kind != "close":
            return False
        if fault.kind != "garbage":
            self._writer.transport.abort()
        return True

    async def _refuse(self, refusal: Refusal) -> None:
        extra = [] if refusal.retry_after_s is None else [("retry-after", str(refusal.retry_after_s))]
        await self._send(refusal.code, json.dumps(refusal.status).encode(), extra)

    async def _send(
        self,
        status: int,
        raw: bytes,
        extra: list[tuple[str, str]] | None = None,
        *,
        only: int | None = None,
        pause_s: float = 0.0,
    ) -> None:
        headers = [("content-type", "application/json"), ("content-length", str(len(raw))), *(extra or [])]
        await self._write(h11.Response(status_code=status, headers=headers))
        for start in range(0, len(raw), 1 + len(raw) // 8) if pause_s else ():
            await self._write(h11.Data(data=raw[start : start + 1 + len(raw) // 8]))
            await asyncio.sleep(pause_s)
        if not pause_s:
            await self._write(h11.Data(data=raw[:only]))
        if only is not None:
            self._writer.close()
            await self._writer.wait_closed()
            return
        await self._write(h11.EndOfMessage())

    async def _stream(self, seen: Seen) -> None:
        with self._server.watch(seen) as watch:
            await self._write(h11.Response(status_code=200, headers=[("transfer-encoding", "chunked")]))
            gone = asyncio.ensure_future(self._reader.read(1))
            deadline_s = time.monotonic() + float(seen.query.get("timeoutSeconds") or 1800)
            try:
                while (line := await self._line(watch, gone, deadline_s)) is not None:
                    await self._write(h11.Data(data=line))
            finally:
                gone.cancel()
            if not gone.done():
                await self._write(h11.EndOfMessage())
        await asyncio.gather(gone, return_exceptions=True)

    async def _line(self, watch: _Watch, gone: asyncio.Future[bytes], deadline_s: float) -> bytes | None:
        """The next event; None where the watch ends or the client is gone."""
        news = asyncio.ensure_future(watch.queue.get())
        try:
            left_s = max(0.0, deadline_s - time.monotonic())
            await asyncio.wait({news, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            return news.result() if news.done() else None
        finally:
            news.cancel()

    async def _write(self, event: h11.Event) -> None:
        self._writer.write(self._talk.send(event) or b"")
        await self._writer.drain()


def _merged(
    stored: list[Object],
    body: Object,
    manager: str,
    owned: dict[str, dict[tuple[str, ...], set[str]]],
    force: str | None,
) -> list[Object]:
    """The list after a manager applied its items; `owned` (manager, item, fields) is brought up to date."""
    items = {_key(one): one for one in stored}
    mine = owned.get(manager, {})
    given = body.get("status", {}).get("devices", [])
    wanted = {_key(one): one for one in given}
    if len(wanted) < len(given) or any(_repeats(one.get("conditions") or []) for one in given):
        raise Refusal(500, "failed to create typed patch object: duplicate entries for key")
    for key, one in wanted.items():
        for other, theirs in owned.items():
            clash = {name for name in theirs.get(key, set()) & set(one) if items.get(key, {}).get(name) != one[name]}
            if other != manager and clash and force != "true":
                raise Refusal(409, f'Apply failed with {len(clash)} conflict: conflict with "{other}": {sorted(clash)}')
            if other != manager:
                theirs.get(key, set()).difference_update(clash)
    owned[manager] = {key: set(one) - set(_ITEM_KEY) for key, one in wanted.items()}
    for key in [*items]:
        gone = mine.get(key, set()) - {name for theirs in owned.values() for name in theirs.get(key, set())}
        items[key] = {name: value for name, value in items[key].items() if name not in gone}
        if key in mine and not any(key in theirs for theirs in owned.values()):
            del items[key]
    for key, one in wanted.items():
        items[key] = {**items.get(key, {}), **one}
    return [{"conditions": None, **one} for one in items.values()]


def _repeats(conditions: list[Object]) -> bool:
    return len({one.get("type") for one in conditions}) < len(conditions)


def _key(item: Object) -> tuple[str, ...]:
    return tuple(item.get(part, "") for part in _ITEM_KEY)


def _typed(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:
        raise Refusal(400, f"strict decoding error: {error}") from None


def _is_counted(device: Object) -> bool:
    return bool(device.get("nodeAllocatableResources"))


def _drop(device: apirules.Device, features: set[str]) -> None:
    if TAINTS in features:
        device.taints = None
    if COUNTERS in features:
        device.consumes_counters = None
    if CONSUMABLE in features:
        device.allow_multiple_allocations = None
        for capacity in (device.capacity or {}).values():
            capacity.request_policy = None
    if CONDITIONS in features:
        device.binding_conditions = device.binding_failure_conditions = None
    for one in (device.attributes or {}).values() if LISTS in features else ():
        one.ints = one.bools = one.strings = one.versions = None


def _selectors(seen: Seen) -> dict[str, str]:
    """spec.nodeName=a,spec.driver=b; Refusal where the resource cannot be selected by that."""
    text = seen.query.get("fieldSelector", "")
    fields = dict(term.replace("==", "=").split("=", 1) for term in text.split(",") if term)
    known = ("metadata.name", *_SELECTABLE.get(seen.resource, ()))
    for name in fields:
        if name not in known:
            raise Refusal(400, f'field label not supported: "{name}"')
    return fields


def _selected(found: Object, fields: Mapping[str, str]) -> bool:
    for path, value in fields.items():
        part: Any = found
        for step in path.split("."):
            part = part.get(step, "") if isinstance(part, dict) else ""
        if part != value:
            return False
    return True


def _content(found: Object) -> Object:
    """An object without what the server itself counts."""
    own = ("resourceVersion", "generation", "creationTimestamp", "uid", "managedFields")
    return {**found, "metadata": {k: v for k, v in found["metadata"].items() if k not in own}}


def _line(kind: str, found: Object) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, good for servers and clients."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    if certificate.exists():
        return certificate, key
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=fake"
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *extra], check=True, capture_output=True)
    return certificate, key
