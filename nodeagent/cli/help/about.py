"""What the help of a verb says besides its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BAD_INPUT = 2
EXIT_CODES = {0: "done", 1: "failed", BAD_INPUT: "bad input or configuration"}
"""Of every verb; a verb adds or changes some with an EXIT_CODES of its own."""
ENVIRONMENT = {
    "NO_COLOR": "no colour, if it is not empty",
    "CLICOLOR_FORCE": "colour also where the output is not a terminal, if it is not 0",
    "COLUMNS": "the width of the terminal, if it is not what the terminal reports",
}
"""What every verb looks at; a verb adds what it looks at itself with an ENVIRONMENT of its own."""


class About(NamedTuple):
    """What the help of a verb says besides its options. examples: (command, what it is for)."""

    examples: Sequence[tuple[str, str]] = ()
    exit_codes: Mapping[int, str] = EXIT_CODES
    environment: Mapping[str, str] = ENVIRONMENT

    @classmethod
    def of(cls, module: Any) -> About:
        """Return what the module of a verb says."""
        return cls(
            getattr(module, "EXAMPLES", ()),
            EXIT_CODES | getattr(module, "EXIT_CODES", {}),
            ENVIRONMENT | getattr(module, "ENVIRONMENT", {}),
        )
