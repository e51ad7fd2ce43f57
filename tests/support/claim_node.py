"""What prepares claims, in one process and with real parts: a scanned machine, a ledger file, folders on disk. Only the
API server is a dict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import Happening
from nodeagent.core.model.claim import ClaimRef, Prepared
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import PeerError
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.devices import all_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dra.claim_files import ClaimRenderer
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.resources.catalog import Dra, dra_of
from nodeagent.resources.offer import selectors
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.dra_node import CPUS, DRIVER, NODE, SERIAL


async def _at_once(ref: ClaimRef) -> None:
    """No delay."""


@dataclass
class Room:
    """One node's claims. `objects` is what the API server has, by (namespace, name)."""

    folder: Path
    tree: DeviceTree
    config: Config
    agent: Agent
    alive: set[str] = field(default_factory=set)
    """UIDs of the pods that have processes."""
    claims: ClaimPreparer = None  # type: ignore[assignment]
    dra: Dra = None  # type: ignore[assignment]
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    away: bool = False
    delay: Callable[[ClaimRef], Awaitable[None]] = _at_once
    reading: int = 0
    most_reading: int = 0
    told: list[tuple[ClaimRef, tuple[Grant, ...], str]] = field(default_factory=list)
    reported: list[Happening] = field(default_factory=list)
    """What Events are made of."""

    @property
    def cdi(self) -> Path:
        return self.folder / "cdi"

    @property
    def readable(self) -> Path:
        return self.folder / "run" / "claims"

    def serve(self, *resources: Mapping[str, Any]) -> None:
        """Serve these resources from now on."""
        self.config = config_of(*resources)
        self.dra = dra_of(self.config, all_kinds.builtin_kinds(), NODE)

    def rescan(self) -> None:
        self.agent.see(scan_of(self.tree, self.config))

    async def fetch(self, ref: ClaimRef) -> Mapping[str, Any] | None:
        self.reading += 1
        self.most_reading = max(self.most_reading, self.reading)
        try:
            await self.delay(ref)
        finally:
            self.reading -= 1
        if self.away:
            raise PeerError("cannot reach the API server: on purpose")
        return self.objects.get((ref.namespace, ref.name))

    def tell(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None:
        self.told.append((ref, tuple(grants), error))

    def claim(self, name: str, *results: Mapping[str, Any], uid: str = "") -> ClaimRef:
        """An allocated claim, reserved for one pod."""
        made = ClaimRef(namespace="default", name=name, uid=uid or str(uuid.uuid4()))
        self.objects["default", name] = {
            "kind": "ResourceClaim",
            "metadata": {"name": name, "namespace": "default", "uid": made.uid},
            "status": {
                "allocation": {"devices": {"results": [dict(one) for one in results]}},
                "reservedFor": [{"resource": "pods", "name": "pod", "uid": "pod-uid"}],
            },
        }
        return made

    async def prepare(self, *refs: ClaimRef) -> list[Prepared]:
        answers = await self.claims.prepare(refs, "op")
        assert answers.keys() == {one.uid for one in refs}
        return [answers[one.uid] for one in refs]

    async def unprepare(self, *refs: ClaimRef) -> list[str]:
        answers = await self.claims.unprepare(refs, "op")
        return [answers[one.uid] for one in refs]

    def spec_file(self, ref: ClaimRef) -> Path:
        return self.cdi / f"{DRIVER}-claim_{ref.uid}.json"

    def env(self, ref: ClaimRef, device: int = 0) -> dict[str, str]:
        edits = json.loads(self.spec_file(ref).read_text())["devices"][device]["containerEdits"]
        return dict(line.split("=", 1) for line in edits.get("env", ()))

    def cpus(self, ref: ClaimRef) -> CpuSet:
        return CpuSet.parse(self.env(ref)["NODEAGENT_CPUS"])

    def files(self) -> list[str]:
        """Everything of ours on disk, half-written files too."""
        found = [*self.cdi.glob("*"), *self.cdi.glob(".*"), *self.readable.glob("*")]
        return sorted(one.name for one in found)

    async def restart(self, boot_id: str = "boot") -> None:
        """Another agent on the same ledger, as after kill -9."""
        await self.agent.close()
        self.agent = _agent(self.folder, self.agent.inventory, boot_id, self.alive)
        self.open()

    def open(self) -> None:
        folder = CdiFolder(self.cdi, DRIVER, SysFs(str(self.tree.root)))
        self.rendering = ClaimRenderer(
            self.agent, lambda: self.dra, folder, ClaimFiles(self.readable), self.folder / "run" / "mps"
        )
        report = self.reported.append
        self.claims = ClaimPreparer(self.agent, lambda: self.dra, self.fetch, self.rendering, self.tell, report=report)


def config_of(*resources: Mapping[str, Any]) -> Config:
    return msgspec.convert({"resources": [dict(one) for one in resources]}, Config)


def scan_of(tree: DeviceTree, config: Config) -> Inventory:
    return scan(SysFs(str(tree.root)), all_kinds.builtin_kinds(), selectors(config))


def _agent(folder: Path, inventory: Inventory, boot_id: str, alive: Container[str] = frozenset()) -> Agent:
    async def listing() -> tuple[Holding, ...]:
        return ()

    async def living(grants: Sequence[Grant]) -> Mapping[str, str]:
        return {one.id: "it runs" for one in grants if any(uid in alive for uid in one.pod_uids)}

    return Agent(Store(folder / "state"), inventory, AgentSettings(boot_id=boot_id), listing, living=living)


@contextlib.asynccontextmanager
async def claim_room(
    folder: Path, *resources: Mapping[str, Any], shape: str = "1s2n4c-smt", ports: int = 2, **options: Any
) -> AsyncIterator[Room]:
    """8 CPUs on 2 NUMA nodes and some serial ports, served through DRA unless told otherwise."""
    tree = DeviceTree(machine(folder / "root", shape, **options))
    for number in range(ports):
        tree.node(f"/dev/ttyS{number}")
    config = config_of(*(resources or (CPUS, SERIAL)))
    alive = set[str]()
    room = Room(folder, tree, config, _agent(folder, scan_of(tree, config), "boot", alive), alive)
    room.serve(*(resources or (CPUS, SERIAL)))
    room.open()
    try:
        yield room
    finally:
        await room.agent.close()


class Gate:
    """Holds those who come until it is opened; reports when a call has come."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, *_: object) -> None:
        self.reached.set()
        await self.opened.wait()
