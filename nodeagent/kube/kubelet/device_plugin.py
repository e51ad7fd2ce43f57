"""The device-plugin API v1beta1: one resource, one socket. Protobuf in, core values, protobuf out.

Guarantees: while kubelet watches, it always has the latest full list; GetPreferredAllocation always gets an answer if
enough devices are available; an allocation returns edits for all containers or fails with one clear line.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from nodeagent.aio.unless import unless
from nodeagent.core.model.device import Advertised, ContainerEdits
from nodeagent.errors import HostError, InputError, NodeagentError, PeerError, Refused, StateError
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.kube.rpc.server import Server
from nodeagent.kube.rpc.status import Code
from nodeagent.pb import deviceplugin_pb2 as pb

VERSION = "v1beta1"
STOP_GRACE_S = 1.0
"""How long calls in progress may still take when a server stops."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
log = structlog.get_logger()


class Resource(Protocol):
    """One extended resource as its owner offers it."""

    @property
    def name(self) -> str:
        """Return the extended resource name, domain/name."""

    @property
    def pre_start_required(self) -> bool:
        """Return whether kubelet must call pre_start before each container start."""

    def advertised(self) -> tuple[Advertised, ...]:
        """Return the current full list, in a fixed order. Cheap."""

    def listed(self, *, news: bool) -> None:
        """Learn that kubelet knows the list that was last returned. news: whether it was sent and replaces another."""

    async def changed(self, seen: int) -> int:
        """Return the version of the list, counted from 1, as soon as it differs from `seen` (0: immediately)."""

    def prefer(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        """Return the best `size` of the available ids, including all of must_include. Quick."""

    async def allocate(self, containers: Sequence[Sequence[str]], op: str) -> list[ContainerEdits]:
        """Return one edit per container for its ids, all or nothing. Durable on return.

        Raise Refused, InputError or StateError.
        """

    async def pre_start(self, ids: Sequence[str]) -> None:
        """Prepare the devices for a container that is about to start."""


class DevicePluginServer:
    """Serves one resource in kubelet's device-plugins folder, at a different path each time it starts. Building one
    binds nothing."""

    def __init__(self, resource: Resource, folder: Path, *, on_watch: Callable[[], None] = lambda: None) -> None:
        """Choose a path without binding it.

        `on_watch` is called when kubelet starts or stops watching. Raise ConfigError if the path is too long.
        """
        self.resource = resource
        self._paths = PluginPaths(folder, resource.name)
        self.path = self._paths.fresh()
        """Where it is served, or will be at its next start."""
        self._on_watch = on_watch
        self._service: _Service | None = None
        self._server: Server | None = None
        self._bound: sockets.Identity | None = None
        self._others = False
        """Whether another server of the resource, alive or dead, was seen since the last start of this one."""

    @property
    def serving(self) -> bool:
        """Return whether the socket is being served."""
        return self._bound is not None

    @property
    def watched(self) -> bool:
        """Return whether a ListAndWatch stream is open."""
        return self._service is not None and self._service.streams > 0

    @property
    def lost(self) -> bool:
        """Return whether the path no longer refers to the socket being served."""
        return self._bound is not None and sockets.identity(self.path) != self._bound

    @property
    def options(self) -> pb.DevicePluginOptions:
        """Return the options that Register sends for this resource."""
        return _options(self.resource)

    async def start(self) -> bool:
        """Serve on a fresh socket and remove sockets of dead servers of the resource.

        Return whether another server of the resource may have ended just now. Raise HostError with path and cause, or
        PeerError if another process serves the resource: kubelet supports one server at a time.
        """
        self._others |= self._paths.remove_dead()
        if other := self._paths.served():
            self._others = True
            raise PeerError(f"cannot serve {self.resource.name}: another process serves {other}")
        service = _Service(self.resource, self._on_watch)
        self._server = await sockets.serve(self.path, service.add_to)
        self._service = service
        self._bound = sockets.identity(self.path)
        others, self._others = self._others, False
        return others

    async def stop(self) -> bool:
        """End the streams in an orderly way, let calls in progress finish (STOP_GRACE_S), and remove the socket.

        Return whether a stream was open. May be called again, even if an earlier call was cancelled.
        """
        self._bound = None
        if self._server is None or self._service is None:
            return False
        self._service.ending.set()
        await sockets.stop(self._server, STOP_GRACE_S)
        self._server, self.path = None, self._paths.fresh()
        return self._service.cut


class _Service:
    """The five calls, from one start of a server to its stop."""

    def __init__(self, resource: Resource, on_watch: Callable[[], None]) -> None:
        self.resource = resource
        self.streams = 0
        self.ending = asyncio.Event()
        self.cut = False
        """Whether a stream was still open when the server began to stop."""
        self._on_watch = on_watch

    def add_to(self, server: Server) -> None:
        """Register the service with a gRPC server."""
        server.add(pb.DESCRIPTOR, "DevicePlugin", self)

    async def GetDevicePluginOptions(self, request: pb.Empty, context: Any) -> pb.DevicePluginOptions:  # noqa: N802
        return _options(self.resource)

    async def ListAndWatch(self, request: pb.Empty, context: Any) -> None:  # noqa: N802
        with self._counted():
            seen, sent = 0, None
            while version := await unless(self.ending, self.resource.changed(seen)):
                seen, newest = version, self.resource.advertised()
                news = newest != sent
                if news:
                    await context.write(_device_list(newest))
                self.resource.listed(news=news and sent is not None)
                sent = newest

    async def GetPreferredAllocation(  # noqa: N802
        self, request: pb.PreferredAllocationRequest, context: Any
    ) -> pb.PreferredAllocationResponse:
        async with self._call("prefer devices of", context):
            chosen = [self._preferred(one) for one in request.container_requests]
            answers = [pb.ContainerPreferredAllocationResponse(deviceIDs=ids) for ids in chosen]
            return pb.PreferredAllocationResponse(container_responses=answers)

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:  # noqa: N802
        async with self._call("allocate", context) as op:
            containers = [list(one.devices_ids) for one in request.container_requests]
            edits = await self.resource.allocate(containers, op)
            if len(edits) != len(containers):
                raise AssertionError(f"{len(edits)} answers for {len(containers)} containers")
            return pb.AllocateResponse(container_responses=[_container_response(one) for one in edits])

    async def PreStartContainer(  # noqa: N802
        self, request: pb.PreStartContainerRequest, context: Any
    ) -> pb.PreStartContainerResponse:
        async with self._call("prepare", context):
            await self.resource.pre_start(list(request.devices_ids))
            return pb.PreStartContainerResponse()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.streams += 1
        self._on_watch()
        try:
            yield
        finally:
            self.cut |= self.ending.is_set()
            self.streams -= 1
            self._on_watch()

    @contextlib.asynccontextmanager
    async def _call(self, verb: str, context: Any) -> AsyncIterator[str]:
        """Run one call under one op id; any exception becomes a status with one line of text."""
        op = secrets.token_hex(4)
        with structlog.contextvars.bound_contextvars(op=op, resource=self.resource.name):
            try:
                yield op
            except Exception as error:
                code, text = _status(error, f"cannot {verb} {self.resource.name}", op)
                known = isinstance(error, (NodeagentError, OSError))
                log.warning("call-failed", code=code.name, error=text, exc_info=None if known else error)
                await context.abort(code, text)

    def _preferred(self, request: pb.ContainerPreferredAllocationRequest) -> list[str]:
        must, size = list(dict.fromkeys(request.must_include_deviceIDs)), request.allocation_size
        every = list(dict.fromkeys([*must, *request.available_deviceIDs]))
        if not 0 <= size <= len(every):
            raise InputError(f"cannot prefer {size} devices of {self.resource.name}: {len(every)} are available")
        try:
            chosen = self.resource.prefer(list(request.available_deviceIDs), must, size)
            _check_choice(chosen, every, must, size)
        except Exception as error:
            unforeseen = None if isinstance(error, NodeagentError) else error
            log.warning("no-preference", error=str(error), size=size, available=len(every), exc_info=unforeseen)
            return every[:size]
        return chosen


def _check_choice(chosen: Sequence[str], every: Sequence[str], must: Sequence[str], size: int) -> None:
    outside, missing = set(chosen) - set(every), set(must) - set(chosen)
    if outside or missing or len(chosen) != size or len(set(chosen)) != size:
        raise InputError(
            f"cannot use the preference {list(chosen)}: {size} different ids are wanted, "
            f"{sorted(outside)} are not available, {sorted(missing)} must be included"
        )


def _status(error: Exception, cannot: str, op: str) -> tuple[Code, str]:
    """Return the gRPC status and text for an error. An unexpected one shows only its type and the op id."""
    match error:
        case InputError():
            return Code.INVALID_ARGUMENT, str(error)
        case Refused():
            lacking = error.want > error.free
            code = Code.RESOURCE_EXHAUSTED if lacking else Code.FAILED_PRECONDITION
            return code, f"{cannot}: {error}"
        case OSError():
            full = error.errno in _DISK_FULL
            return (Code.UNAVAILABLE if full else Code.INTERNAL), f"{cannot}: {error}"
        case StateError() | PeerError():
            return Code.UNAVAILABLE, str(error)
        case HostError() | NodeagentError():
            return Code.INTERNAL, str(error)
    return Code.INTERNAL, f"{cannot}: unexpected {type(error).__name__}, see op {op} in the agent's log"


def _options(resource: Resource) -> pb.DevicePluginOptions:
    return pb.DevicePluginOptions(
        pre_start_required=resource.pre_start_required, get_preferred_allocation_available=True
    )


def _device_list(devices: Iterable[Advertised]) -> pb.ListAndWatchResponse:
    return pb.ListAndWatchResponse(devices=[_device(one) for one in devices])


def _device(device: Advertised) -> pb.Device:
    nodes = [pb.NUMANode(ID=node) for node in device.numa_nodes]
    return pb.Device(
        ID=device.id,
        health="Healthy" if device.healthy else "Unhealthy",
        topology=pb.TopologyInfo(nodes=nodes) if nodes else None,
    )


def _container_response(edits: ContainerEdits) -> pb.ContainerAllocateResponse:
    return pb.ContainerAllocateResponse(
        envs=dict(edits.env),
        annotations=dict(edits.annotations),
        cdi_devices=[pb.CDIDevice(name=name) for name in edits.cdi_devices],
        mounts=[
            pb.Mount(container_path=one.container_path, host_path=one.host_path, read_only=one.read_only)
            for one in edits.mounts
        ],
        devices=[
            pb.DeviceSpec(container_path=one.container_path, host_path=one.host_path, permissions=one.permissions)
            for one in edits.device_nodes
        ],
    )
