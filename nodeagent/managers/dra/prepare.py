"""Kubelet's calls for claims: each claim is read from the API server, decided by the agent (durable), rendered to
files, and answered. A prepare that kubelet has abandoned and followed by an unprepare has no effect."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

import structlog

from nodeagent.aio.supervise import run_to_end
from nodeagent.core.dra.prepare import Batch, Catalog, grants_of
from nodeagent.core.events.happenings import Report, claim_refused, unreported
from nodeagent.core.model.claim import Claim, ClaimRef, Prepared, PreparedDevice
from nodeagent.core.model.grant import Grant
from nodeagent.errors import HostError, InputError, NodeagentError, PeerError, StateError
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.dra import container_edits as handover
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.device_setup import (
    NO_INSTANCES,
    NOTHING_BOUND,
    NOTHING_SHARED,
    Instances,
    Passthrough,
    Sharing,
)
from nodeagent.managers.manager import Followed, nothing_follows
from nodeagent.resources.catalog import Dra
from nodeagent.state.agent import Agent
from nodeagent.state.audit import Refusal
from nodeagent.state.values import Unprepared
from nodeagent.telemetry import metrics

MOST_READS, READ_S = 4, 25.0
"""Maximum number of claims read from the API server concurrently, and the time limit for all reads of one call. Kubelet
waits 45 s, and existing grants can be returned without reading."""
ENDING_S, ENDING_POLL_S = 2.0, 0.05
"""How long the last process of a pod may take to end after kubelet has seen its containers end."""
log = structlog.get_logger()
Fetch = Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]]
"""Returns a claim's object from the API server, or None if there is none. Raises PeerError if that is unknown."""


Grow = Callable[[Catalog, Sequence[Claim]], AbstractAsyncContextManager[Callable[[str], str]]]
"""Grows hugepage pools for claims that are decided inside the context. Yields a function that returns, by claim UID,
why they did not grow."""
_ENDED = "kubelet unprepared its claim"
_IN_USE = "cannot unprepare claim {}: it is in use, {}"
_UNMADE = "the driver refused to make what was allocated to its claim"
_UNPREPARED = "cannot prepare claim {}: it was unprepared meanwhile"


class _Decided(NamedTuple):
    """Claims of one call, by UID: what each is granted, why others are not, and those that could be read."""

    granted: dict[str, Sequence[Grant]]
    errors: dict[str, str]
    read: Mapping[str, Claim]


