"""Server-side apply of whole objects as far as agents use it: labels one by one, every other part as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]
Owned = dict[str, set[Path]]
"""Fields by their managers."""


class AppliedConflictError(Exception):
    """Another manager owns a field and has given it another value."""


def fields(body: Mapping[str, Any]) -> dict[Path, Any]:
    """The fields of an object that is applied."""
    metadata = body["metadata"]
    found: dict[Path, Any] = {(key,): value for key, value in body.items() if key not in _IDENTITY}
    found |= {("metadata", "labels", key): value for key, value in (metadata.get("labels") or {}).items()}
    if "ownerReferences" in metadata:
        found["metadata", "ownerReferences"] = metadata["ownerReferences"]
    return found


_IDENTITY = ("apiVersion", "kind", "metadata")


def merged(before: Mapping[str, Any], body: Mapping[str, Any], manager: str, owned: Owned, *, force: bool) -> Any:
    """The object as it is stored then; `owned` is changed to what each manager owns."""
    found, wanted = copy.deepcopy(dict(before)), fields(body)
    for other in owned.keys() - {manager}:
        clash = [path for path in owned[other] & wanted.keys() if _at(found, path) != wanted[path]]
        if clash and not force:
            raise AppliedConflictError(f'conflict with "{other}": .{".".join(clash[0])}')
        owned[other] -= {*clash}
    theirs = {path for other, paths in owned.items() if other != manager for path in paths}
    for path in owned.get(manager, set()) - wanted.keys() - theirs:
        _parent(found, path).pop(path[-1], None)
    for path, value in wanted.items():
        _parent(found, path)[path[-1]] = copy.deepcopy(value)
    owned[manager] = {*wanted}
    return found


def _parent(found: dict[str, Any], path: Path) -> dict[str, Any]:
    for key in path[:-1]:
        found = found.setdefault(key, {})
    return found


def _at(found: dict[str, Any], path: Path) -> Any:
    return _parent(found, path).get(path[-1])
