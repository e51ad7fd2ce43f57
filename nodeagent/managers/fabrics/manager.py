"""Keeps the targets that claims hold connected, and no others.

A target is connected after its claim is durable and before kubelet is answered, and disconnected before the claim is
released, so that no other holder meets it in between. What is recorded for grants that are held no longer (the agent
was killed, or an admin released the claim) is disconnected as soon as it is seen. A disk that is still mounted is not
taken away: then the claim stays, and kubelet asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.resources import NvmeTargetConfig
from nodeagent.config.schema import Config
from nodeagent.core.fabrics.pool import PATH
from nodeagent.core.fabrics.target import KIND, Port, Timeouts, device_id
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.errors import HostError, StateError
from nodeagent.host.fabrics.connections import LIVE, host, secrets
from nodeagent.host.fabrics.kernel import Kernel
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.fabrics.connector import Wanted, connector
from nodeagent.managers.journal import recorded_claims
from nodeagent.managers.manager import Manager
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "fabrics.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger without any change of it."""
PATHS_S = 3.0
"""How often the connections are looked at; the kernel announces no lost one."""


class FabricsManager(Manager):
    """Connects and disconnects for claims."""

    name = "NVMe over fabrics"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        hide: Callable[[], Awaitable[None]],
        kernel: Kernel | None = None,
        **times_s: float,
    ) -> None:
        """Set up without changing anything. hide, and the deadlines times_s: as of Connector."""
        self._agent, self._sysfs, self._config = agent, sysfs, config
        self._connector = connector(sysfs, state_dir, agent.settings.boot_id, kernel, hide, **times_s)
        self._turns = Turns(state_dir / LOCK, "cannot connect targets")
        self._left: Mapping[str, str] = {}
        """Why a target that no claim holds is not disconnected, by device."""
        self._failing = Once("targets-not-disconnected")
        self._unforgotten = Once("disks-not-forgotten")
        self._observed: frozenset[str] = frozenset()

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return which targets are not disconnected, and why."""
        return [f"NVMe over fabrics: {why}" for why in self._left.values()]

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Connect the targets of claims. Return, by UID, "" for each claim that has some, or why it cannot be handed
        over; nothing for the others."""
        mine = {uid: grants for uid, grants in claims.items() if any(map(self._ids, grants))}
        return await run_to_end(self._bind(mine)) if mine else {}

    def _ids(self, grant: Grant) -> list[str]:
        """Return the targets of a grant."""
        known = self._agent.inventory.device_by_id
        return [id for id in grant.devices if id in known and known[id].kind == KIND]

    async def _bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        found: dict[str, str] = {}
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                now = self._agent.ledger.grants
                for uid, grants in claims.items():
                    if all(one.id in now for one in grants):
                        found[uid] = await self._connected(uid, grants)
        except (HostError, StateError) as error:
            found |= {uid: str(error) for uid in claims if uid not in found}
        await self.look()
        return found

    async def _connected(self, uid: str, grants: Sequence[Grant]) -> str:
        """Return why a target of a claim is not connected, or ""."""
        wanted = [(one, id) for one in grants for id in self._ids(one)]
        try:
            left = await self._connector.disconnect({id for _, id in wanted} & {*self._orphans()})
            if left:
                return "; ".join(left.values())
            for grant, id in wanted:
                await self._connector.connect(self._wanted(uid, grant, id))
        except HostError as error:
            return str(error)
        return ""

    def _wanted(self, uid: str, grant: Grant, id: str) -> Wanted:
        """Return how a target is to be connected. Raise HostError if it is not configured or a key cannot be read."""
        config = next((one for one in self._config().targets if device_id(one.name) == id), None)
        if config is None:
            raise HostError(f"cannot connect {id}: no resource of the configuration has it any longer")
        return Wanted(
            device=id,
            claim=uid,
            grant=grant.id,
            port=_port(config),
            host=host(self._sysfs, config.host_nqn),
            timeouts=Timeouts(
                ctrl_loss_tmo=config.ctrl_loss_tmo,
                reconnect_delay=config.reconnect_delay,
                fast_io_fail_tmo=config.fast_io_fail_tmo,
            ),
            secrets=secrets(self._sysfs, config.dhchap_secret_file, config.dhchap_ctrl_secret_file),
        )

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        return recorded_claims(self._connector.records(certain=True), uids)

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Disconnect what was connected for some claims, which are about to be released. Return, by UID, why something
        is left."""

        def claim_of() -> dict[str, str]:
            """By device, as it is at the moment: another call may end one's connection and begin another's."""
            records = self._connector.records(certain=True)
            return {id: one.claim for id, one in records.items() if one.claim in uids}

        try:
            if not self.concerned(uids):
                return {}
            left = await run_to_end(self._disconnect(lambda: [*claim_of()]))
            claims = claim_of()
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in uids}
        return {claims[id]: why for id, why in left.items() if id in claims}

    async def _disconnect(self, which: Callable[[], Sequence[str]]) -> dict[str, str]:
        """which: returns the devices, once no other call changes anything. Raise StateError if another call does not
        end."""
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                return await self._connector.disconnect(which())
        except HostError as error:
            return {id: str(error) for id in which()}
        finally:
            await self.look()

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Disconnect what no claim holds: at the start, after each change of the ledger, and periodically; and watch
        the paths of the others."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(after_each(self._agent.revisions.ledger, self.recover, every_s=LOOK_S))
            tasks.create_task(after_each(self._agent.revisions.inventory, self.look, every_s=PATHS_S))

    async def recover(self) -> None:
        """Disconnect what no claim holds, while the ledger is known to be complete."""
        try:
            self._left = await run_to_end(self._disconnect(self._orphans)) if self._orphans() else {}
        except (HostError, StateError) as error:
            self._left = {"": str(error)}
        if self._left:
            self._failing.report("; ".join(self._left.values()))
        else:
            self._failing.clear()

    def _orphans(self) -> list[str]:
        if self._agent.loss:
            return []
        held = {id: one.devices for id, one in self._agent.newest.grants.items() if one.holder.api == CLAIM}
        return self._connector.orphans(held)

    async def look(self) -> None:
        """Report the state of each connection, and forget the disks of those that have ended."""
        with contextlib.suppress(HostError):  # what was seen last counts until it can be told again
            evidence = await asyncio.to_thread(lambda: [*self._seen()])
            self._agent.observe(evidence, [(id, PATH) for id in self._observed - {one.device for one in evidence}])
            self._observed = frozenset(one.device for one in evidence)
        try:
            await self._connector.forget_disks()
        except (HostError, StateError) as error:
            self._unforgotten.report(str(error))
        else:
            self._unforgotten.clear()

    def _seen(self) -> Iterator[Evidence]:
        """Blocks. Raise HostError if it cannot be told what is connected."""
        for one in (one for one in self._connector.records(certain=True).values() if one.controller):
            there = self._connector.standing(one)
            if there is not None and there.state == LIVE:
                yield Evidence(device=one.device, source=PATH, state=HEALTHY)
            else:
                how = f"{there.name} is {there.state}" if there is not None else f"{one.controller} was disconnected"
                why = f"the path to {one.port} is lost: {how}"
                yield Evidence(device=one.device, source=PATH, state=UNHEALTHY, reason=why)


def _port(config: NvmeTargetConfig) -> Port:
    return Port(transport=config.transport, traddr=config.traddr, trsvcid=config.trsvcid, nqn=config.nqn)
