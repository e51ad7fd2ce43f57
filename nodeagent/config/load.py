"""Reads a configuration: typed, strict YAML. Reading changes nothing; a bad configuration is rejected as a whole.

An unknown key is rejected with its path and the nearest known key, a wrong value with its path and what is expected.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from nodeagent.config import hints
from nodeagent.config.schema import Config, schema
from nodeagent.config.validate import wrong as mistakes
from nodeagent.errors import ConfigError

LARGEST_FILE_BYTES, MOST_VALUES = 256 << 10, 20_000
LONGEST_LINE = 120
"""So much of a line is shown."""


def parse(text: str | bytes, *, source: str) -> Config:
    """Return a configuration. Raise ConfigError with the source, the path of the key and what is expected."""
    found = _read_yaml(text, source)
    for path, key, known in _unknown(found, schema(), "$"):
        where = _line_of(text, hints.steps(f"at `{path}`"))
        why = f"unknown key {path}; {hints.hint(key, sorted(known))}{where}"
        raise ConfigError(f"cannot use {source}: {hints.one_line(why)}")
    if said := _error_of(found):
        place = hints.path_of(found, said, _error_of)
        more = f"{hints.found(found, said, place)}{hints.expected(schema(), said)}{_line_of(text, place)}"
        raise ConfigError(f"cannot use {source}: {hints.one_line(said + more)}")
    config = msgspec.convert(found, Config)
    for wrong in mistakes(config):
        named = re.search(r"(?:at |^)(\$\S*?)(?:,|:| |$)", f"{wrong} ")
        where = _line_of(text, hints.steps(f"at `{named[1]}`")) if named else ""
        raise ConfigError(f"cannot use {source}: {hints.one_line(wrong + where)}")
    return config


def _error_of(document: Any) -> str:
    """Return why a document does not have the form of a configuration, or ""."""
    try:
        msgspec.convert(document, Config)
    except (msgspec.ValidationError, UnicodeError) as error:
        return str(error)
    return ""


def load(path: Path) -> Config:
    """Return the configuration in a file. Raise ConfigError."""
    return parse(_read(path), source=str(path))


@contextlib.contextmanager
def placed(path: Path | None) -> Iterator[None]:
    """Add the file and the line to a ConfigError that comes up while a configuration is used, if it names its key.

    path: of the file that the configuration was loaded from, or None if it has none.
    """
    try:
        yield
    except ConfigError as error:
        if path is None or not error.key:
            raise
        where = _line_of(_read(path), hints.steps(f"at `{error.key}`"))
        raise ConfigError(f"cannot use {path}: {error}{where}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def differences(old: Config, new: Config) -> list[str]:
    """Return what another configuration changes, one line per key, as PATH: OLD -> NEW."""
    return sorted(_differences(msgspec.to_builtins(old), msgspec.to_builtins(new), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


class _Loader(yaml.SafeLoader):
    """The YAML loader. A duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


for _tag in ("value", "merge"):
    # A plain "=" or "<<" as a value is text, as in YAML 1.2; PyYAML has no constructor for what they are in YAML 1.1.
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _text)


def _read_yaml(text: str | bytes, source: str) -> dict[Any, Any]:
    """Return a mapping of limited size: through aliases, a file of a few lines can expand to a billion values."""
    if len(text) > LARGEST_FILE_BYTES:
        raise ConfigError(f"cannot read {source}: it has more than {LARGEST_FILE_BYTES} bytes")
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # The last ones are what the loader raises where a tag and its value do not fit, such as "!!bool x".
        raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"cannot read {source}: it is nested too deeply") from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ConfigError(f"cannot read {source}: {type(found).__name__} at the top, expected a mapping")
    _limit(found, source)
    return found


def _limit(found: Any, source: str) -> None:
    waiting, count = [found], 0
    while waiting:
        one, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise ConfigError(f"cannot read {source}: it has more than {MOST_VALUES} values, aliases counted each time")
        if isinstance(one, str) and one.endswith("\n"):
            raise ConfigError(f"cannot read {source}: {hints.shown(one)} ends with a line break")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _unknown(found: Any, form: Mapping[str, Any], path: str, root: Any = None) -> Iterator[tuple[str, str, list[str]]]:
    """Yield keys that are not in the schema, as (path, key, keys known there)."""
    root = form if root is None else root
    for option in hints.options(form, root):
        if isinstance(found, dict) and "properties" in option:
            known = option["properties"]
            for key, value in found.items():
                if key not in known:
                    yield f"{path}.{key}", str(key), list(known)
                else:
                    yield from _unknown(value, known[key], f"{path}.{key}", root)
        if isinstance(found, list) and "items" in option:
            for i, value in enumerate(found):
                yield from _unknown(value, option["items"], f"{path}[{i}]", root)


def _line_of(text: str | bytes, path: Iterable[str | int]) -> str:
    """Return the place in a YAML text that a path leads to, as far as it does, as " (line 3, column 9: TEXT)"."""
    node: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    if node is None:
        return ""
    for step in path:
        below = _below(node, step)
        if below is None:
            break
        node = below
    mark = node.start_mark
    lines = (text if isinstance(text, str) else text.decode(errors="replace")).splitlines()
    line = lines[mark.line].strip() if mark.line < len(lines) else ""
    return f" (line {mark.line + 1}, column {mark.column + 1}: {line[:LONGEST_LINE]})"


def _below(node: yaml.Node, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == step), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        found: yaml.Node = node.value[step]
        return found
    return None
