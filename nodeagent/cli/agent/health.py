"""`nodeagent health`: what is known against devices; `nodeagent health clear DEVICE` ends causes that have latched."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from nodeagent.cli.output import columns, forms
from nodeagent.cli.output.columns import Column
from nodeagent.cli.shared import ask, watch
from nodeagent.errors import InputError

EXAMPLES = (
    ("nodeagent health", "what is known against devices, by source"),
    ("nodeagent health -o jsonpath='{[?(@.state==\"unhealthy\")].device}'", "the devices that are unhealthy"),
    ("nodeagent health clear 0000:41:00.0", "end the causes of a repaired device that last until then"),
)
COLUMNS = (
    Column("DEVICE", lambda cause: cause["device"]),
    Column("STATE", lambda cause: cause["state"]),
    Column("SOURCE", lambda cause: cause["source"]),
    Column("LATCHED", lambda cause: "yes" if cause["latched"] else ""),
    Column("REASON", lambda cause: cause["reason"]),
)
REPLAYABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent health`."""
    ask.add_socket(parser)
    forms.add_output(parser)
    columns.add_sort(parser, COLUMNS)
    watch.add_watch(parser)
    parser.add_argument("action", nargs="?", choices=["clear"], help="clear: end the latched causes of a device")
    parser.add_argument("device", nargs="?", metavar="DEVICE", help="id of a device, such as 0000:41:00.0")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.action is None:
        return watch.show(args, lambda: ask.pages(args)("/v1/health"), lambda health: _write(args, health))
    if getattr(args, "facts", None) is not None:
        raise InputError(f"cannot clear the health of {args.device}: a capture is only read")
    if args.device is None:
        raise InputError("cannot clear the health of a device: DEVICE is missing")
    from urllib.parse import quote

    done = ask.request(args.socket, "DELETE", f"/v1/health/{quote(os.fsencode(args.device), safe=':./')}")
    print(f"cleared {done['device']}: it is {done['state']}")
    return 0


def _write(args: argparse.Namespace, health: Any) -> None:
    if args.output.is_table:
        forms.write_list(args, [*_causes(health)], COLUMNS)
    else:
        forms.write_list(args, health, COLUMNS, name=lambda one: one["device"])


def _causes(health: Any) -> Iterator[Any]:
    """Yield what is known against devices, each with its device."""
    from nodeagent.core.model.health import HEALTHY

    for one in health:
        yield from ({"device": one["device"], **cause} for cause in one["causes"] if cause["state"] != HEALTHY)
