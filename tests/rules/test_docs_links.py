"""The pages hold together: links lead to pages and headings that exist, and every block of code ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMES = [str(page.relative_to(CHECKOUT)) for page in PAGES]


def prose(page: Path) -> Iterator[str]:
    """The lines outside of blocks of code."""
    code = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield line


def anchors(page: Path) -> set[str]:
    """The anchors of a page as GitHub makes them of its headings."""
    heads = (line.lstrip("#").strip() for line in prose(page) if re.match(r"#{1,6} ", line))
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads)
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in (target for line in prose(page) for target in LINK.findall(re.sub(r"`[^`]*`", "", line))):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if "://" in target or target.startswith("mailto:"):
            continue
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_of_code_end(page: Path) -> None:
    """A fence that is missing turns code and prose around from there on: headings would be code."""
    code, headings = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            assert not code or line.strip() == "```", f"{page}:{number}: a block begins within another"
            code = not code
        elif code and line.startswith("## "):
            headings.append(f"{page}:{number}: {line}")
    assert (code, headings) == (False, [])
