"""`nodeagent devices`: what a running agent shows to kubelet; one line for each NUMA node, or for each id."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nodeagent.cli.output import columns, filters, forms
from nodeagent.cli.output.columns import Column
from nodeagent.cli.output.words import age, folded
from nodeagent.cli.shared import ask, grant_text, watch

EXAMPLES = (
    ("nodeagent devices", "how much of each resource is free on each NUMA node"),
    ("nodeagent devices -o wide", "every id with its health and holder"),
    ("nodeagent devices --resource gpu --numa 0-1 -o wide", "the GPUs of two NUMA nodes"),
    ("nodeagent devices --pod shop/till -o name", "the ids that a pod holds"),
    ("nodeagent devices -o jsonpath='{[?(@.healthy==false)].id}'", "the ids that are unhealthy"),
)


class _Row(NamedTuple):
    """The ids of one resource on the same NUMA nodes."""

    resource: str
    nodes: str
    ids: Sequence[Any]

    @property
    def free(self) -> list[str]:
        return [one["id"] for one in self.ids if one["healthy"] and not one["holder"]]

    def count(self, state: str) -> int:
        return sum(_health(one) == state for one in self.ids)


SUMMARY = (
    Column("RESOURCE", lambda row: row.resource),
    Column("NUMA", lambda row: row.nodes),
    Column("IDS", lambda row: len(row.ids)),
    Column("FREE", lambda row: len(row.free)),
    Column("HELD", lambda row: sum(bool(one["holder"]) for one in row.ids)),
    Column("UNHEALTHY", lambda row: row.count("unhealthy") + row.count("unknown")),
    Column("FREE IDS", lambda row: folded(row.free)),
    Column("HOLDERS", lambda row: _holders(row.ids)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent devices`."""
    ask.add_socket(parser)
    forms.add_output(parser)
    filters.add_filters(parser)
    columns.add_sort(parser, (*SUMMARY, *(one for one in _columns({}, 0) if one.name not in ("resource", "numa"))))
    watch.add_watch(parser)


REPLAYABLE = True


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return watch.show(args, lambda: _read(args), lambda pages: _write(args, *pages))


def _read(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Return the ids that were asked for, and all grants by id."""
    page = ask.pages(args)
    grants = {one["id"]: one for one in page("/v1/grants")}
    return [one for one in page("/v1/devices") if _wanted(args, one, grants.get(one["grant"]))], grants


def _wanted(args: argparse.Namespace, device: Any, grant: Any) -> bool:
    return (
        (not filters.by_holder(args) or (grant is not None and filters.held_by(args, grant)))
        and filters.of_resource(args, device["resource"])
        and filters.of_device(args, lambda: (device["id"],))
        and filters.on_nodes(args, lambda: device["numa_nodes"])
    )


def _write(args: argparse.Namespace, devices: Sequence[Any], grants: Mapping[str, Any]) -> None:
    if args.output.kind == forms.TABLE:
        forms.write_list(args, _rows(devices), SUMMARY)
    else:
        forms.write_list(args, devices, _columns(grants, ask.now_s(args)), name=lambda one: one["id"])


def _rows(devices: Iterable[Any]) -> list[_Row]:
    """Return ids grouped by resource and NUMA nodes, in order."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in devices:
        groups.setdefault((one["resource"], _nodes(one)), []).append(one)
    return [_Row(resource, nodes, ids) for (resource, nodes), ids in groups.items()]


def _columns(grants: Mapping[str, Any], now_s: float) -> tuple[Column, ...]:
    """Return the columns of a list of ids."""
    return (
        Column("RESOURCE", lambda one: one["resource"]),
        Column("ID", lambda one: one["id"]),
        Column("NUMA", _nodes),
        Column("HEALTH", _health),
        Column("HOLDER", lambda one: one["holder"]),
        Column("MEMORY", lambda one: grant_text.memory(grants[one["grant"]]) if one["grant"] in grants else ""),
        Column("AGE", lambda one: age(_since(one, grants), now_s), key=lambda one: now_s - _since(one, grants)),
        Column("GRANT", lambda one: one["grant"]),
        Column("REASON", lambda one: one["reason"]),
    )


def _nodes(one: Any) -> str:
    return ",".join(map(str, one["numa_nodes"]))


def _health(one: Any) -> str:
    if one["state"] == "unknown":
        return "unknown"
    return "healthy" if one["healthy"] else "held elsewhere" if one["held_elsewhere"] else "unhealthy"


def _since(one: Any, grants: Mapping[str, Any]) -> float:
    return float(grants[one["grant"]]["granted_at"]) if one["grant"] in grants else 0.0


def _holders(ids: Iterable[Any]) -> str:
    """Return the holders of some ids, each with how many it holds."""
    counts = Counter(one["holder"] for one in ids if one["holder"])
    return ", ".join(f"{holder} ({count})" if count > 1 else holder for holder, count in counts.items())
