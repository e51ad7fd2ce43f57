"""The Plugin service: what the runtime asks on one connection, handed to the handler that decides.

Promises: each question has its answer inside the time limit of the runtime. A container whose creation cannot be
decided is not created, with the reason; any other failure is logged and answered with "no change", because an error
there would only keep a container from being stopped or removed.

A runtime gives up on a plugin whose answer is late (containerd/nri pkg/adaptation): after a question about a container
it closes the connection; after Synchronize it closes it too or, as containerd 1.7 was seen to, keeps it open and never
asks anything. So an answer that was late all the same is reported, for the connection to be made again.
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
"""Parts of the runtime's time limit: how long a handler may wait for anything before it answers from what it knows; how
long a decision may take at all; and from when on the runtime may have given up. It began to count before its request
arrived."""
MOST_LISTED = 1 << 16
"""Pods and containers in one synchronization; more are refused."""

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
log = structlog.get_logger()


class Handler(Protocol):
    """Who decides. None of these may call back into the runtime before it has returned: the runtime waits meanwhile."""

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Sequence[Update]:
        """All that exists, at each connection; what is to be changed of it."""

    async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        """What a new container gets, and what changes for others before it is there. Raising refuses the container.
        within_s: how long it may wait for anything; after that it is to answer from what is known."""

    async def update(self, pod: Pod, container: Container, resources: Resources) -> Sequence[Update]:
        """Kubelet changes a container to `resources`; an update of the container itself takes precedence over that."""

    async def stopped(self, pod: Pod, container: Container) -> Sequence[Update]:
        """A container has stopped; what changes for others."""

    async def removed(self, pod: Pod, container: Container) -> None:
        """A container is gone."""


@runtime_checkable
class HearsStarts(Protocol):
    """A handler that also wants to know when containers start."""

    async def starting(self, pod: Pod, container: Container, within_s: float) -> None:
        """The container is there and runs its first instruction after this. Raising keeps it from starting. within_s:
        how long it may wait for anything."""

    async def started(self, pod: Pod, container: Container) -> None:
        """The container's process runs."""


@runtime_checkable
class HearsPods(Protocol):
    """A handler that also wants to know of pods."""

    async def pod_started(self, pod: Pod) -> None:
        """The sandbox is there, its containers are not yet."""

    async def pod_stopped(self, pod: Pod) -> None:
        """All its containers have stopped."""

    async def pod_removed(self, pod: Pod) -> None:
        """The sandbox is gone."""


_ALWAYS = (pb.CREATE_CONTAINER, pb.UPDATE_CONTAINER, pb.STOP_CONTAINER, pb.REMOVE_CONTAINER)
_STARTS = (pb.START_CONTAINER, pb.POST_START_CONTAINER)
_PODS = (pb.RUN_POD_SANDBOX, pb.STOP_POD_SANDBOX, pb.REMOVE_POD_SANDBOX)


def event_mask(handler: Handler) -> int:
    """The events that the handler hears, as the runtime is told."""
    starts = _STARTS if isinstance(handler, HearsStarts) else ()
    pods = _PODS if isinstance(handler, HearsPods) else ()
    return sum(1 << (event - 1) for event in (*_ALWAYS, *starts, *pods))


class PluginService:
    """Serves one connection. `calls` and `failed` count the questions, and those whose handler failed."""

    def __init__(
        self,
        handler: Handler,
        *,
        request_timeout_s: float,
        on_failure: Callable[[], None],
        on_late: Callable[[str], None],
    ) -> None:
        """`on_failure` is called after each failure, `on_late` with a reason after an answer that the runtime may not
        have waited for."""
        self.configured, self.synchronized = asyncio.Event(), asyncio.Event()
        """The latter once the runtime has the answer to all that it listed."""
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
        """How long the runtime waits for an answer."""
        return self.runtime.request_timeout / 1e3 if self.runtime.request_timeout > 0 else self._request_timeout_s

    def services(self) -> Services:
        """The methods as a connection serves them."""
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
        """How long the runtime waits for an answer. waits_s: what the request says of that."""
        return self.request_timeout_s if waits_s is None else min(waits_s, self.request_timeout_s)

    def served(self, one: ServedCall) -> None:
        """Take note of how long an answer took, as the connection reports it."""
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
        """Parts are kept until the last: a container may come before its pod."""
        if request.more and not request.pods and not request.containers:
            # containerd sends such parts without end where one pod has more containers than fit into a message.
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
        """How older runtimes tell what needs no answer."""
        await self._tell(request.event, request.pod, request.container, limit_s)
        return pb.Empty()

    async def _tell(self, event: pb.Event, of_pod: pb.PodSandbox, of_container: pb.Container, limit_s: float) -> None:
        handler = self._handler
        pod, container = _subject(of_pod, of_container)
        if event == pb.REMOVE_CONTAINER:
            await self._or_none("removed", handler.removed(pod, container), limit_s, **_names(container))
        elif event == pb.START_CONTAINER and isinstance(handler, HearsStarts):
            work = handler.starting(pod, container, WAITING * limit_s)
            await self._decide("starting", work, limit_s, **_names(container))
        elif event == pb.POST_START_CONTAINER and isinstance(handler, HearsStarts):
            await self._or_none("started", handler.started(pod, container), limit_s, **_names(container))
        elif event in _PODS and isinstance(handler, HearsPods):
            heard = dict(zip(_PODS, (handler.pod_started, handler.pod_stopped, handler.pod_removed), strict=True))[
                event
            ]
            await self._or_none(heard.__name__, heard(pod), limit_s, pod=f"{pod.namespace}/{pod.name}")

    async def _updates(self, work: Awaitable[Sequence[Update]]) -> list[pb.ContainerUpdate]:
        return [write_update(one) for one in await work]

    async def _or_none(self, call: str, work: Awaitable[T], limit_s: float, **names: object) -> T | None:
        """What `work` returns; None where it fails, which is logged."""
        try:
            return await self._decide(call, work, limit_s, **names)
        except RpcError:
            return None

    async def _decide(self, call: str, work: Awaitable[T], limit_s: float, **names: object) -> T:
        """What `work` returns, in time; RpcError with the cause otherwise."""
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
"""Requests that name a container beside the pod."""
