"""What is worked out of a frozen value and kept by the value itself: it goes when the value goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def kept_by(owner: object, name: str, make: Callable[[], T], of: object = None) -> T:
    """Return what `make` returns, made once, and again where `of` (settings that it depends on too) is another.

    owner: a frozen dataclass without slots. name: unique among what is kept by it."""
    kept: tuple[object, T] | None = owner.__dict__.get(name)
    if kept is None or kept[0] != of:
        kept = owner.__dict__[name] = (of, make())
    return kept[1]


def seed(owner: object, **properties: Any) -> None:
    """Give cached properties of a frozen value their values: those that are cheaper known than worked out."""
    owner.__dict__.update(properties)
