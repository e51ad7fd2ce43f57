"""Prints lines of a drawing: with colours on a terminal that has them, else as text alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable

from nodeagent.cli.picture.colours import colour_of
from nodeagent.cli.picture.lines import Line, text_of


def columns() -> int:
    """Return how many columns the terminal has; 80 if there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def print_lines(lines: Iterable[Line]) -> None:
    """Print to standard output."""
    if _has_colours():
        _print_coloured(lines)
        return
    for line in lines:
        print(text_of(line).rstrip())


def _has_colours() -> bool:
    """Return whether colours are wanted (no-color.org) and shown."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in (None, "", "dumb")


def _print_coloured(lines: Iterable[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        text = Text(end="")
        for span in line:
            text.append(span.text, None if span.holder is None else f"#111111 on {colour_of(span.holder)}")
        text.rstrip()
        console.print(text)
