"""What is held, and what it costs, in words and columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nodeagent.cli.shared.tables import print_table
from nodeagent.core.advice.tenants import Tenant
from nodeagent.core.model.cpuset import union
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.quantity import format_size

HELD_COLUMNS = ("CPUS", "HUGEPAGES", "MEMORY", "DEVICES")


def held(grants: Iterable[Grant]) -> dict[str, Any]:
    """Return what some grants hold together, in the words of the columns."""
    every = list(grants)
    pages: Counter[tuple[int, int]] = Counter()
    memory: Counter[int] = Counter()
    for grant in every:
        pages.update({(one.page_bytes, one.node): one.pages for one in grant.hugepages})
        memory.update(dict(grant.memory))
    devices = dict.fromkeys(one for grant in every for one in (*grant.devices, *grant.shares))
    return {
        "cpus": str(union(one.cpus for one in every)),
        "hugepages": " ".join(f"{n}x{format_size(size)}@node{node}" for (size, node), n in sorted(pages.items())),
        "memory": " ".join(f"{format_size(size)}@node{node}" for node, size in sorted(memory.items())),
        "devices": list(devices),
    }


def holdings(tenant: Tenant) -> dict[str, Any]:
    """Return a tenant in plain types."""
    return {"pods": list(tenant.pods), "grants": sorted(one.id for one in tenant.grants), **held(tenant.grants)}


def cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of what `held` returns."""
    return one["cpus"], one["hugepages"], one["memory"], " ".join(one["devices"])


def print_costs(parts: Sequence[Mapping[str, Any]], headings: tuple[str, str] = ("NOW", "EMPTY")) -> None:
    """Print the parts of a cost with what each would be on the empty machine."""
    rows = ((one["part"], one["value"], _known(one["on_empty"]), one["words"]) for one in parts)
    print_table(("COST", *headings, "IN WORDS"), rows)


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)
