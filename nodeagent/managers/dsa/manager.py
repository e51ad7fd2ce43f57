"""Keeps the work queues that claims hold made, and no others.

A queue is made after its claim is durable and before kubelet is answered, and taken down before the claim is released,
so that no other holder meets it in between. What is recorded for grants that are held no longer (the agent was killed,
or an admin released the claim) is taken down as soon as it is seen. A queue that a program has open is not taken down:
then the claim stays, and kubelet asks again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.schema import Config
from nodeagent.core.dsa.division import KIND, SOURCE, device_id, place_of, rule_for
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.errors import HostError, StateError
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper
from nodeagent.managers.dsa.wanted import Place, Wanted
from nodeagent.managers.manager import Manager
from nodeagent.managers.turns import Turns
from nodeagent.resources.offer import selectors
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "dsa-queues.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger and with the kernel without any change of the ledger."""


class DsaManager(Manager):
    """Makes queues and takes them down for claims."""

    name = "DSA queues"

    def __init__(
        self,
        agent: Agent,
        accelerators: Accelerators,
        state_dir: Path,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        hide: Callable[[], Awaitable[None]],
    ) -> None:
        """Set up without changing anything. config: returns the current configuration. rescan: reads the machine
        again. hide: returns once no file of a claim hands over a queue that another program has changed."""
        self._agent, self._accelerators, self._config = agent, accelerators, config
        self._rescan, self._hide = rescan, hide
        self._keeper = QueueKeeper(DsaJournal(state_dir, agent.settings.boot_id), accelerators)
        self._turns = Turns(state_dir / LOCK, "cannot make DSA queues")
        self._left: Mapping[str, str] = {}
        """Why something that no claim holds is not as it was, by what it is."""
        self._failing = Once("dsa-queues-not-taken-down")
        self._observed: frozenset[str] = frozenset()

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return what is not taken down, and why."""
        return [f"DSA queues: {why}" for why in self._left.values()]

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Make the queues of claims. Return, by UID, "" for each claim that has some, or why it cannot be handed over;
        nothing for the others."""
        mine = {uid: grants for uid, grants in claims.items() if any(map(self._wanted_by, grants))}
        return await run_to_end(self._bind(mine)) if mine else {}

    def _wanted_by(self, grant: Grant) -> list[tuple[Place, str]]:
        """Return the slots of a grant with their ids: also of devices that are gone, instead of which no others are to
        be handed over."""
        known = self._agent.inventory.device_by_id
        mine = (id for id in grant.devices if id not in known or known[id].kind == KIND)
        return [(place, id) for id in mine if (place := place_of(id)) is not None]

    async def _bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        found: dict[str, str] = {}
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        await self._hide_lost()  # before the name of a node is used again
                        found[uid] = await self._turns.in_thread(self._make, uid, grants)
                await self._look()
        except (HostError, StateError) as error:
            found |= {uid: str(error) for uid in claims if uid not in found}
        await self._rescan()
        return found

    def _make(self, uid: str, grants: Sequence[Grant]) -> str:
        """In a thread. Return why a queue of a claim is not made, or ""."""
        wanted = [(grant, place, id) for grant in grants for place, id in self._wanted_by(grant)]
        try:
            mine = {place for _, place, _ in wanted}
            if left := self._keeper.take_down([one for one in self._orphans() if one in mine]):
                return "; ".join(left.values())
            for grant, place, id in wanted:
                self._keeper.make(self._wanted(uid, grant, place, id))
        except HostError as error:
            return str(error)
        return ""

    def _wanted(self, uid: str, grant: Grant, place: Place, id: str) -> Wanted:
        """Return how a slot is to be made: as recorded if the accelerator is divided, as a claim's containers may use
        its queue already. Raise HostError if the configuration no longer has the queue that was allocated."""
        address, slot = place
        record = self._keeper.records().get(address)
        held = record.of(slot) if record is not None else None
        name = dict(self._accelerators.places()).get(address, "")
        rule = rule_for(selectors(self._config()).dsa.rules, address, name)
        queues = rule.queues if rule is not None else ()
        if record is not None and held is not None and held.grant == grant.id:
            queues = record.queues
        if slot >= len(queues):
            raise HostError(f"cannot make queue {slot} of {address}: accelerators.dsa has no such queue any longer")
        if (now := device_id(address, slot, queues[slot])) != id:
            raise HostError(f"cannot make {id}: accelerators.dsa was changed since it was allocated, it is {now} now")
        return Wanted(address=address, slot=slot, claim=uid, grant=grant.id, queues=queues)

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        mine = {claim for _, claim in self._claims()}
        return [uid for uid in uids if uid in mine]

    def _claims(self) -> list[tuple[Place, str]]:
        every = self._keeper.records().items()
        return [((address, one.slot), one.claim) for address, record in every for one in record.held]

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Take down what was made for some claims, which are about to be released. Return, by UID, why something is
        left."""
        try:
            return await run_to_end(self._give_back(uids)) if self.concerned(uids) else {}
        except HostError as error:
            return {uid: str(error) for uid in uids}

    async def _give_back(self, uids: Sequence[str]) -> dict[str, str]:
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                mine = {place: uid for place, uid in self._claims() if uid in uids}
                left = await self._turns.in_thread(self._keeper.take_down, [*mine])
                await self._look()
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in uids}
        await self._rescan()
        return {mine[place]: why for place, why in left.items()}

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Take down what no claim holds: at the start, after each change of the ledger, and periodically."""
        await after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S)

    async def recover(self) -> None:
        """Take down what no claim holds, while the ledger is known to be complete, and look at what is held."""
        self._left = await run_to_end(self._recover()) if self._is_due() else {}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    def _is_due(self) -> bool:
        try:
            return bool(self._keeper.has_any() or self._observed)
        except HostError:
            return True  # which says why

    async def _recover(self) -> Mapping[str, str]:
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                before, orphans = self._keeper.records(), self._orphans()
                left = await self._turns.in_thread(self._keeper.take_down, orphans)
                ended = await self._turns.in_thread(self._keeper.end)
                await self._look()
                has_changed = self._keeper.records() != before
        except (HostError, StateError) as error:
            return {"": str(error)}
        if has_changed:
            await self._rescan()
        return {**{f"{address} {slot}": why for (address, slot), why in left.items()}, **ended}

    def _orphans(self) -> list[Place]:
        """Return the slots that are recorded although no grant holds them. Raise HostError."""
        if self._agent.loss:
            return []
        grants = self._agent.newest.grants.items()
        held = {id: self._slots(one) for id, one in grants if one.holder.api == CLAIM}
        return self._keeper.orphans(held)

    def _slots(self, grant: Grant) -> list[Place]:
        """Return the slots of a grant, by their ids: a device may be gone."""
        return [place for id in grant.devices if (place := place_of(id)) is not None]

    async def _look(self) -> None:
        """Report whether each queue that is held is as it was made, and have none handed over that is not. While no
        other call changes anything. Raise HostError."""
        faults = await self._turns.in_thread(self._keeper.faults)
        records = self._keeper.records()
        ids = {(at, slot): records[at].id(slot) for at, slot in faults if at in records}
        evidence = [
            Evidence(device=id, source=SOURCE, state=UNHEALTHY if why else HEALTHY, reason=why)
            for place, id in ids.items()
            if (why := faults[place]) is not None
        ]
        unread = {id for place, id in ids.items() if faults[place] is None}  # what was said of these stays
        now = {*(one.device for one in evidence), *(unread & self._observed)}
        self._agent.observe(evidence, [(id, SOURCE) for id in self._observed - now])
        self._observed = frozenset(now)
        if (error := await self._hide_lost()) is not None:
            raise error

    async def _hide_lost(self) -> HostError | None:
        """Have no queue handed over that is no longer as it was made. Return why some cannot be read, or None."""
        error = None
        try:
            await self._turns.in_thread(self._keeper.forget_changed)
        except HostError as unread:
            error = unread
        if self._keeper.is_to_hide:
            await self._hide()
            self._keeper.is_to_hide = False
        return error
