"""Makes MIG instances for claims when they are prepared, and destroys them when no grant holds them any longer.

The ledger's grants are what shall exist. An instance is made after its grant is durable, and its grant ends before it
is destroyed; where the driver keeps it, because a process still uses it, nothing that overlaps it is granted until it
is gone. After kill -9 at any moment the next agent compares journal, driver and ledger, and ends with the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import run_to_end, supervise
from nodeagent.config.schema import Config
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.partitions.standing import standing
from nodeagent.errors import HostError, StateError
from nodeagent.host.nvml.values import Failure, Snapshot
from nodeagent.managers.dra.device_setup import Unmade
from nodeagent.managers.manager import Manager
from nodeagent.managers.partitions.maker import Driver, InstanceMaker
from nodeagent.managers.partitions.modes import MigModes, ModeDriver
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

RETRY_S, SLOWEST_S = 1.0, 60.0
"""Time until the destruction of an instance in use is tried again: after the first failure, doubled with each more; at
most."""
ENDING_S = 2.0
"""How long the release of a claim waits for the last process that uses its instance."""
ENDING_POLL_S = 0.1
FIRST_ANSWER_S = 10.0
"""How long claims wait for NVML's first answer after the agent has started."""
MODES_S, MODES_REST_S = 30.0, 1.0
"""How often to compare the modes of GPUs with the configuration without news, and the shortest pause with them."""
HELD_BACK = "mig"
"""Resource of what is held back."""


class MigDriver(Driver, ModeDriver, Protocol):
    """NVML, as host/nvml/client.py asks it."""


class NvmlSource(Protocol):
    """What asks NVML: the scanner of the machine."""

    answered: asyncio.Event
    """Set once NVML has answered, or there is nothing to ask it."""

    @property
    def probe(self) -> MigDriver:
        """The client of NVML."""
        ...

    @property
    def nvml(self) -> Snapshot | Failure | None:
        """NVML's last answer, or None before the first."""
        ...

    async def ask_nvml(self) -> None:
        """Ask NVML, and report the machine as it is now."""
        ...


class _Pace(msgspec.Struct):
    """When to try again what failed."""

    wait_s: float = RETRY_S
    not_before_s: float = 0.0

    def failed(self) -> None:
        self.not_before_s = time.monotonic() + self.wait_s
        self.wait_s = min(self.wait_s * 2, SLOWEST_S)

    def succeeded(self) -> None:
        self.wait_s, self.not_before_s = RETRY_S, 0.0


async def _nothing_runs() -> None:
    return


