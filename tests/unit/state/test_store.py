"""The ledger's file: what was saved is there, whatever happens to the process, the disk or the file itself."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import ADOPTED, CONFIRMED, GRANTED, REDUCED, RELEASED, Change
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.errors import StateError
from nodeagent.state import layout as ledgerlayout
from nodeagent.state import store as store_of
from nodeagent.state.store import FILE, LOCK, Store


def grant_of(number: int) -> Grant:
    """A grant that has a bit of everything."""
    return Grant(
        id=f"g-{number:04d}",
        holder=Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/cpu", namespace="ns", pod=f"p{number}", container="c"),
        ids=(f"cpu{number}",),
        cpus=CpuSet([number]),
        hugepages=(Pages(node=1, page_bytes=2 << 20, pages=number + 1),),
        memory=((0, 4096 + number),),
        devices=("0000:3b:00.0",),
        shares=("/dev/fuse",),
        granted_at=1e9 + number / 8,
        confirmed=bool(number % 2),
        boot_id="b",
    )


def granted(*numbers: int) -> list[Change]:
    return [Change(action=GRANTED, grant=grant_of(number)) for number in numbers]


def filled(folder: Path, count: int = 40) -> tuple[Grant, ...]:
    """A closed ledger with some grants, each saved on its own."""
    with contextlib.closing(Store(folder)) as store:
        for number in range(count):
            store.save(granted(number), op="op", at=number)
        return store.load()


def reopened(folder: Path) -> tuple[str, tuple[Grant, ...]]:
    """The note and the grants of a ledger opened again, which must take another grant."""
    with contextlib.closing(Store(folder)) as store:
        before = store.load()
        store.save(granted(999), op="again", at=1)
        assert grant_of(999) in store.load()
        store.save([Change(action=RELEASED, grant=grant_of(999))], op="again", at=1)
        return store.note, before


def asides(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".damaged-" in path.name)


def audit(folder: Path) -> list[tuple[str, str, str]]:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        return db.execute("SELECT action, op, grant_id FROM audit ORDER BY seq").fetchall()


# What is saved


def test_everything_in_a_grant_comes_back(folder: Path) -> None:
    """Also a claim's, and one that holds nothing."""
    empty = Grant(id="e", holder=Holder(api=CLAIM, uid="1234"))
    with contextlib.closing(Store(folder)) as store:
        store.save([*granted(0, 1, 63), Change(action=ADOPTED, grant=empty)], op="op", at=1)
    assert reopened(folder) == ("", (empty, grant_of(0), grant_of(1), grant_of(63)))


def test_every_change_is_in_the_audit_in_order(folder: Path) -> None:
    """With the operation that it belongs to; a grant that changes is still one grant."""
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1, 2), op="a", at=1)
        store.save(
            [Change(action=CONFIRMED, grant=grant_of(1)), Change(action=REDUCED, grant=grant_of(2))], op="b", at=2
        )
        store.save([Change(action=RELEASED, grant=grant_of(1))], op="c", at=3)
        assert store.load() == (grant_of(2),)
    lines = [("granted", "a", 1), ("granted", "a", 2), ("confirmed", "b", 1), ("reduced", "b", 2), ("released", "c", 1)]
    assert audit(folder) == [(action, op, grant_of(number).id) for action, op, number in lines]


def test_old_lines_of_the_audit_are_forgotten_and_grants_are_not(folder: Path) -> None:
    """prune goes by the time of the line alone."""
    with contextlib.closing(Store(folder)) as store:
        for at in (1.0, 2.0, 3.0):
            store.save(granted(int(at)), op="op", at=at)
        assert store.prune(2.5) == 2
        assert len(store.load()) == 3
    assert [grant for _, _, grant in audit(folder)] == [grant_of(3).id]


def test_a_save_that_fails_half_way_changes_nothing(folder: Path) -> None:
    """The second change cannot be written."""
    bad = Change(action=GRANTED, grant=Grant(id="bad", holder=Holder(api=CLAIM, resource=None)))  # type: ignore[arg-type]
    with contextlib.closing(Store(folder)) as store:
        with pytest.raises(StateError, match=r"cannot save .*ledger\.db: NOT NULL constraint failed"):
            store.save([*granted(1), bad], op="op", at=1)
        assert store.load() == ()
        store.save(granted(2), op="op", at=2)
        assert store.load() == (grant_of(2),)
    assert len(audit(folder)) == 1


