"""What makes MIG instances for claims, in one process and with real parts: a scanned machine, a ledger file, NVML's
code on the double of the library. Only the API server is a dict."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml

from nodeagent.core.dra.pool import ALL_FEATURES, Pool
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.grant import Grant, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.devices import all_kinds
from nodeagent.host.nvml.helper import Nvml
from nodeagent.host.nvml.values import (
    Completed,
    Create,
    Destroy,
    Failure,
    Made,
    MigState,
    Question,
    RefusedByDriver,
    SetMode,
    Snapshot,
)
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.partitions.manager import PartitionsManager
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.claim_node import Room, config_of
from tests.support.dra_node import DRIVER, result
from tests.support.mig_driver import MigDriver, library

MIG = {"name": "mig", "kind": "gpu", "serve": "dra", "mig": {"mode": "dynamic"}}


class LocalNvml:
    """NVML's functions in this process: what the helper would answer, without the helper."""

    def __init__(self, driver: MigDriver) -> None:
        os.environ["FAKE_NVML_STATE"] = str(driver.path)
        pynvml.nvmlLib = ctypes.CDLL(str(library() / "libnvidia-ml.so.1"))
        self._nvml = Nvml(pynvml)
        self.failing: list[str] = []
        """What the next requests that change something do: "lost" before their work, "late" after it."""

    def snapshot(self) -> Snapshot:
        return self._nvml.snapshot()

    async def mig_state(self, gpu: str) -> MigState | RefusedByDriver | Failure:
        reply = self._nvml.answer(Question(ask=1, look=gpu))
        return reply.state or reply.refused or Failure(absent=False, reason="no answer")

    async def create(self, one: Create) -> Made | RefusedByDriver | Failure:
        answer = self._changed(Question(ask=1, create=one))
        assert not isinstance(answer, Completed)
        return answer

    async def set_mode(self, one: SetMode) -> Completed | RefusedByDriver | Failure:
        answer = self._changed(Question(ask=1, mode=one))
        assert not isinstance(answer, Made)
        return answer

    async def destroy(self, one: Destroy) -> Completed | RefusedByDriver | Failure:
        answer = self._changed(Question(ask=1, destroy=one))
        assert not isinstance(answer, Made)
        return answer

    def _changed(self, question: Question) -> Made | Completed | RefusedByDriver | Failure:
        late = Failure(absent=False, reason="NVML did not answer within 10 s")
        what = self.failing.pop(0) if self.failing else ""
        if what == "lost":
            return late
        reply = self._nvml.answer(question)
        answer = reply.made or reply.completed or reply.refused
        assert answer is not None
        return late if what == "late" else answer


@dataclass
class MigRoom(Room):
    """A node whose GPUs are divided on demand."""

    driver: MigDriver = None  # type: ignore[assignment]
    probe: LocalNvml = None  # type: ignore[assignment]
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    manager: PartitionsManager = None  # type: ignore[assignment]
    table: InstanceTable = None  # type: ignore[assignment]
    boot: str = "boot"
    journal_class: type[PartitionJournal] = PartitionJournal
    names: dict[str, str] = field(default_factory=dict)
    """Device ids by their names in the pool."""

    def open(self) -> None:
        sysfs = SysFs(str(self.tree.root))
        journal = self.journal_class(self.folder / "state", self.boot)
        self.table = InstanceTable(journal, sysfs)
        self.answered.set()
        self.manager = PartitionsManager(self.agent, self, self.table, self.folder / "state", lambda: self.config)
        folder = CdiFolder(self.cdi, DRIVER, sysfs)
        readable, mps = ClaimFiles(self.readable), self.folder / "run" / "mps"
        self.rendering = ClaimRenderer(self.agent, lambda: self.dra, folder, readable, mps, self.table.view)
        self.claims = ClaimPreparer(
            self.agent, lambda: self.dra, self.fetch, self.rendering, self.tell, instances=self.manager
        )
        self.look()

    @property
    def nvml(self) -> Snapshot:
        return self.probe.snapshot()

    async def ask_nvml(self) -> None:
        self.look()

    def look(self) -> None:
        """Ask NVML and scan the machine."""
        selectors = Selectors(partitions=self.table.selector())
        found = scan(SysFs(str(self.tree.root)), all_kinds.builtin_kinds(), selectors, self.nvml)
        self.agent.see(found)

    async def restart(self, boot_id: str = "boot") -> None:
        """Another agent on the same folders, as after kill -9."""
        await self.agent.close()
        self.boot = boot_id
        self.agent = agent_of(self.folder, Inventory(), boot_id, self.alive)
        self.open()

    def reboot(self, boot_id: str) -> None:
        """What a reboot does to the driver; `restart` follows."""
        self.driver.reset()

    def pool(self) -> Pool:
        kind = self.dra.catalog.kinds["gpu"]
        return kind.pool(self.agent.inventory, self.agent.ledger, self.agent.health, ALL_FEATURES)

    def named(self, end: str) -> str:
        """The name in the pool of the device whose id ends so."""
        (name,) = [one.name for one in self.pool().devices if one.part.device.endswith(end)]
        return name

    def mig_claim(self, name: str, *ends: str) -> ClaimRef:
        """A claim that was allocated possible instances, by the ends of their ids."""
        results = [result("gpu", self.named(end), f"r{number}") for number, end in enumerate(ends)]
        return self.claim(name, *results)

    def held(self) -> set[str]:
        """The partitions that the ledger grants."""
        return {one for grant in self.agent.ledger.grants.values() for one in grant.devices}

    def spec(self, ref: ClaimRef) -> Any:
        import json

        return json.loads(self.spec_file(ref).read_text())


def agent_of(folder: Path, inventory: Inventory, boot_id: str, alive: set[str]) -> Agent:
    async def listing() -> tuple[Holding, ...]:
        return ()

    async def living(grants: Sequence[Grant]) -> Mapping[str, str]:
        return {one.id: "it runs" for one in grants if any(uid in alive for uid in one.pod_uids)}

    return Agent(Store(folder / "state"), inventory, AgentSettings(boot_id=boot_id), listing, living=living)


@contextlib.asynccontextmanager
async def mig_room(
    folder: Path, *cards: str, journal_class: type[PartitionJournal] = PartitionJournal, **options: Any
) -> AsyncIterator[MigRoom]:
    """A node with these cards, all of whose GPUs are in MIG mode and divided on demand."""
    driver = MigDriver.of(folder / "nvml", *(cards or ("h100-80",)), **options)
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    driver.machine(tree)
    config, alive = config_of(MIG), set[str]()
    agent = agent_of(folder, Inventory(), "boot", alive)
    room = MigRoom(
        folder, tree, config, agent, alive, driver=driver, probe=LocalNvml(driver), journal_class=journal_class
    )
    room.serve(MIG)
    room.open()
    try:
        yield room
    finally:
        await room.agent.close()
