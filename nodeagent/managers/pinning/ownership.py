"""Ownership of grants, as far as it is known only elsewhere: which devices kubelet's checkpoint assigns to whom, for
which pods kubelet has a claim prepared, and for which the API server has it reserved. Read on demand; the ledger
remembers the pods of claims.

Kubelet is asked first: it alone knows the pods of a claim that is reserved for a group of pods.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from nodeagent.core.dra.prepare import grants_of
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.container import Container
from nodeagent.core.model.grant import DEVICE_PLUGIN
from nodeagent.core.opaque.device import OWN_VARIABLES
from nodeagent.core.pinning.plan import Pin
from nodeagent.errors import InputError, PeerError
from nodeagent.kube import resourceclaim as wire
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, FileVersion, Listing, given, version
from nodeagent.kube.kubelet_files.claim_state import pods_of
from nodeagent.state.agent import Agent
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

LIST_S, CLAIM_S = 0.5, 1.0
"""How long kubelet may take to list what containers use, and the API server to answer for whom a claim is reserved: the
runtime waits 2 s."""
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
List = Callable[[float], Awaitable[Listing]]
"""Returns what kubelet lists, within a time in seconds. Raises PeerError."""
_NOT_SHOWN = "kubelet does not show that its pod uses it"
log = structlog.get_logger()


class GrantOwnership:
    """Who owns grants. `given` is what kubelet has assigned to whom, as last read."""

    def __init__(self, agent: Agent, plugins: Path, fetch: Fetch, listing: List) -> None:
        """Store the sources.

        `plugins` is kubelet's device-plugins folder with its checkpoint; the parent has the record of its claims.
        `fetch` returns a claim's object from the API server.
        """
        self.given: Given = MappingProxyType({})
        self._agent = agent
        self._plugins = plugins
        self._fetch = fetch
        self._listing = listing
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
        reasons = self._unread_of(container, pin())
        silent = await self._hear_of_claims(container, pin())
        for ref in self._refs(pin()):
            reasons.append(await self._prove(ref, container, silent))
        if not any(reasons):
            self._say_foreign(container, pin())
        return "; ".join(filter(None, reasons))

    # ---------------------------------------------------------------- claims

    async def _hear_of_claims(self, container: Container, pin: Pin) -> str:
        """Record which unproven grants are the pod's according to kubelet; return why none of the others is shown to be
        ("" if all are)."""
        left, silent = self._refs(pin), ""
        for ask in (self._prepared_for, self._listed_for) if left else ():
            try:
                shown = await ask(container, left)
            except (PeerError, InputError, TimeoutError) as error:
                silent = f"kubelet is silent: {error or 'it did not answer in time'}"
                continue
            for ref in shown:
                known = self._known_pods(ref.uid)
                await self._agent.record_reserved_for(ref.uid, (*known, container.pod_uid), new_op())
            left = [ref for ref in left if ref not in shown]
        return silent or _NOT_SHOWN

    async def _prepared_for(self, container: Container, refs: Sequence[ClaimRef]) -> list[ClaimRef]:
        """Return the claims that kubelet has recorded as prepared for the container's pod, by its UID."""
        folder = self._plugins.parent
        of = await asyncio.to_thread(lambda: {ref.uid: pods_of(folder, ref.uid) for ref in refs})
        return [ref for ref in refs if container.pod_uid in of[ref.uid]]

    async def _listed_for(self, container: Container, refs: Sequence[ClaimRef]) -> list[ClaimRef]:
        """Return the claims whose devices kubelet lists for a container of the pod, by its name."""
        async with asyncio.timeout(LIST_S):
            every = (await self._listing(LIST_S)).claimed
        pod = (container.namespace, container.pod_name)
        ids = {id.partition("=")[2] for one in every if (one.namespace, one.pod) == pod for id in one.ids}
        return [ref for ref in refs if any(one.rpartition("-")[0] == ref.uid for one in ids)]

    def _known_pods(self, uid: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pod for one in grants_of(self._agent.ledger, uid) for pod in one.pods))

    def _refs(self, pin: Pin) -> list[ClaimRef]:
        """Return the claims of a container's unproven grants."""
        grants = self._agent.ledger.grants
        return sorted({self._ref(one) for one in pin.unproven if one in grants}, key=str)

    def _unread_of(self, container: Container, pin: Pin) -> list[str]:
        """Return why it is unknown whether a device-plugin grant that the container names is its own; empty if
        known."""
        ledger = self._agent.ledger.grants
        named = (ledger.get(value) for name, value in container.env.items() if name.startswith(OWN_VARIABLES))
        open_ = [one for one in named if one and one.holder.api == DEVICE_PLUGIN and not one.confirmed]
        return [self._unread.last] if self._unread.last and any(one.id not in pin.grants for one in open_) else []

    async def _prove(self, ref: ClaimRef, container: Container, silent: str) -> str:
        """Ask the API server for which pods a claim is reserved. Return why it is not known whether the container's pod
        is one of them, or "" if it is known.

        `silent` is why kubelet does not show it.
        """
        try:
            async with asyncio.timeout(CLAIM_S):
                document = await self._fetch(ref)
            claim = wire.read(document, "") if document is not None else None
        except (TimeoutError, PeerError, InputError) as error:
            why = str(error) or f"the API server did not answer within {CLAIM_S:g} s"
            return f"cannot determine for which pods claim {ref} is reserved: {why}; {silent}"
        if claim is None or claim.ref.uid != ref.uid:
            return f"cannot prove that claim {ref} is its pod's: the API server has no such claim; {silent}"
        pods = claim.pods_with(self._known_pods(ref.uid))
        await self._agent.record_reserved_for(ref.uid, pods, new_op())
        if claim.groups and container.pod_uid not in pods:
            return f"cannot prove that claim {ref} is its pod's: it is reserved for a group of pods; {silent}"
        return ""

    def _ref(self, grant_id: str) -> ClaimRef:
        holder = self._agent.ledger.grants[grant_id].holder
        return ClaimRef(namespace=holder.namespace, name=holder.claim, uid=holder.uid)

    def _say_foreign(self, container: Container, pin: Pin) -> None:
        for one in pin.unproven:
            grant = self._agent.ledger.grants.get(one)
            holder = str(grant and grant.holder)
            log.warning("grant-of-another-pod-named", container=str(container), grant=one, holder=holder)
