"""One agent of the cluster at a time does something: the one that holds a Lease."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog

from nodeagent.aio.supervise import race
from nodeagent.errors import PeerError
from nodeagent.kube import lease as wire
from nodeagent.telemetry.once import Once

DURATION_S, RENEW_S, LOOK_S = 120, 30.0, 60.0
"""How long a Lease lasts without being renewed, how often it is renewed, and how often the others look at it. All of
5,000 nodes together look 83 times a second; a pool stays as it is while no agent holds the Lease. A holder stops in
time: a try takes 20 s at most, as each call of the API server has a deadline of 10 s."""
RETRY_S = 5.0
CONFLICT = 409
log = structlog.get_logger()


class LeaseApi(Protocol):
    """The calls that are needed. Each raises PeerError."""

    async def get(self, resource: Any, name: str, namespace: str = "") -> dict[str, Any] | None: ...
    async def create(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]: ...
    async def replace(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]: ...


class ClusterLease:
    """A Lease that this agent tries to hold. Building it asks for nothing."""

    def __init__(
        self,
        api: LeaseApi,
        resource: Any,
        name: str,
        namespace: str,
        holder: str,
        *,
        duration_s: int = DURATION_S,
        renew_s: float = RENEW_S,
        look_s: float = LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """resource: what `api` calls Leases. holder: how this agent is called in the Lease. The times are in
        seconds."""
        self._api, self._resource = api, resource
        self._name, self._namespace, self._holder = name, namespace, holder
        self._duration_s, self._renew_s, self._look_s = duration_s, renew_s, look_s
        self._clock = clock
        self._seen: wire.Held | None = None
        self._seen_s = 0.0
        self._spread = random.Random(f"{holder}/{name}")  # noqa: S311  spreads nodes; the name makes it repeatable
        self._failing = Once("lease-not-available")
        self.holder = ""
        """Who holds it, as last seen; "" if that is unknown."""
        self.held = False
        """Whether this agent does."""

    @property
    def reason(self) -> str:
        """Return why the Lease cannot be read or written, or ""."""
        return self._failing.last

    async def while_held(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something whenever this agent holds the Lease, until cancelled. `work` is cancelled when it is lost."""
        while True:
            await self._take()
            self.held = True
            log.info("lease-taken", lease=f"{self._namespace}/{self._name}")
            try:
                await race(work(), self._keep())
            finally:
                self.held = False
            log.warning("lease-lost", lease=f"{self._namespace}/{self._name}", holder=self.holder)

    async def _take(self) -> None:
        while True:
            if await self._tried():
                return
            await asyncio.sleep(self._look_s * self._spread.uniform(0.7, 1.3))

    async def _keep(self) -> None:
        """Renew it. Return when another agent has it, or may have it because this one could not renew it."""
        renewed_s, rest_s = self._clock(), self._renew_s
        while self._clock() - renewed_s < self._duration_s - self._renew_s:
            await asyncio.sleep(rest_s)
            asked_s = self._clock()
            if await self._tried():
                renewed_s, rest_s = asked_s, self._renew_s
            elif self.holder != self._holder:
                return
            else:
                rest_s = min(RETRY_S, self._renew_s)

    async def _tried(self) -> bool:
        """Take or renew it, if it is free or this agent's. Return whether it is this agent's now."""
        try:
            found = await self._api.get(self._resource, self._name, self._namespace)
            if not self._may_take(found):
                self._failing.clear()
                return False
            body = wire.taken(found, self._name, self._namespace, self._holder, self._duration_s, time.time())
            if found is None:
                await self._api.create(self._resource, body)
            else:
                await self._api.replace(self._resource, body)
        except PeerError as error:
            if error.status != CONFLICT:  # otherwise another agent was faster
                self._failing.report(str(error))
            return False
        self.holder = self._holder
        self._failing.clear()
        return True

    def _may_take(self, found: Mapping[str, Any] | None) -> bool:
        if found is None:
            return True
        said = wire.read(found)
        if said != self._seen:
            self._seen, self._seen_s = said, self._clock()
        self.holder = said.holder
        if said.holder in ("", self._holder):
            return True
        return self._clock() - self._seen_s > said.duration_s
