"""Whether output is coloured, and which words have a colour. Every choice of colour is in this file.

NO_COLOR (any value but the empty one) forbids colour, else CLICOLOR_FORCE (any value but 0) demands it, else the output
has to be a terminal that is not dumb. Sources: no-color.org, bixense.com/clicolors.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, MutableMapping
from typing import TextIO

HEADING, GOOD, BAD, DOUBTFUL = "1", "32", "31", "33"
"""Parameters of the terminal's Select Graphic Rendition (ECMA-48): bold, green, red, yellow."""
WORDS = {
    "healthy": GOOD,
    "ready": GOOD,
    "shown": GOOD,
    "good": GOOD,
    "unhealthy": BAD,
    "NOT ready": BAD,
    "refused": BAD,
    "unknown": DOUBTFUL,
    "degraded": DOUBTFUL,
}


class When(enum.StrEnum):
    """Values of --color."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def choose(when: str, environ: MutableMapping[str, str]) -> None:
    """Make a value of --color the environment's, so that libraries that draw follow it too."""
    if when == When.AUTO:
        return
    for name in ("NO_COLOR", "CLICOLOR_FORCE", "FORCE_COLOR"):
        environ.pop(name, None)
    environ.update({"NO_COLOR": "1"} if when == When.NEVER else {"CLICOLOR_FORCE": "1", "FORCE_COLOR": "1"})


def is_wanted(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether what is written to a stream is coloured."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return stream.isatty() and environ.get("TERM", "") != "dumb"


def painted(text: str, style: str) -> str:
    """Return text in a style."""
    return f"\x1b[{style}m{text}\x1b[0m"