def test_what_was_saved_outlives_kill_9(folder: Path) -> None:
    """The process dies the moment that save returns, with the file open."""
    program = """
import os, signal, sys
from pathlib import Path
from nodeagent.core.ledger.ledger import Change
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.state.store import Store
Store(Path(sys.argv[1])).save([Change(action="granted", grant=Grant(id="g", holder=Holder(api="claim")))], op="", at=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", program, str(folder)], timeout=30, check=False)
    assert child.returncode == -signal.SIGKILL
    assert [grant.id for grant in reopened(folder)[1]] == ["g"]


@pytest.mark.parametrize("seed", range(30))
def test_a_power_cut_takes_no_grant_and_is_no_loss(seed: int, folder: Path, tmp_path: Path) -> None:
    """Of what follows the last flush of the journal, the disk has a part; releases alone are not flushed. Whatever was
    granted and not released is held, what was released may be held again, and the file is whole."""
    rng, held, maybe, flushes = random.Random(seed), set[int](), set[int](), list[str]()
    journal = folder / f"{FILE}-wal"
    with contextlib.closing(Store(folder)) as store:
        store._db.set_trace_callback(lambda line: flushes.append(line) if line.endswith("= FULL") else None)
        flushed_bytes = journal.stat().st_size
        for number in range(rng.randint(1, 40)):
            released = rng.sample(sorted(held), rng.randint(0, len(held)))
            given = [number] if rng.random() < 0.5 or not released else []
            before = len(flushes)
            freed = [Change(action=RELEASED, grant=grant_of(one)) for one in released]
            store.save([*freed, *granted(*given)], op="op", at=number)
            held, maybe = held - set(released) | set(given), maybe | set(released)
            assert (len(flushes) > before) is bool(given), "releases alone wait for no disk, grants do"
            if given:
                maybe, flushed_bytes = set(), journal.stat().st_size
        place = tmp_path / "after"
        place.mkdir()
        for name in (FILE, LOCK):
            (place / name).write_bytes((folder / name).read_bytes())
        kept = journal.read_bytes()[: rng.randint(flushed_bytes, journal.stat().st_size)]
        (place / journal.name).write_bytes(kept)
    with contextlib.closing(Store(place)) as store:
        assert (store.loss, store.note) == ("", "")
        assert held <= {int(one.id[2:]) for one in store.load()} <= held | maybe


# Damage found at the start


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_is_read_right_or_moved_aside_and_never_read_wrong(seed: int, folder: Path) -> None:
    """Random bytes at random places, pieces overwritten, the end cut off."""
    before = filled(folder)
    chance, path = random.Random(seed), folder / FILE
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 4, 64])):
        at = chance.randrange(len(content))
        content[at : at + chance.choice([1, 16, 600])] = chance.randbytes(chance.choice([1, 16]))
    path.write_bytes(content[: chance.randrange(len(content))] if seed % 3 == 0 else content)
    note, found = reopened(folder)
    assert (found, bool(note)) in ((before, False), ((), True))
    for name in asides(folder)[:1]:
        assert f"cannot use {path}: " in note
        assert f"moved to {folder / name}, a new ledger is begun" in note


@pytest.mark.parametrize("what", ["cut", "bytes", "gone", "garbage"])
@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_journal_costs_the_newest_saves_at_most(what: str, seed: int, folder: Path) -> None:
    """What a dead process left: the grants found are the first so many, each as it was saved."""
    living, dead = folder / "living", folder / "dead"
    with contextlib.closing(Store(living)) as store:
        for number in range(30):
            store.save(granted(number), op="op", at=number)
        before = store.load()
        dead.mkdir()
        for suffix in ("", "-wal"):
            (dead / (FILE + suffix)).write_bytes((living / (FILE + suffix)).read_bytes())
    chance, journal = random.Random(seed), dead / f"{FILE}-wal"
    content = bytearray(journal.read_bytes())
    if what == "gone":
        journal.unlink()
    elif what == "cut":
        journal.write_bytes(content[: chance.randrange(len(content))])
    else:
        at = chance.randrange(len(content))
        content[at : at + 8] = chance.randbytes(8)
        journal.write_bytes(chance.randbytes(999) if what == "garbage" else content)
    _, found = reopened(dead)
    assert found == before[: len(found)]


def write_garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 1000)


def write_foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE grants (id TEXT)")


def write_bad_text(path: Path) -> None:
    filled(path.parent, 1)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE grants SET body = CAST(x'fffe' AS TEXT)")
        db.commit()


def write_lie(path: Path) -> None:
    """A body that is good in itself and not what was saved."""
    filled(path.parent, 1)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("""UPDATE grants SET body = replace(body, '"cpus":"0"', '"cpus":"7"')""")
        db.commit()


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (write_garbage, "file is not a database"),
        (write_foreign, "table grants already exists"),
        (write_bad_text, "Could not decode to UTF-8"),
        (write_lie, "cannot read ledger.db, grant g-0000: its checksum is wrong"),
        (Path.mkdir, "unable to open database file"),
        (os.mkfifo, ""),
    ],
)
def test_what_cannot_be_a_ledger_is_moved_aside_and_named(put: Callable[[Path], None], why: str, folder: Path) -> None:
    """And nothing of it is lost: it lies alongside the new one."""
    put(folder / FILE)
    note, found = reopened(folder)
    assert found == ()
    assert note.startswith(f"cannot use {folder / FILE}: ")
    assert why in note
    assert f"moved to {folder / asides(folder)[0]}" in note


def test_a_folder_in_the_place_of_the_journal_is_moved_aside(folder: Path) -> None:
    """With the file that it belongs to."""
    (folder / f"{FILE}-wal").mkdir()
    note, found = reopened(folder)
    assert found == ()
    assert [name for name in asides(folder) if f"{name.removesuffix('-wal')}, a new" in note and name.endswith("-wal")]


def test_files_moved_aside_never_replace_each_other(folder: Path) -> None:
    """Three within one second, by one process."""
    for number in range(3):
        (folder / FILE).write_bytes(b"no ledger %d" % number * 999)
        reopened(folder)
    assert {(folder / name).read_bytes()[:11] for name in asides(folder)} == {b"no ledger %d" % n for n in range(3)}


def test_an_empty_file_is_an_empty_ledger(folder: Path) -> None:
    """It holds nothing that could be moved aside."""
    (folder / FILE).touch()
    assert reopened(folder) == ("", ())


def test_a_file_without_a_layout_gets_the_newest(folder: Path) -> None:
    """user_version 0 is what a file has before the first migration."""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("VACUUM")
    filled(folder, 2)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (ledgerlayout.NEWEST,)


def test_a_migration_that_was_cut_off_is_begun_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one transaction: the half that failed is not there."""
    (layout, *_) = ledgerlayout.LAYOUTS
    cut = replace(layout, up=layout.up + "CREATE TABLE grants (id TEXT);")
    monkeypatch.setattr(ledgerlayout, "LAYOUTS", (cut,))
    with pytest.raises(StateError, match="table grants already exists"):
        Store(folder)
    monkeypatch.setattr(ledgerlayout, "LAYOUTS", (layout,))
    assert reopened(folder) == ("", ())


