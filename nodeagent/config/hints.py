"""Hints for errors of a strict reader: the value found, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_SHOWN = 60


def hint(word: str, known: Iterable[str]) -> str:
    """Return the nearest known word as a hint, or all of them if none is near."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"expected one of {', '.join(words)}" if words else "expected none"


def shown(value: object) -> str:
    """Return a value as quoted in a message."""
    return "nothing" if value is None else repr(value)[:LONGEST_SHOWN]


def found(document: Any, error: str) -> str:
    """Return ", found VALUE" for the place named at the end of msgspec's ValidationError;
    empty if it is not a scalar."""
    place = re.search(r"at `\$([^`]*)`$", error)
    try:
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place[1] if place else "["):
            document = document[key] if key else document[int(index)]
    except (LookupError, TypeError):
        return ""
    return "" if isinstance(document, Mapping | list) or document is None else f", found {shown(document)}"
