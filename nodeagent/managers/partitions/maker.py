"""Makes and destroys MIG instances: one agent of the node at a time, each step recorded before the driver is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import structlog
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.partitions.geometry import Place, overlapping
from nodeagent.core.partitions.instances import Fate, Lying, Record, fate, found
from nodeagent.host.nvml.values import Completed, Create, Destroy, Failure, Made, MigState, RefusedByDriver
from nodeagent.managers.dra.device_setup import Unmade
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent

LOCK = "partitions.lock"
"""In the state folder."""
LOCK_S = 10.0
"""How long to wait while another call or agent makes or destroys instances. Kubelet waits 45 s for a claim."""
log = structlog.get_logger()
Shown = Mapping[str, "list[Lying] | str"]
"""What lies on each GPU, by its UUID, or why that is unknown."""


class Driver(Protocol):
    """NVML, as host/nvml/client.py asks it."""

    async def mig_state(self, gpu: str) -> MigState | RefusedByDriver | Failure: ...
    async def create(self, one: Create) -> Made | RefusedByDriver | Failure: ...
    async def destroy(self, one: Destroy) -> Completed | RefusedByDriver | Failure: ...


class InstanceMaker:
    """Has the driver's instances follow the ledger. Its methods raise HostError if a step cannot be recorded, and
    StateError if another agent keeps the right to change instances."""

    def __init__(self, agent: Agent, driver: Driver, table: InstanceTable, state_dir: Path) -> None:
        self._agent = agent
        self._driver = driver
        self._journal = table.journal
        self._table = table
        self._turns = Turns(state_dir / LOCK, "cannot change MIG instances")
        self.ending: dict[str, str] = {}
        """Why instances that no grant holds still exist or may exist, by partition."""

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Hold the right to change instances exclusively."""
        return self._turns.alone(LOCK_S)

    async def settle(self, gpus: Iterable[str] | None = None) -> Shown:
        """Destroy what is ours and no grant holds, and forget what is gone. Needs `alone`. Return what lies on the
        GPUs, given by their UUIDs, or on all that have records."""
        # Read before the ledger: a record is written after its grant, so one that the ledger does not have has ended.
        records = await asyncio.to_thread(self._journal.read)
        await self._agent.refresh()
        held = self._agent.newest.devices_held
        shown = {
            gpu: await self._look(gpu)
            for gpu in sorted({one.gpu for one in records.values()} if gpus is None else gpus)
        }
        gone = [one for one in records.values() if one.gpu in shown and await self._ended(one, shown, held)]
        if gone:
            await asyncio.to_thread(self._journal.forget, *(one.partition for one in gone))
        known = records.keys() - {one.partition for one in gone}
        self.ending = {id: why for id, why in self.ending.items() if id in known and id not in held}
        return shown

    async def make(self, device: Device, lying: list[Lying] | str) -> Unmade | None:
        """Make the instance that a granted device stands for, unless it exists. Needs `alone`, and what lies on its
        GPU."""
        part, gpu = device.partition, str(device.attributes.get("parent_uuid", ""))
        assert part is not None
        place = Place(part.profile, part.start, part.size)
        what = f"MIG instance {device.attributes.get('mig_profile')} at slice {part.start} of GPU {device.parent}"
        if isinstance(lying, str):
            return Unmade(why=f"cannot create {what}: {lying}", refused=False)
        record = (await asyncio.to_thread(self._journal.read)).get(device.id)
        there = found(record, lying) if record is not None else None
        if there is None and (others := overlapping(place, [one.place for one in lying])):
            where = ", ".join(f"slices {one.start} to {one.start + one.size - 1}" for one in others)
            return Unmade(
                why=f"cannot create {what}: an instance that the agent did not make has {where}", refused=True
            )
        if record is None or there is None:
            record = Record(
                partition=device.id,
                gpu=gpu,
                profile=place.profile,
                start=place.start,
                size=place.size,
                boot_id=self._journal.boot_id,
            )
            await asyncio.to_thread(self._journal.keep, {record.partition: record})
        return await self._created(record, there, what)

    async def _created(self, record: Record, there: Lying | None, what: str) -> Unmade | None:
        gi = there.gi if there is not None else None
        request = Create(gpu=record.gpu, profile=record.profile, start=record.start, size=record.size, gi=gi)
        answer = await self._driver.create(request)
        if not isinstance(answer, Made):
            why = f"cannot create {what}: {answer.reason}"
            log.warning("mig-not-created", partition=record.partition, error=why)
            return Unmade(why=why, refused=isinstance(answer, RefusedByDriver))
        made = replace(record, gi=answer.gi, ci=answer.ci, uuid=answer.uuid)
        if made != record:
            await asyncio.to_thread(self._journal.keep, {made.partition: made})
            log.info("mig-created", partition=record.partition, gi=answer.gi, uuid=answer.uuid)
        return None

    # ---------------------------------------------------------------- what no grant holds

    async def _look(self, gpu: str) -> list[Lying] | str:
        answer = await self._driver.mig_state(gpu)
        if not isinstance(answer, MigState):
            return answer.reason
        if answer.instances is None:
            return "NVML does not list the instances of this GPU"
        return [Lying(gi=one.id, place=Place(one.profile, one.start, one.size)) for one in answer.instances]

    async def _ended(self, record: Record, shown: Shown, held: frozenset[str]) -> bool:
        """Return whether a recorded instance is known not to exist, after destroying it if no grant holds it."""
        lying, is_held = shown[record.gpu], record.partition in held
        if isinstance(lying, str):
            if not is_held:
                self.ending[record.partition] = lying
            return False
        what = fate(record, lying, held=is_held)
        if what is Fate.DESTROY:
            return await self._destroyed(record, lying)
        if what is Fate.FORGET and is_held and record.uuid:
            log.warning("mig-lost", partition=record.partition, uuid=record.uuid)
        return what is Fate.FORGET

    async def _destroyed(self, record: Record, lying: list[Lying]) -> bool:
        there = found(record, lying)
        assert there is not None
        answer = await self._driver.destroy(Destroy(gpu=record.gpu, gi=there.gi))
        if not isinstance(answer, Completed):
            if self.ending.get(record.partition) != answer.reason:
                log.warning("mig-not-destroyed", partition=record.partition, gi=there.gi, error=answer.reason)
            self.ending[record.partition] = answer.reason
            return False
        lying.remove(there)
        self._table.ended(record)
        log.info("mig-destroyed", partition=record.partition, gi=there.gi)
        return True
