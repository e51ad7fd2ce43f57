"""Grants claims while their pods wait to be bound (DRADeviceBindingConditions, KEP-5007; on by default since 1.36).

Between the scheduler's decision and kubelet's call the device plugin may grant the same CPU or device to another pod,
and the claim's pod would wait for it on this node. With binding conditions a claim is prepared as soon as it is
allocated: the scheduler binds the pod once the claim's status says Ready, and allocates another device once it says
Refused.

The API server cannot select claims by node: every claim of the cluster is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from nodeagent.core.dra.prepare import grants_of
from nodeagent.core.model.claim import Claim, ClaimRef, Prepared
from nodeagent.core.model.grant import Grant
from nodeagent.errors import InputError, NodeagentError, PeerError
from nodeagent.kube import resourceclaim as wire
from nodeagent.state.agent import Agent
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

AGAIN_S, AWAY_S, NOT_ALLOWED_S = 0.2, 5.0, 600.0
"""How long to wait after a watch has ended; after an error; after it was forbidden."""
_FORBIDDEN, _GONE, _EXPIRED = 403, 404, 410
log = structlog.get_logger()


class Api(Protocol):
    """The calls that are needed. Each raises PeerError."""

    def claims(self) -> AsyncIterator[Any]: ...
    def watch_claims(self, revision: str) -> AsyncIterator[Any]: ...


class Preparer(Protocol):
    """Prepares claims, as for kubelet."""

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]: ...


class Answer(Protocol):
    """Writes the result of preparing a claim to its status. Raises PeerError."""

    async def __call__(self, claim: Claim, grants: Sequence[Grant], error: str) -> None: ...


class ClaimBinder:
    """Follows the claims of the cluster and prepares those for which the scheduler waits."""

    def __init__(
        self,
        api: Api,
        agent: Agent,
        preparer: Preparer,
        answer: Answer,
        driver: str,
        node_name: str,
        *,
        changed: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        """Start nothing. `changed` is called after each change of `able`, `gone` if a claim that holds something is
        probably gone."""
        self.able = False
        """Whether claims are followed: only then may a pod wait for it."""
        self._api = api
        self._agent = agent
        self._preparer = preparer
        self._answer = answer
        self._driver = driver
        self._node_name = node_name
        self._changed = changed
        self._gone = gone
        self._failing = Once("claims-not-followed")
        self._odd = Once("claim-not-understood")

    @property
    def reason(self) -> str:
        """Return why claims are not followed at present, or ""."""
        return self._failing.last

    async def follow(self) -> None:
        """Prepare claims that are waited for, until cancelled; then none may be waited for any longer."""
        try:
            while True:
                rest_s = await self._session()
                await asyncio.sleep(rest_s)
        finally:
            self._set_able(False)

    async def _session(self) -> float:
        """Take all claims and their changes until the server ends the watch. Return how long to wait, in seconds."""
        try:
            revision = ""
            async for page in self._api.claims():
                revision = page.revision
                for document in page.items:
                    await self._take(document, deleted=False)
            self._failing.clear()
            self._set_able(True)
            async for event in self._api.watch_claims(revision):
                if event.type != "BOOKMARK":
                    await self._take(event.object, deleted=event.type == "DELETED")
        except PeerError as error:
            if error.status == _EXPIRED:
                return AGAIN_S
            self._failing.report(str(error))
            if error.status != _FORBIDDEN:
                return AWAY_S
            self._set_able(False)
            return NOT_ALLOWED_S
        return AGAIN_S

    def _set_able(self, able: bool) -> None:
        if able != self.able:
            self.able = able
            self._changed()

    async def _take(self, document: Mapping[str, Any], *, deleted: bool) -> None:
        """Take a claim as it is now. A claim that cannot be read is another claim's problem: it is logged and left."""
        try:
            found = wire.read_allocated(document, self._driver, self._node_name)
            if found.awaited and not deleted:
                await self._bind(wire.read(document, self._driver))
        except InputError as error:
            self._odd.report(str(error))
            return
        if (deleted or not found.here) and grants_of(self._agent.ledger, found.ref.uid):
            self._gone()

    async def _bind(self, claim: Claim) -> None:
        """Prepare a claim and inform the scheduler. Raise PeerError if the API server cannot be reached; what concerns
        this claim alone, such as a ledger that cannot be written, is the reason of a refusal."""
        try:
            error = (await self._preparer.prepare([claim.ref], new_op()))[claim.ref.uid].error
        except NodeagentError as fault:
            error = f"cannot prepare claim {claim.ref}: {fault}"
        try:
            await self._answer(claim, grants_of(self._agent.ledger, claim.ref.uid), error)
        except PeerError as fault:
            if fault.status != _GONE:
                raise
            error = str(fault)
        log.info(
            "claim-bound" if not error else "claim-not-bound", claim=str(claim.ref), uid=claim.ref.uid, error=error
        )
