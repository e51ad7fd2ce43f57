"""Kubernetes objects from files, as they are applied."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nodeagent.errors import InputError

LARGEST_FILE_BYTES = 4 << 20
MOST_VALUES, DEEPEST = 500_000, 100
Object = dict[str, Any]


def read_objects(path: str, option: str) -> list[Object]:
    """Return the objects of a YAML or JSON file, also those in lists. Raise InputError if it cannot be read.

    path: "-" for standard input. option: the option that named it, for errors.
    """
    source = f"{option} {path}"
    return [one for document in read_documents(path, source) for one in _objects(document, source)]


def read_documents(path: str, source: str) -> list[Any]:
    """Return the documents of a YAML or JSON file that are not empty, in the types of JSON. Raise InputError if it
    cannot be read.

    path: "-" for standard input. source: what it is in errors.
    """
    return parse_documents(read_bytes(path, source), source)


def parse_documents(text: bytes, source: str) -> list[Any]:
    """Return the documents of a text, as `read_documents` does those of a file."""
    import yaml

    try:
        documents = list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except RecursionError:
        raise InputError(f"cannot read {source}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # The last ones are what the loader raises where a tag and its value do not fit, such as "!!bool x".
        raise InputError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    plain = _Plain(source)
    return [plain.of(document) for document in documents if document is not None]


def parse_json(text: bytes, source: str) -> Any:
    """Return a JSON document, within the same bounds. Raise ValueError if it is none, InputError if it is beyond
    them."""
    try:
        return _Plain(source).of(json.loads(text))
    except RecursionError:
        raise InputError(f"cannot read {source}: it is nested too deeply") from None


def read_bytes(path: str, source: str) -> bytes:
    """Return the content of a file. Raise InputError if it cannot be read, or is larger than LARGEST_FILE_BYTES.

    path: "-" for standard input. source: what it is in errors.
    """
    try:
        if path == "-":
            text = sys.stdin.buffer.read(LARGEST_FILE_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                text = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    if len(text) > LARGEST_FILE_BYTES:
        raise InputError(f"cannot read {source}: it is larger than {LARGEST_FILE_BYTES >> 20} MiB")
    return text


class _Plain:
    """Converts what YAML can express to what JSON can, as far as the bounds allow: through aliases, a few lines can
    expand to a billion values, or contain themselves."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """Return a value in plain types; a key that is no text, and a date, as text. Raise InputError."""
        self._count += 1
        if self._count > MOST_VALUES:
            raise self._wrong(f"it has more than {MOST_VALUES} values, aliases counted each time")
        if depth > DEEPEST:
            raise self._wrong("it is nested too deeply")
        if isinstance(value, dict):
            return {self._text(_key(key)): self.of(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list):
            return [self.of(one, depth + 1) for one in value]
        if isinstance(value, datetime.date):
            return value.isoformat()
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, int | float):
            return value
        raise self._wrong(f"a value of type {type(value).__name__}, which JSON does not have")

    def _text(self, value: str) -> str:
        if not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
            raise self._wrong("half a surrogate pair in a text, which no file can have")
        return value

    def _wrong(self, why: str) -> InputError:
        return InputError(f"cannot read {self._source}: {why}")


def _key(key: object) -> str:
    return key if isinstance(key, str) else str(key)


def _objects(document: Any, source: str) -> Iterator[Object]:
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        raise InputError(f"cannot read {source}: expected Kubernetes objects with a kind")
    if not document["kind"].endswith("List"):
        yield document
        return
    items = document.get("items") or []
    if not isinstance(items, list):
        raise InputError(f"cannot read {source}: items of {document['kind']} is no list")
    for one in items:
        yield from _objects(one, source)
