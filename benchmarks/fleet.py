"""Many nodes that start against one API server: what it has to write, second by second.

The nodes' real publishers with their real pace, on a clock that jumps to whatever is waited for next: a minute of 5,000
nodes takes seconds. The API server is a dictionary that counts, and takes a while for each answer.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.pool import DevicePart, Pool, PoolDevice
from nodeagent.kube.apiserver.client import ObjectList, WatchEvent
from nodeagent.kube.resourceslice.pool_writer import DEFAULT_PACE, PUBLISHED
from nodeagent.kube.resourceslice.publisher import Publisher
from nodeagent.kube.resourceslice.render import Object
from nodeagent.telemetry import log

FLEET, FEW, POOLS = 5000, 50, 8
"""Nodes; of them so many for an hour of rest; pools a node."""
SPREAD_S = 60.0
ANSWER_S, WATCH_S = 0.01, 300.0
"""How long the server takes for an answer, and for how long it lets a watch be."""
HOUR_S = 3600.0
SLICES, NODES = "resourceslices", "nodes"


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: `now_s` is set forward by what it was to wait."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("every client waits for another one")
        self.now_s += timeout
        return super().select(0)


class JumpLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes in no time."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


@dataclass
class CountingApi:
    """As much of an API server as a publisher asks."""

    now_s: Callable[[], float]
    writes: Counter[int] = field(default_factory=Counter)
    """By second."""
    reads: Counter[int] = field(default_factory=Counter)
    last_write_s: float = 0.0
    _revision: int = 0

    async def get(self, resource: Any, name: str) -> Object:
        await self._answer(self.reads)
        return {"metadata": {"name": name, "uid": f"uid-{name}"}}

    async def list(self, resource: Any, *, fields: Mapping[str, str]) -> ObjectList:
        await self._answer(self.reads)
        return ObjectList((), str(self._revision))

    async def create(self, resource: Any, body: Object) -> Object:
        await self._answer(self.writes)
        self._revision += 1
        self.last_write_s = self.now_s()
        return {**body, "metadata": {**body["metadata"], "uid": "u", "resourceVersion": str(self._revision)}}

    async def replace(self, resource: Any, body: Object) -> Object:
        return await self.create(resource, body)

    async def delete(self, resource: Any, name: str, *, uid: str) -> bool:
        await self._answer(self.writes)
        return True

    async def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[WatchEvent]:
        """Nothing happens to anybody's slices but by himself, which he knows."""
        await self._answer(self.reads)
        await asyncio.sleep(WATCH_S)
        nothing: tuple[WatchEvent, ...] = ()
        for event in nothing:
            yield event

    async def _answer(self, counter: Counter[int]) -> None:
        counter[int(self.now_s())] += 1
        await asyncio.sleep(ANSWER_S)


def pools() -> tuple[Pool, ...]:
    """One slice each; what is in it makes no difference here."""
    device = PoolDevice(name="device", part=DevicePart())
    return tuple(Pool(kind=f"kind{number}", devices=(device,)) for number in range(POOLS))


async def start(api: CountingApi, starts_s: list[float], rest_s: float) -> None:
    """Nodes that start at these times; returns rest_s after the last has everything published."""
    every, quiet = pools(), Revision()
    nodes = [
        Publisher(
            api,
            "nodeagent.dev",
            f"node-{number}",
            lambda features: every,
            quiet.changed,
            nodes=NODES,
            slices=SLICES,
            clock=api.now_s,
        )
        for number in range(len(starts_s))
    ]
    tasks = [asyncio.create_task(_late(at_s, one.run)) for at_s, one in zip(starts_s, nodes, strict=True)]
    for one in nodes:
        seen = 0
        while one.standing.state != PUBLISHED:
            seen = await one.changed(seen)
    await asyncio.sleep(rest_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _late(at_s: float, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await asyncio.sleep(at_s)
    await run()


def simulate(starts_s: list[float], rest_s: float = 0.0) -> CountingApi:
    """What the API server saw."""
    with asyncio.Runner(loop_factory=JumpLoop) as runner:
        api = CountingApi(runner.get_loop().time)
        runner.run(start(api, starts_s, rest_s))
    return api


def line(what: str, api: CountingApi) -> None:
    writes, reads = api.writes.values(), api.reads.values()
    mean = sum(writes) / len(writes)
    print(
        f"| {what} | {sum(writes)} | {max(writes)} | {mean:.0f} | {max(reads)} | {api.last_write_s:.0f} s |", flush=True
    )


def hour() -> None:
    """What a node asks in an hour in which nothing changes."""
    asked = simulate([0.0] * FEW, rest_s=SPREAD_S)
    rested = simulate([0.0] * FEW, rest_s=SPREAD_S + HOUR_S)
    writes, reads = (
        (sum(getattr(rested, one).values()) - sum(getattr(asked, one).values())) / FEW for one in ("writes", "reads")
    )
    print(f"\nIn an hour without news a node writes {writes:.0f} times (reach: 0) and begins {reads:.0f} watches.")


def main() -> None:
    log.configure("error", "json")
    began = time.perf_counter()
    pick = random.Random(1)
    spread = [pick.uniform(0, SPREAD_S) for _ in range(FLEET)]
    together = [0.0] * FLEET
    jitter_s = DEFAULT_PACE.start_jitter_s
    print(f"{FLEET} nodes with {POOLS} pools each, {ANSWER_S * 1e3:.0f} ms for an answer\n")
    print("| all start | writes | most in a second | mean in a second | most reads in a second | last write at |")
    print("|---|---|---|---|---|---|")
    line(f"within {SPREAD_S:.0f} s, each late by up to {jitter_s:.0f} s", simulate(spread))
    line(f"in the same second, each late by up to {jitter_s:.0f} s", simulate(together))
    hour()
    print(f"Simulated in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
