"""What a JSON schema (draft 7) says of a document: as far as the project's own schemas go, and no keyword further.

A keyword that is not known here raises KeyError, so that none is silently without effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Form = Mapping[str, Any]
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda one: isinstance(one, dict),
    "array": lambda one: isinstance(one, list),
    "string": lambda one: isinstance(one, str),
    "boolean": lambda one: isinstance(one, bool),
    "integer": lambda one: isinstance(one, int) and not isinstance(one, bool),
    "number": lambda one: isinstance(one, int | float) and not isinstance(one, bool),
    "null": lambda one: one is None,
}
_NOTES = ("title", "description", "default", "$defs", "$schema", "then", "else")
"""Keywords that require nothing by themselves."""


class JsonSchema:
    """A schema and its definitions."""

    def __init__(self, root: Form) -> None:
        self._root = root

    def valid(self, document: Any) -> bool:
        return self._fits(self._root, document)

    def _fits(self, form: Form, one: Any) -> bool:
        return all(self._holds(key, form, one) for key in form if key not in _NOTES)

    def _holds(self, key: str, form: Form, one: Any) -> bool:
        return _RULES[key](self, form[key], form, one)

    def _ref(self, name: str, _: Form, one: Any) -> bool:
        return self._fits(self._root["$defs"][name.removeprefix("#/$defs/")], one)

    def _properties(self, forms: Form, _: Form, one: Any) -> bool:
        return not isinstance(one, dict) or all(self._fits(forms[key], one[key]) for key in forms if key in one)

    def _others(self, more: Any, form: Form, one: Any) -> bool:
        if not isinstance(one, dict):
            return True
        rest = one.keys() - form.get("properties", {}).keys()
        return not rest if more is False else all(self._fits(more, one[key]) for key in rest)

    def _condition(self, condition: Form, form: Form, one: Any) -> bool:
        return self._fits(form.get("then" if self._fits(condition, one) else "else", {}), one)


def _text(holds: Callable[[str, Any], bool]) -> Any:
    return lambda it, want, form, one: not isinstance(one, str) or holds(one, want)


def _number(holds: Callable[[float, Any], bool]) -> Any:
    return lambda it, want, form, one: not _TYPES["number"](one) or holds(one, want)


_RULES: Mapping[str, Callable[[JsonSchema, Any, Form, Any], bool]] = {
    "$ref": JsonSchema._ref,
    "type": lambda it, want, form, one: _TYPES[want](one),
    "enum": lambda it, want, form, one: one in want,
    "const": lambda it, want, form, one: one == want and isinstance(one, bool) == isinstance(want, bool),
    "pattern": _text(lambda one, want: re.search(want, one) is not None),
    "minLength": _text(lambda one, want: len(one) >= want),
    "maxLength": _text(lambda one, want: len(one) <= want),
    "minimum": _number(lambda one, want: one >= want),
    "maximum": _number(lambda one, want: one <= want),
    "minItems": lambda it, want, form, one: not isinstance(one, list) or len(one) >= want,
    "items": lambda it, want, form, one: not isinstance(one, list) or all(it._fits(want, each) for each in one),
    "required": lambda it, want, form, one: not isinstance(one, dict) or one.keys() >= {*want},
    "properties": JsonSchema._properties,
    "additionalProperties": JsonSchema._others,
    "propertyNames": lambda it, want, form, one: not isinstance(one, dict) or all(it._fits(want, key) for key in one),
    "anyOf": lambda it, want, form, one: any(it._fits(each, one) for each in want),
    "allOf": lambda it, want, form, one: all(it._fits(each, one) for each in want),
    "not": lambda it, want, form, one: not it._fits(want, one),
    "if": JsonSchema._condition,
}
