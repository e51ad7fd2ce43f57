"""Prints the parts of a document that a jsonpath template names, as `kubectl -o jsonpath` does: values of a path are
separated by spaces, what is missing prints nothing, objects and lists print as JSON, and no newline is added.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nodeagent.cli.output.jsonpath_syntax import (
    Deep,
    Every,
    Filter,
    Indexes,
    Keys,
    Part,
    Path,
    Range,
    Slice,
    Step,
    Text,
)

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def printed(parts: Sequence[Part], document: Any) -> str:
    """Return what a template prints of a document."""
    return "".join(_printed(parts, document, document))


def found(path: Path, document: Any) -> list[Any]:
    """Return the values of a path, in order."""
    return _values(path, document, document)


def _printed(parts: Sequence[Part], current: Any, root: Any) -> Iterator[str]:
    for part in parts:
        match part:
            case Text(text):
                yield text
            case Range(path, inner):
                for one in _values(path, current, root):
                    yield from _printed(inner, one, root)
            case Path():
                yield " ".join(map(_shown, _values(part, current, root)))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _values(path: Path, current: Any, root: Any) -> list[Any]:
    values = [root if path.from_root else current]
    for step in path.steps:
        values = _after(step, values, root)
    return values


def _after(step: Step, values: Sequence[Any], root: Any) -> list[Any]:
    """Return what one step leads to from some values. Several names or indexes give one group each, as in kubectl."""
    match step:
        case Keys(paths):
            return [one for names in paths for value in values for one in _members(value, names)]
        case Indexes(numbers):
            lists = [value for value in values if isinstance(value, list)]
            return [value[one] for one in numbers for value in lists if -len(value) <= one < len(value)]
        case _:
            return [one for value in values for one in _stepped(step, value, root)]


def _members(value: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yield what some names lead to, one after another, if all are there."""
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return
        value = value[name]
    yield value


def _stepped(step: Step, value: Any, root: Any) -> Iterator[Any]:
    """Yield what one step leads to from one value; nothing if it has no such part."""
    match step:
        case Slice(start, stop, stride) if isinstance(value, list):
            yield from value[start:stop:stride]
        case Every():
            yield from _below(value)
        case Deep():
            yield from _everything(value)
        case Filter() if isinstance(value, list | dict):
            yield from (one for one in _below(value) if _holds(step, one, root))


def _below(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _everything(value: Any) -> Iterator[Any]:
    yield value
    for one in _below(value):
        yield from _everything(one)


def _holds(condition: Filter, one: Any, root: Any) -> bool:
    left = _values(condition.left, one, root)
    if not condition.operator:
        return bool(left)
    right = condition.right
    others = _values(right, one, root) if isinstance(right, Path) else [right]
    return any(_compares(condition.operator, a, b) for a in left[:1] for b in others[:1])


def _compares(name: str, left: Any, right: Any) -> bool:
    """Return whether two values compare; values of different kinds are only unequal."""
    if isinstance(left, bool) != isinstance(right, bool):
        return name == "!="
    try:
        return _COMPARE[name](left, right)
    except TypeError:
        return False
