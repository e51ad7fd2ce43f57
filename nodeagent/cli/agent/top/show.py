"""The tables of `nodeagent top`, and its document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nodeagent.cli.agent.top.usage import NodeUse, Use
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.quantity import format_size

GRANTS = ("HOLDER", "CPUS", "NUMA", "BUSY", "OWN", "THROTTLED", "MHZ", "PAGES", "NOTE")
NODES = ("NUMA", "CPUS", "BUSY", "MEMORY", "PAGES")
GIB = 1 << 30


def print_uses(uses: Iterable[Use], nodes: Iterable[NodeUse]) -> None:
    """Print use by holder, the busiest first, and by NUMA node."""
    print_table(GRANTS, [_row(one) for one in sorted(uses, key=_order)])
    print()
    print_table(NODES, [_node_row(one) for one in nodes])


def _order(one: Use) -> tuple[float, str]:
    return -(one.busy or 0.0), one.holder


def _row(one: Use) -> tuple[object, ...]:
    own = "" if one.cpus_used is None else f"{one.cpus_used:.2f}"
    pages = {size: (used, held) for size, (used, held) in one.pages_used.items()}
    note = "idle" if one.idles else ""
    return (
        one.holder,
        str(one.cpus),
        str(one.nodes),
        _percent(one.busy),
        own,
        _percent(one.throttled),
        one.mhz,
        _pages(pages),
        note,
    )


def _node_row(one: NodeUse) -> tuple[object, ...]:
    memory = ""
    if one.used_bytes is not None and one.total_bytes is not None:
        memory = f"{one.used_bytes / GIB:.1f}/{one.total_bytes / GIB:.1f} GiB"
    return one.node, str(one.cpus), _percent(one.busy), memory, _pages(one.pages)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.0f}%"


def _pages(pages: Mapping[int, tuple[int | None, int]]) -> str:
    return " ".join(f"{format_size(size)}:{'?' if used is None else used}/{of}" for size, (used, of) in pages.items())


def document(seconds: float, uses: Iterable[Use], nodes: Iterable[NodeUse]) -> dict[str, Any]:
    """Return one sample in plain types. Shares are from 0 to 1."""
    return {
        "seconds": round(seconds, 2),
        "holders": [_use_document(one) for one in sorted(uses, key=_order)],
        "numa_nodes": [_node_document(one) for one in nodes],
    }


def _use_document(one: Use) -> dict[str, Any]:
    pages = [{"size": format_size(size), "used": used, "held": held} for size, (used, held) in one.pages_used.items()]
    return {
        "holder": one.holder,
        "cpus": str(one.cpus),
        "numa_nodes": str(one.nodes),
        "busy": _rounded(one.busy),
        "cpus_used": _rounded(one.cpus_used),
        "throttled": _rounded(one.throttled),
        "mhz": one.mhz,
        "hugepages": pages,
        "idle": one.idles,
    }


def _node_document(one: NodeUse) -> dict[str, Any]:
    pages = [{"size": format_size(size), "used": used, "total": total} for size, (used, total) in one.pages.items()]
    return {
        "numa_node": one.node,
        "cpus": str(one.cpus),
        "busy": _rounded(one.busy),
        "memory_used_bytes": one.used_bytes,
        "memory_bytes": one.total_bytes,
        "hugepages": pages,
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
