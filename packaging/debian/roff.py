"""Text for man(7) pages: escaped, and from the little Markdown that docs/ uses in tables."""

from __future__ import annotations

import re

_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
_CODE = re.compile(r"`([^`]*)`")
_REFERENCE = re.compile(r" \(\[[^\]]*\.md\]\([^)]*\)\)")
"""A link in brackets that only names a document."""


def escaped(text: str) -> str:
    """Return text that prints as it is, on one line."""
    one_line = _plain(" ".join(text.split()))
    return f"\\&{one_line}" if one_line[:1] in (".", "'") else one_line


def bold(text: str) -> str:
    """Return text in bold."""
    return f"\\fB{escaped(text)}\\fR"


def from_markdown(text: str) -> str:
    """Return a table cell: code in bold, links as their text."""
    plain = _LINK.sub(r"\1", _REFERENCE.sub("", text).replace("\\|", "|"))
    parts = _CODE.split(plain)
    shown = "".join(bold(part) if i % 2 else _plain(re.sub(r"\s+", " ", part)) for i, part in enumerate(parts))
    return f"\\&{shown}" if shown[:1] in (".", "'") else shown


def _plain(text: str) -> str:
    """Return text whose characters have no meaning to roff, in ASCII."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return "".join(letter if letter.isascii() else f"\\[u{ord(letter):04X}]" for letter in safe)


def entry(term: str, text: str) -> str:
    """Return a tagged paragraph; both are roff already."""
    return f".TP\n{term}\n{text}\n" if text else f".TP\n{term}\n\\&\n"


def section(title: str, *paragraphs: str) -> str:
    """Return a section of paragraphs of roff."""
    spaced = (one if one.startswith(".") else f".PP\n{one}\n" for one in paragraphs)
    return f".SH {title}\n{''.join(spaced).removeprefix('.PP' + chr(10))}"
