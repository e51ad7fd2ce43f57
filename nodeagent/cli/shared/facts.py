"""What an agent knows of its node: from a running one, or as it was when the node was captured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.shared.ask import SOCKET, ask, text
from nodeagent.cli.shared.held import grants_of, ledger_of
from nodeagent.cli.shared.places import DEFAULT_CONFIG, STATE_DIR
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document
from nodeagent.errors import PeerError


def no_text(page: str) -> str:
    """Raise PeerError: nothing answers in text."""
    raise PeerError(f"cannot read {page}: it is not known here")


class Facts(msgspec.Struct, frozen=True):
    """Where to read about one node. The same verb answers the same from a running agent and from a capture of it."""

    page: Callable[[str], Any]
    """Returns the JSON of a page of the status socket, such as /v1/status; raises PeerError if there is none."""
    root: str
    """The tree with the machine's /sys and /proc: "/" on the node itself."""
    state_dir: Path
    """The folder with the ledger."""
    now_s: float
    """When the node looked like this, in seconds since the epoch."""

    text: Callable[[str], str] = no_text
    """Returns a page that is text, such as /metrics, like `page`."""
    config_file: Path | None = None
    """The agent's configuration; None if there is no file, so that the defaults are in force."""
    kubelet_dir: Path | None = None
    """Kubelet's folder, of a capture; None if it is where the configuration says."""
    scanned: bytes | None = None
    """The machine as `nodeagent inventory -o json` shows it, of a capture; None if it can be scanned."""

    def inventory(self) -> Inventory:
        """Return the machine as the agent saw it."""
        return from_document(msgspec.json.encode(self.page("/v1/inventory")), source="/v1/inventory")

    def grants(self) -> tuple[Grant, ...]:
        """Return what is held, also by other device plugins."""
        return grants_of(msgspec.json.encode(self.page("/v1/grants")))

    def ledger(self) -> Ledger:
        """Return what is held and reserved as the agent decides on it."""
        return ledger_of(self.grants(), self.reserved())

    def reserved(self) -> CpuSet:
        """Return the CPUs that are reserved for the system."""
        return CpuSet.parse(self.page("/v1/status")["inventory"]["cpus_reserved"], source="/v1/status")

    def machine(self) -> Inventory:
        """Return the machine itself, scanned now or when it was captured."""
        if self.scanned is not None:
            return from_document(self.scanned, source="the capture")
        from nodeagent.cli.shared.source import read_root

        return read_root(None if self.root == "/" else self.root)


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the running agent to ask, and its ledger."""
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the agent's status socket ({SOCKET})")
    add_state_dir(parser)


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder with the ledger."""
    parser.add_argument("--state-dir", metavar="DIR", help="the ledger's folder (default: the configuration's)")


def machine_of(args: argparse.Namespace) -> Inventory:
    """Return the machine of the option --root, or of the facts. Raise InputError if it cannot be read."""
    if args.root is None:
        return facts_of(args).machine()
    from nodeagent.cli.shared.source import read_root

    return read_root(args.root)


def facts_of(args: argparse.Namespace) -> Facts:
    """Return the facts that a verb is to use: those of a capture that is replayed, else the running agent's."""
    replayed: Facts | None = getattr(args, "facts", None)
    if replayed is not None:
        return replayed
    return Facts(
        page=lambda path: ask(args.socket, path),
        root="/",
        state_dir=state_dir_of(args),
        now_s=time.time(),
        text=lambda path: text(args.socket, path),
        config_file=config_file_of(args),
    )


def config_file_of(args: argparse.Namespace) -> Path | None:
    """Return the configuration as given, or the default one if it exists."""
    if given := getattr(args, "config", None):
        return Path(given)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def state_dir_of(args: argparse.Namespace) -> Path:
    """Return the ledger's folder: as given, as configured, or the default one. Raise ConfigError if the configuration
    cannot be read. A verb without the option needs no ledger."""
    if not hasattr(args, "state_dir"):
        return Path(STATE_DIR)
    if args.state_dir:
        return Path(args.state_dir)
    file = config_file_of(args)
    if file is None:
        return Path(STATE_DIR)
    from nodeagent.config.load import load as load_config

    return Path(load_config(file).state_dir)
