"""Keeps the agent connected to the container runtime as an NRI plugin, even if the runtime starts
late, restarts or stops answering.

Connections to the runtime's socket are retried at growing intervals, starting again from the shortest once a connection
was established. Connected means registered, configured and synchronized: from then on the runtime asks before it
creates any container.

A runtime that has given up on a plugin may keep the connection open and never ask again (containerd 1.7 does
so after a late answer to Synchronize). So a connection whose peer may have dropped the plugin is not kept: it
ends if Synchronize does not arrive in time, if an answer was late, or if `reconnect` reports evidence. The
next one begins with a Synchronize.
"""

from __future__ import annotations

import asyncio
import enum
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.errors import ConfigError, NodeagentError, PeerError, cause_of
from nodeagent.nri.service import Handler, PluginService
from nodeagent.nri.ttrpc import Code, RpcError, TtrpcConnection
from nodeagent.pb import nri_pb2 as pb
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

RUNTIME = "nri.pkg.api.v1alpha1.Runtime"
SERVES, CALLS = 1, 2
"""Trunk ids of the plugin's service and of the runtime's."""


class Reason(enum.StrEnum):
    """Why a connection ended."""

    CLOSED = "closed"
    """The runtime closed it or violated the protocol."""
    UNSYNCHRONIZED = "unsynchronized"
    """The runtime did not register, configure or synchronize the plugin in time."""
    LATE = "late"
    """An answer was late: the runtime has given up on this plugin, or may have."""
    UNASKED = "unasked"
    """There is evidence that the runtime no longer asks."""


class DisconnectedError(PeerError):
    """An established connection that has ended."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


_NAME, _INDEX = re.compile(r"[A-Za-z0-9_.+-]+"), re.compile(r"[0-9]{2}")
log = structlog.get_logger()


class NriTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Retry intervals and deadlines, in seconds."""

    first_retry_s: float = 0.1
    last_retry_s: float = 1.0
    """The runtime does not ask about containers created while there is no connection, so this is short."""
    registration_s: float = 5.0
    """How long the runtime may take to register and configure, until it announces its own limit."""
    request_s: float = 2.0
    """How long the runtime waits for an answer, until it announces its own limit."""
    synchronize_s: float = 10.0
    """How long the runtime may take to synchronize after configuring. It synchronizes only while no pod is being
    created, so this doubles each time it was not enough, up to longest_synchronize_s."""
    longest_synchronize_s: float = 160.0


DEFAULT_PACE = NriTiming()


class NriState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the connection to the runtime."""

    connected: bool = False
    since_s: float
    """When `connected` last changed, by the monotonic clock."""
    runtime: str = ""
    """Name of the runtime that is connected, or was last."""
    version: str = ""
    reason: str = ""
    """What the plugin is waiting for, or why the last connection ended."""
    calls: int = 0
    """Number of the runtime's calls since the start."""
    failed: int = 0
    """Number of those calls that failed."""