# Who else is there


def test_two_agents_hear_of_each_others_decisions(folder: Path) -> None:
    """As during a rolling upgrade: each begins its turn with the news."""
    with contextlib.closing(Store(folder)) as old, contextlib.closing(Store(folder)) as new:
        assert old.news([]) is None
        old.save(granted(1), op="op", at=1)
        assert old.news(map(grant_of, (1,))) is None
        assert new.news([]) == (grant_of(1),)
        assert new.news(map(grant_of, (1,))) is None
        new.save(granted(2), op="op", at=2)
        assert old.news(map(grant_of, (1,))) == (grant_of(1), grant_of(2))


def test_only_one_agent_has_the_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits, and says so where it has to wait for too long."""
    monkeypatch.setattr(store_of, "TURN_S", 0.05)
    with contextlib.closing(Store(folder)) as one, contextlib.closing(Store(folder)) as other:
        assert one.try_begin()
        assert not other.try_begin()
        with pytest.raises(StateError, match=rf"cannot lock {folder / LOCK}: another nodeagent has had it"):
            other.save(granted(1), op="op", at=1)
        one.end()
        other.save(granted(1), op="op", at=1)


@pytest.mark.parametrize("first", ["old", "new"])
def test_two_agents_agree_after_the_file_was_lost(folder: Path, first: str) -> None:
    """The one that decides next puts it back, and the other one goes on with that."""
    with contextlib.closing(Store(folder)) as old, contextlib.closing(Store(folder)) as new:
        old.save(granted(1), op="op", at=1)
        assert new.news([]) == (grant_of(1),)
        (folder / FILE).unlink()
        one, other = (old, new) if first == "old" else (new, old)
        one.save(granted(2), op="op", at=2)
        assert other.news(map(grant_of, (1,))) == (grant_of(1), grant_of(2))
        other.save(granted(3), op="op", at=3)
        assert one.news(map(grant_of, (1, 2))) == tuple(map(grant_of, (1, 2, 3)))
    assert reopened(folder) == ("", tuple(map(grant_of, (1, 2, 3))))


def test_two_agents_agree_after_the_file_was_damaged(folder: Path) -> None:
    """One begins it again with all that is held, and the other one goes on with that."""
    with contextlib.closing(Store(folder)) as old, contextlib.closing(Store(folder)) as new:
        old.save(granted(1), op="op", at=1)
        assert new.news([]) == (grant_of(1),)
        with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
            db.execute("DROP TABLE grants")
        assert new.news([grant_of(1)]) is None
        new.save(granted(2), op="op", at=2, held=[grant_of(1)])
        assert "replaced by a new file" in new.note
        assert old.news([grant_of(1)]) == (grant_of(1), grant_of(2))
        assert old.note == ""


def test_who_opens_a_damaged_file_beside_an_agent_soon_has_what_that_one_knows(folder: Path) -> None:
    """The one that was there puts its own back, and not a copy of the damage."""
    with contextlib.closing(Store(folder)) as old:
        for number in range(1, 41):
            old.save(granted(number), op="op", at=number)
        old._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        old._db.execute("PRAGMA shrink_memory")
        file = folder / FILE
        file.write_bytes(file.read_bytes()[:4096] + b"\xa5" * (file.stat().st_size - 4096))
        with contextlib.closing(Store(folder)) as new:
            assert "cannot use" in new.note and new.load() == ()
            held = tuple(grant_of(number) for number in range(1, 41))
            assert old.news(held) is None
            assert "replaced by a new file with all grants" in old.note
            assert new.news([]) == held
            new.save(granted(41), op="op", at=41)
            assert old.news(held) == (*held, grant_of(41))


def test_a_transaction_of_an_admin_makes_a_save_fail_and_the_next_one_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sqlite3 ledger.db 'BEGIN IMMEDIATE' and gone for coffee."""
    monkeypatch.setattr(store_of, "BUSY_TIMEOUT_MS", 20)
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1), op="op", at=1)
        with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as admin:
            admin.execute("BEGIN IMMEDIATE")
            with pytest.raises(StateError, match=r"cannot save .*: database is locked"):
                store.save(granted(2), op="op", at=2)
            assert store.load() == (grant_of(1),)
        store.save(granted(2), op="op", at=2)
        assert store.load() == (grant_of(1), grant_of(2))


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_state_folder_that_is_none_is_said_to_be(place: str, folder: Path) -> None:
    """Not a traceback."""
    (folder / "state").touch()
    where = folder / "state" if place == "a file" else folder / "state" / "deeper"
    with pytest.raises(StateError, match=rf"cannot use state folder {where}: "):
        Store(where)