class PartitionsManager(Manager):
    """Keeps the MIG instances that the agent makes equal to what the ledger grants."""

    name = "partitions"

    def __init__(
        self,
        agent: Agent,
        source: NvmlSource,
        table: InstanceTable,
        state_dir: Path,
        config: Callable[[], Config],
        end_users: Callable[[], Awaitable[None]] = _nothing_runs,
    ) -> None:
        """Set up without asking anything. `config` returns the configuration in force. `end_users` ends what the agent
        itself runs on instances that no grant holds any longer."""
        self._end_users = end_users
        self._config = config
        self._source = source
        self._agent = agent
        self._journal, self._table = table.journal, table
        self._maker = InstanceMaker(agent, source.probe, table, state_dir)
        self._revision = Revision(agent.revisions.ledger, agent.revisions.inventory)
        self._reserved = ""
        """PCI address of a GPU of which nothing is granted at this moment."""
        self._modes = MigModes(agent, source, source.probe, state_dir, config, self._reserve)
        self._pace = _Pace()
        self._unsettled = Once("mig-not-settled")
        self._looked = False

    # ---------------------------------------------------------------- what preparing claims needs

    def concerned(self, grants: Sequence[Grant]) -> bool:
        return bool(self._devices(grants))

    async def make(self, claims: Mapping[str, Sequence[Grant]]) -> Mapping[str, Unmade]:
        wanted = {uid: devices for uid, grants in claims.items() if (devices := self._devices(grants))}
        return await run_to_end(self._made(wanted)) if wanted else {}

    async def settle(self) -> None:
        """Destroy what no grant holds any longer. The last process of a pod may briefly outlive its containers."""
        await run_to_end(self._settled(time.monotonic() + ENDING_S))

    async def ready(self) -> None:
        """Wait until NVML has answered for the first time, but not for long: without it no instance is known."""
        if self._config().divided:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_S):
                    await self._source.answered.wait()

    def view(self, inventory: Inventory) -> Inventory:
        return self._table.view(inventory)

    async def apply(self, config: Config) -> None:
        self._revision.bump()

    def _devices(self, grants: Sequence[Grant]) -> list[Device]:
        known = self._agent.inventory.device_by_id
        found = (known.get(one) for grant in grants for one in grant.devices)
        return [one for one in found if one is not None and one.partition is not None]

    async def _made(self, wanted: Mapping[str, Sequence[Device]]) -> Mapping[str, Unmade]:
        errors = dict[str, Unmade]()
        try:
            async with self._maker.alone():
                shown = await self._maker.settle({_gpu(one) for devices in wanted.values() for one in devices})
                for uid, devices in wanted.items():
                    for one in devices:
                        if uid not in errors and (why := await self._maker.make(one, shown[_gpu(one)])) is not None:
                            errors[uid] = why
        except (HostError, StateError) as error:
            errors |= {uid: Unmade(why=str(error), refused=False) for uid in wanted if uid not in errors}
        self._hold_back()
        return errors

    async def _settled(self, until_s: float) -> None:
        left = not await self._settle_once()
        while left and time.monotonic() < until_s:
            await asyncio.sleep(ENDING_POLL_S)
            left = not await self._settle_once()

    async def _settle_once(self) -> bool:
        """Destroy what no grant holds. Return whether nothing of it is left."""
        try:
            async with self._maker.alone():
                await self._maker.settle()
        except (HostError, StateError) as error:
            self._unsettled.report(str(error))
            return False
        self._unsettled.clear()
        self._hold_back()
        return not self._maker.ending

    def _hold_back(self) -> None:
        """Have nothing granted that overlaps an instance which no grant holds and which still exists, or that is of a
        GPU whose mode is being switched."""
        every = [self._held(id, "an instance that is to be destroyed") for id in sorted(self._maker.ending)]
        if self._reserved:
            every.append(self._held(self._reserved, "the agent, which switches its MIG mode"))
        self._agent.hold_back({one.id: one for one in every})

    def _held(self, device: str, by: str) -> Grant:
        return Grant(
            id=f"{HELD_BACK}-{device}",
            holder=Holder(api=DEVICE_PLUGIN, resource=HELD_BACK, pod=by),
            ids=(device,),
            devices=(device,),
            things=things_of(self._agent.inventory, [device]),
        )

    def _reserve(self, gpu: str) -> None:
        self._reserved = gpu
        self._hold_back()

    # ---------------------------------------------------------------- what the leading agent does

    async def lead(self) -> None:
        """Compare journal, driver and ledger at the start and whenever the ledger changes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise(self.name, self._follow))
            tasks.create_task(supervise("MIG modes", self._follow_modes))

    async def _follow_modes(self) -> None:
        while True:
            seen = self._revision.value
            await self._modes.step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MODES_S):
                    await self._revision.changed(seen)
            await asyncio.sleep(MODES_REST_S)

    async def _follow(self) -> None:
        while True:
            seen = self._revision.value
            if time.monotonic() >= self._pace.not_before_s and await self._is_due():
                await self._end_users()
                self._looked = await self._settle_once()
                self._pace.failed() if not self._looked else self._pace.succeeded()
            rest_s = self._pace.not_before_s - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s if rest_s > 0 else None):
                    await self._revision.changed(seen)

    async def _is_due(self) -> bool:
        """Return whether something of ours has to be destroyed, or may have changed since the agent last looked."""
        records = await asyncio.to_thread(self._journal.read)
        held = self._agent.ledger.devices_held
        return bool(records) and (not self._looked or any(one not in held for one in records))

    # ---------------------------------------------------------------- what admins see

    def document(self) -> dict[str, Any]:
        """Return the instances that the agent makes, has made or destroys, in plain types; empty if there are none."""
        agent = self._agent
        every = standing(self._journal.read(), self._maker.ending, agent.ledger, agent.inventory)
        found = [msgspec.structs.asdict(one) for one in every]
        return {"instances": found} if found else {}

    def notes(self) -> list[str]:
        """Return which instances are to be destroyed and still exist."""
        return [
            f"{id} is held back: its claim is released, and its MIG instance still exists: {why}"
            for id, why in sorted(self._maker.ending.items())
        ] + list(self._modes.notes())


def _gpu(device: Device) -> str:
    return str(device.attributes.get("parent_uuid", ""))
