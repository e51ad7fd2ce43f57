"""Waiting for changes: of a number, of an event, of a folder that comes and goes."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.revision import Revision
from nodeagent.aio.unless import unless

LONG_S = 30.0


async def test_a_revision_rises_and_wakes_everyone_who_waits() -> None:
    """What happened before the wait is seen at once."""
    revision = Revision()
    assert await revision.changed(0) == 1
    waiting = [asyncio.create_task(revision.changed(1)) for _ in range(2)]
    await asyncio.wait(waiting, timeout=0)
    revision.bump()
    revision.bump()
    assert await asyncio.gather(*waiting) == [3, 3]
    assert await revision.changed(1) == 3


async def test_work_is_cancelled_and_over_when_the_event_comes_first() -> None:
    """Also its clean-up has run by then."""
    event, steps = asyncio.Event(), []

    async def work() -> int:
        steps.append("begun")
        event.set()
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("cleaned up")
        return 1

    assert await unless(event, work()) is None
    assert steps == ["begun", "cleaned up"]


async def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    """The event may never come."""

    async def work() -> int:
        return 7

    async def broken() -> int:
        raise KeyError("x")

    assert await unless(asyncio.Event(), work()) == 7
    with pytest.raises(KeyError, match="x"):
        await unless(asyncio.Event(), broken())


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "new").touch(),
        lambda folder: (folder / "old").unlink(),
        lambda folder: (folder / "old").rename(folder / "other"),
        shutil.rmtree,
        lambda folder: folder.rename(folder.with_name("elsewhere")),
    ],
    ids=["file-comes", "file-goes", "file-renamed", "folder-goes", "folder-renamed"],
)
async def test_a_change_in_a_folder_wakes(change: Callable[[Path], object], tmp_path: Path) -> None:
    """Long before the poll; also the change made between two waits."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with FolderWatch(folder, poll_s=LONG_S) as watch:
        change(folder)
        async with asyncio.timeout(5):
            await watch.wait()


async def test_a_folder_that_comes_back_is_watched_again(tmp_path: Path) -> None:
    """Twenty times deleted and made, parents and all; each file in it wakes."""
    folder = tmp_path / "a" / "b" / "c"
    with FolderWatch(folder, poll_s=LONG_S) as watch:
        for _ in range(20):
            folder.mkdir(parents=True)
            waiting = asyncio.create_task(_until(watch, (folder / "file").exists))
            (folder / "file").touch()
            async with asyncio.timeout(5):
                await waiting
            shutil.rmtree(tmp_path / "a")
            async with asyncio.timeout(5):
                await _until(watch, lambda: not folder.exists())


async def test_a_folder_re_created_behind_the_watch_s_back_is_watched(tmp_path: Path) -> None:
    """Deleted and re-created between two waits, very likely with the same inode number."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with FolderWatch(folder, poll_s=LONG_S) as watch:
        for _ in range(20):
            folder.rmdir()
            folder.mkdir()
            await watch.wait()
            waiting = asyncio.create_task(_until(watch, (folder / "file").exists))
            await asyncio.wait({waiting}, timeout=0.01)
            (folder / "file").touch()
            async with asyncio.timeout(5):
                await waiting
            (folder / "file").unlink()


async def test_many_changes_wake_once(tmp_path: Path) -> None:
    """The second wait has only the poll left."""
    with FolderWatch(tmp_path, poll_s=0.05) as watch:
        for number in range(100):
            (tmp_path / str(number)).touch()
        await watch.wait()
        loop = asyncio.get_running_loop()
        before = loop.time()
        await watch.wait()
        assert loop.time() - before >= 0.04


async def test_where_inotify_cannot_be_had_the_poll_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file descriptor is free: the log says so, and wait still returns."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with capture_logs() as logged, FolderWatch(tmp_path, poll_s=0.01) as watch:
            await watch.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [(one["event"], one["folder"]) for one in logged] == [("folder-not-watched", str(tmp_path))]


async def _until(watch: FolderWatch, holds: Callable[[], bool]) -> None:
    while not holds():
        await watch.wait()
