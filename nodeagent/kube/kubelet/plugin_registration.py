"""Keeps the DRA driver registered with kubelet indefinitely: its two sockets, and kubelet's response to them.

Kubelet discovers the registration socket, asks it for the driver's details, and reports whether it accepted the driver;
it forgets the driver when that socket's file is removed. So the driver is served before the registration socket appears
and still served after it is gone. Both sockets are re-created after any removal, including that of their folders.
An attempt that kubelet refuses, or does not follow up, is repeated under another name of the registration socket: under
the same one kubelet would wait (plugin_sockets.py).
Answers to kubelet's query are constants: nothing that can hang delays them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.revision import Revision
from nodeagent.errors import HostError, NodeagentError, PeerError
from nodeagent.kube.kubelet import dra_health as drahealth
from nodeagent.kube.kubelet import dra_plugin as dra
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.device_plugin import STOP_GRACE_S
from nodeagent.kube.kubelet.plugin_sockets import PluginSockets, other_instance_serves, plugin_sockets, remove_stale
from nodeagent.kube.kubelet.registration import FAILED, REGISTERED, WAITING
from nodeagent.kube.kubelet.registration_state import RegistrationState, Standing
from nodeagent.kube.rpc.server import Server
from nodeagent.pb import pluginregistration_pb2 as pb

__all__ = ["DraPlugin", "DraRegistration", "PluginSockets", "other_instance_serves", "plugin_sockets", "remove_stale"]

PLUGIN_TYPE = "DRAPlugin"
LAST_RETRY_S = 30.0
UNASKED_S, LAST_UNASKED_S = 20.0, 120.0
"""How long kubelet may leave a socket without a verdict, at first and at last. One of its attempts takes up to 16 s: 10
to connect, 1 for GetInfo, 5 for its verdict (operation_generator.go in pkg/kubelet/pluginmanager of 1.37)."""

log = structlog.get_logger()


class DraRegistration(Standing, frozen=True, kw_only=True):
    """Registration status of the driver. FAILED: kubelet refused it, or a socket cannot be served."""

    driver: str
    connected: bool = False
    """Whether kubelet is watching device health now; by default, kubelet before 1.36 does not."""
    times: int = 0
    """How often kubelet has accepted the driver: increases when kubelet restarts."""

    @property
    def ready(self) -> bool:
        """Return whether kubelet has accepted the driver."""
        return self.state == REGISTERED


class _Served:
    """A restartable server on one socket."""

    def __init__(self, path: Path, add: Callable[[Server], None]) -> None:
        self.path = path
        self._add = add
        self._server: Server | None = None
        self._bound: sockets.Identity | None = None

    @property
    def stands(self) -> bool:
        """Return whether the path refers to the socket being served."""
        return self._bound is not None and sockets.identity(self.path) == self._bound

    @property
    def lost(self) -> bool:
        """Return whether a socket is being served but the path no longer refers to it."""
        return self._bound is not None and not self.stands

    async def begin(self, path: Path | None = None) -> None:
        """Serve on a fresh socket, under another path if one is given. Raise HostError, or PeerError if a live process
        has taken the path."""
        path = path or self.path
        if sockets.is_served(path) and not (self.stands and path == self.path):
            raise PeerError(f"cannot serve {path}: another process serves it")
        await self.stop(STOP_GRACE_S)
        self.path = path
        self._server = await sockets.serve(self.path, self._add)
        self._bound = sockets.identity(self.path)

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, let those in progress finish, and remove the socket. May be called again after a
        cancellation."""
        self._bound = None
        if self._server is not None:
            await sockets.stop(self._server, grace_s)
            self._server = None


