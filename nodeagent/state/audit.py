"""The audit in the ledger file: what happened to each grant, who or what caused it, what was refused, and what else
happened on the node: health of devices, configuration, drift of cgroups.

An entry about a grant is written in the transaction of its decision. A refusal or happening changes nothing and is
written afterwards. Kubelet repeats a call that was refused, and a device may fail again and again: equal ones within
REPEAT_S are one entry that counts them, and only the newest MOST_REFUSALS and MOST_HAPPENINGS entries are kept.

Reasons, refusals and happenings have tables of their own that belong to no layout. A build that does not know them
ignores them, so an older build that starts during a rollback takes nothing away from a newer one that is still running.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import msgspec

from nodeagent.core.ledger.ledger import Change
from nodeagent.core.model.grant import Grant, describe
from nodeagent.errors import StateError
from nodeagent.state import grant_json as storedgrant

COUNTED, REFUSED = "counted", "refused"
"""Action of an entry without a grant, which only records how far the ledger has counted; of a refusal."""
LEDGER = "ledger"
"""Action that admins see of an entry without a grant."""
REPEAT_S = 3600.0
"""For how long after a refusal an equal one is counted with it."""
WHOLE, RECREATED = "ledger-whole", "ledger-recreated"
"""Ops of entries without a grant."""
_COUNTED_WHY = {
    WHOLE: "it was found to have every decision in force",
    RECREATED: "the file was damaged and replaced while nothing was held",
}
HEALTH, CONFIGURATION, DRIFT = "health", "configuration", "drift"
"""Actions of happenings."""
MOST_REFUSALS = MOST_HAPPENINGS = 1000
MOST_CHARACTERS = 2000
"""Length of the longest text of a refusal or happening; the rest is cut off."""
_COUNTED_COLUMNS = (
    "id INTEGER PRIMARY KEY, first_at REAL NOT NULL, at REAL NOT NULL, times INTEGER NOT NULL, op TEXT NOT NULL"
)
_TABLES = {
    "audit_reasons": "seq INTEGER PRIMARY KEY, why TEXT NOT NULL",
    "refusals": f"{_COUNTED_COLUMNS}, holder TEXT NOT NULL, want TEXT NOT NULL, why TEXT NOT NULL",
    "happenings": f"{_COUNTED_COLUMNS}, action TEXT NOT NULL, what TEXT NOT NULL, why TEXT NOT NULL",
}
"""Columns by table."""
_NEWEST = """
SELECT at, at, 1, action, op, grant_id, holder, body, coalesce(why, ''), seq
    FROM audit LEFT JOIN audit_reasons USING (seq)
UNION ALL SELECT at, first_at, times, ?1, op, '', holder, want, why, id FROM refusals
UNION ALL SELECT at, first_at, times, action, op, '', '', what, why, id FROM happenings
ORDER BY 1 DESC, 10 DESC LIMIT ?2
"""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """What was refused to whom, and why. `want` is what was requested, in words."""

    holder: str
    want: str
    why: str


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """What happened on the node that is no decision. action: one of the above; what: to what, and what."""

    action: str
    what: str
    why: str = ""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry as admins see it. Times are in seconds since the epoch."""

    at: float
    first_at: float
    """Of refusals that were counted together, the time of the first."""
    times: int
    action: str
    op: str
    grant: str
    """Id of the grant, "" for a refusal."""
    holder: str
    what: str
    """What is held, or what was requested."""
    why: str
    number: int = 0
    """Its place among all decisions about grants: what the ledger contained follows from them in this order. 0 for
    anything else."""
    held: Grant | None = None
    """The grant as the decision left it, or, if it was released, as it was; None if the entry is about no grant."""


# ---------------------------------------------------------------- writing


def add_tables(db: sqlite3.Connection) -> None:
    """Create what an audit needs in addition to the layout."""
    for name, columns in _TABLES.items():
        db.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns}) STRICT")


def add(db: sqlite3.Connection, number: int, change: Change, body: str, *, op: str, at: float) -> None:
    """Write the entry of a change under its number. body: the grant as stored."""
    grant = change.grant
    _insert(db, number, at, change.action, op, grant.id, str(grant.holder), body)
    if change.why:
        db.execute("INSERT OR REPLACE INTO audit_reasons VALUES (?, ?)", (number, change.why))