class NriPlugin:
    """One plugin of the runtime whose NRI socket is at a path."""

    def __init__(
        self,
        socket: Path,
        name: str,
        index: str,
        handler: Handler,
        *,
        pace: NriTiming = DEFAULT_PACE,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the plugin without starting anything.

        `index`: two digits, the plugin's place among others. `on_change` is called when `standing` changes in more than
        `calls`. `clock`: in seconds. Raise ConfigError if a runtime would not accept the name or index."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f'cannot register plugin "{name}": expected letters, digits and _ . + - only')
        if not _INDEX.fullmatch(index):
            raise ConfigError(f'cannot register plugin {name} with index "{index}": expected two digits')
        self._socket = socket
        self._request = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index)
        self._handler = handler
        self._pace = pace
        self._on_change = on_change
        self._clock = clock
        self._standing = NriState(since_s=clock(), reason="not started")
        self._registration_s, self._request_s = pace.registration_s, pace.request_s
        self._synchronize_s = pace.synchronize_s
        self._service: PluginService | None = None
        self._connection: TtrpcConnection | None = None
        self._end: asyncio.Future[DisconnectedError] | None = None
        """Of the current connection: why it has to end."""
        self._retry_s = pace.first_retry_s
        self._lost_once = Once("runtime-not-connected")
        self._jitter = random.Random(name)  # noqa: S311  spreads retries; the name makes it repeatable

    @property
    def standing(self) -> NriState:
        """Return the current state."""
        if self._service is None:
            return self._standing
        calls, failed = self._standing.calls + self._service.calls, self._standing.failed + self._service.failed
        return replace(self._standing, calls=calls, failed=failed)

    async def run(self) -> None:
        """Connect and serve until cancelled. Errors are shown in `standing` and logged, never raised."""
        while True:
            try:
                await self._serve()
            except Exception as error:
                self._lost(error)
            await asyncio.sleep(self._retry_s * self._jitter.uniform(0.75, 1.0))
            self._retry_s = min(2 * self._retry_s, self._pace.last_retry_s)

    def reconnect(self, why: str) -> None:
        """End the connection, if there is one, and connect again: the runtime is assumed to have stopped asking."""
        self._give_up(Reason.UNASKED, f"cannot rely on {self._socket}: {why}")

    def _give_up(self, reason: Reason, text: str) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(DisconnectedError(reason, text))

    async def _serve(self) -> None:
        """Serve one connection from start to end. Always ends by raising the reason."""
        stream = await self._open()
        service = PluginService(
            self._handler,
            request_timeout_s=self._request_s,
            on_failure=self._on_change,
            on_late=lambda why: self._give_up(Reason.LATE, why),
        )
        connection = TtrpcConnection(
            stream, service.services(), serves=SERVES, calls=CALLS, on_served=service.served, clock=self._clock
        )
        self._service, self._connection, self._end = service, connection, asyncio.Future()
        running = asyncio.create_task(connection.run())
        introducing = asyncio.create_task(self._introduce(connection, service))
        try:
            await self._until_end(running, introducing, self._end)
        except DisconnectedError as error:
            metrics.NRI_DISCONNECTS.labels(error.reason).inc()
            raise
        finally:
            running.cancel()
            introducing.cancel()
            await asyncio.gather(running, introducing, return_exceptions=True)
            stream[1].transport.abort()  # even if the task that reads it never started
            self._forget()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(self._registration_s):
                return await asyncio.open_unix_connection(str(self._socket))
        except TimeoutError:
            raise PeerError(f"cannot connect to {self._socket}: not done in {self._registration_s:g} s") from None

    async def _until_end(
        self, running: asyncio.Task[None], introducing: asyncio.Task[None], end: asyncio.Future[DisconnectedError]
    ) -> None:
        """Wait until a connection ends or has to end. Raise DisconnectedError with the first reason."""
        every: set[asyncio.Future[Any]] = {running, introducing, end}
        await asyncio.wait(every, return_when=asyncio.FIRST_COMPLETED)
        if not running.done() and not end.done():
            introducing.result()
            await asyncio.wait(every - {introducing}, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            raise end.result()
        raise self._ended(running.exception())

    def _ended(self, error: BaseException | None) -> BaseException:
        """Return what to raise when the stream ended, given the error of its reader."""
        if error is not None and not isinstance(error, OSError | NodeagentError):
            return error
        why = "the runtime closed the connection" if error is None else cause_of(error)
        return DisconnectedError(Reason.CLOSED, f"cannot serve {self._socket} on: {why}")

    async def _introduce(self, connection: TtrpcConnection, service: PluginService) -> None:
        """Register, then wait until the runtime has configured and synchronized the plugin; it synchronizes
        once no pod is being created."""
        request = self._request.SerializeToString()
        try:
            await connection.call(RUNTIME, "RegisterPlugin", request, timeout_s=self._registration_s)
        except RpcError as error:
            reason = Reason.CLOSED if error.code == Code.UNAVAILABLE else Reason.UNSYNCHRONIZED
            raise DisconnectedError(reason, str(error)) from None
        self._show(reason="registered, waiting to be configured")
        await self._come(service.configured, "configure", self._registration_s)
        self._learn(service)
        try:
            await self._come(service.synchronized, "synchronize", self._synchronize_s)
        except DisconnectedError:
            self._synchronize_s = min(2 * self._synchronize_s, self._pace.longest_synchronize_s)
            raise
        self._retry_s, self._synchronize_s = self._pace.first_retry_s, self._pace.synchronize_s
        self._lost_once.clear()
        self._show(connected=True)
        log.info("runtime-connected", socket=str(self._socket), runtime=self._standing.runtime)

    async def _come(self, event: asyncio.Event, what: str, within_s: float) -> None:
        """Wait for the next step of the runtime."""
        try:
            async with asyncio.timeout(within_s):
                await event.wait()
        except TimeoutError:
            why = f"the runtime did not {what} the plugin within {within_s:g} s"
            raise DisconnectedError(Reason.UNSYNCHRONIZED, f"cannot serve {self._socket}: {why}") from None

    def _learn(self, service: PluginService) -> None:
        runtime = service.runtime
        self._request_s = service.request_timeout_s
        if runtime.registration_timeout > 0:
            self._registration_s = runtime.registration_timeout / 1e3
        self._standing = replace(self._standing, runtime=runtime.runtime_name, version=runtime.runtime_version)
        self._show(reason="configured, waiting to be synchronized")

    def _forget(self) -> None:
        self._standing, self._service, self._connection, self._end = self.standing, None, None, None
        self._show(reason="the connection ended")

    def _lost(self, error: Exception) -> None:
        reason = f"cannot connect to {self._socket}: {error.strerror}" if isinstance(error, OSError) else str(error)
        unforeseen = None if isinstance(error, OSError | NodeagentError) else error
        self._show(reason=reason)
        self._lost_once.report(reason, socket=str(self._socket), exc_info=unforeseen)

    def _show(self, *, connected: bool = False, reason: str = "") -> None:
        before = self._standing
        since_s = before.since_s if connected == before.connected else self._clock()
        self._standing = replace(before, connected=connected, since_s=since_s, reason=reason)
        if self._standing != before:
            self._on_change()
