"""Shows a page once, or again whenever it changes (--watch)."""

from __future__ import annotations

import argparse
import select
import sys
from collections.abc import Callable
from typing import Any

from nodeagent.errors import PeerError

WATCH_S = 0.5
RESTLESS = frozenset({"uptime_s", "listed_at"})
"""Keys that change although nothing happens."""
_CLEAR = "\x1b[H\x1b[2J"


def add_watch(parser: argparse.ArgumentParser) -> None:
    """Add the option that repeats."""
    parser.add_argument("-w", "--watch", action="store_true", help="show it again whenever it changes")


def show(args: argparse.Namespace, read: Callable[[], Any], write: Callable[[Any], None]) -> int:
    """Read and write once, or, when watching, each time that something changes. A watch outlives the agent: that it is
    away is one line. On a terminal a table replaces the one before."""
    seen = read()
    redraws = args.watch and args.output.is_table and sys.stdout.isatty()
    _write(seen, write, clear=redraws)
    while args.watch:
        _pause()
        try:
            document = read()
        except PeerError as error:
            if seen is not None:
                print(f"nodeagent: {error}", file=sys.stderr, flush=True)
            seen = None
            continue
        if _still(document) != _still(seen):
            _write(document, write, clear=redraws)
        seen = document
    return 0


def _write(document: Any, write: Callable[[Any], None], *, clear: bool) -> None:
    if clear:
        sys.stdout.write(_CLEAR)
    write(document)
    sys.stdout.flush()


def _pause() -> None:
    """Wait until the next look. Raise BrokenPipeError as soon as the reader of the output is gone."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always reported
    if reader.poll(WATCH_S * 1000):
        raise BrokenPipeError


def _still(document: Any) -> Any:
    """Return a page without what changes although nothing happens."""
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if key not in RESTLESS}
