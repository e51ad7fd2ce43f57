"""Keeps GPUs shared as the ledger says: MPS daemons run, time slices are set, and both end with the grants.

A claim is answered when its daemon answers and its time slices are set, and released when they are gone. In between the
leading agent watches the daemons: one that ends is started again. All of it happens under one lock of the node, and
nothing is stopped while the ledger may lack grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from nodeagent.aio.supervise import race, run_to_end, supervise
from nodeagent.core.events.happenings import Report, mps_restarted
from nodeagent.core.events.states import PodOf
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.sharing.mps import (
    MpsSet,
    asks_for_sharing,
    devices_of,
    mps_sets,
    set_name,
    settings_of,
    uses_mps,
)
from nodeagent.core.sharing.rules import time_slices
from nodeagent.errors import HostError, StateError
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.nvidia_smi import NvidiaSmi
from nodeagent.managers.manager import Manager
from nodeagent.managers.sharing.journal import DaemonRecord, SharingJournal
from nodeagent.managers.sharing.mps_daemons import Kept, MpsDaemons
from nodeagent.managers.sharing.time_slices import TimeSlices
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "sharing.lock"
"""In the state folder."""
LOCK_S = 15.0
"""How long to wait for another change. Kubelet waits 45 s for a claim, of which reading it may take 25."""
POLL_S = 30.0
"""How often everything is compared without an event."""
REST_S = 1.0
"""How long to wait after a daemon has ended: one that always ends would be started as fast as it can."""
log = structlog.get_logger()


class SharingManager(Manager):
    """Keeps MPS daemons and time slices. Building one starts nothing."""

    name = "sharing"

    def __init__(
        self,
        agent: Agent,
        search: DriverSearch,
        state_dir: Path,
        runtime_dir: Path,
        report: Report,
        pod_of: PodOf,
        view: Callable[[Inventory], Inventory] = lambda inventory: inventory,
    ) -> None:
        """Set up. search: where NVIDIA's programs are looked for. `pod_of` returns the pod with a UID, if its name is
        known; `view` an inventory with the parts that were made on demand as they are now."""
        self._view = view
        journal, smi = SharingJournal(state_dir, agent.settings.boot_id), NvidiaSmi(search)
        self._agent = agent
        self._report = report
        self._pod_of = pod_of
        self._daemons = MpsDaemons(journal, runtime_dir, search, smi)
        self._slices = TimeSlices(journal, smi)
        self._turns = Turns(state_dir / LOCK, "cannot change MPS daemons and time slices")
        self._died = asyncio.Event()
        self._watched: dict[int, int] = {}
        """Handles of processes that are watched (pidfd), by pid."""
        self._errors: Mapping[str, str] = {}
        """Why something is not as it should be, by daemon or device."""
        self._shown: Mapping[str, tuple[MpsSet, DaemonRecord]] = {}
        self._intervals: Mapping[str, tuple[str, str]] = {}
        """(time slice, what it was before) by device."""
        self._failing = Once("sharing-not-kept")
        self._nothing_left = False
        """Whether the last comparison found nothing wanted and nothing left: looking for what is left goes through all
        processes, which a node that shares nothing is spared."""

    # ---------------------------------------------------------------- for claims

    async def prepare(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Make what was granted to claims ready for their programs. Return, by UID, why it is not."""
        mine = {uid: grants for uid, grants in claims.items() if any(map(asks_for_sharing, grants))}
        return await run_to_end(self._prepare(mine)) if mine else {}

    async def release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """End what nothing needs any longer after claims were released. Return, by UID, why something is left."""
        mine = {uid: grants for uid, grants in claims.items() if any(map(asks_for_sharing, grants))}
        return await run_to_end(self._release(mine)) if mine else {}

    async def _prepare(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        names, devices = _touched(self._agent.inventory, claims.values())
        self._nothing_left = False
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                sets = {name: one for name, one in self._sets().items() if name in names}
                slices = {id: one for id, one in self._wanted_slices().items() if id in devices}
                kept = await self._turns.in_thread(self._daemons.keep, sets, ended=False)
                errors = await self._turns.in_thread(self._slices.keep, slices, self._uuids(), ended=False)
                self._say_restarts(sets, kept)
                await self._look()
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in claims}
        return _by_claim(self._agent.inventory, claims, {**errors, **kept.errors})

    async def _release(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        names, devices = _touched(self._agent.inventory, claims.values())
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                sets, slices = self._sets(), self._wanted_slices()
                stopped = await self._turns.in_thread(self._daemons.stop, names - sets.keys())
                errors = await self._turns.in_thread(self._slices.restore, devices - slices.keys())
                await self._look()
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in claims}
        return _by_claim(self._agent.inventory, claims, {**errors, **stopped})

    async def settle(self) -> None:
        """End what no grant needs any longer. What cannot be ended now is ended later."""
        await run_to_end(self._keep_all())

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Compare everything at the start, after each change of the ledger, when a daemon ends, and periodically."""
        try:
            while True:
                seen = self._agent.revisions.ledger.value
                self._died.clear()
                await supervise(self.name, self._keep_all)
                await race(self._agent.revisions.ledger.changed(seen), self._died.wait(), asyncio.sleep(POLL_S))
                if self._died.is_set():
                    await asyncio.sleep(REST_S)
        finally:
            self._watch(())

    async def close(self) -> None:
        """Wait for a step in progress. The daemons keep running: their clients outlive the agent."""
        self._watch(())
        await self._turns.close()

    async def _keep_all(self) -> None:
        if self._nothing_left and not self._sets() and not self._wanted_slices():
            return
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                sets, slices = self._sets(), self._wanted_slices()
                whole = not self._agent.loss
                kept = await self._turns.in_thread(self._daemons.keep, sets, ended=whole)
                errors = await self._turns.in_thread(self._slices.keep, slices, self._uuids(), ended=whole)
                self._say_restarts(sets, kept)
                self._errors = {**errors, **kept.errors}
                self._nothing_left = whole and not (sets or slices or self._errors)
                await self._look()
        except (HostError, StateError) as error:
            self._failing.report(str(error))
            return
        self._failing.report("; ".join(self._errors.values()))

    async def _look(self) -> None:
        """Read what is recorded, for those who ask, and watch the daemons."""
        records = await self._turns.in_thread(self._daemons.records)
        slices = await self._turns.in_thread(self._slices.records)
        sets = self._sets()
        self._shown = {name: (sets[name], one) for name, one in records.items() if name in sets}
        self._intervals = {id: (one.interval, one.before) for id, one in slices.items()}
        self._watch(one.pid for _, one in self._shown.values() if one.pid)

    def _sets(self) -> dict[str, MpsSet]:
        return mps_sets(self._view(self._agent.inventory), self._agent.ledger)

    def _wanted_slices(self) -> dict[str, str]:
        return time_slices(self._agent.inventory, self._agent.ledger)

    def _uuids(self) -> dict[str, str]:
        every = ((one.id, one.attributes.get("uuid", "")) for one in self._view(self._agent.inventory).devices)
        return {id: str(uuid) for id, uuid in every if uuid}

    # ---------------------------------------------------------------- daemons that end

    def _watch(self, pids: Iterable[int]) -> None:
        """Be woken when one of these processes ends."""
        wanted, loop = set(pids), asyncio.get_running_loop()
        for pid in self._watched.keys() - wanted:
            loop.remove_reader(handle := self._watched.pop(pid))
            os.close(handle)
        for pid in wanted - self._watched.keys():
            with contextlib.suppress(OSError):  # it has ended: the next comparison finds that
                self._watched[pid] = handle = os.pidfd_open(pid)
                loop.add_reader(handle, self._ended, pid)

    def _ended(self, pid: int) -> None:
        handle = self._watched.pop(pid)
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
        self._died.set()

    def _say_restarts(self, sets: Mapping[str, MpsSet], kept: Kept) -> None:
        for name in kept.restarted:
            one = sets[name]
            pods = [
                pod
                for grant in self._agent.ledger.grants.values()
                if uses_mps(grant) and set_name(grant) == name
                for uid in grant.pod_uids
                if (pod := self._pod_of(uid)) is not None
            ]
            log.warning("mps-restarted", daemon=name, devices=one.devices, holders=one.holders)
            self._report(mps_restarted(name, one.devices, one.holders, tuple(dict.fromkeys(pods))))

    # ---------------------------------------------------------------- what admins see

    def notes(self) -> list[str]:
        """Return what is not as it should be, and which programs have lost their daemon, one sentence each."""
        return [*self._errors.values(), *self._lost()]

    def _lost(self) -> Iterator[str]:
        for one, record in self._shown.values():
            if record.restarts:
                times = "once" if record.restarts == 1 else f"{record.restarts} times"
                yield (
                    f"the MPS daemon of {', '.join(one.devices)} ended and was started again {times}: programs of "
                    f"{', '.join(one.holders)} that used it then have lost it and must be started again"
                )

    def document(self) -> dict[str, Any]:
        """Return the daemons and the time slices, in plain types; empty if there are none."""
        daemons = [
            {
                "name": name,
                "devices": list(one.devices),
                "uuids": list(record.uuids),
                "holders": list(one.holders),
                "shared": one.shared,
                "state": str(record.stage),
                "pid": record.pid,
                "restarts": record.restarts,
                "threads_percent": record.threads_percent,
                "memory_mib": {str(number): size for number, size in record.memory_mib.items()},
                "error": self._errors.get(name, ""),
            }
            for name, (one, record) in sorted(self._shown.items())
        ]
        slices = [
            {"device": id, "interval": interval, "before": before, "error": self._errors.get(id, "")}
            for id, (interval, before) in sorted(self._intervals.items())
        ]
        return {"mps": daemons, "time_slices": slices} if daemons or slices else {}


def _touched(inventory: Inventory, claims: Iterable[Sequence[Grant]]) -> tuple[set[str], set[str]]:
    """Return the names of the daemons of some claims, and the devices of which they set the time slice."""
    grants = [grant for some in claims for grant in some]
    names = {set_name(one) for one in grants if uses_mps(one)}
    return names, set(devices_of(inventory, (one for one in grants if settings_of(one).time_slice)))


def _by_claim(inventory: Inventory, claims: Mapping[str, Sequence[Grant]], errors: Mapping[str, str]) -> dict[str, str]:
    """Return the errors of daemons and devices by the claims that they concern."""
    found = dict[str, str]()
    for uid, grants in claims.items():
        names, devices = _touched(inventory, [grants])
        if whys := [errors[one] for one in sorted(names | devices) if one in errors]:
            found[uid] = "; ".join(whys)
    return found
