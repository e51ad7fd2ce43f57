"""Keeps the work queues that claims hold enabled, and no others.

A queue is enabled after its claim is durable and before kubelet is answered, and disabled before the claim is released,
so that no other holder meets it in between. What is recorded for grants that are held no longer (the agent was killed,
or an admin released the claim) is disabled as soon as it is seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.schema import Config
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.core.opaque.settings import from_json
from nodeagent.core.queues.check import NO_QUEUE_SETTINGS, queue_for
from nodeagent.errors import HostError, InputError, StateError
from nodeagent.host.idxd import Accelerators
from nodeagent.managers.manager import Manager
from nodeagent.managers.queues.journal import QueueJournal
from nodeagent.managers.queues.maker import QueueMaker, Wanted
from nodeagent.managers.turns import Turns
from nodeagent.resources.offer import queue_selectors
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "queues.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
QUEUE = "queue"
"""The source of evidence that says whether a claim still has its queue."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger and with the kernel without any change of either."""


class QueuesManager(Manager):
    """Enables and disables for claims."""

    name = "work queues"

    def __init__(
        self,
        agent: Agent,
        accelerators: Accelerators,
        state_dir: Path,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        **times_s: float,
    ) -> None:
        """Set up without changing anything. `rescan` reads the machine again. times_s: as of QueueMaker."""
        self._agent, self._config, self._rescan = agent, config, rescan
        self._maker = QueueMaker(QueueJournal(state_dir, agent.settings.boot_id), accelerators, **times_s)
        self._turns = Turns(state_dir / LOCK, "cannot enable work queues")
        self._left: Mapping[str, str] = {}
        """Why a queue that no claim holds is not disabled, by device."""
        self._failing = Once("queues-not-disabled")
        self._unseen = Once("queues-not-read")
        self._observed: frozenset[str] = frozenset()

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return which queues are not disabled, and why."""
        return [f"work queues: {why}" for why in self._left.values()]

    def document(self) -> dict[str, Any]:
        """Return the queues that are enabled for claims, in plain types."""
        return {
            "enabled": [
                {"device": id, "queue": one.queue, "claim": one.claim, "mode": one.wanted.mode, "ready": one.ready}
                for id, one in sorted(self._maker.records().items())
            ]
        }

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Enable the queues of claims. Return, by UID, "" for each claim that has some, or why it cannot be handed
        over; nothing for the others."""
        mine = {uid: grants for uid, grants in claims.items() if any(map(self._devices, grants))}
        return await run_to_end(self._bind(mine)) if mine else {}

    def _devices(self, grant: Grant) -> list[Device]:
        """Return the queues of a grant."""
        known = self._agent.inventory.device_by_id
        return [known[id] for id in grant.devices if id in known and known[id].made_for_claims]

    async def _bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        found: dict[str, str] = {}
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        found[uid] = await self._turns.in_thread(self._enabled, uid, grants)
        except (HostError, StateError) as error:
            found |= {uid: str(error) for uid in claims if uid not in found}
        await self._rescan()
        await self.look()
        return found

    def _enabled(self, uid: str, grants: Sequence[Grant]) -> str:
        """Return why a queue of a claim is not enabled, or "". Blocks."""
        wanted = [(grant, device) for grant in grants for device in self._devices(grant)]
        orphans = {*self._orphans()}
        try:
            if left := self._maker.give_back({device.id for _, device in wanted} & orphans):
                return "; ".join(left.values())
            for grant, device in wanted:
                if not self._maker.has(device.id, grant.id):  # whatever is configured by now
                    self._maker.make(self._wanted(uid, grant, device))
        except (HostError, InputError) as error:
            return str(error)
        return ""

    def _wanted(self, uid: str, grant: Grant, device: Device) -> Wanted:
        """Return how a queue is to be enabled. Raise HostError if it is not configured any longer, or InputError if the
        claim wants what the node does not allow."""
        queue, own = str(device.attributes["name"]), device.attributes["selector"]
        selector = next((one for one in queue_selectors(self._config()) if one.name == own), None)
        if selector is None or device.parent is None:
            raise HostError(f"cannot enable {queue}: no resource of the configuration has it any longer")
        return Wanted(
            device=device.id,
            claim=uid,
            grant=grant.id,
            address=device.parent,
            accelerator=str(device.attributes["accelerator"]),
            queue=queue,
            wanted=queue_for(device, from_json(grant.settings).queue or NO_QUEUE_SETTINGS),
            layout=selector.layout,
        )

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded."""
        mine = {one.claim for one in self._maker.records().values()}
        return [uid for uid in uids if uid in mine]

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Disable what was enabled for some claims, which are about to be released. Return, by UID, why something is
        left."""
        if not self.concerned(uids):
            return {}
        records, claims = self._maker.records(), {*uids}
        devices = [id for id, one in records.items() if one.claim in claims]
        try:
            left = await run_to_end(self._disable(lambda: devices))
        except StateError as error:
            return {uid: str(error) for uid in uids}
        return {records[id].claim: why for id, why in left.items()}

    async def _disable(self, which: Callable[[], Sequence[str]]) -> dict[str, str]:
        """which: returns the devices, once no other call changes anything. Raise StateError if another call does not
        end."""
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                return await self._turns.in_thread(lambda: self._maker.give_back(which()))
        except HostError as error:
            return {id: str(error) for id in which()}
        finally:
            await self._rescan()
            await self.look()

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Disable what no claim holds: at the start, after each change of the ledger, and periodically; and look
        whether the queues of the others are still enabled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S))
            tasks.create_task(after_each(self._agent.revisions.inventory, self.look, every_s=LOOK_S))

    async def look(self) -> None:
        """Report whether the queues of claims are enabled."""
        try:
            seen = await self._turns.in_thread(self._maker.look)
        except HostError as error:
            self._unseen.report(str(error))
            return
        self._unseen.clear()
        evidence = [
            Evidence(device=id, source=QUEUE, state=HEALTHY)
            if enabled
            else Evidence(device=id, source=QUEUE, state=UNHEALTHY, reason="another program has disabled the queue")
            for id, enabled in seen.items()
        ]
        self._agent.observe(evidence, [(id, QUEUE) for id in self._observed - seen.keys()])
        self._observed = frozenset(seen)

    async def recover(self) -> None:
        """Disable what no claim holds, while the ledger is known to be complete."""
        try:
            self._left = await run_to_end(self._disable(self._orphans)) if self._orphans() else {}
        except StateError as error:
            self._left = {"": str(error)}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    def _orphans(self) -> list[str]:
        if self._agent.loss:
            return []
        held = {id: one.devices for id, one in self._agent.newest.grants.items() if one.holder.api == CLAIM}
        return self._maker.orphans(held)
