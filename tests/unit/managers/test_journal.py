"""What becomes of a record of what the agent has changed: killed agents, full disks, damaged files, reboots, and
newer versions.

The files of all users: `test_record_files.py`. What a manager makes of an empty record is tested with the manager.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.errors import HostError
from nodeagent.host.sysfs import atomic_file, record_file
from nodeagent.host.sysfs.record_file import LARGEST_BYTES, RecordFile, set_aside
from nodeagent.managers.journal import Journal

LEFT = "things stay as they are"
GARBAGE = b'{"boot_id": "b'


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    things: dict[str, int] = {}


def journal(folder: Path, boot_id: str) -> Journal[_File, str, int]:
    """Return the journal of an agent that has just started."""
    return Journal(
        RecordFile(folder / "things.json", _File),
        lambda file: file.things if file.boot_id == boot_id else {},
        lambda things: _File(boot_id=boot_id, things=dict(things)),
        unreadable="things-unreadable",
        left=LEFT,
    )


class KilledError(BaseException):
    """kill -9: nothing of the agent runs from here on, no handler either."""


class Disk:
    """What files are written with; it fails at one of its operations."""

    def __init__(self, at: int, failure: BaseException) -> None:
        self.at, self.failure = at, failure
        self.count, self.failed = 0, False

    def _around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            dead = self.failed and isinstance(self.failure, KilledError)
            if self.count == self.at or dead:
                self.failed = True
                raise self.failure
            return work(*args, **kwargs)

        return done

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        places = [(os, "fsync"), (os, "fchmod"), (Path, "rename"), (Path, "replace"), (Path, "unlink")]
        places.append((tempfile, "mkstemp"))
        with contextlib.ExitStack() as stack:
            for place, name in places:
                stack.enter_context(mock.patch.object(place, name, self._around(getattr(place, name))))
            yield


def harmed(path: Path, how: str, at: int) -> None:
    """Damage a file of a power cut, a bad disk or an editor. at: where, of anything."""
    content = path.read_bytes()
    at %= len(content) or 1
    match how:
        case "truncated":
            path.write_bytes(content.rstrip()[:at])
        case "flipped":
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 + at % 255)]) + content[at + 1 :])
        case "garbage":
            path.write_bytes(GARBAGE * at + b"\xff")
        case "deep":
            path.write_bytes(b'{"new": ' + b"[" * 100_000)
        case "newer":
            path.write_bytes(content.replace(b'{"boot_id"', b'{"version": 7, "boot_id"', 1))
        case "huge":
            path.write_bytes(content.rstrip()[:-1] + b" " * LARGEST_BYTES + b"}")
        case "folder":
            path.unlink()
            path.mkdir()


keys, places = st.sampled_from("abc"), st.integers(0, 60)
acts = st.tuples(st.sampled_from(["keep", "forget"]), keys, st.integers(0, 9))
faults = st.one_of(st.none(), st.tuples(st.sampled_from(["killed", "full"]), st.integers(1, 7)))
harms = st.sampled_from(["truncated", "flipped", "garbage", "deep", "newer", "huge", "folder"])
events = st.one_of(
    st.tuples(acts, faults),
    st.tuples(acts, faults),
    st.tuples(harms, places),
    st.tuples(st.just("rebooted"), st.none()),
    st.tuples(st.just("deleted"), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=12))
def test_a_record_is_the_old_or_the_new_one_and_a_damaged_file_is_reported_and_set_aside(history: list[Any]) -> None:
    """Each event meets an agent that has just started, so nothing is remembered but the file."""
    with tempfile.TemporaryDirectory(prefix="na-") as name:
        folder, boot = Path(name) / "state", 0
        path, known = folder / "things.json", dict[str, int]()
        for what, detail in history:
            now = journal(folder, f"boot-{boot}")
            if isinstance(what, tuple):
                known = acted(now, known, what, detail)
            elif what == "rebooted":
                boot, known = boot + 1, {}
            elif what == "deleted":
                path.unlink(missing_ok=True)
                known = {}
            elif path.exists():
                harmed(path, what, detail)
                known = found_after(now, known, what)
            assert journal(folder, f"boot-{boot}").read() == known


def acted(
    now: Journal[_File, str, int], known: dict[str, int], act: tuple[str, str, int], fault: tuple[str, int] | None
) -> dict[str, int]:
    """Record something, with a failure of the disk or of the agent; return what is recorded then."""
    what, key, value = act
    after = {**known, key: value} if what == "keep" else {one: n for one, n in known.items() if one != key}
    kind, at = fault or ("", 0)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    disk = Disk(at, KilledError() if kind == "killed" else full)
    try:
        with disk.failing():
            now.keep({key: value}) if what == "keep" else now.forget(key)
    except HostError as error:
        assert kind == "full" and str(error).startswith("cannot ") and str(error).endswith(": No space left on device")
    except KilledError:
        assert kind == "killed"
    else:
        assert not disk.failed
        return after
    found = dict(now.read())
    assert found in (known, after)
    for left in atomic_file.drafts(now.path.parent, "things.json"):
        left.unlink()
    return found


def found_after(now: Journal[_File, str, int], known: dict[str, int], harm: str) -> dict[str, int]:
    """Read a damaged file, and record something in its place; return what is recorded then."""
    with capture_logs() as logs:
        found = dict(now.read())
        assert found == now.read()
    assert all(isinstance(key, str) and type(value) is int for key, value in found.items())
    if harm == "newer":
        assert (found, logs) == (known, [])
    elif harm not in ("flipped", "truncated") or logs:  # without its last byte it is whole
        (line,) = logs
        assert (line["event"], line["log_level"], line["left"]) == ("things-unreadable", "error", LEFT)
        assert line["error"].startswith(f"cannot read {now.path}: ") and not found
    if harm == "folder":
        with pytest.raises(HostError, match=f"cannot write {now.path}: Is a directory"):
            now.keep({"a": 1})
        now.path.rmdir()
    damaged = now.path.read_bytes() if logs and harm != "folder" else None
    before = set(set_aside(now.path.parent))
    with capture_logs() as logs:
        now.keep({"z": 1})
    if damaged is None:
        assert (set_aside(now.path.parent), logs) == (sorted(before), [])
    else:
        (name,) = {*set_aside(now.path.parent)} - before
        assert (now.path.parent / name).read_bytes() == damaged
        (line,) = logs
        assert (line["event"], line["log_level"]) == ("record-set-aside", "error")
        assert line["file"] == str(now.path.parent / name) and line["error"].startswith(f"cannot read {now.path}: ")
    return {**found, "z": 1}


STEPS_OF_A_SAVE = 7


@pytest.mark.parametrize("what", ["keep", "forget"])
@pytest.mark.parametrize("at", range(1, STEPS_OF_A_SAVE + 1))
@pytest.mark.parametrize("failure", [KilledError(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_nothing_of_a_damaged_file_is_lost_at_any_step(
    tmp_path: Path, what: str, at: int, failure: BaseException
) -> None:
    """It is where it was, or aside; a failure to keep it is the caller's, who does not act then."""
    now = journal(tmp_path, "boot")
    now.path.write_bytes(GARBAGE)
    disk = Disk(at, failure)
    with contextlib.suppress(KilledError, HostError), disk.failing():
        now.keep({"a": 1}) if what == "keep" else now.forget("a")
    places = [tmp_path / one for one in (now.path.name, *set_aside(tmp_path)) if (tmp_path / one).exists()]
    assert [one.read_bytes() for one in places].count(GARBAGE) == 1
    now.keep({"a": 2})
    assert journal(tmp_path, "boot").read() == {"a": 2}
    assert [(tmp_path / one).read_bytes() for one in set_aside(tmp_path)] == [GARBAGE]