# The disk


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; the test is skipped where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No room left, until the context is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextlib.contextmanager
def no_growing(folder: Path) -> Iterator[None]:
    """No file may grow: works without rights and on every file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / f"{FILE}-wal").stat().st_size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_full(folder: Path, full: Callable[[Path], contextlib.AbstractContextManager[None]]) -> None:
    """A save on a full disk fails with its reason and changes nothing; with room again the next one is good."""
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1), op="op", at=1)
        with full(folder):
            for _ in range(3):
                with pytest.raises(StateError, match=rf"cannot save {folder / FILE}: "):
                    store.save(granted(*range(2, 60)), op="op", at=2)
                assert store.load() == (grant_of(1),)
        store.save(granted(3), op="op", at=3)
        assert store.note == ""
    assert reopened(folder) == ("", (grant_of(1), grant_of(3)))


def test_a_full_disk_fails_a_save_and_nothing_is_half_there(folder: Path) -> None:
    """A small file system, filled to the last block."""
    with mounted(folder, "size=512k") as small:
        check_full(small, full_disk)


def test_a_limit_on_file_sizes_fails_a_save_and_nothing_is_half_there(folder: Path) -> None:
    """As a full disk, seen by another error."""
    check_full(folder, no_growing)


def test_a_disk_that_is_full_at_the_start_is_said_and_moves_nothing_aside(folder: Path) -> None:
    """The ledger is whole: it only has to wait."""
    with mounted(folder, "size=512k") as small:
        before = filled(small, 3)
        with full_disk(small), pytest.raises(StateError, match=r"cannot open .*(full|disk I/O error)"):
            Store(small)
        assert reopened(small) == ("", before)
        assert asides(small) == []


def test_a_read_only_disk_is_said(folder: Path) -> None:
    """Neither moved aside nor begun again."""
    with mounted(folder, "size=1m"):
        before = filled(folder)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(StateError, match=rf"cannot use state folder {folder}: Read-only file system"):
            Store(folder)
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        assert reopened(folder) == ("", before)


# What happens to an open file


@pytest.mark.parametrize("lost", ["folder", "file", "journal", "index", "replaced"])
def test_a_file_that_is_lost_while_open_is_put_back_with_the_next_save(lost: str, folder: Path) -> None:
    """With every grant and the audit."""
    state = folder / "state"
    with contextlib.closing(Store(state)) as store:
        store.save(granted(1), op="op", at=1)
        if lost == "folder":
            state.rename(folder / "gone")
        else:
            (state / (FILE + {"journal": "-wal", "index": "-shm"}.get(lost, ""))).unlink()
        if lost == "replaced":
            write_garbage(state / FILE)
        store.save(granted(2), op="op", at=2)
        assert f"{state / FILE} was removed or replaced" in store.note
        # What is there now is what a process that starts after kill -9 finds.
        after = folder / "after"
        after.mkdir()
        for suffix in ("", "-wal"):
            (after / (FILE + suffix)).write_bytes((state / (FILE + suffix)).read_bytes())
    assert reopened(after) == ("", (grant_of(1), grant_of(2)))
    assert [op for _, op, _ in audit(after)][:2] == ["op", "op"]


def test_nothing_is_saved_while_something_is_in_the_way_of_a_lost_folder(folder: Path) -> None:
    """Each try says so; when it is gone, everything is put back."""
    state = folder / "state"
    with contextlib.closing(Store(state)) as store:
        store.save(granted(1), op="op", at=1)
        state.rename(folder / "gone")
        state.touch()
        for _ in range(3):
            with pytest.raises(StateError, match=rf"cannot use state folder {state}: File exists"):
                store.save(granted(2), op="op", at=2)
        assert store.load() == (grant_of(1),)
        state.unlink()
        store.save(granted(2), op="op", at=2)
    assert reopened(state) == ("", (grant_of(1), grant_of(2)))


def test_a_file_that_is_damaged_while_open_is_begun_anew_with_all_that_is_held(folder: Path) -> None:
    """The agent knows what is held; the damaged file is kept aside."""
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1, 2), op="op", at=1)
        with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
            db.execute("DROP TABLE grants")
        store.save([Change(action=RELEASED, grant=grant_of(2)), *granted(3)], op="op", at=2, held=map(grant_of, (1, 2)))
        assert "no such table: grants" in store.note
        assert asides(folder)[0] in store.note
    assert reopened(folder) == ("", (grant_of(1), grant_of(3)))


def test_bodies_are_plain_json_that_an_admin_can_query(folder: Path) -> None:
    """Columns and body say the same."""
    filled(folder, 1)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        pod, cpus, body = db.execute("SELECT pod, cpus, body FROM grants").fetchone()
    assert (pod, cpus) == (json.loads(body)["pod"], json.loads(body)["cpus"]) == ("p0", "0")
