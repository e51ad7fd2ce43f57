"""systemd is told of each slice what is in force there, and of each change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.systemd.units import SOCKET
from nodeagent.managers.pinning import slices as slicetelling
from nodeagent.managers.pinning.slices import SliceNotifier
from tests.doubles.systemd import FakeSystemd

IN_TIME_S = 10.0


class InForce:
    """What is in force, changed by the test."""

    def __init__(self) -> None:
        self.news = Revision()
        self.now: dict[str, CpuSet] = {}
        self._asked = Revision()

    def put(self, **slices: str) -> None:
        self.now = {f"kubepods.slice/kubepods-{pod}.slice": CpuSet.parse(cpus) for pod, cpus in slices.items()}
        self.news.bump()

    def slices(self) -> dict[str, CpuSet]:
        self._asked.bump()
        return dict(self.now)

    async def asked_twice(self) -> None:
        """Return when it was asked what is in force, and then again."""
        for _ in range(2):
            await self._asked.changed(self._asked.value)

    async def unchanged(self, path: str, tell: Callable[[str, CpuSet], None]) -> None:
        if path in self.now:
            await asyncio.to_thread(tell, path, self.now[path])


@contextlib.asynccontextmanager
async def telling(root: Path) -> AsyncIterator[tuple[InForce, FakeSystemd]]:
    in_force = InForce()
    async with FakeSystemd(root / SOCKET) as systemd:
        task = asyncio.create_task(SliceNotifier(in_force, SysFs(root)).run())
        try:
            async with asyncio.timeout(IN_TIME_S):
                yield in_force, systemd
        finally:
            task.cancel()
            await asyncio.wait({task})


async def test_every_slice_is_told_and_told_again_when_it_changes(tmp_path: Path) -> None:
    async with telling(tmp_path) as (in_force, systemd):
        in_force.put(pod1="2-7", pod2="2-7")
        await systemd.until_told("kubepods-pod1.slice", {2, 3, 4, 5, 6, 7})
        await systemd.until_told("kubepods-pod2.slice", {2, 3, 4, 5, 6, 7})
        in_force.put(pod1="2-7", pod2="4-7")
        await systemd.until_told("kubepods-pod2.slice", {4, 5, 6, 7})
        assert len(systemd.told) == 3


async def test_new_slices_come_before_changes_of_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd is about to start the first container in them."""
    async with telling(tmp_path) as (in_force, systemd):
        in_force.put(pod1="2-7", pod2="2-7")
        await systemd.until_told("kubepods-pod2.slice", {2, 3, 4, 5, 6, 7})
        in_force.put(pod1="4-7", pod2="4-7", pod3="4-7")
        await systemd.until_told("kubepods-pod2.slice", {4, 5, 6, 7})
        assert [unit for unit, _ in systemd.told[2:]] == [f"kubepods-pod{n}.slice" for n in (3, 1, 2)]


async def test_a_slice_that_systemd_does_not_have_is_said_once_and_costs_the_others_nothing(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with telling(tmp_path) as (in_force, systemd):
            systemd.refusal = "Unit not found."
            in_force.put(pod1="2-7")
            await systemd.news.wait()
            systemd.refusal = ""
            in_force.put(pod1="2-7", pod2="2-7")
            await systemd.until_told("kubepods-pod2.slice", {2, 3, 4, 5, 6, 7})
    assert [one["event"] for one in logs] == ["slice-not-told"]


async def test_a_systemd_that_is_away_is_told_when_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicetelling, "RETRY_S", 0.01)
    with capture_logs() as logs:
        async with telling(tmp_path) as (in_force, systemd):
            in_force.put(pod1="2-7")
            await systemd.until_told("kubepods-pod1.slice", {2, 3, 4, 5, 6, 7})
            socket, aside = tmp_path / SOCKET, tmp_path / "aside"
            socket.rename(aside)
            in_force.put(pod1="4-7")
            await in_force.asked_twice()
            aside.rename(socket)
            await systemd.until_told("kubepods-pod1.slice", {4, 5, 6, 7})
    assert {one["event"] for one in logs} == {"systemd-not-told"}


async def test_where_there_is_no_systemd_nobody_is_told(tmp_path: Path) -> None:
    async with asyncio.timeout(IN_TIME_S):
        await SliceNotifier(InForce(), SysFs(tmp_path)).run()
