"""`nodeagent devices`: what a running agent shows to kubelet."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.shared.ask import add_arguments as add_arguments
from nodeagent.cli.shared.ask import show
from nodeagent.cli.shared.tables import print_table

REPLAYABLE = True


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return show(args, "/v1/devices", _print)


def _print(devices: Any) -> None:
    print_table(
        ("RESOURCE", "ID", "NUMA", "HEALTH", "HOLDER", "REASON"),
        [
            (
                d["resource"],
                d["id"],
                ",".join(str(node) for node in d["numa_nodes"]),
                d["state"] if d["state"] == "unknown" else "healthy" if d["healthy"] else "unhealthy",
                d["holder"],
                d["reason"],
            )
            for d in devices
        ],
    )
