"""What becomes of each value of a foreign configuration: every leaf of it has exactly one finding, known or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

LONGEST_SHOWN = 60


class State(StrEnum):
    """What becomes of a value."""

    TRANSLATED = "translated"
    """The configuration or the claim that is written has it."""
    PARTLY = "in-part"
    """It has some of it."""
    BUILT_IN = "built-in"
    """The agent does so without a key, or the value asks for nothing."""
    ELSEWHERE = "elsewhere"
    """It is set in another place, such as the agent's chart, or is another program's."""
    IGNORED = "ignored"
    """The other program reads it and does not use it."""
    LOST = "no-equivalent"
    UNKNOWN = "unknown"
    """The format does not have it."""


INCOMPLETE = frozenset({State.PARTLY, State.LOST, State.UNKNOWN})
"""What an admin has to look at."""


class Said(NamedTuple):
    """What becomes of one value. to: where it is now; why: what is different, or why it is nowhere."""

    state: State
    to: str = ""
    why: str = ""


class Finding(msgspec.Struct, frozen=True):
    """What becomes of the value at one place."""

    place: str
    value: str
    said: Said


class Translation(msgspec.Struct, frozen=True):
    """The agent's form of a foreign configuration."""

    findings: tuple[Finding, ...]
    config: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """Of the agent, as in its file; empty where claims alone were translated."""
    objects: tuple[Mapping[str, Any], ...] = ()
    """Kubernetes objects."""


class Leaf(NamedTuple):
    """A value without parts. path: such as $.a[0].b; form: the same for all items of a list, such as $.a[].b."""

    path: str
    form: str
    value: Any


Rule = Said | Callable[[Any], Said]
"""What becomes of a value, or what says so."""
NOT_SET = Said(State.BUILT_IN, why="it is not set")
NOT_KNOWN = Said(State.UNKNOWN, why="the format does not have this key")
ANYTHING = ".**"
"""At the end of a form: everything below."""


def leaves(document: Any, path: str = "$") -> Iterator[Leaf]:
    """Yield the values of a document that have no parts: also empty mappings and lists, and lists of plain values."""
    if isinstance(document, Mapping) and document:
        for key, value in document.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(document, list) and any(isinstance(one, Mapping | list) for one in document):
        for i, value in enumerate(document):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield Leaf(path, re.sub(r"\[\d+\]", "[]", path), document)


def findings(
    document: Any, rules: Mapping[str, Rule], decided: Mapping[str, Said] | None = None, where: str = ""
) -> Iterator[Finding]:
    """Yield one finding for each leaf of a document.

    rules: by form, for every key of the format. decided: by path, of it or of what it lies in; before the rule of a key
    that is known. where: begins each place.
    """
    for leaf in leaves(document):
        rule = _above(leaf.form, rules, suffix=ANYTHING)
        if rule is None:
            said = NOT_KNOWN
        elif leaf.value is None:
            said = NOT_SET
        else:
            rule = _above(leaf.path, decided or {}) or rule
            said = rule if isinstance(rule, Said) else rule(leaf.value)
        yield Finding(where + leaf.path, shown(leaf.value), said)


def _above(path: str, known: Mapping[str, Any], suffix: str = "") -> Any:
    """Return what is known of a path or, with a suffix, of what it lies in."""
    if path in known:
        return known[path]
    while path != "$":
        path = path[: max(path.rfind("."), path.rfind("["))]
        if path + suffix in known:
            return known[path + suffix]
    return None


def shown(value: Any) -> str:
    """Return a value in a few words."""
    text = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 1]}…"


OFF = Said(State.BUILT_IN, why="it is off")


def switch(on: Said, off: Said = OFF) -> Callable[[Any], Said]:
    """Return the rule of a value that is true or false."""
    return lambda value: on if value else off


def usual(values: frozenset[str], other: Said, why: str = "") -> Callable[[Any], Said]:
    """Return the rule of a value that the agent has anyway if it is one of some texts; the format may not check that it
    is a text."""
    return lambda value: Said(State.BUILT_IN, why=why) if isinstance(value, str) and value in values else other
