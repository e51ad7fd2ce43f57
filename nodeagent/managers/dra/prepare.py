"""What kubelet asks about claims: each is read from the API server, decided by the agent (durable), rendered to files,
and answered. What kubelet no longer waits for, and has unprepared, comes to nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import structlog

from nodeagent.core.dra.prepare import Catalog, grants_of
from nodeagent.core.model.claim import Claim, ClaimRef, Prepared, PreparedDevice
from nodeagent.core.model.grant import Grant
from nodeagent.errors import InputError, NodeagentError, PeerError, StateError
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.dra import container_edits as handover
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.resources.catalog import Dra
from nodeagent.state.agent import Agent, Unprepared
from nodeagent.telemetry import metrics

MOST_READS, READ_S = 4, 25.0
"""Claims that are read from the API server at once, and how long those of one call may take together: kubelet waits for
45 s, and what is granted already can be answered without."""
ENDING_S, ENDING_POLL_S = 2.0, 0.05
"""How long the last process of a pod may take to end after kubelet has seen its containers end."""
log = structlog.get_logger()
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
"""A claim's object from the API server; None: there is none. PeerError where that cannot be known."""


Grow = Callable[[Catalog, Sequence[Claim]], AbstractAsyncContextManager[Callable[[str], str]]]
"""Have pools of hugepages grow for claims that are decided within; why they did not, by UID of the claim."""
_IN_USE = "cannot unprepare claim {}: it is in use, {}"
_UNPREPARED = "cannot prepare claim {}: it was unprepared meanwhile"


