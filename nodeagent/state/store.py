"""The ledger's durable form: one SQLite file, a transaction for the decisions that wait together, on disk before they
take effect.

Promises: what `save` returned from survives kill -9, and a power cut too (WAL, synchronous=FULL), except that releases
alone may have to be found again then. A save that fails changes nothing. A damaged file is moved aside and reported; it
is never deleted and never stops the agent. A file of a newer build is left as it is. A file that is removed while open
is restored before the next decision; one that is damaged while open is replaced by one with everything that is held. A
ledger that may lack decisions says so (`loss`) until it is rebuilt, across restarts too. Two processes may have it
open, as during a rolling upgrade: each decides in its turn, under a lock, after learning what the other has decided.
Every call blocks; `Store` is used from one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from nodeagent.core.ledger.ledger import ADOPTED, RELEASED, Change
from nodeagent.core.model.grant import Grant
from nodeagent.errors import LedgerTooNewError, StateError
from nodeagent.state import audit
from nodeagent.state import file_identity as files
from nodeagent.state import grant_json as storedgrant
from nodeagent.state.audit import Happening, Refusal
from nodeagent.state.layout import migrate, take_back
from nodeagent.state.lock import FileLock
from nodeagent.state.mark import LedgerMark, Mark
from nodeagent.telemetry import metrics

T = TypeVar("T")
FILE, LOCK = "ledger.db", "ledger.lock"
_REPLACED = "the ledger file was damaged and replaced while it was held"
BUSY_TIMEOUT_MS = 2000
TURN_S, TURN_POLL_S = 20.0, 0.005
"""How long another process may take for its turn, and how often to check whether it is over."""

_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_IOERR_SHORT_READ,
    }
)
"""Result codes that concern a file's content, not the disk, the folder or a lock (sqlite.org/rescode.html)."""


class Entry(NamedTuple):
    """What one decision changes. at: seconds since the epoch."""

    changes: Sequence[Change]
    op: str
    at: float


