"""Hints for errors of a strict reader: the value found, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

LONGEST_SHOWN = 60
ANY_KEY, WRONG_KEY = "[...]", "at `key` in"
"""How msgspec names a value of a mapping with any keys, and a key of one."""
NOT_TEXT = ("int", "float", "bool", "date", "datetime", "bytes")
"""What YAML may take an unquoted text for."""


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


def one_line(text: str) -> str:
    """Return a message in which everything that a terminal does not show as it is, such as a line break in the name of
    a key, is escaped."""
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def steps(error: str) -> list[str | int]:
    """Return the path at the end of msgspec's ValidationError, such as `$.resources[1].serve`, as keys and indices.

    Of a wrong key or value of a mapping with any keys, it is that of the mapping.
    """
    place = re.search(r"(?:at|in) `\$([^`]*)`$", error)
    every = re.findall(r"\.([^.\[]+)|\[(\d+)\]", place[1].removesuffix(ANY_KEY)) if place else []
    return [key or int(index) for key, index in every]


def path_of(document: Any, error: str, errors_of: Callable[[Any], str]) -> list[str | int]:
    """Return the path of what an error is about, also where the error leaves out the key of a mapping.

    errors_of: returns the error of a document, or "".
    """
    path = steps(error)
    if not error.endswith(f"{ANY_KEY}`") and WRONG_KEY not in error:
        return path
    mapping = _at(document, path)
    for key in mapping if isinstance(mapping, Mapping) else ():
        if errors_of(_replaced(document, path, {key: mapping[key]})) == error:
            return [*path, key]
    return path


def found(document: Any, error: str, path: Sequence[str | int]) -> str:
    """Return ", found VALUE" for the path of an error, or the key if that is wrong; empty if there is no scalar."""
    value = path[-1] if path and WRONG_KEY in error else _at(document, path)
    scalar = path and not isinstance(value, Mapping | list) and value is not None
    return f", found {shown(value)}" if scalar else ""


def _at(document: Any, path: Iterable[str | int]) -> Any:
    try:
        for step in path:
            document = document[step]
    except (LookupError, TypeError):
        return None
    return document


def _replaced(document: Any, path: Sequence[str | int], value: Any) -> Any:
    """Return a document with another value at a path."""
    if not path:
        return value
    if isinstance(document, list):
        return [_replaced(one, path[1:], value) if i == path[0] else one for i, one in enumerate(document)]
    return {**document, path[0]: _replaced(document[path[0]], path[1:], value)}


def expected(schema: Mapping[str, Any], error: str) -> str:
    """Return what an error leaves out of what is expected: the choices of an enumeration, an absolute path, or that a
    value that YAML took for a number, a date, or (as "off") for a boolean has to be quoted."""
    if error.startswith(("Expected `str` matching regex '^/[", "Expected `str` matching regex '^(/[")):
        return ", expected an absolute path"
    unquoted = error.startswith("Expected `str") and any(f"got `{one}`" in error for one in NOT_TEXT)
    choices = _choices(schema, steps(error)) if unquoted or error.startswith("Invalid enum value") else []
    return (f", expected one of {', '.join(choices)}" if choices else "") + ("; quote it" if unquoted else "")


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
