"""How columns fit a width: those that are empty in every row are left out, then the widest are cut; where too little
would remain of each, every row becomes a block of lines. Pure: cells in, lines out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

GAP = "   "
EMPTY = "-"
LEAST = 8
"""Characters that a cut column keeps."""
Paint = Callable[[str, str], str]
"""Returns the text, padded as it is printed, in the colour of the cell that it stands for."""


def widths_within(widths: Sequence[int], room: int) -> list[int] | None:
    """Return widths that need at most `room` characters with the gaps between them, or None if a column would keep
    less than LEAST. The first column, which names the row, stays whole, and so does what is narrow."""
    left = room - len(GAP) * (len(widths) - 1)
    if sum(widths) <= left:
        return list(widths)
    first, others = widths[0], widths[1:]
    level = _level(others, left - first)
    if level < LEAST:
        return None
    cut = [min(width, level) for width in others]
    spare = left - first - sum(cut)
    for i, width in enumerate(others):
        more = min(spare, width - cut[i], 1)
        cut[i], spare = cut[i] + more, spare - more
    return [first, *cut]


def _level(widths: Sequence[int], room: int) -> int:
    """Return the largest width to which all wider columns can be cut so that they fit together, or 0."""
    ordered = sorted(widths)
    for i, width in enumerate(ordered):
        if width * (len(ordered) - i) > room:
            return max(0, room // (len(ordered) - i))
        room -= width
    return ordered[-1] if ordered else 0


def table(cells: Sequence[Sequence[str]], room: int | None, ellipsis: str, paint: Paint) -> Iterator[str]:
    """Yield the lines of a table. cells: rows, the headings first. room: characters in a line, or None for any."""
    natural = _natural(cells)
    if room is not None and widths_within(natural, room) != natural:
        cells = _without_empty(cells)
        natural = _natural(cells)
    widths = natural if room is None else widths_within(natural, room)
    if widths is None:
        yield from _blocks(cells, paint)
        return
    for row in cells:
        last = max((i for i, cell in enumerate(row) if cell), default=0)
        shown = (
            paint(cell, _cut(cell, width, ellipsis).ljust(0 if i == last else width))
            for i, (cell, width) in enumerate(zip(row[: last + 1], widths, strict=False))
        )
        yield GAP.join(shown)


def _natural(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return how wide each column is."""
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _without_empty(cells: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """Return the columns that have a value in some row, and the first."""
    first, *others = zip(*cells, strict=True)
    shown = [column for column in others if any(cell != EMPTY for cell in column[1:])]
    return [*zip(first, *shown, strict=True)]


def _cut(cell: str, width: int, ellipsis: str) -> str:
    return cell if len(cell) <= width else cell[: width - len(ellipsis)] + ellipsis


def _blocks(cells: Sequence[Sequence[str]], paint: Paint) -> Iterator[str]:
    """Yield each row as lines "HEADING value", without what is empty; the terminal wraps what is long."""
    headings, *rows = cells
    width = max(map(len, headings))
    for number, row in enumerate(rows):
        if number:
            yield ""
        for heading, cell in zip(headings, row, strict=True):
            if cell != EMPTY:
                yield f"{paint(heading, heading.ljust(width))} {paint(cell, cell)}"
