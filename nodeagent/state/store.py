"""The ledger's durable form: one SQLite file, one transaction a decision, on disk before anyone acts on it.

Promises: what `save` returned from is there after kill -9 and after a power cut (WAL, synchronous=FULL); a save that
fails changes nothing; a damaged file is moved aside and named, never deleted and never the end of the agent; a file of
a newer build is left as it is; a file that is removed while it is open is put back before the next decision, and one
that is damaged while it is open is replaced by one with all that is held. A ledger that may lack decisions says so
(`loss`) until it is rebuilt, over restarts too. Two processes may have it open, as during a rolling upgrade: each
decides in its turn, under a lock, and learns first what the other has decided.
Every call blocks; `Store` is used from one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from nodeagent.core.ledger.ledger import ADOPTED, RELEASED, Change
from nodeagent.core.model.grant import Grant
from nodeagent.errors import LedgerTooNewError, StateError
from nodeagent.state import grant_json as storedgrant
from nodeagent.state.layout import migrate, take_back
from nodeagent.state.lock import FileLock
from nodeagent.state.mark import LedgerMark, Mark

FILE, LOCK = "ledger.db", "ledger.lock"
COUNTED, WHOLE = "counted", "ledger-whole"
"""Action of an audit line without a grant, which says only how far the ledger has counted; op of such a line."""
BUSY_TIMEOUT_MS = 2000
TURN_S, TURN_POLL_S = 20.0, 0.005
"""How long another process may take for its turn, and how often it is looked whether it is over."""

_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_IOERR_SHORT_READ,
    }
)
"""Results that speak of a file's content rather than of the disk, the folder or a lock (sqlite.org/rescode.html)."""