class StatusNotifier(Protocol):
    """Who is told what was prepared, when kubelet has its answer."""

    def __call__(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None: ...


@contextlib.asynccontextmanager
async def never_grow(catalog: Catalog, claims: Sequence[Claim]) -> AsyncIterator[Callable[[str], str]]:
    """Pools of hugepages are what they are."""
    yield lambda uid: ""


class ClaimPreparer:
    """Prepares and unprepares claims, as the DRA plugin calls it."""

    def __init__(
        self,
        agent: Agent,
        dra: Callable[[], Dra],
        fetch: Fetch,
        rendering: ClaimRenderer,
        told: StatusNotifier = lambda ref, grants, error: None,
        grow: Grow = never_grow,
    ) -> None:
        """dra: what is served at this moment."""
        self._agent = agent
        self._dra = dra
        self._fetch = fetch
        self._rendering = rendering
        self._told = told
        self._grow = grow
        self._reads = asyncio.Semaphore(MOST_READS)
        self._reading: list[set[str]] = []

    # ---------------------------------------------------------------- kubelet's calls

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]:
        """By UID: the devices of each claim, or why it cannot be prepared. Claims of one call are of one pod."""
        began = time.perf_counter()
        granted, errors = await self._decided(claims, op)
        errors.update(await self._rendering.write(granted))
        for ref in claims:
            if ref.uid in granted and not self._rendering.hold(granted[ref.uid]):
                errors[ref.uid] = _UNPREPARED.format(ref)
        answers = {ref.uid: self._answer(ref, granted, errors) for ref in claims}
        for ref in claims:
            self._told(ref, granted.get(ref.uid, ()), answers[ref.uid].error)
            self._say(ref, granted.get(ref.uid, ()), answers[ref.uid].error, op)
        failed = sum(bool(one.error) for one in answers.values())
        metrics.count_prepared(failed, len(answers) - failed, time.perf_counter() - began)
        return answers

    async def unprepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, str]:
        """By UID: "", or why something of a claim is left. A prepare that kubelet gave up, and that is still being
        read, comes to nothing: nobody would ever give back what it were granted. Of a claim whose pod lives nothing is
        released, whatever kubelet has forgotten: it asks again."""
        for waited_for in self._reading:
            waited_for.difference_update(ref.uid for ref in claims)
        done = await self._unprepared([ref.uid for ref in claims], op)
        for grant in done.released:
            log.info("claim-released", op=op, claim=str(grant.holder), grant=grant.id)
        errors = {ref.uid: _IN_USE.format(ref, done.living[ref.uid]) for ref in claims if ref.uid in done.living}
        for uid, why in errors.items():
            log.warning("claim-in-use", op=op, uid=uid, error=why)
        return errors | await self._rendering.remove([ref.uid for ref in claims if ref.uid not in errors])

    async def _unprepared(self, uids: Sequence[str], op: str) -> Unprepared:
        """What became of some claims. A runtime's helper may outlive its container by a moment."""
        until_s = time.monotonic() + ENDING_S
        done = await self._agent.unprepare(uids, op)
        while done.living and time.monotonic() < until_s:
            await asyncio.sleep(ENDING_POLL_S)
            more = await self._agent.unprepare(list(done.living), op)
            done = Unprepared(released=(*done.released, *more.released), living=more.living)
        return done

    # ---------------------------------------------------------------- deciding

    async def _decided(self, claims: Sequence[ClaimRef], op: str) -> tuple[dict[str, Sequence[Grant]], dict[str, str]]:
        """What each claim is granted, or why it is not, by UID."""
        with self._waited_for(claims) as waited_for:
            until_s = asyncio.get_running_loop().time() + READ_S
            read = await asyncio.gather(*(self._read(ref, until_s) for ref in claims))
            found = [one for one in read if isinstance(one, Claim) and one.ref.uid in waited_for]
            catalog = self._dra().catalog
            async with self._grow(catalog, found) as too_small:
                found = [one for one in found if one.ref.uid in waited_for]  # growing takes its time
                batch = await self._agent.prepare(catalog, found, op)
                errors = {uid: _because(why, too_small(uid)) for uid, why in batch.errors.items()}
        granted = dict[str, Sequence[Grant]](batch.grants)
        for ref, one in zip(claims, read, strict=True):
            if isinstance(one, PeerError) and (known := grants_of(self._agent.ledger, ref.uid)):
                log.warning("claim-not-read", claim=str(ref), error=str(one), answered="as granted before")
                granted[ref.uid] = known
            elif isinstance(one, NodeagentError):
                errors[ref.uid] = f"cannot prepare claim {ref}: {one}"
            elif ref.uid not in batch.grants:
                errors.setdefault(ref.uid, _UNPREPARED.format(ref))
        return granted, errors

    # ---------------------------------------------------------------- reading

    @contextlib.contextmanager
    def _waited_for(self, claims: Sequence[ClaimRef]) -> Iterator[set[str]]:
        """The UIDs of claims that are being read: those that are unprepared meanwhile drop out."""
        uids = {ref.uid for ref in claims}
        self._reading.append(uids)
        try:
            yield uids
        finally:
            self._reading = [one for one in self._reading if one is not uids]

    async def _read(self, ref: ClaimRef, until_s: float) -> Claim | NodeagentError:
        """The claim, or why it cannot be had: PeerError where that is the API server's doing. until_s: by the loop's
        clock."""
        try:
            async with asyncio.timeout_at(until_s), self._reads:
                document = await self._fetch(ref)
            return self._checked(ref, document)
        except TimeoutError:
            return PeerError(f"the API server did not answer within {READ_S:g} s")
        except (PeerError, InputError) as error:
            return error

    def _checked(self, ref: ClaimRef, document: Mapping[str, Any] | None) -> Claim:
        if document is None:
            raise InputError("the API server has no such claim")
        claim = wire.read(document, self._dra().catalog.driver)
        if claim.ref.uid != ref.uid:
            raise InputError(f"the claim of that name has UID {claim.ref.uid}, kubelet asks for {ref.uid}")
        if claim.ref != ref:
            raise InputError(f"the API server has it as {claim.ref}")
        if not claim.reserved_for:
            raise InputError("it is not reserved for any pod")
        return claim

    # ---------------------------------------------------------------- answers

    def _answer(self, ref: ClaimRef, granted: Mapping[str, Sequence[Grant]], errors: Mapping[str, str]) -> Prepared:
        if why := errors.get(ref.uid):
            return Prepared(error=why)
        try:
            return Prepared(devices=tuple(self._device(grant) for grant in granted[ref.uid]))
        except NodeagentError as error:  # the device went away since it was rendered
            return Prepared(error=f"cannot prepare claim {ref}: {error}")

    def _device(self, grant: Grant) -> PreparedDevice:
        result = grant.result
        if result is None:
            raise StateError(f"grant {grant.id} of the ledger does not say what was allocated")
        own = self._rendering.cdi_id(grant)
        others = handover.cdi_names(self._dra(), self._agent.inventory, grant)
        return PreparedDevice(
            requests=_names(result.request),
            pool=result.pool,
            device=result.device,
            cdi_ids=(own, *others),
            share_id=result.share_id,
        )

    def _say(self, ref: ClaimRef, grants: Sequence[Grant], error: str, op: str) -> None:
        if error:
            log.warning("claim-refused", op=op, claim=str(ref), uid=ref.uid, error=error)
        else:
            parts = [f"{grant.id}: {grant.cpus or ''} {' '.join(grant.ids)}" for grant in grants]
            log.info("claim-prepared", op=op, claim=str(ref), uid=ref.uid, grants=parts)


def _because(error: str, why: str) -> str:
    return f"{error}; {why}" if why else error


def _names(request: str) -> tuple[str, ...]:
    """Under which names containers may ask: of a subrequest its own and its request's."""
    return tuple(dict.fromkeys((request.partition("/")[0], request)))
