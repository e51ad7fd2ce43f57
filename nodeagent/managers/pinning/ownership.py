"""Ownership of grants, as far as it is known only elsewhere: which devices kubelet's checkpoint assigns to whom, and
for which pods the API server has a claim reserved. Read on demand; the ledger remembers the latter."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from nodeagent.core.dra.opaque_config import OWN_VARIABLES
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.container import Container
from nodeagent.core.model.grant import DEVICE_PLUGIN
from nodeagent.core.pinning.plan import Pin
from nodeagent.errors import InputError, PeerError
from nodeagent.kube import resourceclaim as wire
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, FileVersion, given, version
from nodeagent.state.agent import Agent
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

CLAIM_S = 1.0
"""How long the API server may take to answer for whom a claim is reserved: the runtime waits 2 s."""
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
log = structlog.get_logger()


class GrantOwnership:
    """Who owns grants. `given` is what kubelet has assigned to whom, as last read."""

    def __init__(self, agent: Agent, plugins: Path, fetch: Fetch) -> None:
        """Store the sources.

        `plugins` is kubelet's device-plugins folder with its checkpoint. `fetch` returns a claim's object from the API
        server.
        """
        self.given: Given = MappingProxyType({})
        self._agent = agent
        self._plugins = plugins
        self._fetch = fetch
        self._seen: FileVersion | None = None
        self._unread = Once("given-devices-unknown")

    async def hear_kubelet(self) -> None:
        """Read what kubelet has assigned to whom, if its checkpoint has changed."""
        now = version(self._plugins / CHECKPOINT)
        if now == self._seen and not self._unread.last:
            return
        try:
            found = await asyncio.to_thread(given, self._plugins)
            self.given = found if found is not None else MappingProxyType({})
            self._seen = now
            self._unread.clear()
        except InputError as error:
            self._unread.report(str(error))

    async def doubt(self, container: Container, pin: Callable[[], Pin]) -> str:
        """Determine whether what a container names belongs to its pod; return why that cannot be determined, or "".

        `pin` returns the container's pin from what is known when it is called.
        """
        refs = {self._ref(one) for one in pin().unproven if one in self._agent.ledger.grants}
        reasons = [*self._unread_of(container, pin()), *[await self._prove(ref) for ref in sorted(refs, key=str)]]
        if not any(reasons):
            self._say_foreign(container, pin())
        return "; ".join(filter(None, reasons))

    def _unread_of(self, container: Container, pin: Pin) -> list[str]:
        """Return why it is unknown whether a device-plugin grant that the container names is its own; empty if
        known."""
        ledger = self._agent.ledger.grants
        named = (ledger.get(value) for name, value in container.env.items() if name.startswith(OWN_VARIABLES))
        open_ = [one for one in named if one and one.holder.api == DEVICE_PLUGIN and not one.confirmed]
        return [self._unread.last] if self._unread.last and any(one.id not in pin.grants for one in open_) else []

    async def _prove(self, ref: ClaimRef) -> str:
        try:
            async with asyncio.timeout(CLAIM_S):
                document = await self._fetch(ref)
            claim = wire.read(document, "") if document is not None else None
            if claim is not None and claim.ref.uid == ref.uid:
                await self._agent.record_reserved_for(ref.uid, claim.reserved_for, new_op())
        except (TimeoutError, PeerError, InputError) as error:
            why = str(error) or f"the API server did not answer within {CLAIM_S:g} s"
            return f"cannot determine for which pods claim {ref} is reserved: {why}"
        return ""

    def _ref(self, grant_id: str) -> ClaimRef:
        holder = self._agent.ledger.grants[grant_id].holder
        return ClaimRef(namespace=holder.namespace, name=holder.claim, uid=holder.uid)

    def _say_foreign(self, container: Container, pin: Pin) -> None:
        for one in pin.unproven:
            grant = self._agent.ledger.grants.get(one)
            holder = str(grant and grant.holder)
            log.warning("grant-of-another-pod-named", container=str(container), grant=one, holder=holder)
