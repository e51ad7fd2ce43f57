"""`nodeagent status`: how a running agent stands."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.ask import add_arguments as add_arguments
from nodeagent.cli.ask import show
from nodeagent.cli.tables import print_table


def run(args: argparse.Namespace) -> int:
    return show(args, "/v1/status", _print)


def _print(status: Any) -> None:
    machine = status["inventory"]
    print(f"nodeagent {status['version']}, up {status['uptime_s']} s, {'ready' if status['ready'] else 'NOT ready'}")
    print(
        f"CPUs {machine['cpus_online']} online, {machine['cpus_reserved'] or 'none'} reserved; "
        f"{machine['numa_nodes']} NUMA nodes, {machine['devices']} devices, generation {machine['generation']}"
    )
    for kind, lines in (
        ("not ready", status["not_ready"]),
        ("refused", [f"{name}: {why}" for name, why in status["refused"].items()]),
        ("configuration", [status["config_error"]] if status["config_error"] else []),
        ("conflict", status["conflicts"]),
        ("note", status["notes"]),
        ("dra", _dra(status["dra"]) if status["dra"] else []),
        ("warning", machine["warnings"]),
        ("kind", [f"{k['kind']} {k['state']}: {k['reason']}" for k in status["kinds"] if k["state"] == "degraded"]),
    ):
        for line in lines:
            print(f"{kind}: {line}")
    print()
    print_table(
        ("RESOURCE", "KIND", "DEVICES", "HEALTHY", "HELD", "KUBELET"),
        [
            (
                r["name"],
                r["kind"],
                r["devices"],
                r["healthy"],
                r["held"],
                "shown" if r["registered"] else r["registration"],
            )
            for r in status["resources"]
        ],
    )


def _dra(dra: Any) -> list[str]:
    """The DRA side in a few lines."""
    state = "registered" if dra["registered"] else f"NOT registered: {dra['reason'] or dra['registration']}"
    lines = [f"{dra['driver']} on node {dra['node']}: {state}, {dra['claims']} claims"]
    slices = dra["slices"]
    if slices:
        lines += [
            f"pool {one['name']}: {one['state']}, {one['devices']} devices in {one['slices']} slices"
            + (f"; {one['reason']}" if one["reason"] else "")
            for one in slices["pools"]
        ]
        lines += [f"the API server does not keep {name}" for name in slices["lost"]]
        lines += [f"left out: {why}" for why in slices["broken"]]
    return lines
