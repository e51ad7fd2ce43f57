"""Rows of text under headings, as in `kubectl get`: fitted to a terminal, whole everywhere else.

They are drawn here and not by rich: importing it takes more CPU time than a whole `nodeagent status`, and drawing 200
rows twice as much again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from nodeagent.cli.output import colour, fitting

USUAL_COLUMNS = 80
"""Of a terminal that does not report its width."""


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, whole: bool = False) -> None:
    """Print columns. None and empty cells are shown as "-".

    whole: cut nothing, however narrow the terminal is. Output that is not a terminal is never cut.
    """
    stream = sys.stdout
    cells = [list(headings), *([_text(one) for one in row] for row in rows)]
    paint = _paint(frozenset(headings)) if colour.is_wanted(stream) else _plain
    room = None if whole else room_of(stream)
    for line in fitting.table(cells, room, _ellipsis(stream), paint):
        stream.write(f"{line}\n")


def room_of(stream: TextIO, environ: Mapping[str, str] = os.environ) -> int | None:
    """Return how many characters fit into a line, or None where the output is not a terminal. COLUMNS overrides what
    the terminal reports."""
    if not stream.isatty():
        return None
    set_by_hand = environ.get("COLUMNS", "")
    if set_by_hand.isdigit() and int(set_by_hand):
        return int(set_by_hand)
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def print_document(document: Any, form: str) -> None:
    """Print a document as json or yaml."""
    if form == "yaml":
        import yaml

        yaml.dump(document, sys.stdout, getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)
    else:
        json.dump(document, sys.stdout, indent=1)
        print()


def _text(cell: object) -> str:
    """Return a cell in one line. Control characters must not reach a terminal: names come from devices and pods."""
    text = fitting.EMPTY if cell in (None, "") else str(cell)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else " " if one.isspace() else "?" for one in text)


def _ellipsis(stream: TextIO) -> str:
    try:
        "…".encode(stream.encoding or "ascii")
    except (UnicodeError, LookupError):
        return "~"
    return "…"


def _plain(_: str, padded: str) -> str:
    return padded


def _paint(headings: frozenset[str]) -> fitting.Paint:
    """Return what colours headings and the words that have a colour."""

    def paint(cell: str, padded: str) -> str:
        style = colour.HEADING if cell in headings else colour.WORDS.get(cell)
        return colour.painted(padded, style) if style else padded

    return paint
