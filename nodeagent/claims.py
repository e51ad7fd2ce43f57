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
from nodeagent.errors import HostError, InputError, NodeagentError, PeerError, StateError
from nodeagent.host.cdi import CdiDevice, CdiFolder, ClaimFiles
from nodeagent.kube import claims as wire

MOST_READS, READ_S = 4, 25.0
"""Claims that are read from the API server at once, and how long those of one call may take together: kubelet waits for
45 s, and what is granted already can be answered without."""
RENDER_PACK = 16
"""Claims whose files are looked at in one go."""
log = structlog.get_logger()
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
"""A claim's object from the API server; None: there is none. PeerError where that cannot be known."""


class _EveryClaim:
    """Has every UID."""

    def __contains__(self, uid: object) -> bool:
        return True


_EVERY_CLAIM = _EveryClaim()
_UNPREPARED = "cannot prepare claim {}: it was unprepared meanwhile"


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
        self._unrendered: Mapping[str, str] = {}
        """What was said last of claims whose files cannot be written."""

    # ---------------------------------------------------------------- kubelet's calls

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]:
        """By UID: the devices of each claim, or why it cannot be prepared. Claims of one call are of one pod."""
        began = time.perf_counter()
        granted, errors = await self._decided(claims, op)
        errors.update(await self._render(granted))
        for ref in claims:
            if ref.uid in granted and not self._hold(granted[ref.uid]):
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
        read, comes to nothing: nobody would ever give back what it were granted."""
        for waited_for in self._reading:
            waited_for.difference_update(ref.uid for ref in claims)
        gone = await self._agent.unprepare([ref.uid for ref in claims], op)
        for grant in gone:
            log.info("claim-released", op=op, claim=str(grant.holder), grant=grant.id)
        async with self._disk:
            return await asyncio.to_thread(self._remove, [ref.uid for ref in claims])

    # ---------------------------------------------------------------- deciding

    async def _decided(self, claims: Sequence[ClaimRef], op: str) -> tuple[dict[str, Sequence[Grant]], dict[str, str]]:
        """What each claim is granted, or why it is not, by UID."""
        with self._waited_for(claims) as waited_for:
            until_s = asyncio.get_running_loop().time() + READ_S
            read = await asyncio.gather(*(self._read(ref, until_s) for ref in claims))
            found = [one for one in read if isinstance(one, Claim) and one.ref.uid in waited_for]
            batch = await self._agent.prepare(self._dra().catalog, found, op)
        granted, errors = dict[str, Sequence[Grant]](batch.grants), dict(batch.errors)
        for ref, one in zip(claims, read, strict=True):
            if isinstance(one, PeerError) and (known := grants_of(self._agent.ledger, ref.uid)):
                log.warning("claim-not-read", claim=str(ref), error=str(one), answered="as granted before")
                granted[ref.uid] = known
            elif isinstance(one, NodeagentError):
                errors[ref.uid] = f"cannot prepare claim {ref}: {one}"
            elif ref.uid not in batch.grants:
                errors.setdefault(ref.uid, _UNPREPARED.format(ref))
        return granted, errors

    def _hold(self, grants: Iterable[Grant]) -> bool:
        """Whether these grants are in force, as they were made."""
        return all(self._agent.ledger.grants.get(one.id) == one for one in grants)

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
            raise InputError("it is reserved for nobody")
        return claim

    # ---------------------------------------------------------------- rendering

    async def render(self) -> None:
        """Put back what is missing of any claim and remove what is of none. Errors are said, claim by claim."""
        on_disk = await asyncio.to_thread(lambda: self._cdi.uids() | self._readable.uids())
        # Whoever wrote a file had decided before: what is unknown after this has no grant.
        await self._agent.refresh()
        held = claims_held(self._agent.ledger)
        before, self._unrendered = self._unrendered, await self._render_all(held)
        for uid, error in self._unrendered.items():
            if before.get(uid) != error:
                log.warning("claim-not-rendered", claim=str(held[uid][0].holder), error=error)
        orphans = sorted(on_disk - claims_held(self._agent.ledger).keys())
        async with self._disk:
            await asyncio.to_thread(self._remove, orphans)
            drafts = await asyncio.to_thread(self._remove_drafts)
        if orphans or drafts:
            log.info("orphans-removed", claims=orphans, drafts=drafts)

    async def _render_all(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """The same of many claims, a few at a time: kubelet's calls come in between."""
        errors, every = dict[str, str](), list(claims.items())
        for start in range(0, len(every), RENDER_PACK):
            errors |= await self._render(dict(every[start : start + RENDER_PACK]))
        return errors

    async def _render(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Write the files of those claims whose grants are still in force; errors by UID."""
        async with self._disk:
            some = {uid: grants for uid, grants in claims.items() if self._hold(grants)}
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

    def _remove_drafts(self) -> list[str]:
        """What a killed agent left half-written. Who is writing at this moment, as another instance may be, notices
        and writes again."""
        try:
            return [*self._cdi.sweep(_EVERY_CLAIM), *self._readable.sweep(_EVERY_CLAIM)]
        except (HostError, OSError) as error:
            log.warning("drafts-not-removed", error=str(error))
            return []

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
    """What each claim holds, by its UID, in the order of its allocation."""
    held: dict[str, list[Grant]] = {}
    for grant in ledger.grants.values():
        if grant.holder.api == CLAIM:
            held.setdefault(grant.holder.uid, []).append(grant)
    return {uid: tuple(sorted(grants, key=lambda one: (len(one.id), one.id))) for uid, grants in held.items()}


def _index(grant: Grant) -> str:
    return grant.id.rpartition("-")[2]


def _names(request: str) -> tuple[str, ...]:
    """Under which names containers may ask: of a subrequest its own and its request's."""
    return tuple(dict.fromkeys((request.partition("/")[0], request)))
