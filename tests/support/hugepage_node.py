"""A claim room whose pools of hugepages a kernel of the test's resizes. Run as a program, one that dies on the way: it
prepares one claim and kills itself at a step that its arguments name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.config.schema import Config
from nodeagent.core.model.claim import ClaimRef, Prepared
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.hugepages.growth import GrowthTiming
from nodeagent.managers.hugepages.manager import HugepagesManager
from nodeagent.resources.catalog import dra_of
from tests.builders.devices import DeviceTree
from tests.builders.machines import MIB
from tests.doubles.hugepage_kernel import PageKernel
from tests.support.claim_node import Room, _agent, claim_room, config_of, scan_of
from tests.support.dra_node import NODE, PAGES, consumed
from tests.support.until import until

SIZE = 2 * MIB
POOL = (0, SIZE)
QUICK = GrowthTiming(poll_s=0.01, rest_s=0, lock_s=5, grow_s=5)
RULE: Mapping[str, Any] = {"pageSize": "2Mi", "node": 0, "maxPages": 2000}
START = {POOL: (8, 8, 0), (1, SIZE): (4, 4, 0)}
CLAIM_UID = "11111111-2222-4333-8444-555555555555"
STEPS = ("recorded", "half-way", "grown", "decided")


@dataclass
class PageRoom:
    """One node whose pools can grow."""

    room: Room
    kernel: PageKernel
    pages: HugepagesManager = field(init=False)
    rescans: int = 0
    scanning: asyncio.Lock = field(default_factory=asyncio.Lock)

    def open(
        self,
        *rules: Mapping[str, Any],
        pace: GrowthTiming = QUICK,
        put: Callable[[str, str], None] | None = None,
        rescan: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """An agent's part of it, as after a start."""
        self.configure(*rules)
        sysfs, state = SysFs(self.kernel.root), self.room.folder / "state"
        self.pages = HugepagesManager(
            self.room.agent,
            sysfs,
            state,
            lambda: self.room.config,
            rescan or self.rescan,
            put=put or self.kernel.put,
            pace=pace,
        )
        room = self.room
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, self.pages.growing
        )

    def configure(self, *rules: Mapping[str, Any]) -> None:
        said = {"resources": [dict(PAGES)], "hugepages": [dict(one) for one in rules], "resyncSeconds": 3600}
        self.room.config = msgspec.convert(said, Config)
        self.room.dra = dra_of(self.room.config, all_kinds.builtin_kinds(), NODE)

    async def rescan(self) -> None:
        async with self.scanning:
            self.rescans += 1
            found = await asyncio.to_thread(scan_of, self.room.tree, self.room.config)
            self.room.agent.see(found)

    def claim(self, name: str, pages: int, *, node: int = 0, uid: str = "") -> ClaimRef:
        share = "99999999-2222-4333-8444-555555555555" if uid else ""
        wanted = consumed("hugepages", f"numa{node}-2mi", share=share, size=str(pages * SIZE))
        return self.room.claim(name, wanted, uid=uid)

    async def prepare(self, *claims: ClaimRef) -> list[Prepared]:
        return await self.room.prepare(*claims)

    def total(self, node: int = 0) -> int:
        return self.kernel.counts((node, SIZE))[0]

    @property
    def record(self) -> Path:
        return self.room.folder / "state" / "hugepages.json"

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """The leading agent's part runs within."""
        tasks = [asyncio.create_task(self.pages.lead()), asyncio.create_task(self.pages.serve())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return soon after it holds."""
        await until(holds)


@contextlib.asynccontextmanager
async def page_room(
    folder: Path,
    *rules: Mapping[str, Any],
    pace: GrowthTiming = QUICK,
    memory: Mapping[tuple[int, int], int] | None = None,
) -> AsyncIterator[PageRoom]:
    """8 pages of 2 MiB on node 0 and 4 on node 1, through DRA; a folder that was used before is as it was left."""
    opened = reopened(folder) if (folder / "root").exists() else claim_room(folder, PAGES, hugepages=START)
    async with opened as room:
        found = PageRoom(room, PageKernel(room.tree.root, memory or {}))
        found.open(*(rules or (RULE,)), pace=pace)
        try:
            yield found
        finally:
            await found.pages.close()


@contextlib.asynccontextmanager
async def reopened(folder: Path) -> AsyncIterator[Room]:
    """The room of an agent that ended: the same machine, ledger and files."""
    tree, config = DeviceTree(folder / "root"), config_of(PAGES)
    room = Room(folder, tree, config, _agent(folder, scan_of(tree, config), "boot"))
    room.serve(PAGES)
    room.open()
    try:
        yield room
    finally:
        await room.agent.close()


# ---------------------------------------------------------------- an agent that dies


async def _die(folder: Path, step: str) -> None:
    async with page_room(folder) as room:
        calls = 0

        def put(path: str, value: str) -> None:
            nonlocal calls
            calls += 1
            if (step, calls) in (("recorded", 1), ("half-way", 2)):
                os.kill(os.getpid(), signal.SIGKILL)
            room.kernel.put(path, value)

        async def rescan() -> None:
            await room.rescan()
            if step == "grown" and room.total() > START[POOL][0]:
                os.kill(os.getpid(), signal.SIGKILL)

        room.open(RULE, put=put, rescan=rescan)
        answer = await room.prepare(room.claim("c", 1000, uid=CLAIM_UID))
        assert not answer[0].error, answer
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(_die(Path(sys.argv[1]), sys.argv[2]))
