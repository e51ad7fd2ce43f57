"""Sentences of the form "SUBJECT: REASON", each reason said once: what several subjects share becomes one line."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

_COLON = ": "
_KERNELS_WORDS = frozenset(map(os.strerror, errno.errorcode))


def merged(lines: Iterable[str]) -> list[str]:
    """Return the lines with one line for all subjects of a reason, "A, B: REASON", in order of the first.

    A reason is a whole line, or its end after a colon, that another line has too.
    """
    every = list(dict.fromkeys(lines))
    while len(fewer := _merged_once(every)) < len(every):
        every = fewer
    return every


def _merged_once(lines: Sequence[str]) -> list[str]:
    counts = Counter(reason for line in lines for reason in (line, *_reasons(line)))
    groups: dict[str, list[str]] = {}
    for line in lines:
        shared = next((one for one in (line, *_reasons(line)) if counts[one] > 1), line)
        groups.setdefault(shared, []).append(line.removesuffix(f"{_COLON}{shared}"))
    return [_joined(reason, subjects) for reason, subjects in groups.items()]


def once(sections: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Yield "SECTION: LINE" for all lines, without a reason that a line before has given."""
    said: set[str] = set()
    for section, lines in sections:
        for line in merged(lines):
            shown = _without(line, said)
            said.update((line, *_reasons(line), shown, *_reasons(shown)))
            if shown:
                yield f"{section}{_COLON}{shown}"


def _joined(reason: str, subjects: Sequence[str]) -> str:
    """Return one line. A line that is a reason by itself is among its own subjects."""
    named = [one for one in subjects if one != reason]
    return f"{', '.join(named)}{_COLON}{reason}" if named else reason


def _without(line: str, said: set[str]) -> str:
    """Return a line without the reasons at its end that were given before; "" if nothing is left."""
    if line in said:
        return ""
    known = next((one for one in _reasons(line) if one in said), "")
    return _without(line.removesuffix(f"{_COLON}{known}"), said) if known else line


def _reasons(line: str) -> Iterator[str]:
    """Yield the ends of a line after each colon, the longest first. A single word is a state and no reason, nor are the
    kernel's words without what they are about, such as "No such file or directory"."""
    start = line.find(_COLON)
    while start >= 0:
        reason = line[start + len(_COLON) :]
        if " " in reason and reason not in _KERNELS_WORDS:
            yield reason
        start = line.find(_COLON, start + 1)
