"""Keeps every resource registered with kubelet for ever: late, restarted, wiped or forgetful as kubelet may be.

Each resource has its own task, so none waits for another. A resource is served before it is registered, because kubelet
dials back inside Register; nothing is served before kubelet.sock exists, because kubelet's start empties the folder.
What is registered but not watched is registered again: kubelet would show 0 devices while all looks well here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import structlog

from nodeagent.errors import NodeagentError, PeerError
from nodeagent.kube import deviceplugin, sockets
from nodeagent.kube.waiting import FolderWatch, Revision, unless
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import deviceplugin_pb2_grpc as rpc

KUBELET_SOCKET = "kubelet.sock"
WAITING, REGISTERED, FAILED = "waiting", "registered", "failed"
"""Registration.state: there is no kubelet yet; kubelet took it; the last try failed and is repeated."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """How one resource stands with kubelet."""

    resource: str
    state: str = WAITING
    since_unix_s: float
    """When the state began."""
    kubelet_inode: int | None = None
    """The kubelet.sock that took the last registration."""
    watched: bool = False
    """Whether kubelet listens to the list of devices at this moment."""
    reason: str = ""
    """What is waited for, or why the last try failed."""

    @property
    def ready(self) -> bool:
        return self.state == REGISTERED and self.watched


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast things are tried again, in seconds."""

    poll_s: float = 5.0
    """The safety net below the folder's watch."""
    register_s: float = 12.0
    """Deadline of one Register call; kubelet itself takes up to 10 s to dial back."""
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    unwatched_s: float = 1.0
    """How long a registered resource may go unwatched; doubled up to unwatched_most_s while that does not help."""
    unwatched_most_s: float = 30.0


DEFAULT_PACE = Pace()


class Registrar:
    """Serves the resources in the device-plugins folder and keeps them registered while run() runs."""

    def __init__(self, resources: Sequence[deviceplugin.Resource], folder: Path, *, pace: Pace = DEFAULT_PACE) -> None:
        """ConfigError where a socket's path would be too long. Starts nothing."""
        self._folder = folder
        self._pace = pace
        self._revision = Revision()
        socket = sockets.checked(folder / KUBELET_SOCKET)
        self._plugins = [_Plugin(one, socket, pace, self._revision.bump) for one in resources]

    def registrations(self) -> tuple[Registration, ...]:
        """How each resource stands, in the order given."""
        return tuple(plugin.registration for plugin in self._plugins)

    @property
    def ready(self) -> bool:
        """Whether kubelet took every resource and watches it."""
        return all(one.ready for one in self.registrations())

    async def changed(self, seen: int) -> int:
        """The version of registrations(), from 1 up, as soon as it differs from `seen` (0: at once)."""
        return await self._revision.changed(seen)

    async def wait_ready(self) -> None:
        """Return once every resource is ready."""
        while not self.ready:
            await self.changed(self._revision.value)

    async def run(self) -> None:
        """Keep everything registered until cancelled; then end all streams and remove the sockets."""
        try:
            async with asyncio.TaskGroup() as tasks:
                # The watch first: what it finds at the start must not interrupt a try that is under way.
                tasks.create_task(self._watch())
                for plugin in self._plugins:
                    tasks.create_task(plugin.keep())
        finally:
            await asyncio.gather(*(plugin.server.stop() for plugin in self._plugins))

    async def _watch(self) -> None:
        socket, before = self._folder / KUBELET_SOCKET, None
        with FolderWatch(self._folder, poll_s=self._pace.poll_s) as folder:
            while True:
                kubelet = sockets.identity(socket)
                for plugin in self._plugins:
                    if kubelet != before or plugin.server.lost:
                        plugin.interrupt()
                before = kubelet
                await folder.wait()