class Store:
    """An open ledger file."""

    def __init__(self, folder: Path, *, accept_loss: bool = False) -> None:
        """Open or create the ledger in a folder.

        accept_loss: move a file of a newer build aside. Raise StateError if the folder cannot be used or is in use,
        LedgerTooNewError if a newer build wrote the file and `accept_loss` is not set.
        """
        self.path = folder / FILE
        self.note = ""
        """What was wrong with the file, or ""."""
        self.loss = ""
        """Why the ledger may lack decisions; "" if it is whole."""
        self.fresh = False
        """Whether there was neither a ledger nor any trace of one."""
        self._accept_loss = accept_loss
        self._lock = FileLock(folder / LOCK)
        self._mark = LedgerMark(self._lock)
        try:
            with self._turn():
                existed = self.path.exists()
                self._db = self._open()
                self._seq, self._version = _last_seq(self._db), _version(self._db)
                self._judge(existed)
        except BaseException:
            self._lock.close()
            raise
        self._files = self._identities()
        self._folder: tuple[int, ...] | None = None

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        self._lock.close()

    def load(self) -> tuple[Grant, ...]:
        """Return all grants in order of id. Raise StateError if one cannot be read."""
        with self._said("load"):
            return tuple(_grants(self._db, str(self.path)))

    def never_had(self, claims: Iterable[str]) -> list[str]:
        """Return the UIDs of those claims that have neither a grant nor an audit entry. Raise StateError on failure."""
        grant = "SELECT 1 FROM grants WHERE id >= ?1 || '-' AND id < ?1 || '.'"
        line = "SELECT 1 FROM audit WHERE grant_id >= ?1 || '-' AND grant_id < ?1 || '.'"
        with self._said("load"):
            return [
                uid
                for uid in sorted(claims)
                if not self._db.execute(f"{grant} UNION ALL {line} LIMIT 1", (uid,)).fetchone()
            ]

    def never_had_of_pods(self, given: Mapping[str, Set[tuple[str, str]]]) -> list[str]:
        """Return the UIDs of those pods to which kubelet gave something that no grant has, and that no audit entry of
        the device plugin's grants names. given: (resource, id) pairs by UID. Raise StateError on failure."""
        held = {(grant.holder.resource, one) for grant in self.load() for one in grant.ids}
        named = "SELECT 1 FROM audit WHERE grant_id GLOB 'g-*' AND instr(body, ?) LIMIT 1"
        with self._said("load"):
            lacking = sorted(uid for uid, parts in given.items() if not parts <= held)
            return [uid for uid in lacking if not self._db.execute(named, (uid,)).fetchone()]

    # ---------------------------------------------------------------- completeness

    def _judge(self, existed: bool) -> None:
        """Determine at start whether the file has every decision that was made."""
        mark = self._mark.read()
        self.fresh = mark is None and not existed and not self.note
        if self.note:
            self._lose(self.note)
        elif mark is not None and mark.loss:
            self._lose(mark.loss)
        elif mark is not None and mark.newest > self._seq:
            metrics.LEDGER_REPLACED.inc()
            made = f"ends with decision {self._seq} although {mark.newest} were made"
            self._lose(f"{self.path} {made}: it is an older copy")
        else:
            self._mark.write(Mark(newest=self._seq))

    def lose(self, why: str) -> None:
        """Record that the ledger may lack decisions, until it is found whole. Raise StateError on failure."""
        with self._turn():
            metrics.LEDGER_REPLACED.inc()
            self._lose(why)

    def found_whole(self) -> None:
        """Record that every decision in force is in the ledger. Raise StateError if that fails."""
        with self._turn(), self._said("save"):
            self._write([Entry((), audit.WHOLE, time.time())])
            self._mark.write(Mark(newest=self._seq))
            self.loss = ""

    def _lose(self, why: str) -> None:
        self.loss = why
        self._mark.write(Mark(newest=max(self._seq, (self._mark.read() or Mark()).newest), loss=why))

    # ---------------------------------------------------------------- turns

    def try_begin(self) -> bool:
        """Begin a turn unless another process has one: until `end` no other process changes anything."""
        return self._lock.try_take()

    def begin(self) -> None:
        """Begin a turn. Raise StateError if another process does not end its own within TURN_S."""
        until = time.monotonic() + TURN_S
        while not self._lock.try_take():
            if time.monotonic() > until:
                raise StateError(f"cannot lock {self._lock.path}: another nodeagent has had it for {TURN_S:g} s")
            time.sleep(TURN_POLL_S)

    def end(self) -> None:
        """End the turn."""
        self._lock.release()

    def news(self, held: Iterable[Grant]) -> tuple[Grant, ...] | None:
        """Return all grants if another process changed any since the last look, else None. Only in a turn.

        held: every grant that this process knows, in case the file turns out to be damaged.
        """
        with self._said("load"):
            try:
                self._put_back()
                self._compare()
                version = _version(self._db)
                if version == self._version:
                    return None
                grants = tuple(_grants(self._db, str(self.path)))
            except (sqlite3.DatabaseError, StateError) as error:
                if isinstance(error, sqlite3.Error) and not _damaged(error):
                    raise
                self._replace_damaged(str(error), held, time.time())
                return None
            self._version, self._seq = version, _last_seq(self._db)
            return grants

    def _compare(self) -> None:
        """Learn from the mark what another process found out about the ledger, and whether it lacks a decision."""
        mark = self._mark.read()
        if mark is None:
            return
        last = max(self._seq, _last_seq(self._db))
        if mark.newest > last and not mark.loss:
            metrics.LEDGER_REPLACED.inc()
            self._lose(f"{self.path} ends with decision {last} although {mark.newest} were made")
        else:
            self.loss = mark.loss

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold a turn, unless one has already begun."""
        if self._lock.held:
            yield
            return
        self.begin()
        try:
            yield
        finally:
            self.end()

    # ---------------------------------------------------------------- changes

    def save(self, changes: Sequence[Change], *, op: str, at: float, held: Iterable[Grant] = ()) -> None:
        """Make the changes of one decision durable, like `save_all`. at: seconds since the epoch."""
        self.save_all([Entry(changes, op, at)], held=held)

    def save_all(self, entries: Sequence[Entry], *, held: Iterable[Grant] = ()) -> None:
        """Make decisions durable in one transaction, all or none. Raise StateError, with nothing changed, if that
        fails.

        held: every grant before the changes, in case the file turns out to be damaged.
        """
        entries = [one for one in entries if one.changes]
        if not entries:
            return
        with self._turn(), self._said("save"), metrics.LEDGER_WRITE_SECONDS.time():
            try:
                self._put_back()
                self._write(entries)
            except (sqlite3.DatabaseError, StateError) as error:
                if isinstance(error, sqlite3.Error) and not _damaged(error):
                    raise
                self._replace_damaged(str(error), held, entries[0].at)
                self._write(entries)

    def record_refusals(self, refusals: Iterable[Refusal], *, op: str, at: float) -> None:
        """Write to the audit what was refused. Raise StateError if that fails. at: seconds since the epoch."""
        self._record("save", lambda db: audit.add_refusals(db, refusals, op=op, at=at))

    def record_happenings(self, happenings: Iterable[Happening], *, at: float) -> None:
        """Write to the audit what happened, like refusals. It survives kill -9 at once, and a power cut from the next
        decision on: no decision waits for it on the disk."""
        self._record("save", lambda db: audit.add_happenings(db, happenings, at=at), synced=False)

    def prune(self, before: float) -> int:
        """Delete audit entries older than `before` (seconds since the epoch). Return how many about grants."""
        return self._record("prune", lambda db: audit.prune(db, before))

    def _record(self, verb: str, change: Callable[[sqlite3.Connection], T], *, synced: bool = True) -> T:
        """Change the audit alone, in a transaction of its own."""
        with self._turn(), self._said(verb):
            self._put_back()
            with self._transaction(synced=synced) as db:
                return change(db)

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool) -> Iterator[sqlite3.Connection]:
        """Make changes all or none. synced: they are on the disk at the end; otherwise with the next that are."""
        self._db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        with self._db as db:
            db.execute("BEGIN IMMEDIATE")
            yield db

    def _put_back(self) -> None:
        """Restore the file if it or its folder was removed or replaced: the open file still has everything."""
        # The folder shows whether a check is needed. Reading the timestamps of a file that is written all the time
        # makes each fsync of it a third slower (multigrain timestamps, Linux 6.13).
        folder = files.folder_stamp(self.path.parent)
        if folder is not None and folder == self._folder:
            return
        if self._identities() != self._files:
            newer = self._newer()
            if newer is None:
                self._write_again()
            else:
                self._take(newer)
        self._folder = folder

    def _newer(self) -> sqlite3.Connection | None:
        """Return the file now at the path if another process put it there and has decided more since, else None."""
        # Another process would not have put a file next to journals of the open file.
        if not self.path.is_file() or set(self._identities()) & set(self._files):
            return None
        try:
            db = self._connect()
        except (sqlite3.Error, StateError):
            return None
        if _last_seq(db) > self._seq:
            return db
        db.close()
        return None

    def _take(self, db: sqlite3.Connection) -> None:
        """Continue with another file."""
        old, self._db = self._db, db
        self._files, self._version = self._identities(), -1
        old.close()

    def _write_again(self) -> None:
        # A journal on its own has to go too: it does not belong to the fresh file.
        metrics.LEDGER_REPLACED.inc()
        aside = f"; what lay there is now {self._move_aside()}" if any(self._identities()) else ""
        fresh = self._connect()
        try:
            self._db.backup(fresh)
            _check(fresh)
        except BaseException:
            fresh.close()
            raise
        self._take(fresh)
        self._version = _version(fresh)
        mark = self._mark.read()
        if not self.loss and mark is not None and mark.newest <= self._seq:
            # A process that found nothing here and began a new file was wrong: this process has every decision.
            self._mark.write(Mark(newest=self._seq))
        self.note = f"{self.path} was removed or replaced while it was in use: it was written again{aside}"

    def _replace_damaged(self, why: str, held: Iterable[Grant], at: float) -> None:
        """Replace a damaged file by a new one with everything that is held."""
        metrics.LEDGER_REPLACED.inc()
        self._db.close()
        aside = self._move_aside()
        self._db = self._open()
        missed = (self._mark.read() or Mark()).newest > self._seq
        held_still = [Change(action=ADOPTED, grant=grant, why=_REPLACED) for grant in held]
        self._write([Entry(held_still, audit.RECREATED, at)])
        self._files, self._version = self._identities(), _version(self._db)
        self.note = f"cannot use {self.path}: {why}; moved to {aside}, replaced by a new file with all grants"
        if missed:
            self._lose(f"{self.note}; another agent had decided more")

    def _identities(self) -> tuple[tuple[int, int] | None, ...]:
        """Return which files are at the ledger's paths; all of them exist while it is open."""
        return tuple(files.identity(one) for one in self._places())

    def _places(self) -> list[Path]:
        """Return the paths of the file and its journals."""
        return [self.path.with_name(FILE + suffix) for suffix in ("", "-wal", "-shm")]

    def _write(self, entries: Sequence[Entry]) -> None:
        synced = {change.action for one in entries for change in one.changes} != {RELEASED}
        with self._transaction(synced=synced):
            # A replacement file continues counting from the newest decision of any process: of two files, the one that
            # counted further knows more.
            last = max(self._seq, _last_seq(self._db), (self._mark.read() or Mark()).newest)
            for changes, op, at in entries:
                for change in changes:
                    last, body = last + 1, storedgrant.write(change.grant)
                    self._apply(change, body)
                    audit.add(self._db, last, change, body, op=op, at=at)
            if last > _last_seq(self._db):
                # No change was written, so nothing else records how far it has counted: any copy of an earlier file
                # would appear newer.
                audit.add_counted(self._db, last, op=entries[-1].op, at=entries[-1].at)
        self._seq = last
        # The decision is made: a mark that lags behind is weaker evidence, not an error. One that is ahead of the disk
        # would be taken for a loss after a power cut.
        if synced:
            with contextlib.suppress(StateError):
                self._mark.advance(last)

    def _apply(self, change: Change, body: str) -> None:
        grant = change.grant
        if change.action == RELEASED:
            self._db.execute("DELETE FROM grants WHERE id = ?", (grant.id,))
            return
        holder = grant.holder
        self._db.execute(
            "INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                grant.id,
                holder.resource,
                holder.namespace,
                holder.pod,
                holder.container,
                str(grant.cpus),
                ",".join((*grant.devices, *grant.shares)),
                grant.granted_at,
                grant.boot_id,
                body,
                zlib.crc32(body.encode()),
            ),
        )

    def _open(self) -> sqlite3.Connection:
        """Open the file; if it is unusable, move it aside and start a new one."""
        try:
            return self._connect()
        except LedgerTooNewError as error:
            if not self._accept_loss:
                raise
            self.note = f"{error}; moved to {self._move_aside()} as its loss is accepted, a new ledger is begun"
        except (sqlite3.DatabaseError, StateError) as error:
            if not self._unusable(error):
                raise StateError(f"cannot open {self.path}: {error}") from None
            metrics.LEDGER_REPLACED.inc()
            self.note = f"cannot use {self.path}: {error}; moved to {self._move_aside()}, a new ledger is begun"
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise StateError(f"cannot open {self.path}: {error}") from None

    def _connect(self) -> sqlite3.Connection:
        """Open and check the file, and migrate it to the newest layout."""
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            take_back(db, self.path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            _check(db)
            migrate(db)
            audit.add_tables(db)
            tuple(_grants(db, FILE))
        except BaseException:
            db.close()
            raise
        return db

    def _unusable(self, error: Exception) -> bool:
        """Return whether the file at the path can never be opened, so that moving it aside helps."""
        if not isinstance(error, sqlite3.OperationalError) or _damaged(error):
            return True
        return any(one.exists() and not one.is_file() for one in self._places())

    def _move_aside(self) -> Path:
        """Rename the file and its journals. Return the new name of the file."""
        name = f"{FILE}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        names = [name, *(f"{name}-{number}" for number in range(1, 1000))]
        target = next(one for one in map(self.path.with_name, names) if not os.path.lexists(one))
        for one in self._places():
            with contextlib.suppress(FileNotFoundError):
                one.rename(one.with_name(one.name.replace(FILE, target.name, 1)))
        files.sync_folder(self.path.parent)
        return target

    @contextlib.contextmanager
    def _said(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"cannot {verb} {self.path}: {error}") from None


def read_only(folder: Path) -> tuple[Grant, ...]:
    """Return all grants of a ledger that may be in use, in order of id. Raise StateError if they cannot be read."""
    path = folder / FILE
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            return tuple(_grants(db, str(path)))
    except sqlite3.Error as error:
        raise StateError(f"cannot read {path}: {error}") from None


def _grants(db: sqlite3.Connection, source: str) -> Iterator[Grant]:
    """Yield all grants in order of id. Raise StateError if one differs from what was written."""
    for one, body, crc32 in db.execute("SELECT id, body, body_crc32 FROM grants ORDER BY id"):
        if zlib.crc32(body.encode()) != crc32:
            raise StateError(f"cannot read {source}, grant {one}: its checksum is wrong")
        grant = storedgrant.read(body, f"{source}, grant {one}")
        if grant.id != one:
            raise StateError(f"cannot read {source}, grant {one}: it says that it is {grant.id}")
        yield grant


def _check(db: sqlite3.Connection) -> None:
    """Raise StateError if the file is damaged."""
    if (verdict := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise StateError(f"it is damaged: {verdict}")


def _damaged(error: Exception) -> bool:
    """Return whether an error concerns the file's content. One without a code is Python's own, for text that is not
    UTF-8."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return isinstance(error, sqlite3.OperationalError)
    return code in _DAMAGE or code & 0xFF in _DAMAGE


def _last_seq(db: sqlite3.Connection) -> int:
    """Return the number of the newest audit entry, or 0 if there is none."""
    return int(db.execute("SELECT coalesce(max(seq), 0) FROM audit").fetchone()[0])


def _version(db: sqlite3.Connection) -> int:
    """Return a number that changes if another process changes the file (sqlite.org/pragma.html#pragma_data_version)."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])
