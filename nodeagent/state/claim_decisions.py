"""Decisions on claims: what is granted to them when kubelet prepares them, and released when it unprepares them."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import Stamp
from nodeagent.core.dra import prepare as prepare_of
from nodeagent.core.dra.prepare import Batch, Catalog
from nodeagent.core.ledger.ledger import RELEASED, Ledger
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import Refused
from nodeagent.state.decisions import Decisions, Outcome
from nodeagent.state.values import AgentSettings, Unprepared

Living = Callable[[Sequence[Grant]], Awaitable[Mapping[str, str]]]
"""Return the grants whose pods are alive, by id, each with the evidence as a clause."""
FEW_CLAIMS = 4
"""Up to this many claims are decided in the event loop; more are decided in a thread, to keep the loop responsive."""
MOST_MISSING = 3
"""Highest number of things missing from the ledger that a refusal names."""


class ClaimDecisions(Decisions):
    """The part of the agent that decides on claims."""

    inventory: Inventory
    settings: AgentSettings
    unaccounted: Mapping[str, str]
    """What the ledger may still lack, with the reason."""
    _living: Living

    async def prepare(
        self, catalog: Catalog, claims: Sequence[Claim], op: str, then: Callable[[Batch], None] | None = None
    ) -> Batch:
        """Grant claims what was allocated to them, each all or nothing; durable on return.

        then: called with the durable decision before it is returned, in the thread of the disk; it must not raise.
        """

        async def decide(newest: Ledger) -> Outcome[Batch]:
            batch = await self._prepare(newest, catalog, claims)
            after = functools.partial(then, batch) if then is not None else None
            return Outcome(result=batch, ledger=batch.ledger, changes=batch.changes, then=after)

        return await self._decided_in_group(decide, op)

    async def record_reserved_for(self, uid: str, pods: Sequence[str], op: str) -> None:
        """Record the pods (UIDs) for which a claim is reserved now."""

        async def decide(newest: Ledger) -> Outcome[None]:
            decision = prepare_of.record_reserved_for(newest, uid, pods)
            return Outcome(result=None, ledger=decision.ledger, changes=decision.changes)

        await self._decided_in_group(decide, op)

    async def in_use(self, uids: Sequence[str]) -> Mapping[str, str]:
        """Return the claims that a living pod uses, by UID, each with the evidence as a clause."""
        held = self._held(self.ledger, uids)
        living = await self._living(held)
        return {one.holder.uid: living[one.id] for one in held if one.id in living}

    async def unprepare(
        self, uids: Sequence[str], why: str, op: str, then: Callable[[Unprepared], None] | None = None
    ) -> Unprepared:
        """Release what the claims hold, durably, except for claims with a living pod. Unknown UIDs are ignored.

        why: who releases it and by which rule, as a clause for the audit. then: as for `prepare`.
        """
        held = self._held(self.ledger, uids)
        living = await self._living(held)

        async def decide(newest: Ledger) -> Outcome[Unprepared]:
            now = self._held(newest, uids)
            alive = living if now == held else await self._living(now)
            return self._unprepare(newest, uids, alive, why, then)

        return await self._decided_in_group(decide, op)

    # ---------------------------------------------------------------- preparing

    async def _prepare(self, newest: Ledger, catalog: Catalog, claims: Sequence[Claim]) -> Batch:
        if self.loss:
            return await self._prepare_known(newest, catalog, claims)
        decide_all = functools.partial(prepare_of.prepare, self.inventory, newest, catalog, claims, self._stamp())
        # Many decisions would block the event loop for longer than kubelet may be kept waiting. They are pure, so a
        # thread can make them.
        batch = decide_all() if len(claims) <= FEW_CLAIMS else await asyncio.to_thread(decide_all)
        if living := await self._living([one.grant for one in batch.changes if one.action == RELEASED]):
            batch = self._prepare_others(newest, catalog, claims, living)
        return batch

    async def _prepare_known(self, newest: Ledger, catalog: Catalog, claims: Sequence[Claim]) -> Batch:
        """Prepare the claims that an incomplete ledger has, and the one that it lacks if it is the only one and no
        container of it runs: this accounts for it."""
        held = [one for one in claims if prepare_of.grants_of(newest, one.ref.uid)]
        known = [one for one in claims if one in held or await self._may_be_decided(one)]
        batch = prepare_of.prepare(self.inventory, newest, catalog, known, self._stamp())
        errors = dict(batch.errors)
        for claim in (one for one in claims if one not in known):
            try:
                self._refuse_while_incomplete(f"what is allocated to claim {claim.ref}", 1)
            except Refused as refusal:
                errors[claim.ref.uid] = f"cannot prepare claim {claim.ref}: {refusal}"
        return replace(batch, errors=errors)

    async def _may_be_decided(self, claim: Claim) -> bool:
        """Return whether a claim is all that the ledger lacks and no container still uses what the claim had before."""
        if self.unaccounted.keys() != {claim.ref.uid}:
            return False
        before = Grant(id="", holder=Holder(api=CLAIM, uid=claim.ref.uid), pods=claim.reserved_for)
        return not await self._living([before])

    def _prepare_others(
        self, newest: Ledger, catalog: Catalog, claims: Sequence[Claim], living: Mapping[str, str]
    ) -> Batch:
        """Decide without the claims that were previously allocated something else that their pods still use."""
        why = {newest.grants[one].holder.uid: evidence for one, evidence in living.items()}
        others = [claim for claim in claims if claim.ref.uid not in why]
        batch = prepare_of.prepare(self.inventory, newest, catalog, others, self._stamp())
        errors = {
            claim.ref.uid: f"cannot prepare claim {claim.ref}: it was allocated something else before, and "
            f"{why[claim.ref.uid]}"
            for claim in claims
            if claim.ref.uid in why
        }
        return replace(batch, errors={**batch.errors, **errors})

    def _refuse_while_incomplete(self, what: str, want: int) -> None:
        """Raise Refused while the ledger may lack decisions: what looks free may be in use."""
        if self.loss:
            missing = "; ".join(list(self.unaccounted.values())[:MOST_MISSING]) or "it is being rebuilt"
            raise Refused(
                f"cannot grant {what}: the ledger may lack decisions ({self.loss}): {missing}",
                want=want,
                free=0,
                unit="parts",
            )

    # ---------------------------------------------------------------- unpreparing

    def _held(self, ledger: Ledger, uids: Sequence[str]) -> list[Grant]:
        return [grant for uid in dict.fromkeys(uids) for grant in prepare_of.grants_of(ledger, uid)]

    def _unprepare(
        self,
        newest: Ledger,
        uids: Sequence[str],
        alive: Mapping[str, str],
        why: str,
        then: Callable[[Unprepared], None] | None,
    ) -> Outcome[Unprepared]:
        """alive: by grant id."""
        living = {newest.grants[one].holder.uid: evidence for one, evidence in alive.items()}
        decision = prepare_of.unprepare(newest, [uid for uid in uids if uid not in living], why)
        done = Unprepared(released=tuple(change.grant for change in decision.changes), living=living)
        after = functools.partial(then, done) if then is not None else None
        return Outcome(result=done, ledger=decision.ledger, changes=decision.changes, then=after)

    def _stamp(self) -> Stamp:
        return Stamp(new_id=lambda: f"g-{secrets.token_hex(5)}", at=time.time(), boot_id=self.settings.boot_id)