class _Plugin:
    """One resource: its server, how it stands, and the loop that keeps it registered."""

    def __init__(
        self, resource: deviceplugin.Resource, kubelet: Path, pace: Pace, on_change: Callable[[], None]
    ) -> None:
        self.server = deviceplugin.Server(resource, kubelet.parent, on_watch=self._watch_changed)
        self.registration = Registration(resource=resource.name, since_unix_s=time.time(), reason="not started")
        self._kubelet = kubelet
        self._pace = pace
        self._on_change = on_change
        self._woken, self._moved = asyncio.Event(), asyncio.Event()
        self._taken_by: sockets.Identity | None = None
        self._quiet_since_s = 0.0
        self._patience_s = pace.unwatched_s
        self._retry_s = pace.first_retry_s
        self._jitter = random.Random(resource.name)  # noqa: S311  spreads retries; the name makes it repeatable

    def interrupt(self) -> None:
        """Say that kubelet's socket or the own one changed: a try under way is pointless."""
        self._retry_s = self._pace.first_retry_s
        self._moved.set()
        self._woken.set()

    async def keep(self) -> None:
        """Try for ever; an error is shown, never raised."""
        while True:
            self._woken.clear()
            self._moved.clear()
            try:
                rest_s = await self._settle()
            except Exception as error:
                rest_s = self._failed(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._woken.wait()

    async def _settle(self) -> float:
        """Bring the resource into order with what lies in the folder; how long that may stand, in seconds."""
        kubelet = sockets.identity(self._kubelet)
        if kubelet is None:
            return self._await_kubelet()
        if not self.server.serving or self.server.lost:
            await self._serve()
        if kubelet != self._taken_by:
            self._patience_s = self._pace.unwatched_s
            await self._register(kubelet)
        elif self._unwatched_for_s() >= self._patience_s:
            log.warning("not-watched", resource=self.registration.resource, after_s=self._patience_s)
            self._patience_s = min(2 * self._patience_s, self._pace.unwatched_most_s)
            await self._register(kubelet)
        return self._pace.poll_s if self.server.watched else max(0.0, self._patience_s - self._unwatched_for_s())

    def _await_kubelet(self) -> float:
        if not self.server.watched:
            self._taken_by = None
            self._show(WAITING, reason=f"waiting for {self._kubelet}: {sockets.absence(self._kubelet)}")
        return self._pace.poll_s

    async def _serve(self) -> None:
        """A fresh socket in place of a lost one, unless another process has taken the path and lives."""
        self._taken_by = None
        if self.server.lost and sockets.is_served(self.server.path):
            raise PeerError(f"cannot serve {self.server.path}: another process serves it")
        await self.server.stop()
        await self.server.start()

    async def _register(self, kubelet: sockets.Identity) -> None:
        request = pb.RegisterRequest(
            version=deviceplugin.VERSION,
            endpoint=self.server.path.name,
            resource_name=self.registration.resource,
            options=self.server.options,
        )
        self._taken_by = None
        if await unless(self._moved, self._call(request)) is None:
            return
        self._taken_by = kubelet
        self._quiet_since_s = time.monotonic()
        self._retry_s = self._pace.first_retry_s
        self._show(REGISTERED, kubelet_inode=kubelet.inode)
        log.info("registered", resource=request.resource_name, socket=request.endpoint, kubelet_inode=kubelet.inode)

    async def _call(self, request: pb.RegisterRequest) -> pb.Empty:
        async with sockets.channel(self._kubelet) as channel:
            try:
                stub = rpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]
                answer: pb.Empty = await stub.Register(request, timeout=self._pace.register_s)
            except grpc.aio.AioRpcError as error:
                cause = sockets.cause(error)
                raise PeerError(f"cannot register {request.resource_name} at {self._kubelet}: {cause}") from None
        return answer

    def _failed(self, error: Exception) -> float:
        reason = str(error) or type(error).__name__
        said = self.registration.state == FAILED and self.registration.reason == reason
        self._show(FAILED, reason=reason)
        unforeseen = None if isinstance(error, NodeagentError) else error
        delay_s = self._retry_s * self._jitter.uniform(0.75, 1.0)
        self._retry_s = min(2 * self._retry_s, self._pace.last_retry_s)
        if not said:
            log.warning("not-registered", resource=self.registration.resource, error=reason, exc_info=unforeseen)
        return delay_s

    def _unwatched_for_s(self) -> float:
        return 0.0 if self.server.watched else time.monotonic() - self._quiet_since_s

    def _watch_changed(self) -> None:
        self._quiet_since_s = time.monotonic()
        self._show(self.registration.state, reason=self.registration.reason)
        self._woken.set()

    def _show(self, state: str, *, reason: str = "", kubelet_inode: int | None = None) -> None:
        before = self.registration
        after = replace(
            before,
            state=state,
            since_unix_s=before.since_unix_s if state == before.state else time.time(),
            kubelet_inode=kubelet_inode or before.kubelet_inode,
            watched=self.server.watched,
            reason=reason,
        )
        if after != before:
            self.registration = after
            self._on_change()
