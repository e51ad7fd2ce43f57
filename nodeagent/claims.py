"""What kubelet asks about claims: read, decide, render, answer.

A claim is read from the API server, decided by the agent (durable), then rendered: one CDI file and one folder with
what its containers may read. What is rendered is a function of the ledger and the inventory, and is put back whenever
it is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import structlog

from nodeagent import handover, metrics
from nodeagent.agent import Agent
from nodeagent.catalog import Dra
from nodeagent.core.claim import Claim, ClaimRef, Prepared, PreparedDevice
from nodeagent.core.ledger import Ledger
from nodeagent.core.model import CLAIM, Grant, Inventory, Mount
from nodeagent.core.prepare import grants_of
from nodeagent.errors import HostError, InputError, NodeagentError, PeerError
from nodeagent.host.cdi import CdiDevice, CdiFolder, ClaimFiles
from nodeagent.kube import claims as wire

MOST_READS = 8
"""Claims that are read from the API server at once."""
log = structlog.get_logger()
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
"""A claim's object from the API server; None: there is none. PeerError where that cannot be known."""


class Told(Protocol):
    """Who is told what was prepared, when kubelet has its answer."""

    def __call__(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None: ...


class Claims:
    """Prepares and unprepares claims, as kube.dra wants it."""

    def __init__(
        self,
        agent: Agent,
        dra: Callable[[], Dra],
        fetch: Fetch,
        cdi: CdiFolder,
        readable: ClaimFiles,
        told: Told = lambda ref, grants, error: None,
    ) -> None:
        """dra: what is served at this moment."""
        self._agent = agent
        self._dra = dra
        self._fetch = fetch
        self._cdi = cdi
        self._readable = readable
        self._told = told
        self._reads = asyncio.Semaphore(MOST_READS)
        self._reading: list[set[str]] = []
        self._disk = asyncio.Lock()

    # ---------------------------------------------------------------- kubelet's calls

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]:
        """By UID: the devices of each claim, or why it cannot be prepared. Claims of one call are of one pod."""
        began = time.perf_counter()
        with self._waited_for(claims) as waited_for:
            read = await asyncio.gather(*(self._read(ref) for ref in claims))
            found = [one for one in read if isinstance(one, Claim) and one.ref.uid in waited_for]
            batch = await self._agent.prepare(self._dra().catalog, found, op)
        granted, errors = dict(batch.grants), dict(batch.errors)
        for ref, one in zip(claims, read, strict=True):
            if isinstance(one, PeerError) and (known := grants_of(self._agent.ledger, ref.uid)):
                log.warning("claim-not-read", claim=str(ref), error=str(one), answered="as granted before")
                granted[ref.uid] = known
            elif isinstance(one, NodeagentError):
                errors[ref.uid] = f"cannot prepare claim {ref}: {one}"
            elif ref.uid not in batch.grants:
                errors.setdefault(ref.uid, f"cannot prepare claim {ref}: it was unprepared meanwhile")
        errors.update(await self._render(granted))
        for ref in claims:
            self._told(ref, granted.get(ref.uid, ()), errors.get(ref.uid, ""))
            self._say(ref, granted.get(ref.uid, ()), errors.get(ref.uid, ""), op)
        answers = {ref.uid: self._answer(ref, granted, errors) for ref in claims}
        failed = sum(bool(one.error) for one in answers.values())
        metrics.count_prepared(failed, len(answers) - failed, time.perf_counter() - began)
        return answers

    async def unprepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, str]:
        """By UID: "", or why something of a claim is left. A prepare that kubelet gave up, and that is still being
        read, comes to nothing: nobody would ever give back what it were granted."""
        for waited_for in self._reading:
            waited_for.difference_update(ref.uid for ref in claims)
        gone = await self._agent.unprepare([ref.uid for ref in claims], op)
        for grant in gone:
            log.info("claim-released", op=op, claim=str(grant.holder), grant=grant.id)
        async with self._disk:
            return await asyncio.to_thread(self._remove, [ref.uid for ref in claims])

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

    async def _read(self, ref: ClaimRef) -> Claim | NodeagentError:
        """The claim, or why it cannot be had: PeerError where that is the API server's doing."""
        try:
            async with self._reads:
                document = await self._fetch(ref)
            return self._checked(ref, document)
        except (PeerError, InputError) as error:
            return error

    def _checked(self, ref: ClaimRef, document: Mapping[str, Any] | None) -> Claim:
        if document is None:
            raise InputError("the API server has no such claim")
        claim = wire.read(document, self._dra().catalog.driver)
        if claim.ref.uid != ref.uid:
            raise InputError(f"the claim of that name has UID {claim.ref.uid}, kubelet asks for {ref.uid}")
        if not claim.reserved_for:
            raise InputError("it is reserved for nobody")
        return claim

    # ---------------------------------------------------------------- rendering

    async def render(self) -> None:
        """Put back what is missing of any claim and remove what is of none. Errors are said, claim by claim."""
        on_disk = await asyncio.to_thread(lambda: self._cdi.uids() | self._readable.uids())
        # Whoever wrote a file had decided before: what is unknown after this has no grant.
        await self._agent.refresh()
        held = claims_held(self._agent.ledger)
        for uid, error in (await self._render(held)).items():
            log.warning("claim-not-rendered", claim=str(held[uid][0].holder), error=error)
        orphans = sorted(on_disk - claims_held(self._agent.ledger).keys())
        if orphans:
            log.info("orphans-removed", claims=orphans)
            async with self._disk:
                await asyncio.to_thread(self._remove, orphans)

    async def _render(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Write the files of some claims that are still held; errors by UID."""
        async with self._disk:
            held = self._agent.ledger.grants
            some = {uid: grants for uid, grants in claims.items() if all(one.id in held for one in grants)}
            return await asyncio.to_thread(self._write_all, self._dra(), self._agent.inventory, some)

    def _write_all(self, dra: Dra, inventory: Inventory, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        errors = {}
        for uid, grants in claims.items():
            try:
                self._write(dra, inventory, uid, grants)
            except (NodeagentError, OSError) as error:
                errors[uid] = f"cannot prepare {grants[0].holder}: {error}"
        return errors

    def _write(self, dra: Dra, inventory: Inventory, uid: str, grants: Sequence[Grant]) -> None:
        self._readable.write(uid, handover.metadata(dra, inventory, grants))
        edits = handover.edits(dra, inventory, grants, self._mount(uid, grants[0].holder.claim))
        names = [self._cdi.device_name(uid, _index(grant)) for grant in grants]
        self._cdi.write(uid, [CdiDevice(name=name, edits=one) for name, one in zip(names, edits, strict=True)])

    def _mount(self, uid: str, name: str) -> Mount:
        return Mount(host_path=str(self._readable.path(uid).parent), container_path=f"{handover.CLAIMS_FOLDER}/{name}")

    def _remove(self, uids: Iterable[str]) -> dict[str, str]:
        errors = {}
        for uid in uids:
            try:
                self._cdi.remove(uid)
                self._readable.remove(uid)
                errors[uid] = ""
            except InputError:
                errors[uid] = ""  # nothing of ours can be named after it
            except (HostError, OSError) as error:
                errors[uid] = f"cannot unprepare claim {uid}: {error}"
        return errors

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
            raise AssertionError(f"grant {grant.id} of a claim has no result")
        own = self._cdi.device_id(grant.holder.uid, _index(grant))
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


def claims_held(ledger: Ledger) -> dict[str, tuple[Grant, ...]]:
    """What each claim holds, by its UID."""
    uids = dict.fromkeys(one.holder.uid for one in ledger.grants.values() if one.holder.api == CLAIM)
    return {uid: grants_of(ledger, uid) for uid in uids}


def _index(grant: Grant) -> str:
    return grant.id.rpartition("-")[2]


def _names(request: str) -> tuple[str, ...]:
    """Under which names containers may ask: of a subrequest its own and its request's."""
    return tuple(dict.fromkeys((request.partition("/")[0], request)))
