"""`nodeagent health`: what is known against devices; `nodeagent health clear DEVICE` ends causes that have latched."""

from __future__ import annotations

import argparse
import os
from typing import Any
from urllib.parse import quote

from nodeagent.cli.shared import ask
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.health import HEALTHY
from nodeagent.errors import InputError

REPLAYABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent health`."""
    ask.add_arguments(parser)
    parser.add_argument("action", nargs="?", choices=["clear"], help="clear: end the latched causes of a device")
    parser.add_argument("device", nargs="?", metavar="DEVICE", help="id of a device, such as 0000:41:00.0")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.action is None:
        return ask.show(args, "/v1/health", _print)
    if getattr(args, "facts", None) is not None:
        raise InputError(f"cannot clear the health of {args.device}: a capture is only read")
    if args.device is None:
        raise InputError("cannot clear the health of a device: DEVICE is missing")
    done = ask.request(args.socket, "DELETE", f"/v1/health/{quote(os.fsencode(args.device), safe=':./')}")
    print(f"cleared {done['device']}: it is {done['state']}")
    return 0


def _print(health: Any) -> None:
    print_table(
        ("DEVICE", "STATE", "SOURCE", "LATCHED", "REASON"),
        [
            (one["device"], cause["state"], cause["source"], "yes" if cause["latched"] else "", cause["reason"])
            for one in health
            for cause in one["causes"]
            if cause["state"] != HEALTHY
        ],
    )
