"""Hints for errors of a strict reader: the value found, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
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
    if isinstance(value, int):
        value = value if abs(value) < 1 << 64 else hex(value)
    return "nothing" if value is None else repr(value)[:LONGEST_SHOWN]


def steps(error: str) -> list[str | int]:
    """Return the path at the end of msgspec's ValidationError, such as `$.resources[1].serve`, as keys and indices."""
    place = re.search(r"at `\$([^`]*)`$", error)
    every = re.findall(r"\.([^.\[]+)|\[(\d+)\]", place[1]) if place else []
    return [key or int(index) for key, index in every]


def found(document: Any, error: str) -> str:
    """Return ", found VALUE" for the place named in an error; empty if there is no scalar."""
    path = steps(error)
    try:
        for step in path:
            document = document[step]
    except (LookupError, TypeError):
        return ""
    scalar = path and not isinstance(document, Mapping | list) and document is not None
    return f", found {shown(document)}" if scalar else ""


def expected(schema: Mapping[str, Any], error: str) -> str:
    """Return what an error leaves out of what is expected: the choices of an enumeration, an absolute path, or that a
    value that YAML took for a number has to be quoted."""
    if error.startswith(("Expected `str` matching regex '^/[", "Expected `str` matching regex '^(/[")):
        return ", expected an absolute path"
    if error.startswith("Expected `str") and "got `int`" in error:
        return "; quote it"
    choices = _choices(schema, steps(error)) if error.startswith("Invalid enum value") else []
    return f", expected one of {', '.join(choices)}" if choices else ""


def _choices(schema: Mapping[str, Any], path: list[str | int]) -> list[str]:
    forms: list[Mapping[str, Any]] = [schema]
    for step in path:
        every = [option for form in forms for option in options(form, schema)]
        if isinstance(step, int):
            forms = [one["items"] for one in every if "items" in one]
        else:
            forms = [one["properties"][step] for one in every if step in one.get("properties", {})]
    return [str(one) for form in forms for option in options(form, schema) for one in option.get("enum", ())]


def options(form: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a form of a JSON schema, and those that its references and alternatives lead to."""
    if "$ref" in form:
        yield from options(schema["$defs"][form["$ref"].rpartition("/")[2]], schema)
    for option in form.get("anyOf", ()):
        yield from options(option, schema)
    yield form
