"""`nodeagent grants`: who holds what."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from nodeagent.cli.output import columns, filters, forms
from nodeagent.cli.shared import ask, grant_text, watch
from nodeagent.cli.shared.grant_text import Nodes

EXAMPLES = (
    ("nodeagent grants", "who holds what, oldest first"),
    ("nodeagent grants --pod shop/till -o wide", "what one pod holds, with NUMA nodes and UIDs"),
    ("nodeagent grants --device 0000:41:00.0 -o name", "the id of the grant that has a device"),
    ("nodeagent grants --numa 1 --sort-by age", "what is held on NUMA node 1, newest first"),
    ("nodeagent grants -o jsonpath='{[*].cpus}'", "all CPUs that are held"),
    ("nodeagent grants --watch", "the table again at each change"),
)

REPLAYABLE = True


class _Held(NamedTuple):
    grants: Sequence[Any]
    nodes: Nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent grants`."""
    ask.add_socket(parser)
    forms.add_output(parser)
    filters.add_filters(parser)
    columns.add_sort(parser, grant_text.columns(0, {}))
    watch.add_watch(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return watch.show(args, lambda: _read(args), lambda held: _write(args, held))


def _read(args: argparse.Namespace) -> _Held:
    """Return the grants that were asked for. NUMA nodes are looked up only if something shows or needs them."""
    page = ask.pages(args)
    needed = args.numa is not None or args.output.kind == forms.WIDE or args.sort_by == "numa"
    nodes = grant_text.machine_nodes(page("/v1/inventory")) if needed else {}
    return _Held([one for one in page("/v1/grants") if _wanted(args, one, nodes)], nodes)


def _wanted(args: argparse.Namespace, grant: Any, nodes: Nodes) -> bool:
    return (
        filters.held_by(args, grant)
        and filters.of_resource(args, grant["resource"])
        and filters.of_device(args, lambda: grant_text.held_ids(grant))
        and filters.on_nodes(args, lambda: [*grant_text.nodes_of(grant, nodes)])
    )


def _write(args: argparse.Namespace, held: _Held) -> None:
    forms.write_list(args, held.grants, grant_text.columns(ask.now_s(args), held.nodes), name=lambda g: g["id"])
