"""`nodeagent run`: the agent itself."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from nodeagent.cli.shared.places import DEFAULT_CONFIG as DEFAULT_CONFIG
from nodeagent.errors import InputError

EXAMPLES = (
    ("nodeagent run", "as nodeagent.service does"),
    ("nodeagent run --config my.yaml --kubelet-dir /var/lib/k0s/kubelet", "with a kubelet that lives elsewhere"),
    ("nodeagent run --accept-loss", "although the ledger was written by a newer version"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent run`."""
    parser.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
    parser.add_argument("--root", metavar="DIR", default="/", help="read the machine from a captured tree")
    parser.add_argument("--kubelet-dir", metavar="DIR", help="kubelet's folder (default: /var/lib/kubelet)")
    parser.add_argument(
        "--accept-loss", action="store_true", help="move a ledger of a newer version aside and rebuild it"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from nodeagent.cli.shared.source import check_root
    from nodeagent.config.load import load as load_config
    from nodeagent.config.load import placed
    from nodeagent.config.schema import Config
    from nodeagent.daemon import daemon
    from nodeagent.daemon.paths import paths_of
    from nodeagent.telemetry import log

    path = Path(args.config) if args.config else DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None
    check_root(args.root)
    if args.kubelet_dir == "":
        raise InputError("cannot use --kubelet-dir '': expected kubelet's folder")
    config = load_config(path) if path is not None else Config()
    log.configure(config.log.level, config.log.format)
    where = paths_of(
        config, config_file=path, root=args.root, kubelet_dir=args.kubelet_dir, accept_loss=args.accept_loss
    )
    with placed(path):
        asyncio.run(daemon.run(config, where))
    return 0
