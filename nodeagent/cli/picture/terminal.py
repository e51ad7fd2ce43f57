"""Prints lines of a drawing: with colours on a terminal that has them, else as text alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping

from nodeagent.cli.output import colour
from nodeagent.cli.picture.colours import colour_of
from nodeagent.cli.picture.lines import Line, Span, text_of

_DEEP = ("truecolor", "24bit")
"""Values of COLORTERM of terminals with 16 million colours; the others have 256."""


def columns() -> int:
    """Return how many columns the terminal has; 80 if there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def print_lines(lines: Iterable[Line]) -> None:
    """Print to standard output."""
    coloured = colour.is_wanted(sys.stdout)
    for line in lines:
        print(("".join(map(_painted, line)) if coloured else text_of(line)).rstrip())


def _painted(span: Span) -> str:
    return span.text if span.holder is None else colour.painted(span.text, style_of(colour_of(span.holder)))


def style_of(background: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the parameters of Select Graphic Rendition for black text on #rrggbb, or on the nearest of the 6 x 6 x 6
    colours that terminals with 256 have (xterm's ctlseqs, "Character Attributes")."""
    parts = [int(background[at : at + 2], 16) for at in (1, 3, 5)]
    if environ.get("COLORTERM") in _DEEP:
        return f"30;48;2;{parts[0]};{parts[1]};{parts[2]}"
    red, green, blue = (max(0, round((one - 55) / 40)) for one in parts)
    return f"30;48;5;{16 + 36 * red + 6 * green + blue}"