class Store:
    """An open ledger file."""

    def __init__(self, folder: Path, *, accept_loss: bool = False) -> None:
        """Open or create the ledger in a folder.

        accept_loss: a file of a newer build is moved aside. StateError where the folder cannot be used or is in use,
        LedgerTooNewError where a newer build wrote the file and `accept_loss` is not set."""
        self.path = folder / FILE
        self.note = ""
        """What was wrong with the file found, or ""."""
        self.loss = ""
        """Why the ledger may lack decisions; "": it is whole."""
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
        """All grants in order of id; StateError where one cannot be read."""
        with self._said("load"):
            return tuple(_grants(self._db, str(self.path)))

    def never_had(self, claims: Iterable[str]) -> list[str]:
        """Return those of some claims, by UID, of which the file has neither a grant nor any line of the audit.
        StateError."""
        grant = "SELECT 1 FROM grants WHERE id >= ?1 || '-' AND id < ?1 || '.'"
        line = "SELECT 1 FROM audit WHERE grant_id >= ?1 || '-' AND grant_id < ?1 || '.'"
        with self._said("load"):
            return [
                uid
                for uid in sorted(claims)
                if not self._db.execute(f"{grant} UNION ALL {line} LIMIT 1", (uid,)).fetchone()
            ]

    # ---------------------------------------------------------------- whole or not

    def _judge(self, existed: bool) -> None:
        """Find out at the start whether the file has every decision that was made."""
        mark = self._mark.read()
        self.fresh = mark is None and not existed and not self.note
        if self.note:
            self._lose(self.note)
        elif mark is not None and mark.loss:
            self._lose(mark.loss)
        elif mark is not None and mark.newest > self._seq:
            made = f"ends with decision {self._seq} although {mark.newest} were made"
            self._lose(f"{self.path} {made}: it is an older copy")
        else:
            self._mark.write(Mark(newest=self._seq))

    def lose(self, why: str) -> None:
        """Remember that the ledger may lack decisions, until it is found whole. StateError."""
        with self._turn():
            self._lose(why)

    def found_whole(self) -> None:
        """Every decision that is in force is in the ledger. StateError where that cannot be remembered."""
        with self._turn(), self._said("save"):
            self._write([], WHOLE, time.time())
            self._mark.write(Mark(newest=self._seq))
            self.loss = ""

    def _lose(self, why: str) -> None:
        self.loss = why
        self._mark.write(Mark(newest=max(self._seq, (self._mark.read() or Mark()).newest), loss=why))

    # ---------------------------------------------------------------- turns

    def try_begin(self) -> bool:
        """Begin a turn unless another process is in one: until `end` no other process changes anything."""
        return self._lock.try_take()

    def begin(self) -> None:
        """Begin a turn; StateError where another process does not end its own within TURN_S."""
        until = time.monotonic() + TURN_S
        while not self._lock.try_take():
            if time.monotonic() > until:
                raise StateError(f"cannot lock {self._lock.path}: another nodeagent has had it for {TURN_S:g} s")
            time.sleep(TURN_POLL_S)

    def end(self) -> None:
        """End the turn."""
        self._lock.release()

    def news(self, held: Iterable[Grant]) -> tuple[Grant, ...] | None:
        """All grants, where another process changed any since the last look; None: none did. In a turn. held: every
        grant that this process knows, for a file that turns out to be damaged."""
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
                self._begin_anew(str(error), held, time.time())
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
            self._lose(f"{self.path} ends with decision {last} although {mark.newest} were made")
        else:
            self.loss = mark.loss

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """A turn of its own, unless one has begun."""
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
        """Make changes durable, all or none. StateError: nothing was changed.

        at: seconds since the epoch. held: every grant before the changes, for a file that turns out to be damaged.
        """
        with self._turn(), self._said("save"):
            try:
                self._put_back()
                self._write(changes, op, at)
            except (sqlite3.DatabaseError, StateError) as error:
                if isinstance(error, sqlite3.Error) and not _damaged(error):
                    raise
                self._begin_anew(str(error), held, at)
                self._write(changes, op, at)

    def prune(self, before: float) -> int:
        """Forget audit lines older than a moment (seconds since the epoch); how many."""
        with self._turn(), self._said("prune"):
            self._put_back()
            # The newest line stays: its number says how far the ledger has counted.
            older = "DELETE FROM audit WHERE at < ? AND seq < (SELECT max(seq) FROM audit)"
            return self._db.execute(older, (before,)).rowcount

    def _put_back(self) -> None:
        """Where somebody removed or replaced the file or its folder: what is open still has everything, and goes there
        again."""
        # The folder says whether it is worth looking. To ask for the time of a file that is written all the time makes
        # each fsync of it a third slower (multigrain timestamps, Linux 6.13).
        folder = _stamp(self.path.parent)
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
        """What lies at the path now, where another process put it there and has decided more since."""
        # Beside journals of the file that is open, another process would not have put one.
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
        """Go on with another file."""
        old, self._db = self._db, db
        self._files, self._version = self._identities(), -1
        old.close()

    def _write_again(self) -> None:
        # Also a journal alone has to go: it is not one of the fresh file.
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
            # Whoever found nothing here and began a new file was wrong: this process has every decision.
            self._mark.write(Mark(newest=self._seq))
        self.note = f"{self.path} was removed or replaced while it was in use: it was written again{aside}"

    def _begin_anew(self, why: str, held: Iterable[Grant], at: float) -> None:
        """Put a new file with all that is held in the place of a damaged one."""
        self._db.close()
        aside = self._move_aside()
        self._db = self._open()
        missed = (self._mark.read() or Mark()).newest > self._seq
        self._write([Change(action=ADOPTED, grant=grant) for grant in held], "ledger-begun-anew", at)
        self._files, self._version = self._identities(), _version(self._db)
        self.note = f"cannot use {self.path}: {why}; moved to {aside}, replaced by a new file with all grants"
        if missed:
            self._lose(f"{self.note}; another agent had decided more")

    def _identities(self) -> tuple[tuple[int, int] | None, ...]:
        """Which files lie at the ledger's paths; all of them are there while it is open."""
        return tuple(_identity(one) for one in self._places())

    def _places(self) -> list[Path]:
        """The file and its journals."""
        return [self.path.with_name(FILE + suffix) for suffix in ("", "-wal", "-shm")]

    def _write(self, changes: Iterable[Change], op: str, at: float) -> None:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            # A file begun anew goes on counting, from the newest decision that anyone made: of two files the one that
            # counted further knows more.
            last = max(self._seq, _last_seq(self._db), (self._mark.read() or Mark()).newest)
            for change in changes:
                last, body = last + 1, storedgrant.write(change.grant)
                self._apply(change, body)
                self._audit(last, at, change.action, op, change.grant.id, str(change.grant.holder), body)
            if last > _last_seq(self._db):
                # It holds nothing, so nothing else would say that it has counted so far: any copy of an earlier file
                # would count for newer.
                self._audit(last, at, COUNTED, op)
        self._seq = last
        # The decision is made: a mark that lags behind is weaker evidence, not an error.
        with contextlib.suppress(StateError):
            self._mark.advance(last)

    def _audit(
        self, number: int, at: float, action: str, op: str, grant: str = "", holder: str = "", body: str = ""
    ) -> None:
        self._db.execute(
            "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)", (number, at, action, op, grant, holder, body)
        )

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
        """Open the file; one that cannot be used is moved aside and a new one begun."""
        try:
            return self._connect()
        except LedgerTooNewError as error:
            if not self._accept_loss:
                raise
            self.note = f"{error}; moved to {self._move_aside()} as its loss is accepted, a new ledger is begun"
        except (sqlite3.DatabaseError, StateError) as error:
            if not self._unusable(error):
                raise StateError(f"cannot open {self.path}: {error}") from None
            self.note = f"cannot use {self.path}: {error}; moved to {self._move_aside()}, a new ledger is begun"
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise StateError(f"cannot open {self.path}: {error}") from None

    def _connect(self) -> sqlite3.Connection:
        """Check the file and bring it to the newest layout."""
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            take_back(db, self.path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            _check(db)
            migrate(db)
            for _ in _grants(db, FILE):
                pass
        except BaseException:
            db.close()
            raise
        return db

    def _unusable(self, error: Exception) -> bool:
        """Whether what lies there can never be opened: moving it aside helps."""
        if not isinstance(error, sqlite3.OperationalError) or _damaged(error):
            return True
        return any(one.exists() and not one.is_file() for one in self._places())

    def _move_aside(self) -> Path:
        """Rename the file and its journals; the new name of the file."""
        name = f"{FILE}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        names = [name, *(f"{name}-{number}" for number in range(1, 1000))]
        target = next(one for one in map(self.path.with_name, names) if not os.path.lexists(one))
        for one in self._places():
            with contextlib.suppress(FileNotFoundError):
                one.rename(one.with_name(one.name.replace(FILE, target.name, 1)))
        _sync_folder(self.path.parent)
        return target

    @contextlib.contextmanager
    def _said(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"cannot {verb} {self.path}: {error}") from None


def read_only(folder: Path) -> tuple[Grant, ...]:
    """All grants of a ledger that may be in use, in order of id; StateError where they cannot be read."""
    path = folder / FILE
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            return tuple(_grants(db, str(path)))
    except sqlite3.Error as error:
        raise StateError(f"cannot read {path}: {error}") from None


def _grants(db: sqlite3.Connection, source: str) -> Iterator[Grant]:
    """All grants in order of id; StateError where one is not as it was written."""
    for one, body, crc32 in db.execute("SELECT id, body, body_crc32 FROM grants ORDER BY id"):
        if zlib.crc32(body.encode()) != crc32:
            raise StateError(f"cannot read {source}, grant {one}: its checksum is wrong")
        grant = storedgrant.read(body, f"{source}, grant {one}")
        if grant.id != one:
            raise StateError(f"cannot read {source}, grant {one}: it says that it is {grant.id}")
        yield grant


def _check(db: sqlite3.Connection) -> None:
    """StateError where the file is damaged."""
    verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise StateError(f"it is damaged: {verdict}")


def _damaged(error: Exception) -> bool:
    """Whether an error speaks of the file's content. One without a code is Python's own: text that is not UTF-8."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return isinstance(error, sqlite3.OperationalError)
    return code in _DAMAGE or code & 0xFF in _DAMAGE


def _last_seq(db: sqlite3.Connection) -> int:
    """The number of the newest line of the audit; 0: there is none."""
    found: int = db.execute("SELECT coalesce(max(seq), 0) FROM audit").fetchone()[0]
    return found


def _version(db: sqlite3.Connection) -> int:
    """Another number whenever another process has changed the file (sqlite.org/pragma.html#pragma_data_version)."""
    found: int = db.execute("PRAGMA data_version").fetchone()[0]
    return found


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Which file lies at a path or behind a handle."""
    try:
        found = os.stat(file)  # noqa: PTH116 - a path or a handle
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """What differs when another folder lies at a path, or when an entry of it came, went or was replaced."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
