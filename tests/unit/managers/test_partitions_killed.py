"""Random claims on GPUs that are divided on demand, and an agent that dies at any step: at rest the driver has exactly
the instances that the ledger grants and those of others, always.

A death is an exception that nothing catches, raised before or after a write of the ledger or the journal, a call of the
driver, or between the two calls that make or destroy one instance. Everything in memory is gone then; the next agent
has the folders and the driver. The library is the one of tests/doubles/nvml_state_double.c, called through NVML's code.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.partitions.instances import Record
from nodeagent.host.nvml.values import Completed, Create, Destroy, Failure, Made, RefusedByDriver
from nodeagent.managers.partitions import manager as manager_of
from nodeagent.managers.partitions.journal import PartitionJournal
from tests.support.long_form import share_of
from tests.support.mig_driver import CARDS, Instance, address, uuid
from tests.support.mig_node import LocalNvml, MigRoom, mig_room

SEEDS = share_of(24, 1 / 6)
STEPS = share_of(500, 0.6)
REST_EVERY = 12
CARDS_OF_SEED = (("h100-80", "a30"), ("a100-40",), ("b200", "h100-94"), ("a100-80", "h200"))


class Killed(BaseException):
    """kill -9."""


class Fuse:
    """Counts the steps of the agent down to its death."""

    def __init__(self) -> None:
        self.left = -1

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, with a step before and one after it."""

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            answer = work(*args, **kwargs)
            self.step()
            return answer

        return stepped


FUSE = Fuse()


class MortalJournal(PartitionJournal):
    def keep(self, records: Mapping[str, Record]) -> None:
        FUSE.around(super().keep)(records)

    def forget(self, *keys: str) -> None:
        FUSE.around(super().forget)(*keys)


class MortalNvml(LocalNvml):
    async def create(self, one: Create) -> Made | RefusedByDriver | Failure:
        FUSE.step()
        answer = await super().create(one)
        FUSE.step()
        return answer

    async def destroy(self, one: Destroy) -> Completed | RefusedByDriver | Failure:
        FUSE.step()
        answer = await super().destroy(one)
        FUSE.step()
        return answer


