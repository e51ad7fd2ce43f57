"""Health of the devices that claims hold, v1 and v1alpha1; kubelet shows it in pod status.

Guarantees: kubelet receives the complete list at once, after every change, and often enough that no entry expires.
Unknown health is reported as unknown. If the list cannot be obtained, the stream ends, and kubelet then reports unknown
as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

import structlog
from h2.exceptions import H2Error

from nodeagent.aio.unless import unless
from nodeagent.core.model.claim import DeviceHealth
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.kube.rpc.server import Server
from nodeagent.kube.rpc.status import Code
from nodeagent.pb import drahealth_v1_pb2, drahealth_v1alpha1_pb2

SERVICES = ("v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")
"""Service names used at registration, newest first."""
HEARTBEAT_S = 10.0
TIMEOUT_S = 30
"""Kubelet counts a device as unknown after this many seconds without a message."""
LONGEST_MESSAGE_BYTES = 1024
"""Kubelet truncates here, even in the middle of a character."""
log = structlog.get_logger()


class HealthSource(Protocol):
    """Provides the health of the devices."""

    def states(self) -> tuple[DeviceHealth, ...]:
        """Return the current complete list, in a fixed order. Cheap."""

    async def changed(self, seen: int) -> int:
        """Return the version of the list, counted from 1, as soon as it differs from `seen` (0: immediately)."""


def add_to(
    server: Server,
    source: HealthSource,
    ending: asyncio.Event,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    on_watch: Callable[[int], None] = lambda change: None,
) -> None:
    """Serve `source` on a server, in both API versions.

    Setting `ending` ends the streams; `on_watch` is called with +1 when a stream starts and -1 when it ends.
    """
    for pb in (drahealth_v1_pb2, drahealth_v1alpha1_pb2):
        service = _Service(pb, source, ending, heartbeat_s, on_watch)
        server.add(pb.DESCRIPTOR, "DRAResourceHealth", service)


class _Service:
    """The stream in one version; `pb` is its message module."""

    def __init__(
        self,
        pb: ModuleType,
        source: HealthSource,
        ending: asyncio.Event,
        heartbeat_s: float,
        on_watch: Callable[[int], None],
    ) -> None:
        self._pb: Any = pb
        self._source = source
        self._ending = ending
        self._heartbeat_s = heartbeat_s
        self._on_watch = on_watch

    async def NodeWatchResources(self, request: Any, context: Any) -> None:  # noqa: N802
        self._on_watch(+1)
        try:
            await self._send(context)
        except H2Error:
            raise  # kubelet has hung up
        except Exception as error:
            log.error("health-not-sent", error=str(error), exc_info=error)
            text = f"cannot send the health of devices: unexpected {type(error).__name__}, see the agent's log"
            await context.abort(Code.INTERNAL, text)
        finally:
            self._on_watch(-1)

    async def _send(self, context: Any) -> None:
        clock, due_s = asyncio.get_running_loop().time, 0.0
        seen, sent = 0, None
        while not self._ending.is_set():
            states = self._source.states()
            if states != sent or clock() >= due_s:
                await context.write(self._list(states))
                sent, due_s = states, clock() + self._heartbeat_s
            # Only the wait may be interrupted: while a write is in progress, gRPC cannot send the end of the stream.
            seen = await unless(self._ending, self._news(seen, due_s)) or seen

    async def _news(self, seen: int, due_s: float) -> int:
        """Return the next version, or `seen` itself when the heartbeat is due."""
        try:
            async with asyncio.timeout_at(due_s) as limit:
                return await self._source.changed(seen)
        except TimeoutError:
            if not limit.expired():
                raise
        return seen

    def _list(self, states: Iterable[DeviceHealth]) -> Any:
        now = int(time.time())
        return self._pb.NodeWatchResourcesResponse(devices=[self._device(one, now) for one in states])

    def _device(self, one: DeviceHealth, now: int) -> Any:
        known = one.state in (HEALTHY, UNHEALTHY)
        return self._pb.DeviceHealth(
            device=self._pb.DeviceIdentifier(pool_name=one.pool, device_name=one.device),
            health=self._pb.HealthStatus.Value(one.state.upper()) if known else self._pb.UNKNOWN,
            last_updated_time=now,
            health_check_timeout_seconds=TIMEOUT_S,
            message=_cut(one.message or ("" if known else "health is not known yet")),
        )


def _cut(message: str) -> str:
    """Return as much of a message as kubelet accepts, in whole characters."""
    return message.encode(errors="replace")[:LONGEST_MESSAGE_BYTES].decode(errors="ignore")
