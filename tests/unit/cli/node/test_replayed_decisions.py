"""A capture has everything that the agent decides on: what it decides next, its capture decides alike."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.cli import main
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.placed import placed_document, refusal_document
from nodeagent.cli.shared.request_options import RequestLine, request_of
from nodeagent.core.dra.device_pool import label
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.grant import Grant, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.resources.offer import Offer, offers
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from tests.builders.node_captures import opened
from tests.support.agent_pages import pages_of
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import CPUS, PAGES, SERIAL, SHARED, consumed, result
from tests.support.long_form import share_of

MIB = 1 << 20
SEEDS, CAPTURES, PLACED = share_of(50, 0.2), 2, 9
"""Of each capture: so many placements, and one decision of the agent itself. 1,000 decisions in the long form."""
RESOURCES = (CPUS, {**PAGES, "pagesPerBlock": 2}, SERIAL, SHARED)


@dataclass
class Drawn:
    """A node on which things happen at random."""

    draw: random.Random
    room: Room
    offers: Sequence[Offer]
    claims: list[ClaimRef] = field(default_factory=list)
    made: int = 0

    async def happen(self) -> None:
        """One claim or container comes or goes; what does not fit is refused."""
        kind, agent = self.draw.random(), self.room.agent
        if kind < 0.4:
            self.claims.append(self.claim())
            await self.room.prepare(self.claims[-1])
        elif kind < 0.75:
            with contextlib.suppress(Refused, InputError):
                await allocated(agent, *self.ids())
        elif kind < 0.9 and self.claims:
            await self.room.unprepare(self.claims.pop(self.draw.randrange(len(self.claims))))
        elif agent.ledger.grants:
            await agent.release([self.draw.choice([*agent.ledger.grants])], "op")

    def claim(self) -> ClaimRef:
        self.made += 1
        node = self.draw.randint(0, 1)
        parts = self.draw.sample(
            [
                consumed("cpu", f"numa{node}", "c", cpus=str(self.draw.randint(1, 4))),
                consumed("hugepages", f"numa{node}-2mi", "h", size=f"{2 * self.draw.randint(1, 4)}Mi"),
                result("char", label(f"/dev/ttyS{self.draw.randint(0, 3)}"), "p"),
                consumed("char", label("/dev/null"), "s", shares="1"),
            ],
            self.draw.randint(1, 3),
        )
        return self.room.claim(f"c{self.made}", *parts, uid=f"{self.draw.getrandbits(128):032x}")

    def ids(self) -> tuple[Offer, list[str]]:
        offer = self.draw.choice(self.offers)
        every = [one.id for one in offer.resource.advertised(self.room.agent.inventory, Ledger(), {})]
        return offer, self.draw.sample(every, min(len(every), self.draw.randint(1, 3)))

    def request(self) -> RequestLine:
        draw = self.draw
        return RequestLine(
            cpus=draw.randint(0, 8),
            options=draw.sample(
                ["full-pcpus-only", "distribute-cpus-across-numa", "align-by-socket"], draw.randint(0, 1)
            )
            if draw.random() < 0.3
            else [],
            numa=draw.choice(["best-effort", "single", "restricted"]),
            hugepages={"2Mi": draw.randint(1, 8)} if draw.random() < 0.5 else {},
            devices={"char": draw.randint(1, 3)} if draw.random() < 0.5 else {},
        )


async def allocated(agent: Agent, offer: Offer, ids: Sequence[str]) -> object:
    """What a container gets, without the name of its grant."""
    (edits,) = await agent.allocate(offer.resource, [ids], offer.edits, "op")
    return replace(edits, env={key: value for key, value in edits.env.items() if not key.endswith("_GRANT")})


@contextlib.asynccontextmanager
async def drawn(folder: Path, seed: int) -> AsyncIterator[Drawn]:
    pages = {(node, 2 * MIB): (8, 8, 0) for node in (0, 1)}
    async with claim_room(folder, *RESOURCES, shape="1s2n8c", ports=4, hugepages=pages) as room:
        room.tree.node("/dev/null")
        room.rescan()
        yield Drawn(random.Random(seed), room, offers(room.config, builtin_kinds()))


async def captured(node: Drawn, folder: Path) -> Path:
    path = folder / f"c{node.made}-{node.draw.random()}.tar.zst"
    async with pages_of(node.room.agent, folder / "s", node.offers):
        where = ["--root", str(node.room.tree.root), "--state-dir", str(node.room.folder / "state")]
        words = ["capture", "--socket", str(folder / "s"), "--kubelet-dir", str(folder), *where, "-o", str(path)]
        assert await asyncio.to_thread(main, words) == 0
    return path


# ---------------------------------------------------------------- decisions


def placed(inventory: Inventory, ledger: Ledger, line: RequestLine) -> dict[str, Any]:
    """The answer of `place`, or the refusal with its numbers."""
    try:
        request = request_of(inventory, line)
        return placed_document(inventory, request, place(inventory, ledger, request))
    except Refused as refusal:
        return refusal_document(refusal)


def shown(ledger: Ledger) -> Ledger:
    """A ledger without what the pages do not show of a grant."""
    bare = {"boot_id": ""}
    return replace(ledger, grants={name: replace(one, **bare) for name, one in ledger.grants.items()})


async def twin_of(facts: Facts, folder: Path) -> Agent:
    """An agent that knows nothing but the capture."""
    shutil.copytree(facts.state_dir, folder / "state")

    async def listing() -> tuple[Holding, ...]:
        return ()

    return Agent(Store(folder / "state"), facts.inventory(), AgentSettings(boot_id="boot"), listing)


def timeless(grants: Mapping[str, Grant]) -> dict[str, Grant]:
    """Grants without what differs between two moments; those of the device plugin by their ids."""
    same = [replace(one, granted_at=0.0) for one in grants.values()]
    return {one.id if one.holder.uid else str(one.ids): replace(one, id="") for one in same}


async def decided(node: Drawn, room: Room, what: ClaimRef | tuple[Offer, list[str]]) -> object:
    """What an agent answers next, be it a refusal."""
    try:
        if isinstance(what, ClaimRef):
            return await room.prepare(what)
        return await allocated(room.agent, *what)
    except (Refused, InputError) as error:
        return str(error)


async def check_next(node: Drawn, facts: Facts, folder: Path) -> None:
    """The agent and its twin decide on the same, and hold the same then."""
    what = node.claim() if node.draw.random() < 0.5 else node.ids()
    twin = await twin_of(facts, folder)
    room = Room(folder, node.room.tree, node.room.config, twin, objects=node.room.objects)
    room.serve(*RESOURCES)
    room.open()
    try:
        assert await decided(node, room, what) == await decided(node, node.room, what)
        assert timeless(twin.ledger.grants) == timeless(node.room.agent.ledger.grants)
    finally:
        await twin.close()
    if isinstance(what, ClaimRef):
        node.claims.append(what)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_capture_decides_what_the_agent_decides(seed: int, folder: Path) -> None:
    """Bit for bit: placements with their costs and reasons, refusals with their numbers and what would admit the
    request, and the agent's own next grant or refusal over either API."""
    async with drawn(folder, seed) as node:
        for number in range(CAPTURES):
            for _ in range(node.draw.randint(1, 12)):
                await node.happen()
            agent, twin = node.room.agent, folder / f"twin{number}"
            lines = [node.request() for _ in range(PLACED)]
            with opened(await captured(node, folder)) as facts:
                assert facts.ledger() == shown(agent.ledger)
                for line in lines:
                    here = placed(agent.inventory, agent.ledger, line)
                    assert placed(facts.inventory(), facts.ledger(), line) == here, line
                twin.mkdir()
                await check_next(node, facts, twin)
