"""Kubernetes objects from files, as they are applied."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nodeagent.errors import InputError

LARGEST_FILE_BYTES = 4 << 20
Object = dict[str, Any]


def read_objects(path: str, option: str) -> list[Object]:
    """Return the objects of a YAML or JSON file, also those in lists. Raise InputError if it cannot be read.

    path: "-" for standard input. option: the option that named it, for errors.
    """
    import yaml

    text = _read(path, option)
    try:
        documents = list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {option} {path}: {' '.join(str(error).split())}") from None
    return [one for document in documents if document is not None for one in _objects(document, f"{option} {path}")]


def _read(path: str, option: str) -> bytes:
    try:
        if path == "-":
            text = sys.stdin.buffer.read(LARGEST_FILE_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                text = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {option} {path}: {error.strerror}") from None
    if len(text) > LARGEST_FILE_BYTES:
        raise InputError(f"cannot read {option} {path}: it is larger than {LARGEST_FILE_BYTES >> 20} MiB")
    return text


def _objects(document: Any, source: str) -> Iterator[Object]:
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        raise InputError(f"cannot read {source}: expected Kubernetes objects with a kind")
    if not document["kind"].endswith("List"):
        yield document
        return
    for one in document.get("items") or ():
        yield from _objects(one, source)
