"""Pods that end as soon as they have begun are seen all the same: kubelet is asked at once after each change."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

from nodeagent.aio.revision import Revision
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet.pod_resources import Listing, PodResources
from nodeagent.managers.deviceplugin.reconciler import HolderReconciler
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pod_witness import PodWitness
from tests.doubles.kubelet import FakeKubelet
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import CPUS, DRIVER
from tests.support.until import News

MOST_S = 20.0
"""By another clock than the loop's."""


class Asked(PodResources):
    """Asks kubelet, and notes which pods it has listed."""

    def __init__(self, kubelet: FakeKubelet) -> None:
        super().__init__(kubelet.pod_resources_socket)
        self.times = 0
        self.seen: set[str] = set()
        self.news = News()

    async def listing(self, timeout_s: float = 5.0) -> Listing:
        found = await super().listing(timeout_s)
        self.times += 1
        self.seen.update(name for _, name in found.pods)
        self.news.tell()
        return found


@contextlib.contextmanager
def stopped_clock() -> Iterator[None]:
    """No timer of the loop ends: what rests does so until the test is given up."""
    loop, task, late = asyncio.get_running_loop(), asyncio.current_task(), threading.Event()
    assert task is not None
    now_s = loop.time()

    def give_up() -> None:
        late.set()
        loop.call_soon_threadsafe(task.cancel)

    timer = threading.Timer(MOST_S, give_up)
    timer.start()
    try:
        with mock.patch.object(loop, "time", lambda: now_s):
            yield
    except asyncio.CancelledError:
        if not late.is_set():
            raise
        task.uncancel()
        raise AssertionError(f"something waits for a timer: not done within {MOST_S:g} s") from None
    finally:
        timer.cancel()


@contextlib.asynccontextmanager
async def _running(room: Room, kubelet: FakeKubelet, pods: Asked) -> AsyncIterator[None]:
    """Follow what kubelet lists, polling it practically never."""
    sysfs, containers = SysFs(room.folder / "none"), ContainerTable(layouts())
    witness = PodWitness(PodCgroups(sysfs), containers, kubelet.plugins_folder, frozenset({"n"}))
    holders = HolderReconciler(
        room.agent, pods, witness, lambda: (), kubelet.plugins_folder, Revision(), lambda: 3600.0, DRIVER, room.cdi
    )
    task = asyncio.create_task(holders.lead())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        pods.close()


async def test_each_change_of_the_checkpoint_is_followed_by_a_list_without_any_rest(folder: Path) -> None:
    """A pod that is listed for less time than a rest would take was never seen, and what it held stayed held for as
    long as that of a pod that is still to come."""
    async with claim_room(folder / "room", CPUS) as room, FakeKubelet(folder / "kubelet") as kubelet:
        pods = Asked(kubelet)
        async with _running(room, kubelet, pods):
            await pods.news.until(lambda: pods.times)
            with stopped_clock():
                for number in range(5):
                    name, asked = f"p{number}", pods.times
                    await kubelet.admit_pod("ns", name, {"main": {}})
                    await pods.news.until(lambda name=name: name in pods.seen)
                    assert pods.times > asked
                    await kubelet.delete_pod("ns", name)
