"""Lines of styled text, and how they are wrapped: what does not fit a line is continued on the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

NARROWEST = 20
"""Columns that a terminal has at least."""


class Span(NamedTuple):
    """Text of one look: coloured as what belongs to a holder, or plain."""

    text: str
    holder: int | None = None
    """The holder's index in the picture."""


Line = tuple[Span, ...]
Item = tuple[Span, ...]
"""Spans that stay together on one line if they fit."""


def plain(text: str) -> Span:
    """Return text without a colour."""
    return Span(text)


def words(text: str) -> list[Item]:
    """Return each word of a sentence as an item."""
    return [(plain(word),) for word in text.split()]


def text_of(line: Line) -> str:
    """Return a line without its colours."""
    return "".join(span.text for span in line)


def printable(text: str) -> str:
    """Return text without what would move a terminal's cursor or change its colours."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def wrapped(items: Iterable[Item], width: int, *, first: str = "", rest: str = "", gap: str = " ") -> Iterator[Line]:
    """Return lines of at most `width` columns with the items in order.

    first, rest: what the first line and each later one start with. gap: what stands between two items of a line.
    """
    line: list[Span] = [plain(first)] if first else []
    used, empty = len(first), True
    for item in items:
        for part in _cut(item, max(1, width - len(rest))):
            size = _length(part)
            needed = used + size + (0 if empty else len(gap))
            if needed > width and (not empty or used > len(rest)):
                yield tuple(line)
                line, used, empty = [plain(rest)] if rest else [], len(rest), True
            if not empty:
                line.append(plain(gap))
                used += len(gap)
            line.extend(part)
            used, empty = used + size, False
    yield tuple(line)


def _length(spans: Sequence[Span]) -> int:
    return sum(len(span.text) for span in spans)


def _cut(item: Item, width: int) -> Iterator[Item]:
    """Return an item in parts of at most `width` columns."""
    if _length(item) <= width:
        yield item
        return
    letters = [Span(one, span.holder) for span in item for one in span.text]
    for start in range(0, len(letters), width):
        yield tuple(letters[start : start + width])
