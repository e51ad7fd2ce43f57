"""Keeps the devices that claims want for virtual machines bound to their VFIO driver, and no others.

A device is bound after its claim is durable and before kubelet is answered, and given back before the claim is
released, so that no other holder meets it in between. What is recorded for claims that hold nothing any longer (the
agent was killed, or an admin released the claim) is given back as soon as it is seen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.core.dra.passthrough import driver_for, members
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.errors import HostError, StateError
from nodeagent.host.vfio import Functions
from nodeagent.managers.journal import may_be_recorded, recorded_claims, recorded_for_others
from nodeagent.managers.manager import Manager
from nodeagent.managers.passthrough.binder import Binder
from nodeagent.managers.passthrough.journal import PassthroughJournal
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "passthrough.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger without any change of it."""


class PassthroughManager(Manager):
    """Binds and gives back for claims."""

    name = "passthrough"

    def __init__(
        self,
        agent: Agent,
        functions: Functions,
        state_dir: Path,
        rescan: Callable[[], Awaitable[object]],
    ) -> None:
        """Set up. `rescan` reads the machine again."""
        self._agent = agent
        self._binder = Binder(PassthroughJournal(state_dir, agent.settings.boot_id), functions)
        self._rescan = rescan
        self._turns = Turns(state_dir / LOCK, "cannot bind devices to other drivers")
        self._left: Mapping[str, str] = {}
        """Why something that no claim holds is not given back, by UID."""
        self._failing = Once("passthrough-not-given-back")

    async def close(self) -> None:
        await self._turns.close()

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Bind what claims want bound. Return, by UID, "" for each claim whose device has another driver now, or why it
        cannot be handed over; nothing for the others."""
        wanted = any(driver_for(one) for grants in claims.values() for one in grants)
        if not wanted and not may_be_recorded(self._binder.records):
            return {}
        return await run_to_end(self._bind(claims))

    async def _bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        found: dict[str, str] = {}
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        found |= await self._turns.in_thread(self._bind_all, uid, grants)
        except (HostError, StateError) as error:
            return {uid: str(error) for uid, grants in claims.items() if self._concerns(uid, grants)}
        if found:
            await self._rescan()
        return found

    def _bind_all(self, uid: str, grants: Sequence[Grant]) -> dict[str, str]:
        wanted = [(one, driver) for one in grants if (driver := driver_for(one))]
        try:
            self._refuse_others_records(uid, grants)
            for one, driver in wanted:
                for id in one.devices:
                    group = {id, *(other.id for other in members(self._agent.inventory, id))}
                    self._binder.bind(uid, id, driver, group)
        except HostError as error:
            return {uid: str(error)}
        return {uid: ""} if wanted else {}

    def _refuse_others_records(self, uid: str, grants: Sequence[Grant]) -> None:
        """Raise HostError if a device of the grants is still bound for another claim, or may be."""
        for id in recorded_for_others(self._binder.records, uid, grants):
            raise HostError(f"cannot hand over {id}: it is not given back to its driver yet")

    def _concerns(self, uid: str, grants: Sequence[Grant]) -> bool:
        """Return whether a claim cannot be handed over without binding and giving back."""
        try:
            self._refuse_others_records(uid, grants)
        except HostError:
            return True
        return any(map(driver_for, grants))

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        return recorded_claims(self._binder.records(certain=True), uids)

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Give back what was bound for some claims, which are about to be released. Return, by UID, why something is
        left."""
        mine = self.concerned(uids)
        return await run_to_end(self._give_back(lambda: mine)) if mine else {}

    async def _give_back(self, which: Callable[[], Sequence[str]]) -> dict[str, str]:
        """which: returns the claims, once no other call changes anything."""
        uids: Sequence[str] = which()
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                uids = which()
                errors = await self._turns.in_thread(self._binder.give_back, uids)
        except (HostError, StateError) as error:
            errors = {uid: str(error) for uid in uids}
        if uids:
            await self._rescan()
        return errors

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Give back what no claim holds: at the start, after each change of the ledger, and periodically."""
        await after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S)

    async def recover(self) -> None:
        """Give back what no claim holds, while the ledger is known to be complete."""
        self._left = await run_to_end(self._give_back(self._orphans)) if self._orphans() else {}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    def _orphans(self) -> Sequence[str]:
        if self._agent.loss:
            return ()
        held = {one.holder.uid for one in self._agent.newest.grants.values() if one.holder.api == CLAIM}
        return self._binder.orphans(held)

    def notes(self) -> list[str]:
        """Return what is bound for claims that hold nothing, and why."""
        return [f"passthrough: {why}" for why in self._left.values()]
