"""Keeps virtual functions as the claims that hold them want them, and otherwise as they were.

A function is set after its claim is durable and before kubelet is answered, and set back before the claim is released,
so that no other holder has it in between. What is recorded for claims that hold nothing any longer (the agent was
killed, or an admin released the claim) is set back as soon as it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.core.dra.interfaces import vf_of
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.errors import HostError, StateError
from nodeagent.host.netlink.vf_properties import Exchange, host_exchange
from nodeagent.managers.journal import may_be_recorded, recorded_claims, recorded_for_others
from nodeagent.managers.manager import Manager
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.managers.network.vf_setter import VfSetter
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "vf-properties.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger without any change of it."""


class VfPropertiesManager(Manager):
    """Sets and sets back for claims."""

    name = "properties of virtual functions"

    def __init__(self, agent: Agent, state_dir: Path, *, exchange: Callable[[], Exchange] = host_exchange) -> None:
        """Set up without changing anything. exchange: opens one with the kernel."""
        self._agent = agent
        journal = VfPropertyJournal(state_dir, agent.settings.boot_id)
        self._setter = VfSetter(journal, lambda: agent.inventory, exchange)
        self._turns = Turns(state_dir / LOCK, "cannot set virtual functions")
        self._left: Mapping[str, str] = {}
        """Why a function that no claim holds is not set back, by function."""
        self._failing = Once("vf-properties-not-set-back")

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return which functions are not set back, and why."""
        return [f"virtual functions: {why}" for why in self._left.values()]

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Set what claims want. Return, by UID, why a function is not as its claim wants it, or not set back yet."""
        wanted = any(vf_of(one) for grants in claims.values() for one in grants)
        if not wanted and not may_be_recorded(self._setter.records):
            return {}
        return await run_to_end(self._set(claims))

    async def _set(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        errors: dict[str, str] = {}
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        errors |= await self._turns.in_thread(self._set_all, uid, grants)
        except (HostError, StateError) as error:
            return {uid: str(error) for uid, grants in claims.items() if self._concerns(uid, grants)}
        return errors

    def _set_all(self, uid: str, grants: Sequence[Grant]) -> dict[str, str]:
        """In a thread."""
        try:
            self._refuse_others_records(uid, grants)
            for one in grants:
                if (wanted := vf_of(one)) is not None:
                    self._setter.set(uid, one.devices[0], wanted)
        except HostError as error:
            return {uid: str(error)}
        return {}

    def _refuse_others_records(self, uid: str, grants: Sequence[Grant]) -> None:
        """Raise HostError if a function of the grants is still as another claim wanted it, or may be."""
        for id, one in recorded_for_others(self._setter.records, uid, grants).items():
            raise HostError(f"cannot hand over {id}: what it had before claim {one.claim} is not set back")

    def _concerns(self, uid: str, grants: Sequence[Grant]) -> bool:
        """Return whether a claim cannot be handed over without setting functions or setting them back."""
        try:
            self._refuse_others_records(uid, grants)
        except HostError:
            return True
        return any(map(vf_of, grants))

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        return recorded_claims(self._setter.records(certain=True), uids)

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Set back what was set for some claims, which are about to be released. Return, by UID, why something is
        left."""

        def claim_of() -> dict[str, str]:
            """By function, as it is at the moment: another call may set back one claim's and set another's."""
            records = self._setter.records(certain=True)
            return {vf: one.claim for vf, one in records.items() if one.claim in uids}

        try:
            if not self.concerned(uids):
                return {}
            left = await run_to_end(self._give_back(lambda: [*claim_of()]))
            claims = claim_of()
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in uids}
        return {claims[vf]: why for vf, why in left.items() if vf in claims}

    async def _give_back(self, which: Callable[[], Sequence[str]]) -> dict[str, str]:
        """which: returns the functions, once no other call changes anything. Raise StateError if another call does not
        end."""
        async with self._turns.alone(LOCK_S):
            await self._agent.refresh()
            return await self._turns.in_thread(self._setter.give_back, which())

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Set back what no claim holds: at the start, after each change of the ledger, and periodically."""
        await after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S)

    async def recover(self) -> None:
        """Set back what no claim holds, while the ledger is known to be complete."""
        try:
            self._left = await run_to_end(self._give_back(self._orphans)) if self._orphans() else {}
        except (HostError, StateError) as error:
            self._left = {"": str(error)}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    def _orphans(self) -> Sequence[str]:
        if self._agent.loss:
            return ()
        held: dict[str, set[str]] = {}
        for one in self._agent.newest.grants.values():
            if one.holder.api == CLAIM:
                held.setdefault(one.holder.uid, set()).update(one.devices)
        return self._setter.orphans(held)