def add_counted(db: sqlite3.Connection, number: int, *, op: str, at: float) -> None:
    """Write an entry without a grant, which records how far the ledger has counted."""
    _insert(db, number, at, COUNTED, op, "", "", "")


def _insert(db: sqlite3.Connection, *values: float | str) -> None:
    db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def add_refusals(db: sqlite3.Connection, refusals: Iterable[Refusal], *, op: str, at: float) -> None:
    """Write refusals, or count them where equal ones are recent. Entries beyond MOST_REFUSALS are deleted."""
    for one in refusals:
        _count(db, "refusals", "holder, want, why", (one.holder, one.want, one.why), op, at)
    _delete_oldest(db, "refusals", MOST_REFUSALS)


def add_happenings(db: sqlite3.Connection, happenings: Iterable[Happening], *, at: float) -> None:
    """Write what happened, or count it where equal ones are recent. Entries beyond MOST_HAPPENINGS are deleted."""
    for one in happenings:
        _count(db, "happenings", "action, what, why", (one.action, one.what, one.why), "", at)
    _delete_oldest(db, "happenings", MOST_HAPPENINGS)


def _count(db: sqlite3.Connection, table: str, columns: str, texts: Iterable[str], op: str, at: float) -> None:
    """Write an entry with three texts, or count it if an equal one is recent."""
    short = tuple(map(_short, texts))
    equal = f"({columns}) = (?, ?, ?) AND at > ?"
    count = f"UPDATE {table} SET at = ?, times = times + 1, op = ? WHERE {equal}"  # noqa: S608 - our own text
    if not db.execute(count, (at, op, *short, at - REPEAT_S)).rowcount:
        db.execute(f"INSERT INTO {table} VALUES (NULL, ?, ?, 1, ?, ?, ?, ?)", (at, at, op, *short))  # noqa: S608


def _delete_oldest(db: sqlite3.Connection, table: str, most: int) -> None:
    oldest = f"SELECT id FROM {table} ORDER BY at DESC, id DESC LIMIT -1 OFFSET ?"  # noqa: S608 - our own text
    db.execute(f"DELETE FROM {table} WHERE id IN ({oldest})", (most,))  # noqa: S608


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def prune(db: sqlite3.Connection, before: float) -> int:
    """Delete entries older than `before` (seconds since the epoch). Return how many entries about grants."""
    # The newest entry stays: its number shows how far the ledger has counted.
    gone = db.execute("DELETE FROM audit WHERE at < ? AND seq < (SELECT max(seq) FROM audit)", (before,)).rowcount
    db.execute("DELETE FROM audit_reasons WHERE seq NOT IN (SELECT seq FROM audit)")
    for table in ("refusals", "happenings"):
        db.execute(f"DELETE FROM {table} WHERE at < ?", (before,))  # noqa: S608 - our own text
    return gone


# ---------------------------------------------------------------- reading


def newest(path: Path, most: int) -> list[AuditEntry]:
    """Return the newest entries of a ledger file that may be in use, oldest first. Raise StateError if it cannot be
    read. most: the highest number of entries, -1 for all."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            _stand_in(db)
            found = db.execute(_NEWEST, (REFUSED, most)).fetchall()
    except sqlite3.Error as error:
        raise StateError(f"cannot read {path}: {error}") from None
    return [_entry(row, str(path)) for row in reversed(found)]


def _stand_in(db: sqlite3.Connection) -> None:
    """Let empty tables stand in for those that a file of an older build lacks; the file stays as it is."""
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    for name in _TABLES.keys() - there:
        db.execute(f"CREATE TEMP TABLE {name} ({_TABLES[name]}) STRICT")


def _entry(row: tuple[float, float, int, str, str, str, str, str, str, int], source: str) -> AuditEntry:
    at, first_at, times, action, op, grant, holder, text, why, number = row
    held = storedgrant.read(text, f"{source}, the audit's entry on {grant}") if grant else None
    return AuditEntry(
        at=at,
        first_at=first_at,
        times=times,
        action=LEDGER if action == COUNTED else action,
        op=op,
        grant=grant,
        holder=holder,
        what=describe(held) if held is not None else text,
        why=_COUNTED_WHY.get(op, "") if action == COUNTED else why,
        number=number if grant else 0,
        held=held,
    )
