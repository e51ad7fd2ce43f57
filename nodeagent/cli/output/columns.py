"""Columns of a list, and the order that --sort-by asks for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nodeagent.errors import InputError

_DIGITS = re.compile(r"(\d+)")


class Column(NamedTuple):
    """One column. cell: returns what it shows of an item. wide: shown with -o wide alone. key: what --sort-by compares
    if that is not the cell's text."""

    heading: str
    cell: Callable[[Any], object]
    wide: bool = False
    key: Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """Return how --sort-by names it."""
        return self.heading.lower().replace(" ", "-")


def add_sort(parser: argparse.ArgumentParser, columns: Sequence[Column]) -> None:
    """Add the option that orders a list."""
    order = _Order([one.name for one in columns])
    about = f"{', '.join(order.words)}, or a path in the JSON such as .id"
    parser.add_argument("--sort-by", metavar="COLUMN", type=order, help=about)


class _Order:
    """Reads a value of --sort-by for argparse; in_order checks it. words: for completion."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def __call__(self, text: str) -> str:
        return text


def in_order(items: Sequence[Any], columns: Sequence[Column], by: str) -> list[Any]:
    """Return items in the order of a column, or of a path such as .granted_at. Raise InputError for neither."""
    for column in columns:
        if by.lower() == column.name:
            return sorted(items, key=lambda item: _comparable((column.key or column.cell)(item)))
    if by[:1] not in ("{", ".", "[", "$"):
        names = ", ".join(column.name for column in columns)
        raise InputError(f"cannot use --sort-by {by[:40]!r}: expected one of {names}, or a path such as .id")
    return sorted(items, key=_by_path(by))


def _by_path(text: str) -> Callable[[Any], Any]:
    from nodeagent.cli.output.jsonpath import found
    from nodeagent.cli.output.jsonpath_syntax import Path, parse

    try:
        parts = parse(text if text.startswith("{") else f"{{{text}}}")
    except InputError as error:
        raise InputError(f"cannot use --sort-by {text[:40]!r}: {error}") from None
    if len(parts) != 1 or not isinstance(parts[0], Path):
        raise InputError(f"cannot use --sort-by {text[:40]!r}: expected one path such as .id")
    path = parts[0]
    return lambda item: [_comparable(one) for one in found(path, item)]


def _comparable(value: Any) -> tuple[int, Any]:
    """Return what orders any values: numbers, then texts with their digits as numbers, then what is missing."""
    if value is None or value == "":
        return 2, ""
    if isinstance(value, int | float):
        return 0, value
    pieces = _DIGITS.split(str(value))
    return 1, [(0, int(one[:300]), "") if one.isdecimal() else (1, 0, one) for one in pieces if one]