class StatusNotifier(Protocol):
    """Notified of what was prepared, when the answer for kubelet is ready."""

    def __call__(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None: ...


class PreparedNotifier(Protocol):
    """Notified of a claim that was read and prepared, with its pods."""

    def __call__(self, claim: Claim, grants: Sequence[Grant]) -> None: ...


@contextlib.asynccontextmanager
async def never_grow(catalog: Catalog, claims: Sequence[Claim]) -> AsyncIterator[Callable[[str], str]]:
    """Leave hugepage pools as they are."""
    yield lambda uid: ""


class ClaimPreparer:
    """Prepares and unprepares claims: the DRA plugin's ClaimHandler."""

    def __init__(
        self,
        agent: Agent,
        dra: Callable[[], Dra],
        fetch: Fetch,
        rendering: ClaimRenderer,
        told: StatusNotifier = lambda ref, grants, error: None,
        grow: Grow = never_grow,
        prepared: PreparedNotifier = lambda claim, grants: None,
        report: Report = unreported,
        sharing: Sharing = NOTHING_SHARED,
        instances: Instances = NO_INSTANCES,
        passthrough: Passthrough = NOTHING_BOUND,
        followed: Followed = nothing_follows,
    ) -> None:
        """Store the parts. `dra` returns what is currently served. `followed` is called before a prepare is
        answered."""
        self._followed = followed
        self._sharing = sharing
        self._instances = instances
        self._passthrough = passthrough
        self._prepared = prepared
        self._report = report
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
        """Return, by UID, the devices of each claim, or why it cannot be prepared.

        All claims of one call belong to one pod.
        """
        began = time.perf_counter()
        granted, errors, read = await self._decided(claims, op)
        errors |= await self._shared(claims, {uid: grants for uid, grants in granted.items() if uid not in errors})
        for ref in claims:
            if ref.uid in granted and not self._rendering.hold(granted[ref.uid]):
                errors[ref.uid] = _UNPREPARED.format(ref)
        answers = {ref.uid: self._answer(ref, granted, errors) for ref in claims}
        await self._followed()
        for ref in claims:
            self._told(ref, granted.get(ref.uid, ()), answers[ref.uid].error)
            self._say(ref, granted.get(ref.uid, ()), answers[ref.uid].error, op)
            if not answers[ref.uid].error and ref.uid in read:
                self._prepared(read[ref.uid], granted[ref.uid])
        refused = [ref for ref in claims if answers[ref.uid].error]
        self._agent.record_refusals([_refusal(one, read.get(one.uid), answers[one.uid].error) for one in refused], op)
        for one in refused:
            self._report(claim_refused(one, read.get(one.uid), answers[one.uid].error))
        failed = sum(bool(one.error) for one in answers.values())
        metrics.count_prepared(failed, len(answers) - failed, time.perf_counter() - began)
        return answers

    async def _shared(self, claims: Sequence[ClaimRef], granted: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Make ready what the programs of claims share. Return errors by UID."""
        found, refs = await self._sharing.prepare(granted), {ref.uid: ref for ref in claims}
        return {uid: f"cannot prepare claim {refs[uid]}: {why}" for uid, why in found.items()}

    async def unprepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, str]:
        """Return, by UID, "" or why something of a claim is left.

        A prepare that kubelet has abandoned and that is still reading has no effect: nothing would ever release what it
        was granted. Nothing is released of a claim whose pod is alive, whatever kubelet has forgotten: kubelet asks
        again.
        """
        for waited_for in self._reading:
            waited_for.difference_update(ref.uid for ref in claims)
        unremoved = dict[str, str]()
        with metrics.UNPREPARE_SECONDS.time():
            bound = await self._still_bound([ref.uid for ref in claims])
            done = await self._unprepared([ref.uid for ref in claims if ref.uid not in bound], op, unremoved)
        unremoved |= bound
        for grant in done.released:
            log.info("claim-released", op=op, claim=str(grant.holder), grant=grant.id)
        unremoved |= {
            uid: f"cannot unprepare claim {uid}: {why}"
            for uid, why in (await self._sharing.release(_by_uid(done.released))).items()
        }
        if self._instances.concerned(done.released):  # nothing of ours uses them any longer
            await self._instances.settle()
        errors = {ref.uid: _IN_USE.format(ref, done.living[ref.uid]) for ref in claims if ref.uid in done.living}
        for uid, why in errors.items():
            log.warning("claim-in-use", op=op, uid=uid, error=why)
        return {ref.uid: errors.get(ref.uid) or unremoved.get(ref.uid, "") for ref in claims}

    async def _still_bound(self, uids: Sequence[str]) -> dict[str, str]:
        """Give back what was bound for claims that no living pod uses. Return, by UID, why something is left."""
        try:
            mine = self._passthrough.concerned(uids)
        except HostError as error:
            return {uid: f"cannot unprepare claim {uid}: {error}" for uid in uids}
        until_s = time.monotonic() + ENDING_S
        living = await self._agent.in_use(mine) if mine else {}
        while living and time.monotonic() < until_s:
            await asyncio.sleep(ENDING_POLL_S)
            living = await self._agent.in_use(mine)
        left = {uid: f"it is in use, {evidence}" for uid, evidence in living.items()}
        left |= await self._passthrough.give_back([uid for uid in mine if uid not in living])
        return {uid: f"cannot unprepare claim {uid}: {why}" for uid, why in left.items()}

    async def _unprepared(self, uids: Sequence[str], op: str, unremoved: dict[str, str]) -> Unprepared:
        """Unprepare some claims, remove their files, and return the result. A runtime's helper process may briefly
        outlive its container. unremoved: receives errors by UID."""
        until_s, left, done = time.monotonic() + ENDING_S, list(uids), Unprepared()
        while True:
            now = await self._agent.unprepare(left, _ENDED, op, self._removing(left, unremoved))
            done = Unprepared(released=(*done.released, *now.released), living=now.living)
            left = list(done.living)
            if not left or time.monotonic() > until_s:
                return done
            await asyncio.sleep(ENDING_POLL_S)

    def _removing(self, uids: Sequence[str], unremoved: dict[str, str]) -> Callable[[Unprepared], None]:
        """Return what removes the files of those of some claims that were unprepared."""

        def remove(done: Unprepared) -> None:
            unremoved.update(self._rendering.remove_now([one for one in uids if one not in done.living]))

        return remove

    # ---------------------------------------------------------------- deciding

    async def _decided(self, claims: Sequence[ClaimRef], op: str) -> _Decided:
        """Read claims and decide them together."""
        with self._waited_for(claims) as waited_for:
            until_s = asyncio.get_running_loop().time() + READ_S
            read = await asyncio.gather(*(self._read(ref, until_s) for ref in claims))
            await self._instances.ready()
            found = [one for one in read if isinstance(one, Claim) and one.ref.uid in waited_for]
            catalog = self._dra().catalog
            async with self._grow(catalog, found) as too_small:
                found = [one for one in found if one.ref.uid in waited_for]  # growing takes time
                unwritten = dict[str, str]()
                batch = await self._agent.prepare(catalog, found, op, self._writing(unwritten))
                errors = {uid: _because(why, too_small(uid)) for uid, why in batch.errors.items()} | unwritten
        granted = dict[str, Sequence[Grant]](batch.grants)
        for ref, one in zip(claims, read, strict=True):
            if isinstance(one, PeerError) and (known := grants_of(self._agent.ledger, ref.uid)):
                log.warning("claim-not-read", claim=str(ref), error=str(one), answered="as granted before")
                granted[ref.uid] = known
                if not self._instances.concerned(known):
                    errors |= await self._rendering.write({ref.uid: known})
            elif isinstance(one, NodeagentError):
                errors[ref.uid] = f"cannot prepare claim {ref}: {one}"
            elif ref.uid not in batch.grants:
                errors.setdefault(ref.uid, _UNPREPARED.format(ref))
        await self._bind(granted, errors)
        if made := {uid: grants for uid, grants in granted.items() if self._instances.concerned(grants)}:
            errors |= await run_to_end(self._make(made, granted, op))
        return _Decided(granted, errors, {one.ref.uid: one for one in read if isinstance(one, Claim)})

    def _writing(self, unwritten: dict[str, str]) -> Callable[[Batch], None]:
        """Return what writes the files of claims that were just granted, apart from those of which something has to be
        made first. unwritten: receives errors by UID."""

        def write(made: Batch) -> None:
            there = {uid: grants for uid, grants in made.grants.items() if not self._instances.concerned(grants)}
            unwritten.update(self._rendering.write_now(there))

        return write

    async def _bind(self, granted: Mapping[str, Sequence[Grant]], errors: dict[str, str]) -> None:
        """Bind the devices of claims to the drivers that they want, and write the files of these claims, which could
        not be written before, unless something has to be made first. errors: by UID; changed."""
        for uid, why in (await self._passthrough.bind(granted)).items():
            errors.pop(uid, None)
            if why:
                errors[uid] = f"cannot prepare {granted[uid][0].holder}: {why}"
            elif not self._instances.concerned(granted[uid]):
                errors |= await self._rendering.write({uid: granted[uid]})

    async def _make(
        self, wanted: Mapping[str, Sequence[Grant]], granted: dict[str, Sequence[Grant]], op: str
    ) -> dict[str, str]:
        """Make what was granted and need not exist, and write the files. Return errors by UID. A claim that the driver
        refuses is released whole, and removed from `granted`."""
        unmade = await self._instances.make(wanted)
        errors = await self._rendering.write({uid: one for uid, one in wanted.items() if uid not in unmade})
        errors |= {uid: f"cannot prepare {wanted[uid][0].holder}: {one.why}" for uid, one in unmade.items()}
        if refused := [uid for uid, one in unmade.items() if one.refused]:
            done = await self._agent.unprepare(refused, _UNMADE, op, self._removing(refused, {}))
            for uid in refused:
                if uid not in done.living:
                    del granted[uid]
            await self._instances.settle()
        return errors

    # ---------------------------------------------------------------- reading

    @contextlib.contextmanager
    def _waited_for(self, claims: Sequence[ClaimRef]) -> Iterator[set[str]]:
        """Yield the UIDs of claims being read; those unprepared meanwhile are removed from the set."""
        uids = {ref.uid for ref in claims}
        self._reading.append(uids)
        try:
            yield uids
        finally:
            self._reading = [one for one in self._reading if one is not uids]

    async def _read(self, ref: ClaimRef, until_s: float) -> Claim | NodeagentError:
        """Return the claim, or why it cannot be obtained: PeerError if the API server is at fault. `until_s` is a time
        of the loop's clock."""
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
        except NodeagentError as error:  # the device disappeared after it was rendered
            return Prepared(error=f"cannot prepare claim {ref}: {error}")

    def _device(self, grant: Grant) -> PreparedDevice:
        result = grant.result
        if result is None:
            raise StateError(f"grant {grant.id} of the ledger does not say what was allocated")
        own = self._rendering.cdi_id(grant)
        others = handover.cdi_names(self._dra(), self._rendering.inventory(), grant)
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


def _refusal(ref: ClaimRef, claim: Claim | None, error: str) -> Refusal:
    """Return the audit's entry. claim: as it was read, or None if it could not be."""
    pods = ", ".join(claim.pods) if claim is not None else ""
    want = ", ".join(map(str, claim.results)) if claim is not None else ""
    return Refusal(holder=f"claim {ref}" + (f" of {pods}" if pods else ""), want=want, why=error)


def _by_uid(grants: Sequence[Grant]) -> dict[str, list[Grant]]:
    found: dict[str, list[Grant]] = {}
    for one in grants:
        found.setdefault(one.holder.uid, []).append(one)
    return found


def _because(error: str, why: str) -> str:
    return f"{error}; {why}" if why else error


def _names(request: str) -> tuple[str, ...]:
    """Return the names that containers may use: for a subrequest, its own and that of its request."""
    return tuple(dict.fromkeys((request.partition("/")[0], request)))
