"""A placement and a refusal in the form that `nodeagent place` documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.describe import describe
from nodeagent.errors import Refused


def placed_document(inventory: Inventory, request: Request, placement: Placement) -> dict[str, Any]:
    """Return a placement with its cost and the reasons."""
    more = describe(inventory, request, placement)
    pages: dict[str, dict[str, int]] = {}
    for one in placement.hugepages:
        pages.setdefault(format_size(one.page_bytes), {})[str(one.node)] = one.pages
    document: dict[str, Any] = {
        "cpus": str(placement.cpus),
        "packages": list(more.packages),
        "numa_nodes": list(more.numa_nodes),
        "l3": list(more.l3),
        "split_cores": more.split_cores,
        "hugepages": pages,
        "devices": list(placement.devices),
        "cost": list(placement.cost),
        "why": list(more.why),
    }
    if placement.memory:
        document["memory"] = {str(node): size for node, size in placement.memory}
    return document


def refusal_document(refusal: Refused) -> dict[str, Any]:
    """Return a refusal with its numbers and what would admit the request."""
    return {
        "refused": refusal.why,
        "want": refusal.want,
        "free": refusal.free,
        "unit": refusal.unit,
        "would_admit": refusal.would_admit,
    }


def placed_rows(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield what `placed_document` returns as (what, where)."""
    for name, value in document.items():
        if name == "why":
            yield from ((name, sentence) for sentence in value)
        elif isinstance(value, Mapping):
            yield from (
                (f"{name} {key}", ", ".join(f"{k}: {v}" for k, v in _items(part))) for key, part in value.items()
            )
        else:
            yield name, ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, Mapping) else [("bytes", value)]