class DraPlugin:
    """One driver with its claims and their health, kept registered while run() is running. Building it binds
    nothing."""

    def __init__(
        self,
        driver: str,
        sockets: PluginSockets,
        claims: dra.ClaimHandler,
        health: drahealth.HealthSource,
        *,
        poll_s: float = 15.0,
        retry_s: float = 1.0,
        unasked_s: float = UNASKED_S,
        heartbeat_s: float = drahealth.HEARTBEAT_S,
    ) -> None:
        """Set up both sockets without binding them.

        `poll_s` is the fallback interval of the folder watches; `retry_s` the first wait after a failure; `unasked_s`
        how long kubelet may at first leave a socket without a verdict; `heartbeat_s` how often health is repeated, and
        thus how long it is unknown to kubelet after another instance has ended.
        """
        self.registration = DraRegistration(driver=driver, since_unix_s=time.time(), reason="not started")
        self._sockets = sockets
        self._claims = claims
        self._health = health
        self._poll_s = poll_s
        self._heartbeat_s = heartbeat_s
        self._first_retry_s = self._retry_s = retry_s
        self._first_unasked_s = self._unasked_s = unasked_s
        self._attempt = 0
        self._jitter = random.Random(str(sockets.service))  # noqa: S311  spreads retries; the name makes it repeatable
        self._revision = Revision()
        self._woken, self._ending = asyncio.Event(), asyncio.Event()
        self._streams = 0
        self._taken = False
        self._refusal = ""
        self._again_at_s = math.inf
        self._service = _Served(sockets.service, self._add_service)
        self._registry = _Served(sockets.registration, self._add_registration)

    async def changed(self, seen: int) -> int:
        """Return the version of `registration`, counted from 1, as soon as it differs from `seen` (0: immediately)."""
        return await self._revision.changed(seen)

    async def run(self) -> None:
        """Keep the driver registered until cancelled; then withdraw it and let calls in progress finish."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for folder in (self._sockets.registration.parent, self._sockets.service.parent):
                    tasks.create_task(self._watch(folder))
                tasks.create_task(self._keep())
        finally:
            await self._registry.stop(0)
            self._ending.set()
            await self._service.stop(STOP_GRACE_S)
            self._taken = False
            self._show(WAITING, reason="stopped")

    async def _watch(self, folder: Path) -> None:
        before: object = None
        with FolderWatch(folder, poll_s=self._poll_s) as watch:
            while True:
                now = (_is_there(folder), self._service.stands, self._registry.stands)
                # A socket may be lost before this loop ever saw it.
                if now != before or self._service.lost or self._registry.lost:
                    self._woken.set()
                before = now
                await watch.wait()

    async def _keep(self) -> None:
        """Retry indefinitely; errors are reported, never raised."""
        while True:
            self._woken.clear()
            try:
                rest_s = await self._put_in_order()
            except Exception as error:
                rest_s = self._failed(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._woken.wait()

    async def _put_in_order(self) -> float:
        """Restore both sockets; return after how many seconds to check again."""
        registry = self._sockets.registration.parent
        if not _is_there(registry):
            self._taken = False
            self._show(WAITING, reason=f"waiting for {registry}: {sockets.absence(registry) or 'not a folder'}")
            return self._poll_s
        if not self._service.stands:
            await self._serve()
        if (due := self._is_due()) or not self._registry.stands:
            await self._offer(self._attempt + due)
        self._show_standing()
        return max(0.0, min(self._again_at_s - time.monotonic(), self._poll_s))

    def _is_due(self) -> bool:
        """Return whether another attempt is due. A kubelet that watches health has taken the driver, although its
        verdict was lost."""
        if time.monotonic() < self._again_at_s:
            return False
        if self._streams > 0 and not self._refusal:
            self._again_at_s = time.monotonic() + self._unasked_s
            return False
        return True

    async def _serve(self) -> None:
        _make(self._sockets.service.parent)
        self._ending.set()
        self._ending = asyncio.Event()
        await self._service.begin()

    async def _offer(self, attempt: int) -> None:
        """Serve a fresh registration socket: kubelet drops what it knew of the previous one and asks."""
        self._taken = False
        self._attempt, self._again_at_s = attempt, time.monotonic() + self._unasked_s
        self._unasked_s = min(2 * self._unasked_s, LAST_UNASKED_S)
        await self._registry.begin(self._sockets.registration_of(attempt))
        log.info("offered-to-kubelet", driver=self.registration.driver, socket=str(self._registry.path))

    # ---------------------------------------------------------------- what the servers serve

    def _add_service(self, server: Server) -> None:
        dra.add_to(server, self._claims)
        drahealth.add_to(server, self._health, self._ending, heartbeat_s=self._heartbeat_s, on_watch=self._watched)

    def _add_registration(self, server: Server) -> None:
        info = pb.PluginInfo(
            type=PLUGIN_TYPE,
            name=self.registration.driver,
            endpoint=str(self._sockets.service),
            supported_versions=[*dra.SERVICES, *drahealth.SERVICES],
        )
        service = _Registration(info, partial(self._told, self._attempt))
        server.add(pb.DESCRIPTOR, "Registration", service)

    def _watched(self, change: int) -> None:
        self._streams += change
        self._show(self.registration.state, reason=self.registration.reason)

    def _told(self, attempt: int, taken: bool, error: str) -> None:
        """Handle kubelet's verdict on the driver, unless it is on an earlier attempt.

        Kubelet itself retries a refused registration at growing intervals; a socket with another name makes it retry
        immediately.
        """
        if attempt != self._attempt:
            return
        self._taken = taken
        if taken:
            self._refusal, self._again_at_s, self._retry_s = "", math.inf, self._first_retry_s
            self._unasked_s = self._first_unasked_s
            self._show(REGISTERED, times=self.registration.times + 1)
            log.info("registered", driver=self.registration.driver, times=self.registration.times)
        else:
            self._refusal = f"cannot register {self.registration.driver} with kubelet: {error or 'it does not say why'}"
            self._again_at_s = time.monotonic() + self._failed(PeerError(self._refusal))
        self._woken.set()

    # ---------------------------------------------------------------- status

    def _show_standing(self) -> None:
        """Report the status when both sockets are in order: the rest is up to kubelet."""
        if self._taken:
            self._show(REGISTERED)
        elif self._refusal:
            self._show(FAILED, reason=self._refusal)
        else:
            self._retry_s = self._first_retry_s
            self._show(WAITING, reason="waiting for kubelet to ask")

    def _failed(self, error: Exception) -> float:
        """Report an error, log it once, and return after how many seconds to retry."""
        reason = str(error) or type(error).__name__
        said = (self.registration.state, self.registration.reason) == (FAILED, reason)
        self._show(FAILED, reason=reason)
        delay_s = self._retry_s * self._jitter.uniform(0.75, 1.0)
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        if not said:
            unforeseen = None if isinstance(error, NodeagentError | OSError) else error
            log.warning("not-registered", driver=self.registration.driver, error=reason, exc_info=unforeseen)
        return delay_s

    def _show(self, state: RegistrationState, *, reason: str = "", times: int | None = None) -> None:
        before = self.registration
        after = before.to(state, reason, connected=self._streams > 0, times=before.times if times is None else times)
        if after != before:
            self.registration = after
            self._revision.bump()


class _Registration:
    """Kubelet's two registration calls. GetInfo must be answered within a second: the answer is a constant."""

    def __init__(self, info: pb.PluginInfo, told: Callable[[bool, str], None]) -> None:
        self._info = info
        self._told = told

    async def GetInfo(self, request: pb.InfoRequest, context: Any) -> pb.PluginInfo:  # noqa: N802
        return self._info

    async def NotifyRegistrationStatus(  # noqa: N802
        self, request: pb.RegistrationStatus, context: Any
    ) -> pb.RegistrationStatusResponse:
        self._told(request.plugin_registered, request.error)
        return pb.RegistrationStatusResponse()


def _is_there(folder: Path) -> bool:
    return folder.is_dir()


def _make(folder: Path) -> None:
    """Create a folder of the driver. Raise HostError if it cannot be created."""
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make {folder}: {error.strerror}") from None
