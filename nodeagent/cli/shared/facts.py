"""What an agent knows of its node: from a running one, or as it was when the node was captured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.shared.ask import SOCKET, ask
from nodeagent.cli.shared.held import grants_of
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document

STATE_DIR = "/var/lib/nodeagent"


@dataclass(frozen=True, slots=True)
class Facts:
    """Where to read about one node. The same verb answers the same from a running agent and from a capture of it."""

    page: Callable[[str], Any]
    """Returns the JSON of a page of the status socket, such as /v1/status; raises PeerError if there is none."""
    root: str
    """The tree with the machine's /sys and /proc: "/" on the node itself."""
    state_dir: Path
    """The folder with the ledger."""
    now_s: float
    """When the node looked like this, in seconds since the epoch."""

    def inventory(self) -> Inventory:
        """Return the machine as the agent saw it."""
        return from_document(msgspec.json.encode(self.page("/v1/inventory")), source="/v1/inventory")

    def grants(self) -> tuple[Grant, ...]:
        """Return what is held, also by other device plugins."""
        return grants_of(msgspec.json.encode(self.page("/v1/grants")))


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the running agent to ask."""
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the agent's status socket ({SOCKET})")
    parser.add_argument("--state-dir", metavar="DIR", default=STATE_DIR, help=f"the ledger's folder ({STATE_DIR})")


def facts_of(args: argparse.Namespace) -> Facts:
    """Return the facts that a verb is to use: those of a capture that is replayed, else the running agent's."""
    replayed: Facts | None = getattr(args, "facts", None)
    if replayed is not None:
        return replayed
    return Facts(page=lambda path: ask(args.socket, path), root="/", state_dir=Path(args.state_dir), now_s=time.time())
