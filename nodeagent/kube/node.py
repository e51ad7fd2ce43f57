"""Node objects as the API server sends them: what of them bears on the scheduler's books."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.dra.node_allocatable import FEATURE, PAGES, NodeBooks
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    declared_features: tuple[str, ...] | None = None
    allocatable: dict[str, str] | None = None


class _Node(msgspec.Struct, frozen=True):
    status: _Status | None = None


def read_books(document: Mapping[str, Any]) -> NodeBooks:
    """Return what a Node, as decoded JSON, says of the scheduler's books. Raise InputError with the field."""
    try:
        status = msgspec.convert(document, _Node).status or _Status()
    except msgspec.ValidationError as error:
        raise InputError(f"the Node object cannot be read: {error}") from None
    pages = {name: parse_quantity(one) for name, one in (status.allocatable or {}).items() if name.startswith(PAGES)}
    return NodeBooks(declared=FEATURE in (status.declared_features or ()), pages=MappingProxyType(pages))
