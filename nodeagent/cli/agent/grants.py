"""`nodeagent grants`: who holds what."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.shared.ask import add_arguments as add_arguments
from nodeagent.cli.shared.ask import show
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.grant import KUBELET
from nodeagent.core.model.quantity import format_size

COLUMNS = (
    *("GRANT", "NAMESPACE", "POD", "CONTAINER", "CLAIM", "RESOURCE"),
    *("CPUS", "HUGEPAGES", "MEMORY", "DEVICES", "NOTE"),
)

REPLAYABLE = True


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return show(args, "/v1/grants", _print)


def _print(grants: Any) -> None:
    print_table(
        COLUMNS,
        [
            (
                g["id"],
                g["namespace"],
                g["pod"] or (g["uid"] if g["api"] == KUBELET else ""),
                g["container"],
                g["claim"],
                g["resource"] or g["api"],
                g["cpus"],
                " ".join(f"{p['pages']}x{p['size']}@node{p['numa_node']}" for p in g["hugepages"]),
                " ".join(f"{format_size(m['bytes'])}@node{m['numa_node']}" for m in g["memory"]),
                " ".join(g["devices"]),
                g["held_back"],
            )
            for g in grants
        ],
    )
