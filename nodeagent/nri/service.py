"""The Plugin service: passes the runtime's calls on one connection to the handler that decides.

Promises: each call is answered within the runtime's time limit. If the creation of a container or the start of a pod
cannot be decided, it is refused with the reason; any other failure is logged and answered with "no change", because an
error there would only prevent a container from being stopped or removed.

A runtime gives up on a plugin whose answer is late (containerd/nri pkg/adaptation). After a call about a container it
closes the connection; after Synchronize it closes it too or, as observed with containerd 1.7, keeps it open and never
asks again. So an answer that was nevertheless late is reported, for the connection to be re-established.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import structlog
from google.protobuf.message import DecodeError, Message

from nodeagent.core.model.container import Adjustment, Container, Pod, Resources, Update
from nodeagent.errors import NodeagentError
from nodeagent.nri.translation import read_container, read_pod, read_resources, write_adjustment, write_update
from nodeagent.nri.ttrpc import Code, Method, RpcError, ServedCall, Services
from nodeagent.pb import nri_pb2 as pb
from nodeagent.telemetry import metrics
from nodeagent.telemetry.log import new_op

PLUGIN = "nri.pkg.api.v1alpha1.Plugin"
WAITING, PATIENCE, LATE = 0.7, 0.9, 0.95
"""Fractions of the runtime's time limit: how long a handler may wait before it answers from what it knows;
how long a decision may take at all; and from when on the runtime may have given up, as its clock started
before the request arrived."""
MOST_LISTED = 1 << 16
"""Most pods and containers in one synchronization; more are refused."""

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
log = structlog.get_logger()


class Handler(Protocol):
    """Makes the decisions. No method may call back into the runtime before returning: the
    runtime is waiting meanwhile."""

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Sequence[Update]:
        """Receive everything that exists, at each connection. Return what to change."""

    async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        """Return what a new container gets, and what changes for others before it exists. Raising refuses the
        container. within_s: how long it may wait for anything; after that it answers from what is known."""

    async def update(self, pod: Pod, container: Container, resources: Resources) -> Sequence[Update]:
        """Handle kubelet changing a container to `resources`. An update of the container itself
        takes precedence over them."""

    async def stopped(self, pod: Pod, container: Container) -> Sequence[Update]:
        """Handle a stopped container. Return what changes for others."""

    async def removed(self, pod: Pod, container: Container) -> None:
        """Handle a removed container."""


@runtime_checkable
class HandlesStarts(Protocol):
    """A handler that is also notified when containers start."""

    async def starting(self, pod: Pod, container: Container, within_s: float) -> None:
        """Handle a container that exists and is about to run its first instruction. Raising prevents its start.
        within_s: how long it may wait for anything."""

    async def started(self, pod: Pod, container: Container) -> None:
        """Handle a container whose process runs."""


@runtime_checkable
class HandlesPods(Protocol):
    """A handler that is also notified about pods."""

    async def pod_started(self, pod: Pod) -> None:
        """Handle a pod whose sandbox exists and whose containers do not yet. Raising prevents its start."""

    async def pod_stopped(self, pod: Pod) -> None:
        """Handle a pod whose containers have all stopped."""

    async def pod_removed(self, pod: Pod) -> None:
        """Handle a pod whose sandbox is gone."""


_ALWAYS = (pb.CREATE_CONTAINER, pb.UPDATE_CONTAINER, pb.STOP_CONTAINER, pb.REMOVE_CONTAINER)
_STARTS = (pb.START_CONTAINER, pb.POST_START_CONTAINER)
_PODS = (pb.RUN_POD_SANDBOX, pb.STOP_POD_SANDBOX, pb.REMOVE_POD_SANDBOX)


def event_mask(handler: Handler) -> int:
    """Return the event mask to which the handler subscribes."""
    starts = _STARTS if isinstance(handler, HandlesStarts) else ()
    pods = _PODS if isinstance(handler, HandlesPods) else ()
    return sum(1 << (event - 1) for event in (*_ALWAYS, *starts, *pods))


class PluginService:
    """Serves one connection. `calls` counts the calls, `failed` those whose handler failed."""

    def __init__(
        self,
        handler: Handler,
        *,
        request_timeout_s: float,
        on_failure: Callable[[], None],
        on_late: Callable[[str], None],
    ) -> None:
        """`on_failure` is called after each failure; `on_late`, with a reason, after an answer for which the
        runtime may not have waited."""
        self.configured, self.synchronized = asyncio.Event(), asyncio.Event()
        """`synchronized` is set once the runtime has the answer to everything that it listed."""
        self.runtime = pb.ConfigureRequest()
        self.calls = self.failed = 0
        self._listed_all = False
        self._on_late = on_late
        self._handler = handler
        self._request_timeout_s = request_timeout_s
        self._on_failure = on_failure
        self._listed = pb.SynchronizeRequest()
        self._methods = self._served_methods()

    @property
    def request_timeout_s(self) -> float:
        """Return how long the runtime waits for an answer, in seconds."""
        return self.runtime.request_timeout / 1e3 if self.runtime.request_timeout > 0 else self._request_timeout_s

    def services(self) -> Services:
        """Return the methods in the form that a connection serves."""
        return {PLUGIN: self._methods}

    def _served_methods(self) -> dict[str, Method]:
        return {
            "Configure": self._method(pb.ConfigureRequest, self._configure),
            "Synchronize": self._method(pb.SynchronizeRequest, self._synchronize),
            "Shutdown": self._method(pb.Empty, self._shutdown),
            "CreateContainer": self._method(pb.CreateContainerRequest, self._create),
            "UpdateContainer": self._method(pb.UpdateContainerRequest, self._update),
            "StopContainer": self._method(pb.StopContainerRequest, self._stop),
            "StateChange": self._method(pb.StateChangeEvent, self._state_change),
        } | {name: self._event(*event) for name, event in _EVENTS.items()}

    def _method(self, kind: type[Q], work: Callable[[Q, float], Awaitable[Message]]) -> Method:
        async def served(payload: bytes, waits_s: float | None) -> bytes:
            try:
                request = kind.FromString(payload)
            except DecodeError as error:
                raise RpcError(Code.INVALID_ARGUMENT, f"cannot read {kind.__name__}: {error}") from None
            self.calls += 1
            return (await work(request, self._limit_s(waits_s))).SerializeToString()

        return served

    def _limit_s(self, waits_s: float | None) -> float:
        """Return how long the runtime waits for an answer. waits_s: the limit in the request, or None."""
        return self.request_timeout_s if waits_s is None else min(waits_s, self.request_timeout_s)

    def served(self, one: ServedCall) -> None:
        """Record how long an answer took, as reported by the connection."""
        if one.service != PLUGIN or one.method not in self._methods:
            return
        limit_s = self._limit_s(one.waits_s)
        metrics.NRI_ANSWER_SECONDS.labels(one.method).observe(one.took_s)
        if one.took_s >= limit_s * (LATE if one.answered else PATIENCE):
            metrics.NRI_LATE_ANSWERS.labels(one.method).inc()
            how = f"it took {one.took_s:.3g} s" if one.answered else f"there was none after {one.took_s:.3g} s"
            self._on_late(f"cannot answer {one.method} in time: {how}, the runtime waits {limit_s:.3g} s")
        elif one.method == "Synchronize" and one.answered and self._listed_all:
            self.synchronized.set()

    def _event(self, kind: type[Any], event: pb.Event, answer: type[Message]) -> Method:
        async def told(request: Any, limit_s: float) -> Message:
            container = request.container if kind in _OF_CONTAINERS else pb.Container()
            await self._tell(event, request.pod, container, limit_s)
            return answer()

        return self._method(kind, told)

    async def _configure(self, request: pb.ConfigureRequest, _: float) -> pb.ConfigureResponse:
        self.runtime = request
        self.configured.set()
        return pb.ConfigureResponse(events=event_mask(self._handler))

    async def _shutdown(self, _: pb.Empty, __: float) -> pb.Empty:
        log.info("runtime-shuts-down", runtime=self.runtime.runtime_name)
        return pb.Empty()

    async def _synchronize(self, request: pb.SynchronizeRequest, limit_s: float) -> pb.SynchronizeResponse:
        """Synchronize once the last part is there: a container may be listed before its pod."""
        if request.more and not request.pods and not request.containers:
            # containerd sends such parts endlessly if one pod has more containers than fit into a message.
            log.error("runtime-lists-in-empty-parts", runtime=self.runtime.runtime_name)
            raise RpcError(Code.INVALID_ARGUMENT, "cannot synchronize: an empty part that is not the last")
        self._listed.MergeFrom(request)
        if len(self._listed.pods) + len(self._listed.containers) > MOST_LISTED:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"cannot synchronize: more than {MOST_LISTED} pods and containers")
        if request.more:
            return pb.SynchronizeResponse(more=True)
        listed, self._listed = self._listed, pb.SynchronizeRequest()
        pods = {pod.id: read_pod(pod) for pod in listed.pods}
        containers = [read_container(one, pods.get(one.pod_sandbox_id)) for one in listed.containers]
        work = self._handler.synchronize(tuple(pods.values()), tuple(containers))
        updates = await self._or_none("synchronize", self._updates(work), limit_s, containers=len(containers))
        self._listed_all = True
        return pb.SynchronizeResponse(update=updates)

    async def _create(self, request: pb.CreateContainerRequest, limit_s: float) -> pb.CreateContainerResponse:
        pod, container = _subject(request.pod, request.container)
        work = self._created(pod, container, WAITING * limit_s)
        return await self._decide("create", work, limit_s, **_names(container))

    async def _created(self, pod: Pod, container: Container, within_s: float) -> pb.CreateContainerResponse:
        adjustment, updates = await self._handler.create(pod, container, within_s)
        return pb.CreateContainerResponse(
            adjust=write_adjustment(adjustment), update=[write_update(one) for one in updates]
        )

    async def _update(self, request: pb.UpdateContainerRequest, limit_s: float) -> pb.UpdateContainerResponse:
        pod, container = _subject(request.pod, request.container)
        resources = read_resources(request.linux_resources, container.id)
        work = self._updates(self._handler.update(pod, container, resources))
        return pb.UpdateContainerResponse(update=await self._or_none("update", work, limit_s, **_names(container)))

    async def _stop(self, request: pb.StopContainerRequest, limit_s: float) -> pb.StopContainerResponse:
        pod, container = _subject(request.pod, request.container)
        work = self._updates(self._handler.stopped(pod, container))
        return pb.StopContainerResponse(update=await self._or_none("stopped", work, limit_s, **_names(container)))

    async def _state_change(self, request: pb.StateChangeEvent, limit_s: float) -> pb.Empty:
        """Handle notifications that need no answer, as older runtimes send them."""
        await self._tell(request.event, request.pod, request.container, limit_s)
        return pb.Empty()

    async def _tell(self, event: pb.Event, of_pod: pb.PodSandbox, of_container: pb.Container, limit_s: float) -> None:
        handler = self._handler
        pod, container = _subject(of_pod, of_container)
        if event == pb.REMOVE_CONTAINER:
            await self._or_none("removed", handler.removed(pod, container), limit_s, **_names(container))
        elif event == pb.START_CONTAINER and isinstance(handler, HandlesStarts):
            work = handler.starting(pod, container, WAITING * limit_s)
            await self._decide("starting", work, limit_s, **_names(container))
        elif event == pb.POST_START_CONTAINER and isinstance(handler, HandlesStarts):
            await self._or_none("started", handler.started(pod, container), limit_s, **_names(container))
        elif event == pb.RUN_POD_SANDBOX and isinstance(handler, HandlesPods):
            await self._decide("pod_started", handler.pod_started(pod), limit_s, pod=str(pod))
        elif event in _PODS and isinstance(handler, HandlesPods):
            handle = handler.pod_stopped if event == pb.STOP_POD_SANDBOX else handler.pod_removed
            await self._or_none(handle.__name__, handle(pod), limit_s, pod=str(pod))

    async def _updates(self, work: Awaitable[Sequence[Update]]) -> list[pb.ContainerUpdate]:
        return [write_update(one) for one in await work]

    async def _or_none(self, call: str, work: Awaitable[T], limit_s: float, **names: object) -> T | None:
        """Return the result of `work`, or None if it fails, which is logged."""
        try:
            return await self._decide(call, work, limit_s, **names)
        except RpcError:
            return None

    async def _decide(self, call: str, work: Awaitable[T], limit_s: float, **names: object) -> T:
        """Return the result of `work`. Raise RpcError with the cause if it fails or is late."""
        most_s = PATIENCE * limit_s
        with structlog.contextvars.bound_contextvars(op=new_op()):
            try:
                async with asyncio.timeout(most_s) as deadline:
                    return await work
            except Exception as error:
                late = isinstance(error, TimeoutError) and deadline.expired()
                why = f"not decided within {most_s:.3g} s" if late else str(error) or type(error).__name__
                unforeseen = None if late or isinstance(error, NodeagentError) else error
                log.error("nri-call-failed", call=call, error=why, exc_info=unforeseen, **names)
                self.failed += 1
                self._on_failure()
                raise RpcError(Code.UNKNOWN, why) from None


def _subject(pod: pb.PodSandbox, container: pb.Container) -> tuple[Pod, Container]:
    whose = read_pod(pod)
    return whose, read_container(container, whose)


def _names(container: Container) -> dict[str, object]:
    pod = f"{container.namespace}/{container.pod_name}"
    return {"container": container.id, "name": container.name, "pod": pod}


_EVENTS: dict[str, tuple[type[Any], pb.Event, type[Message]]] = {
    "RunPodSandbox": (pb.RunPodSandboxRequest, pb.RUN_POD_SANDBOX, pb.RunPodSandboxResponse),
    "StopPodSandbox": (pb.StopPodSandboxRequest, pb.STOP_POD_SANDBOX, pb.StopPodSandboxResponse),
    "RemovePodSandbox": (pb.RemovePodSandboxRequest, pb.REMOVE_POD_SANDBOX, pb.RemovePodSandboxResponse),
    "StartContainer": (pb.StartContainerRequest, pb.START_CONTAINER, pb.StartContainerResponse),
    "PostStartContainer": (pb.PostStartContainerRequest, pb.POST_START_CONTAINER, pb.PostStartContainerResponse),
    "RemoveContainer": (pb.RemoveContainerRequest, pb.REMOVE_CONTAINER, pb.RemoveContainerResponse),
}
_OF_CONTAINERS = (pb.StartContainerRequest, pb.PostStartContainerRequest, pb.RemoveContainerRequest)
"""Requests that name a container in addition to the pod."""
