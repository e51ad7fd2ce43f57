"""Keeps the agent connected to the container runtime as an NRI plugin: for ever, late and restarted as that may be.

The runtime's socket is tried at a growing distance, which starts anew once a connection stood. Connected means
registered, configured and synchronized: from then on no container is created without a question.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from nodeagent.core.containers import Update
from nodeagent.errors import ConfigError, NodeagentError, PeerError
from nodeagent.nri.service import Handler, PluginService
from nodeagent.nri.translation import write_update
from nodeagent.nri.ttrpc import Connection
from nodeagent.pb import nri_pb2 as pb

RUNTIME = "nri.pkg.api.v1alpha1.Runtime"
SERVES, CALLS = 1, 2
"""Trunk ids of the plugin's service and the runtime's."""
UPDATE_S = 30.0
"""Deadline of an update that was not asked for: the runtime changes container after container meanwhile."""

_NAME, _INDEX = re.compile(r"[A-Za-z0-9_.+-]+"), re.compile(r"[0-9]{2}")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast things are tried, in seconds."""

    first_retry_s: float = 0.1
    last_retry_s: float = 1.0
    """A container that is created while there is no connection is not asked about: so this is short."""
    registration_s: float = 5.0
    """How long the runtime may take to register and configure, until it has said so itself."""
    request_s: float = 2.0
    """How long the runtime waits for an answer, until it has said so itself."""


DEFAULT_PACE = Pace()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How the plugin stands with the runtime."""

    connected: bool = False
    since_unix_s: float
    """When `connected` became what it is."""
    runtime: str = ""
    """Name of the runtime that is connected, or was last."""
    version: str = ""
    reason: str = ""
    """What is waited for, or why the last connection ended."""
    calls: int = 0
    """Questions of the runtime since the start."""
    failed: int = 0
    """Those among them that could not be decided."""


class NriPlugin:
    """One plugin of the runtime whose NRI socket lies at a path."""

    def __init__(
        self,
        socket: Path,
        name: str,
        index: str,
        handler: Handler,
        *,
        pace: Pace = DEFAULT_PACE,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`index`: two digits, the plugin's place among others. `on_change` is called when `standing` changes in more
        than `calls`. ConfigError where name or index are not what a runtime takes. Starts nothing."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f'cannot register plugin "{name}": expected letters, digits and _ . + - only')
        if not _INDEX.fullmatch(index):
            raise ConfigError(f'cannot register plugin {name} with index "{index}": expected two digits')
        self._socket = socket
        self._request = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index)
        self._handler = handler
        self._pace = pace
        self._on_change = on_change
        self._standing = Standing(since_unix_s=time.time(), reason="not started")
        self._registration_s, self._request_s = pace.registration_s, pace.request_s
        self._service: PluginService | None = None
        self._connection: Connection | None = None
        self._retry_s = pace.first_retry_s
        self._logged = ""
        self._jitter = random.Random(name)  # noqa: S311  spreads retries; the name makes it repeatable

    @property
    def standing(self) -> Standing:
        """How things are at this moment."""
        if self._service is None:
            return self._standing
        calls, failed = self._standing.calls + self._service.calls, self._standing.failed + self._service.failed
        return replace(self._standing, calls=calls, failed=failed)

    async def run(self) -> None:
        """Connect and serve until cancelled; an error is shown, never raised."""
        while True:
            try:
                await self._serve()
            except Exception as error:
                self._lost(error)
            await asyncio.sleep(self._retry_s * self._jitter.uniform(0.75, 1.0))
            self._retry_s = min(2 * self._retry_s, self._pace.last_retry_s)

    async def update_containers(self, updates: Sequence[Update], *, timeout_s: float = UPDATE_S) -> tuple[str, ...]:
        """Have the runtime change containers now; ids of those that it says it could not. PeerError where there is no
        runtime, or it fails the whole call (containerd does for one that fails, without naming it). Never to be called
        from a Handler's method: the runtime would wait for both."""
        if self._connection is None or not self._standing.connected:
            why = f"{self._socket} is not connected: {self._standing.reason}"
            raise PeerError(f"cannot update {len(updates)} containers: {why}")
        request = pb.UpdateContainersRequest(update=[write_update(one) for one in updates])
        answer = await self._connection.call(
            RUNTIME, "UpdateContainers", request.SerializeToString(), timeout_s=timeout_s
        )
        try:
            return tuple(one.container_id for one in pb.UpdateContainersResponse.FromString(answer).failed)
        except DecodeError as error:
            raise PeerError(f"cannot read what {self._socket} answers to an update: {error}") from None

    async def _serve(self) -> None:
        """One connection from its beginning to its end, which is raised."""
        stream = await asyncio.open_unix_connection(str(self._socket))
        service = PluginService(self._handler, request_timeout_s=self._request_s, on_failure=self._on_change)
        connection = Connection(stream, service.services(), serves=SERVES, calls=CALLS)
        self._service, self._connection = service, connection
        running = asyncio.create_task(connection.run())
        introducing = asyncio.create_task(self._introduce(connection, service))
        try:
            await asyncio.wait({running, introducing}, return_when=asyncio.FIRST_COMPLETED)
            if introducing.done():
                introducing.result()
            await running
            raise PeerError(f"cannot serve {self._socket} on: the runtime closed the connection")
        finally:
            running.cancel()
            introducing.cancel()
            await asyncio.gather(running, introducing, return_exceptions=True)
            self._forget()

    async def _introduce(self, connection: Connection, service: PluginService) -> None:
        """Register; then the runtime configures and synchronizes, the latter when its pods let it."""
        request = self._request.SerializeToString()
        await connection.call(RUNTIME, "RegisterPlugin", request, timeout_s=self._registration_s)
        self._show(reason="registered, waiting to be configured")
        try:
            async with asyncio.timeout(self._registration_s):
                await service.configured.wait()
        except TimeoutError:
            why = f"the runtime did not configure the plugin within {self._registration_s:g} s"
            raise PeerError(f"cannot serve {self._socket}: {why}") from None
        self._learn(service)
        await service.synchronized.wait()
        self._retry_s = self._pace.first_retry_s
        self._logged = ""
        self._show(connected=True)
        log.info("runtime-connected", socket=str(self._socket), runtime=self._standing.runtime)

    def _learn(self, service: PluginService) -> None:
        runtime = service.runtime
        self._request_s = service.request_timeout_s
        if runtime.registration_timeout > 0:
            self._registration_s = runtime.registration_timeout / 1e3
        self._standing = replace(self._standing, runtime=runtime.runtime_name, version=runtime.runtime_version)
        self._show(reason="configured, waiting to be synchronized")

    def _forget(self) -> None:
        self._standing, self._service, self._connection = self.standing, None, None
        self._show(reason="the connection ended")

    def _lost(self, error: Exception) -> None:
        reason = f"cannot connect to {self._socket}: {error.strerror}" if isinstance(error, OSError) else str(error)
        unforeseen = None if isinstance(error, OSError | NodeagentError) else error
        self._show(reason=reason)
        if reason != self._logged:
            self._logged = reason
            log.warning("runtime-not-connected", socket=str(self._socket), error=reason, exc_info=unforeseen)

    def _show(self, *, connected: bool = False, reason: str = "") -> None:
        before = self._standing
        since_unix_s = before.since_unix_s if connected == before.connected else time.time()
        self._standing = replace(before, connected=connected, since_unix_s=since_unix_s, reason=reason)
        if self._standing != before:
            self._on_change()
