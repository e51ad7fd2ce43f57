"""Values derived from a frozen value and cached on that value, so that they are freed together with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def kept_by(owner: object, name: str, make: Callable[[], T], of: object = None) -> T:
    """Return the result of `make`, computed once and recomputed only if `of` changes.

    owner: a frozen Struct with `dict=True`. name: the key, unique among the values cached on the owner. of: settings
    that the result also depends on.
    """
    kept: tuple[object, T] | None = owner.__dict__.get(name)
    if kept is None or kept[0] != of:
        kept = owner.__dict__[name] = (of, make())
    return kept[1]


def seed(owner: object, **properties: Any) -> None:
    """Preset cached properties of a frozen value when they are already known and need not be computed."""
    owner.__dict__.update(properties)
