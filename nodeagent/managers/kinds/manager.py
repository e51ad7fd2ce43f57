"""Keeps the devices that claims hold prepared by their kinds, and no others.

A device is prepared after its claim is durable and before kubelet is answered, and unprepared before the claim is
released, so that no other holder meets it in between. What is recorded for grants that are held no longer (the agent
was killed, or an admin released the claim) is undone as soon as it is seen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.core.model.grant import Grant
from nodeagent.errors import HostError, InputError, StateError
from nodeagent.host.devices.base import Kind
from nodeagent.managers.journal import recorded_claims
from nodeagent.managers.kinds.journal import KindsJournal, Record
from nodeagent.managers.kinds.preparer import DevicePreparer
from nodeagent.managers.manager import Manager
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "kinds.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger without any change of it."""


class KindsManager(Manager):
    """Prepares and unprepares for claims."""

    name = "kinds"

    def __init__(
        self,
        agent: Agent,
        journal: KindsJournal,
        families: Sequence[Kind],
        state_dir: Path,
        rescan: Callable[[], Awaitable[object]],
    ) -> None:
        """Set up. `rescan` reads the machine again."""
        self._agent = agent
        self._preparer = DevicePreparer(journal, families, lambda: agent.inventory)
        self._rescan = rescan
        self._turns = Turns(state_dir / LOCK, "cannot prepare devices")
        self._left: Mapping[str, str] = {}
        """Why something that no grant holds is not undone, by device."""
        self._failing = Once("devices-not-unprepared")

    async def close(self) -> None:
        await self._turns.close()

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Have the devices of claims prepared. Return, by UID, "" for each claim of which a kind prepares something, or
        why it cannot be handed over; nothing for the others."""
        mine = {uid: grants for uid, grants in claims.items() if self._concerns(grants)}
        return await run_to_end(self._bind(mine)) if mine else {}

    def _concerns(self, grants: Sequence[Grant]) -> bool:
        """Whether something is, or may be, recorded of their devices, for whichever claim, or is to be prepared."""
        ids = {id for one in grants for id in (*one.devices, *one.shares)}
        try:
            recorded = bool(ids) and not ids.isdisjoint(self._preparer.records(certain=True))
        except HostError:
            return True
        return recorded or bool(self._preparer.wanted(grants))

    async def _bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        found: dict[str, str] = {}
        acted = False
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        try:
                            acted |= await self._preparer.prepare(uid, grants)
                            found[uid] = ""
                        except (HostError, InputError) as error:
                            acted, found[uid] = True, str(error)
        except (HostError, StateError) as error:
            found |= {uid: str(error) for uid in claims if uid not in found}
        if acted:
            await self._rescan()
        return found

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        return recorded_claims(self._preparer.records(certain=True), uids)

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Have unprepared what was prepared for some claims, which are about to be released. Return, by UID, why
        something is left."""
        mine = self.concerned(uids)
        return await run_to_end(self._give_back(mine)) if mine else {}

    async def _give_back(self, uids: Sequence[str]) -> dict[str, str]:
        try:
            async with self._turns.alone(LOCK_S):
                errors = await self._preparer.give_back(uids)
        except (HostError, StateError) as error:
            errors = {uid: str(error) for uid in uids}
        await self._rescan()
        return errors

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Undo what no grant holds: at the start, after each change of the ledger, and periodically."""
        await after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S)

    async def recover(self) -> None:
        """Undo what no grant holds, while the ledger is known to be complete."""
        self._left = await run_to_end(self._recover()) if self._orphans() else {}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    async def _recover(self) -> Mapping[str, str]:
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                orphans = self._orphans()
                left = await self._preparer.undo(orphans)
        except (HostError, StateError) as error:
            return {"": str(error)}
        if len(left) < len(orphans):
            await self._rescan()
        return left

    def _orphans(self) -> list[Record]:
        return [] if self._agent.loss else self._preparer.orphans(self._agent.newest.grants)

    def notes(self) -> list[str]:
        """Return what is prepared although no grant holds it, and why."""
        return [f"kinds: {why}" for why in self._left.values()]
