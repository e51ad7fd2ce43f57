"""The tables of the ledger file, layout by layout, and the migrations between them in both directions.

`PRAGMA user_version` is the layout. A build migrates an older file to its own layout, and stores with each layout the
script that leads back to the previous one. An older build, which cannot know a newer layout, can thus migrate the file
back itself.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nodeagent.errors import LedgerTooNewError, StateError


class LedgerLayout(msgspec.Struct, frozen=True):
    """One layout and the scripts that lead to it and back.

    up: leads from the previous layout to this one. down: leads back without losing anything that the previous layout
    can hold; "" if there is none.
    """

    up: str
    down: str = ""


_FIRST = LedgerLayout(
    """
CREATE TABLE grants (
    id TEXT PRIMARY KEY, resource TEXT NOT NULL, namespace TEXT NOT NULL, pod TEXT NOT NULL, container TEXT NOT NULL,
    cpus TEXT NOT NULL, devices TEXT NOT NULL, granted_at REAL NOT NULL, boot_id TEXT NOT NULL, body TEXT NOT NULL,
    body_crc32 INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, action TEXT NOT NULL, op TEXT NOT NULL, grant_id TEXT NOT NULL,
    holder TEXT NOT NULL, body TEXT NOT NULL
) STRICT;
CREATE INDEX audit_at ON audit (at);
"""
)
LAYOUTS: Sequence[LedgerLayout] = (_FIRST,)
"""LAYOUTS[N] is layout N + 1."""
NEWEST = len(LAYOUTS)
"""The layout that this build writes; it reads 1 to NEWEST."""
_WAYS_BACK = "CREATE TABLE IF NOT EXISTS ways_back (layout INTEGER PRIMARY KEY, script TEXT NOT NULL) STRICT;"
_WAYS_OUT = (
    "start the build that wrote it, or carry the grants over (`nodeagent ledger export` with that build, `nodeagent "
    "ledger import` with this one), or start once with --accept-loss: the file is moved aside and the ledger rebuilt"
)


def migrate(db: sqlite3.Connection, layouts: Sequence[LedgerLayout] | None = None) -> None:
    """Migrate a file to the newest of some layouts (this build's by default), each step entirely or not at all."""
    layouts = LAYOUTS if layouts is None else layouts
    for number in range(_layout(db), len(layouts)):
        layout = layouts[number]
        back = _stored(number + 1, layout.down) if layout.down else ""
        db.executescript(f"BEGIN IMMEDIATE; {layout.up}; {back} PRAGMA user_version = {number + 1}; COMMIT;")


def take_back(db: sqlite3.Connection, path: Path, newest: int | None = None) -> None:
    """Migrate a newer build's file back to layout `newest` (this build's by default), all steps or none.

    Raise LedgerTooNewError if the file does not contain the way back, StateError for a layout that no build writes.
    """
    newest = NEWEST if newest is None else newest
    found = _layout(db)
    if found < 0:
        raise StateError(f"layout {found}, this build reads 1 to {newest}")
    if found <= newest:
        return
    scripts = [_way_back(db, path, number, newest) for number in range(found, newest, -1)]
    forget = f"DELETE FROM ways_back WHERE layout > {newest};"  # noqa: S608 - a number
    try:
        db.executescript(f"BEGIN IMMEDIATE; {';'.join(scripts)}; {forget} PRAGMA user_version = {newest}; COMMIT;")
    except sqlite3.Error as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise _too_new(path, found, newest, f"the way back that it holds fails: {error}") from None


def _stored(number: int, script: str) -> str:
    """Return the statements that store how a layout is migrated back."""
    quoted = script.replace("'", "''")
    return f"{_WAYS_BACK} INSERT OR REPLACE INTO ways_back VALUES ({number}, '{quoted}');"  # noqa: S608 - our own text


def _layout(db: sqlite3.Connection) -> int:
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    return found


def _way_back(db: sqlite3.Connection, path: Path, number: int, newest: int) -> str:
    try:
        found = db.execute("SELECT script FROM ways_back WHERE layout = ?", (number,)).fetchone()
    except sqlite3.OperationalError:
        found = None
    if found is None:
        raise _too_new(path, _layout(db), newest, f"it does not hold the way back from layout {number}")
    return str(found[0])


def _too_new(path: Path, found: int, newest: int, why: str) -> LedgerTooNewError:
    which = f"layout {found}, this build reads 1 to {newest}"
    return LedgerTooNewError(f"cannot open {path}: a newer build wrote it ({which}), and {why}; {_WAYS_OUT}")