def test_what_two_agents_record_at_once_is_all_recorded(tmp_path: Path) -> None:
    """Each of them reads the file, changes it and replaces it: the second one waits for the first."""
    one, two = journal(tmp_path, "boot"), journal(tmp_path, "boot")
    other, arrived, lock = threading.Thread(target=lambda: two.keep({"b": 2})), threading.Event(), fcntl.flock

    def locked(handle: int, how: int) -> None:
        try:
            lock(handle, how)
        except BlockingIOError:
            arrived.set()
            raise

    def change(known: Mapping[str, int]) -> Mapping[str, int]:
        other.start()
        while other.is_alive() and not arrived.wait(0.01):
            pass
        return {**known, "a": 1}

    with mock.patch.object(fcntl, "flock", locked):
        one.change(change)
        other.join()
    assert one.read() == {"a": 1, "b": 2}


def test_an_agent_that_keeps_the_lock_makes_recording_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "PATIENCE_S", 0.05)
    late = journal(tmp_path, "boot")
    with (
        RecordFile(tmp_path / "others.json", list[str]).alone(),
        pytest.raises(HostError, match="another agent has it"),
    ):
        late.keep({"a": 1})
    late.keep({"b": 2})
    assert late.read() == {"b": 2}


def test_what_cannot_be_set_aside_is_not_replaced(tmp_path: Path) -> None:
    now = journal(tmp_path, "boot")
    now.path.write_bytes(GARBAGE)
    failing = mock.patch.object(Path, "rename", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS)))
    with failing, pytest.raises(HostError, match=f"^cannot set aside {now.path}: Read-only file system$"):
        now.keep({"a": 1})
    assert now.path.read_bytes() == GARBAGE


# ---------------------------------------------------------------- a good file that cannot be read for the moment


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Every open fails with EMFILE."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_record_that_cannot_be_read_for_the_moment_is_neither_set_aside_nor_replaced(tmp_path: Path) -> None:
    """Only what has been read and makes no sense is damaged."""
    journal(tmp_path, "b1").keep({"a": 1})
    late = journal(tmp_path, "b1")
    with no_descriptors(), pytest.raises(HostError, match="Too many open files"):
        late.keep({"b": 2})
    assert set_aside(tmp_path) == []
    assert late.read() == {"a": 1}
    late.keep({"b": 2})
    assert journal(tmp_path, "b1").read() == {"a": 1, "b": 2}


def test_one_failed_read_is_enough_to_act_on_nothing(tmp_path: Path) -> None:
    """Also where the file can be read again a moment later."""
    journal(tmp_path, "b1").keep({"a": 1})
    late, opened = journal(tmp_path, "b1"), Path.open
    failures = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def once(path: Path, *args: Any, **kwargs: Any) -> Any:
        for error in failures:
            raise error
        return opened(path, *args, **kwargs)

    with mock.patch.object(Path, "open", once), pytest.raises(HostError, match="Input/output error"):
        late.keep({"b": 2})
    assert late.read() == {"a": 1}
