"""What a strict reader says of a mistake beyond its place: the value that stands there, and the word that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_SHOWN = 60


def hint(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, or all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"expected one of {', '.join(words)}" if words else "expected none"


def shown(value: object) -> str:
    """A value as a message may quote it."""
    return "nothing" if value is None else repr(value)[:LONGEST_SHOWN]


def found(document: Any, error: str) -> str:
    """What stands at the place that msgspec's ValidationError names at its end, as an addition to that message; nothing
    where it is no single value."""
    place = re.search(r"at `\$([^`]*)`$", error)
    try:
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place[1] if place else "["):
            document = document[key] if key else document[int(index)]
    except (LookupError, TypeError):
        return ""
    return "" if isinstance(document, Mapping | list) or document is None else f", found {shown(document)}"
