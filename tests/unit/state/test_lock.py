"""Locks between processes: who has one, who gets it next, and what a removed file costs."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.errors import StateError
from nodeagent.state.lock import FileLock

HOLDER = """
import sys
from pathlib import Path
from nodeagent.state.lock import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.try_take(), flush=True)
sys.stdin.read()
"""


def test_a_lock_is_one_processes_until_it_is_killed(folder: Path) -> None:
    """kill -9 leaves nothing behind."""
    path = folder / "lock"
    words = [sys.executable, "-c", HOLDER, str(path)]
    with (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder,
        contextlib.closing(FileLock(path)) as mine,
    ):
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert not mine.try_take() and not mine.held
        holder.kill()
        holder.wait()
        assert mine.try_take() and mine.held


def test_who_lets_go_lets_others_have_it(folder: Path) -> None:
    """Taking it twice is taking it once; letting go of what one has not is nothing."""
    with contextlib.closing(FileLock(folder / "lock")) as one, contextlib.closing(FileLock(folder / "lock")) as other:
        assert one.try_take() and one.try_take()
        other.release()
        assert not other.try_take()
        one.release()
        assert other.try_take()
        assert not one.try_take()


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: path.rename(path.with_name("aside"))])
def test_a_lock_whose_file_was_removed_has_to_be_taken_again(remove: Callable[[Path], object], folder: Path) -> None:
    """The first that comes has it, and the other one can see that."""
    path = folder / "lock"
    with contextlib.closing(FileLock(path)) as one, contextlib.closing(FileLock(path)) as other:
        assert one.try_take()
        remove(path)
        assert not one.is_there()
        assert not other.try_take(make=False) and not path.exists()
        assert other.try_take()
        assert not one.try_take() and not one.held
        other.release()
        assert one.try_take() and one.is_there()


def test_a_lock_is_taken_again_where_its_folder_was_replaced(folder: Path) -> None:
    """Made with its folder, for the owner alone."""
    path = folder / "state" / "lock"
    with contextlib.closing(FileLock(path)) as one:
        assert one.try_take()
        path.unlink()
        path.parent.rmdir()
        assert one.try_take()
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_in_the_way_of_a_lock_is_said(folder: Path) -> None:
    """When it is made, and when it has to be made again; afterwards it can be had."""
    (folder / "file").touch()
    with pytest.raises(StateError, match=r"^cannot use state folder .*/file: "):
        FileLock(folder / "file" / "lock")
    path = folder / "state" / "lock"
    with contextlib.closing(FileLock(path)) as one:
        assert one.try_take()
        path.unlink()
        path.mkdir()
        with pytest.raises(StateError, match=r"^cannot use state folder .*/state: Is a directory"):
            one.try_take()
        path.rmdir()
        assert one.try_take()


async def test_of_many_only_one_has_a_lock(folder: Path) -> None:
    """Handles of one process are as strange to each other as those of two."""
    locks = [FileLock(folder / "lock") for _ in range(20)]
    taken = await asyncio.gather(*(asyncio.to_thread(lock.try_take) for lock in locks))
    assert sum(taken) == 1
    for lock in locks:
        lock.close()


def test_a_lock_may_be_closed_twice(folder: Path) -> None:
    """The second time it closes nothing: its number may belong to another file by then."""
    lock = FileLock(folder / "lock")
    lock.close()
    with (folder / "other").open("w") as other:
        lock.close()
        other.write("x")