class World:
    """A node, what the scheduler has allocated, and what others have made."""

    def __init__(self, room: MigRoom, drawn: random.Random) -> None:
        self.room, self.drawn = room, drawn
        self.claims: dict[str, tuple[ClaimRef, tuple[str, ...]]] = {}
        """By name: the claim, and the partitions allocated to it."""
        self.others: set[tuple[int, int]] = set()
        """(GPU, number) of the instances that others made."""
        self.counts: Counter[str] = Counter()
        self.made = self.boots = 0

    # ---------------------------------------------------------------- what is there

    def ours(self) -> list[Instance]:
        return [one for one in self.room.driver.instances() if (one.gpu, one.id) not in self.others]

    def check_others(self) -> None:
        there = {(one.gpu, one.id) for one in self.room.driver.instances()}
        assert self.others <= there, "an instance of another program is gone"

    def taken(self) -> set[str]:
        """The things that allocated claims have."""
        return {thing for _, ids in self.claims.values() for id in ids for thing in self.things(id)}

    def things(self, id: str) -> Sequence[str]:
        device = self.room.agent.inventory.device_by_id.get(id)
        return device.exclusive_parts if device is not None else ()

    # ---------------------------------------------------------------- what happens

    async def step(self) -> None:
        what = self.drawn.choices(
            (self.allocate, self.again, self.release, self.others_make, self.others_destroy, self.use, self.fail),
            (30, 12, 25, 4, 4, 6, 5),
        )[0]
        self.counts[what.__name__] += 1
        await what()
        self.check_others()

    async def allocate(self) -> None:
        """A claim for one or two instances that fit, as a scheduler allocates them."""
        room, ids = self.room, list[str]()
        taken = self.taken()
        for _ in range(self.drawn.choice((1, 1, 2))):
            free = [
                one for one in room.pool().devices if not one.taints and taken.isdisjoint(self.things(one.part.device))
            ]
            if free:
                one = self.drawn.choice(free)
                ids.append(one.part.device)
                taken |= set(self.things(one.part.device))
        if ids:
            self.made += 1
            name = f"c{self.made}"
            self.claims[name] = room.mig_claim(name, *ids), tuple(ids)
            await self.prepare(name)

    async def prepare(self, name: str) -> None:
        claim, ids = self.claims[name]
        (answer,) = await self.room.prepare(claim)
        if not answer.error:
            there = {f"{address(one.gpu)}/mig-{one.profile}-{one.start}" for one in self.ours() if one.complete}
            assert there.issuperset(ids), "an answered claim has no instance"
        elif "is not there at this moment" in answer.error:
            self.counts["others lie there"] += 1  # since a reboot: kubelet tries until the pod is deleted
        elif "did not answer" not in answer.error:
            self.counts["refused"] += 1
            del self.claims[name]
            holders = {grant.holder.uid for grant in self.room.agent.ledger.grants.values()}
            assert claim.uid not in holders, "a refused claim holds something"

    async def again(self) -> None:
        if self.claims:
            await self.prepare(self.drawn.choice(list(self.claims)))

    async def release(self) -> None:
        if self.claims:
            name = self.drawn.choice(list(self.claims))
            claim, _ = self.claims.pop(name)
            self.room.objects.pop(("default", name), None)
            assert await self.room.unprepare(claim) == [""]

    async def others_make(self) -> None:
        gpu = self.drawn.randrange(len(self.room.driver.cards))
        card = self.room.driver.cards[gpu]
        *_, size, starts = profile = self.drawn.choice(CARDS[card]["profiles"])
        start = self.drawn.choice(starts)
        there = [one for one in self.room.driver.instances() if one.gpu == gpu]
        sizes = {one[2]: one[-2] for one in CARDS[card]["profiles"]}
        free = all(one.start + sizes[one.profile] <= start or start + size <= one.start for one in there)
        media = profile[11] and any("+me" in one.profile or one.profile.startswith("7g") for one in there)
        id = max({*range(1, 15)} - {one.id for one in there}, default=0)
        # Where the agent has asked and does not know the answer, an instance is taken for its own.
        asked = (uuid(gpu), profile[1], start) in self.room.table.selector().own
        if free and not media and id and not asked:
            self.room.driver.make(gpu, profile[2], start, id=id, complete=self.drawn.random() < 0.8)
            self.others.add((gpu, id))
            if self.drawn.random() < 0.7:
                self.room.look()

    async def others_destroy(self) -> None:
        if self.others:
            one = self.drawn.choice(sorted(self.others))
            self.others.discard(one)
            self.room.driver.destroy(*one)
            self.room.look()

    async def use(self) -> None:
        if mine := self.ours():
            one = self.drawn.choice(mine)
            self.room.driver.use(one.gpu, one.id, busy=not one.busy)

    async def fail(self) -> None:
        self.room.probe.failing = [self.drawn.choice(("lost", "late"))]

    # ---------------------------------------------------------------- deaths, and rest

    async def live(self) -> None:
        """One step, in which the agent may die, with or without a reboot."""
        FUSE.left = self.drawn.randrange(1, 25) if self.drawn.random() < 0.4 else -1
        try:
            await self.step()
        except Killed:
            self.counts["died"] += 1
            await self.begin_again()
        FUSE.left = -1

    async def begin_again(self) -> None:
        FUSE.left = -1
        self.room.probe.failing = []
        if self.drawn.random() < 0.1:
            self.counts["rebooted"] += 1
            self.boots += 1
            self.room.driver.reset()
            self.others = set()
            if self.drawn.random() < 0.5:
                await self.others_make()
        await self.room.restart(f"boot-{self.boots}" if self.boots else "boot")
        self.check_others()

    async def rest(self) -> None:
        """Nothing is in use any longer, kubelet asks for every claim once more, and what has ended is released."""
        FUSE.left, room = -1, self.room
        room.probe.failing = []
        for one in room.driver.instances():
            if one.busy:
                room.driver.use(one.gpu, one.id, busy=False)
        room.look()
        for uid in {grant.holder.uid for grant in room.agent.ledger.grants.values()}:
            if uid not in {claim.uid for claim, _ in self.claims.values()}:
                await room.unprepare(ClaimRef(namespace="default", name="gone", uid=uid))
        for name in list(self.claims):
            if not all(id in room.agent.inventory.device_by_id for id in self.claims[name][1]):
                await room.unprepare(self.claims.pop(name)[0])
        for name in list(self.claims):
            await self.prepare(name)
        await room.manager.settle()
        self.check_others()
        assert {f"{address(one.gpu)}/mig-{one.profile}-{one.start}" for one in self.ours()} == room.held()
        assert room.held() == {id for _, ids in self.claims.values() for id in ids}
        assert room.manager.notes() == []


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_at_rest_the_instances_are_those_of_the_ledger(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_NVML_STATE", "")
    monkeypatch.setattr(manager_of, "ENDING_S", 0.0)
    for name in ("nvmlGpuInstanceCreateComputeInstance", "nvmlGpuInstanceDestroy"):
        monkeypatch.setattr(pynvml, name, FUSE.around(getattr(pynvml, name)))
    FUSE.left = -1
    cards = CARDS_OF_SEED[seed % len(CARDS_OF_SEED)]
    async with mig_room(folder, *cards, journal_class=MortalJournal) as room:
        room.probe = MortalNvml(room.driver)
        room.open()
        world = World(room, random.Random(seed))
        _make_mortal(room)
        for number in range(STEPS):
            await world.live()
            _make_mortal(room)
            if number % REST_EVERY == REST_EVERY - 1:
                await world.rest()
        await world.rest()
    with capsys.disabled():
        print(f"\nmig: {STEPS} steps on {', '.join(cards)}: {dict(world.counts)}")
    assert world.counts["died"] > STEPS // 20


def _make_mortal(room: MigRoom) -> None:
    """Have decisions and files of claims be steps too."""
    if getattr(room.agent, "is_mortal", False):
        return
    room.agent.is_mortal = True  # type: ignore[attr-defined]
    for owner, names in (
        (room.agent, ("prepare", "unprepare")),
        (room.rendering, ("write_now", "remove_now", "write")),
    ):
        for name in names:
            work = getattr(owner, name)
            mortal = _async_around(work) if name in ("prepare", "unprepare", "write") else FUSE.around(work)
            setattr(owner, name, mortal)


def _async_around(work: Callable[..., Any]) -> Callable[..., Any]:
    async def stepped(*args: Any, **kwargs: Any) -> Any:
        FUSE.step()
        answer = await work(*args, **kwargs)
        FUSE.step()
        return answer

    return stepped
