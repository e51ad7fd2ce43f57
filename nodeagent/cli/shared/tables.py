"""Rows of text under headings, as in `kubectl get`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print columns as wide as their widest cell; None and empty cells are shown as "-"."""
    cells = [list(headings), *([("-" if one in (None, "") else str(one)) for one in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    for row in cells:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_document(document: Any, form: str) -> None:
    """Print a document as json or yaml."""
    if form == "yaml":
        import yaml

        yaml.safe_dump(document, sys.stdout, sort_keys=False)
    else:
        json.dump(document, sys.stdout, indent=1)
        print()
