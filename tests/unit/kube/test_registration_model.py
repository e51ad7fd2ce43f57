"""Random sequences of everything that happens to a kubelet, its folder and an agent: nothing is registered while a
stream is open, and in the end kubelet shows exactly what is advertised.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nodeagent.kube.kubelet.registration import Registrar, RegistrationTiming
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.kubelet_plugins import Version
from tests.support.registering import leave_dead_socket, own_sockets, shown
from tests.support.shelf import CPU, Shelf

PACE = RegistrationTiming(
    first_retry_s=0.01,
    last_retry_s=0.05,
    unwatched_s=0.05,
    unwatched_most_s=0.1,
    clean_up_s=0.12,
    poll_s=0.5,
    register_s=0.15,
)
GROUPS, AT_ONCE, STEPS = 6, 25, 8
LONGEST_BREATH_S = 0.1
END_S = 10.0
"""Generous: two dozen nodes share the processors."""


class Node:
    """A kubelet and an agent with one resource, and what may happen to them."""

    def __init__(self, folder: Path, seed: str, version: Version) -> None:
        self.version = version
        self.random = random.Random(seed)
        self.kubelet = FakeKubelet(folder, version=version, clean_up_s=0.01)
        self.shelf = Shelf()
        self.trace: list[str] = []
        self._agent: asyncio.Task[None] | None = None

    def start_agent(self) -> None:
        self.shelf = Shelf(count=self.random.randint(1, 5))
        self._agent = asyncio.create_task(Registrar([self.shelf], self.kubelet.plugins_folder, pace=PACE).run())

    async def end_agent(self) -> None:
        """In order, and as if nothing were wrong."""
        assert self._agent is not None
        self._agent.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._agent

    # What happens to the agent

    async def reload(self) -> None:
        await self.end_agent()
        self.start_agent()

    async def crash(self) -> None:
        await self.end_agent()
        if self.kubelet.plugins_folder.exists():
            leave_dead_socket(self.kubelet.plugins_folder)
        self.start_agent()

    async def change_list(self) -> None:
        self.shelf.show(self.random.randint(1, 5))

    # What happens to the folder

    async def touch(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.kubelet.socket)

    async def lose_socket(self) -> None:
        for path in own_sockets(self.kubelet):
            self.kubelet.lose(path)

    async def move_kubelet_socket(self) -> None:
        aside = self.kubelet.socket.with_name("aside")
        self.kubelet.socket.rename(aside)
        await self.breathe()
        aside.rename(self.kubelet.socket)

    async def lose_folder(self) -> None:
        await self.kubelet.stop()
        shutil.rmtree(self.kubelet.plugins_folder)
        await self.breathe()
        await self.kubelet.start()

    # What happens to kubelet

    async def restart(self) -> None:
        await self.kubelet.restart(wipe=self.random.random() < 0.8)

    async def die_and_come_back(self) -> None:
        await self.kubelet.stop(leave_socket=True)
        await self.breathe()
        await self.kubelet.start()

    async def cut(self) -> None:
        self.kubelet.resume()
        await self.kubelet.cut_streams()

    async def stall(self) -> None:
        self.kubelet.pause()
        await self.breathe(3 * PACE.register_s)
        self.kubelet.resume()

    async def pause(self) -> None:
        self.kubelet.pause()

    async def go_on(self) -> None:
        self.kubelet.resume()
        self.kubelet.release(CPU)

    async def hold(self) -> None:
        self.kubelet.release(CPU)
        self.random.choice([self.kubelet.hold_dials, self.kubelet.hold_answers])(CPU)

    async def refuse(self) -> None:
        self.random.choice([self.kubelet.refuse, self.kubelet.spoil])(CPU, self.random.randint(1, 3))

    async def breathe(self, longest_s: float = LONGEST_BREATH_S) -> None:
        await asyncio.sleep(self.random.uniform(0, longest_s))

    def events(self) -> list[Callable[[], Awaitable[None]]]:
        agent = [self.reload, self.crash, self.change_list]
        folder = [self.touch, self.lose_socket, self.move_kubelet_socket, self.lose_folder]
        kubelet = [self.restart, self.die_and_come_back, self.cut, self.stall, self.pause, self.go_on, self.hold]
        return [*agent, *folder, *kubelet, self.refuse, self.breathe, self.breathe, self.settle]

    async def settle(self) -> None:
        """What is wrong with kubelet is over: it shows what is advertised."""
        self.kubelet.resume()
        self.kubelet.release(CPU)
        self.kubelet.refuse(CPU, 0)
        self.kubelet.spoil(CPU, 0)
        await shown(self.kubelet, self.shelf, within_s=END_S, end_noticed=self.end_noticed)

    @property
    def end_noticed(self) -> bool:
        """Up to 1.36 kubelet takes the failure of one Register for that of another one of the resource. Where it stood
        still, the two come at once: it shows the resource, and will not notice its end."""
        stood_still = {"pause", "stall", "hold"} & {*self.trace}
        return self.version is Version.V1_37 or not stood_still

    async def live(self, counts: Counter[str]) -> None:
        async with self.kubelet:
            self.start_agent()
            for event in self.random.choices(self.events(), k=STEPS):
                self.trace.append(event.__name__)
                counts[event.__name__] += 1
                await event()
            await self.settle()
            await self.reload()
            await self.settle()
            await self.end_agent()
            async with asyncio.timeout(END_S):
                await self.kubelet.until(lambda: not self.kubelet.connections(CPU))
            assert self.kubelet.allocatable(CPU) == 0 or not self.end_noticed
            assert own_sockets(self.kubelet) == []


async def lived(seed: str, version: Version, counts: Counter[str]) -> str:
    """One sequence; what went wrong, or ""."""
    with tempfile.TemporaryDirectory(prefix="na-", ignore_cleanup_errors=True) as folder:
        node = Node(Path(folder), seed, version)
        try:
            await node.live(counts)
        except Exception as error:
            causes = [str(one) for one in getattr(error, "exceptions", [error])]
            return f"{seed}: {' '.join(node.trace)}: {type(error).__name__} {causes}"
    return ""


@pytest.mark.parametrize("version", [*Version])
@pytest.mark.parametrize("group", range(GROUPS))
async def test_whatever_happens_in_whatever_order_the_resource_is_allocatable_again(
    group: int, version: Version
) -> None:
    """Each sequence is repeatable by its seed."""
    counts = Counter[str]()
    lives = (lived(f"{version}/{group}/{number}", version, counts) for number in range(AT_ONCE))
    assert [wrong for wrong in await asyncio.gather(*lives) if wrong] == []
    assert min(counts.values()) > 0 and len(counts) == 17, "every event happened"
