"""A ledger's file that is not whole: an older copy, a lost one, a newer build's. It is noticed, shown, remembered."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import GRANTED, RELEASED, Change
from nodeagent.errors import LedgerTooNewError
from nodeagent.state import layout as ledgerlayout
from nodeagent.state.layout import LedgerLayout, migrate, take_back
from nodeagent.state.leader import LOCK as LEADER
from nodeagent.state.lock import FileLock
from nodeagent.state.store import FILE, LOCK, Store
from nodeagent.telemetry.metrics import REGISTRY
from tests.unit.state.test_store import filled, grant_of, granted


def loss(folder: Path) -> str:
    with contextlib.closing(Store(folder)) as store:
        return store.loss


def copied(folder: Path, name: str = "copy") -> Path:
    """A copy of the closed ledger, as a backup has it."""
    return Path(shutil.copy(folder / FILE, folder / name))


def garbage(folder: Path) -> None:
    (folder / FILE).write_bytes(b"no ledger" * 999)


def truncated(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:2048])


def emptied(folder: Path) -> None:
    (folder / FILE).write_bytes(b"")


def removed(folder: Path) -> None:
    (folder / FILE).unlink()


def replaced() -> float:
    """The metric `nodeagent_ledger_replaced_total`."""
    return REGISTRY.get_sample_value("nodeagent_ledger_replaced_total") or 0.0


@pytest.mark.parametrize("lose", [garbage, truncated, emptied, removed])
def test_each_loss_of_a_ledger_is_counted_once(lose: Callable[[Path], None], folder: Path) -> None:
    """A loss that is known from before, as after a restart, is not counted again."""
    filled(folder, 5)
    before = replaced()
    lose(folder)
    loss(folder)
    assert replaced() == before + 1
    loss(folder)
    assert replaced() == before + 1


@pytest.mark.parametrize("lose", [garbage, removed])
def test_a_ledger_that_is_replaced_while_it_is_open_is_counted_once(lose: Callable[[Path], None], folder: Path) -> None:
    filled(folder, 5)
    with contextlib.closing(Store(folder)) as store:
        held, before = store.load(), replaced()
        for one in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
            (folder / one).unlink()
        if lose is garbage:
            garbage(folder)
        for number in (7, 8):
            store.save(granted(number), op="o", at=1, held=held)
    assert replaced() == before + 1


@pytest.mark.parametrize("lose", [garbage, truncated, emptied, removed])
def test_a_ledger_that_was_lost_is_not_taken_for_a_new_one(lose: Callable[[Path], None], folder: Path) -> None:
    """Also after a restart, and until an agent finds it whole."""
    filled(folder, 5)
    assert loss(folder) == ""
    lose(folder)
    first = loss(folder)
    assert first != ""
    assert loss(folder) == first
    with contextlib.closing(Store(folder)) as store:
        assert not store.fresh
        store.save(granted(7), op="o", at=1)
        assert store.loss == first
        store.found_whole()
    assert loss(folder) == ""


def test_an_older_copy_is_told_from_the_ledger_that_it_replaces(folder: Path) -> None:
    """It is a good file; only the lock file knows that more was decided."""
    filled(folder, 3)
    copy = copied(folder)
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(3), op="o", at=9)
    shutil.move(copy, folder / FILE)
    for journal in folder.glob(f"{FILE}-*"):
        journal.unlink()
    assert loss(folder) == f"{folder / FILE} ends with decision 3 although 4 were made: it is an older copy"


def test_a_first_start_has_lost_nothing(folder: Path) -> None:
    """Neither a ledger nor any trace of one."""
    with contextlib.closing(Store(folder)) as store:
        assert (store.fresh, store.loss) == (True, "")
    with contextlib.closing(Store(folder)) as store:
        assert (store.fresh, store.loss) == (False, "")


def test_a_ledger_of_the_version_before_is_whole(folder: Path) -> None:
    """It left an empty lock file; and it may go on counting after this version has been rolled back."""
    filled(folder, 3)
    (folder / LOCK).write_bytes(b"")
    assert loss(folder) == ""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db, db:
        db.execute("INSERT INTO audit VALUES (9, 1.0, 'granted', 'o', 'g', 'h', '{}')")
    assert loss(folder) == ""


def test_a_copy_from_before_a_loss_is_noticed_also_when_nothing_was_held_after_it(folder: Path) -> None:
    """The new file holds nothing, and counts on from where the old one was."""
    filled(folder, 5)
    copy = copied(folder)
    (folder / FILE).unlink()
    with contextlib.closing(Store(folder)) as store:
        assert store.loss
        store.found_whole()
        store.save(granted(9), op="o", at=2)
    assert loss(folder) == ""
    shutil.copy(copy, folder / FILE)
    assert "it is an older copy" in loss(folder)


def test_it_is_known_which_claims_a_ledger_never_had(folder: Path) -> None:
    """Neither what it holds nor what it has released; a copy from before a grant never had it."""
    uid, other, third = (f"6f4929bc-484a-4e6b-bfa5-a5fea530e88{n}" for n in range(3))
    grants = [replace(grant_of(1), id=f"{one}-0") for one in (uid, other)]
    with contextlib.closing(Store(folder)) as store:
        empty = copied(folder)
        store.save([Change(action=GRANTED, grant=one) for one in grants], op="o", at=1)
        store.save([Change(action=RELEASED, grant=grants[0])], op="o", at=2)
        assert store.never_had([third, uid, other]) == [third]
    (folder / FILE).unlink()
    shutil.copy(empty, folder / FILE)
    with contextlib.closing(Store(folder)) as store:
        assert store.never_had([uid, other, uid[:-1]]) == [uid[:-1], uid, other]


def test_it_is_known_which_pods_of_kubelets_checkpoint_a_ledger_never_had(folder: Path) -> None:
    """What is held counts for its holder of now; a pod whose grant was released is known from the audit, unless all
    that names it there is a claim."""
    held, ended, with_claim, lost = "held", "6f4929bc-ended", "6f4929bc-claimed", "6f4929bc-lost"
    grants = [replace(grant_of(number), id=f"g-{number}") for number in range(2)]
    gone = replace(grants[1], pods=(ended,))
    claimed = replace(grant_of(2), id="8f2d2c1e-0000-4000-8000-000000000001-0", pods=(with_claim,))
    parts = {held: grants[0], ended: gone, with_claim: grants[1], lost: grants[1]}
    given = {uid: frozenset((one.holder.resource, id) for id in one.ids) for uid, one in parts.items()}
    with contextlib.closing(Store(folder)) as store:
        store.save([Change(action=GRANTED, grant=one) for one in (*grants, claimed)], op="o", at=1)
        store.save([Change(action=RELEASED, grant=gone)], op="o", at=2)
        assert store.never_had_of_pods(given) == [with_claim, lost]
        assert store.never_had_of_pods({}) == []


def test_a_ledger_that_was_begun_anew_without_grants_is_whole_at_the_next_start(folder: Path) -> None:
    """It was damaged while it was open, and every grant had been released."""
    filled(folder, 2)
    with contextlib.closing(Store(folder)) as store:
        store.save([Change(action=RELEASED, grant=one) for one in store.load()], op="o", at=2)
        with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
            db.execute("DROP TABLE grants")
        store.begin()
        store.news(())
        store.end()
        assert store.note and not store.loss
    assert loss(folder) == ""


@pytest.mark.parametrize("content", [b"\xff\xfe", b"-1\n", b"12", b"x" * 5000, b"12\nwhy\nmore"])
def test_a_mark_that_makes_no_sense_does_not_stop_the_agent(content: bytes, folder: Path) -> None:
    """The ledger itself is what counts."""
    filled(folder, 12)
    (folder / LOCK).write_bytes(content)
    with contextlib.closing(Store(folder)) as store:
        assert len(store.load()) == 12


def test_forgetting_old_lines_of_the_audit_does_not_look_like_an_older_copy(folder: Path) -> None:
    """The newest line stays, however old it is."""
    filled(folder, 5)
    with contextlib.closing(Store(folder)) as store:
        assert store.prune(1e12) == 4
    assert loss(folder) == ""


def test_an_agent_learns_that_the_other_one_found_the_ledger_incomplete(folder: Path) -> None:
    """And that it is whole again."""
    with contextlib.closing(Store(folder)) as one, contextlib.closing(Store(folder)) as other:
        one.lose("because")
        other.begin()
        other.news(())
        assert other.loss == "because"
        other.found_whole()
        other.end()
        one.begin()
        one.news(())
        one.end()
        assert one.loss == ""


def test_of_two_agents_the_one_that_begins_again_knows_that_the_other_decided_more(folder: Path) -> None:
    """Only one of them notices the damage; what the other had decided last is not in what it writes."""
    with contextlib.closing(Store(folder)) as one, contextlib.closing(Store(folder)) as other:
        one.save(granted(1), op="o", at=1)
        held = one.load()
        other.begin()
        other.news(())
        other.end()
        other.save(granted(2), op="o", at=2)
        with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
            db.execute("DROP TABLE grants")
        one.save(granted(3), op="o", at=3, held=held)
        assert "another agent had decided more" in one.loss


# A newer build's file


def newer(folder: Path, *, back: bool) -> None:
    """As the next version writes it, with a column of its own; `back`: it says how that is undone."""
    filled(folder, 4)
    down = "ALTER TABLE grants DROP COLUMN colour" if back else ""
    layouts = (*ledgerlayout.LAYOUTS, LedgerLayout("ALTER TABLE grants ADD COLUMN colour TEXT", down))
    with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        migrate(db, layouts)
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_ledger_of_the_next_version_is_taken_back_and_forth(folder: Path) -> None:
    """A rollback loses nothing, and neither does the upgrade after it."""
    for _ in range(2):
        newer(folder, back=True)
        with contextlib.closing(Store(folder)) as store:
            assert [one.id for one in store.load()] == [grant_of(number).id for number in range(4)]
            assert store.loss == ""
            store.save([Change(action=RELEASED, grant=grant_of(number)) for number in range(4)], op="o", at=1)


def test_a_newer_ledger_that_cannot_be_taken_back_is_left_alone(folder: Path) -> None:
    """The ways out are named, nothing is moved, nothing is begun."""
    newer(folder, back=False)
    before = (folder / FILE).read_bytes()
    with pytest.raises(LedgerTooNewError) as failure:
        Store(folder)
    said = str(failure.value)
    assert said.startswith(f"cannot open {folder / FILE}: a newer build wrote it (layout 2, this build reads 1 to 1)")
    assert all(way in said for way in ("ledger export", "ledger import", "--accept-loss"))
    assert (folder / FILE).read_bytes() == before
    with contextlib.closing(Store(folder, accept_loss=True)) as store:
        assert "moved to" in store.note and store.loss == store.note
        assert store.load() == ()


def test_a_way_back_that_fails_changes_nothing(folder: Path) -> None:
    """All steps or none."""
    filled(folder, 2)
    with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        for number, down in ((2, "DROP TABLE nowhere"), (3, "DELETE FROM grants")):
            db.execute("CREATE TABLE IF NOT EXISTS ways_back (layout INTEGER PRIMARY KEY, script TEXT NOT NULL) STRICT")
            db.execute("INSERT INTO ways_back VALUES (?, ?)", (number, down))
        db.execute("PRAGMA user_version = 3")
        with pytest.raises(LedgerTooNewError, match="no such table: nowhere"):
            take_back(db, folder / FILE)
        assert db.execute("SELECT count(*) FROM grants").fetchone() == (2,)


def nodeagent(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nodeagent", *words], capture_output=True, text=True, check=False)


def test_the_agent_exits_with_2_and_the_ways_out_instead_of_trying_for_ever(folder: Path) -> None:
    """systemd shows it; --accept-loss is the admin's word."""
    state = folder / "state"
    state.mkdir()
    newer(state, back=False)
    (folder / "config.yaml").write_text(json.dumps({"stateDir": str(state), "runtimeDir": str(folder / "run")}))
    (folder / "sys").mkdir()
    done = nodeagent("run", "--config", str(folder / "config.yaml"), "--root", str(folder))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--accept-loss" in done.stderr


def test_grants_are_carried_from_one_ledger_to_another(folder: Path) -> None:
    """Twice is once; what overlaps is refused whole."""
    old, new, file = folder / "old", folder / "new", folder / "ledger.json"
    for one in (old, new):
        one.mkdir()
    grants = tuple(replace(grant_of(number), devices=(), hugepages=()) for number in range(5))
    with contextlib.closing(Store(old)) as store:
        store.save([Change(action=GRANTED, grant=one) for one in grants], op="o", at=1)
    assert nodeagent("ledger", "export", "--state-dir", str(old), "-o", str(file)).returncode == 0
    assert json.loads(nodeagent("ledger", "export", "--state-dir", str(old)).stdout) == json.loads(file.read_text())
    done = nodeagent("ledger", "import", "--state-dir", str(new), str(file))
    assert (done.returncode, done.stdout) == (0, "5 grants added, 0 were there already\n")
    again = nodeagent("ledger", "import", "--state-dir", str(new), str(file))
    assert again.stdout == "0 grants added, 5 were there already\n"
    with contextlib.closing(Store(new)) as store:
        assert store.load() == grants
        other = replace(grants[0], id="g-other")
        store.save([Change(action=RELEASED, grant=grants[0]), Change(action=GRANTED, grant=other)], op="o", at=1)
    refused = nodeagent("ledger", "import", "--state-dir", str(new), str(file))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"cannot import grant g-0000 of {file}: cannot grant CPUs 0: 0 held by ns/p0/c" in refused.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot read"),
        ("[]", 'expected apiVersion "nodeagent.dev/v1alpha1" and kind "Ledger"'),
        ('{"apiVersion": "nodeagent.dev/v1alpha1", "kind": "Ledger"}', "grants is NoneType, expected a list"),
        ('{"apiVersion": "nodeagent.dev/v1alpha1", "kind": "Ledger", "grants": [{"id": 7}]}', "cannot read"),
    ],
)
def test_what_is_no_export_is_refused_in_one_line(text: str, why: str, folder: Path) -> None:
    (folder / "x.json").write_text(text)
    done = nodeagent("ledger", "import", "--state-dir", str(folder / "s"), str(folder / "x.json"))
    assert done.returncode in (1, 2)
    assert why in done.stderr and done.stderr.count("\n") == 1


def test_nothing_is_imported_under_an_agent_that_runs(folder: Path) -> None:
    """It would not learn of it in time."""
    filled(folder, 1)
    file = folder / "x.json"
    assert nodeagent("ledger", "export", "--state-dir", str(folder), "-o", str(file)).returncode == 0
    lock = FileLock(folder / LEADER)
    assert lock.try_take()
    try:
        done = nodeagent("ledger", "import", "--state-dir", str(folder), str(file))
    finally:
        lock.close()
    assert done.returncode == 1
    assert "an agent uses" in done.stderr


def test_an_import_that_is_refused_leaves_the_ledger_of_a_newer_version_in_its_place(folder: Path) -> None:
    """The agent that runs may be of that version."""
    filled(folder, 1)
    file = folder / "x.json"
    assert nodeagent("ledger", "export", "--state-dir", str(folder), "-o", str(file)).returncode == 0
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA user_version = 99")
    with contextlib.closing(FileLock(folder / LEADER)) as lock:
        assert lock.try_take()
        done = nodeagent("ledger", "import", "--state-dir", str(folder), str(file))
    assert (done.returncode, "an agent uses" in done.stderr) == (1, True)
    assert not [one.name for one in folder.iterdir() if "damaged" in one.name]
