"""`nodeagent capture`: one node in one file, to look at elsewhere with `nodeagent replay`.

It only reads. The file is readable by its owner alone, complete or not there, and never takes the place of another.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nodeagent.cli.shared.ask import SOCKET
from nodeagent.cli.shared.facts import add_facts, config_file_of, state_dir_of
from nodeagent.cli.shared.places import DEFAULT_CONFIG

if TYPE_CHECKING:
    from nodeagent.cli.node.capture.collect import Node

EXAMPLES = (
    ("nodeagent capture", "this node in one file in the current folder"),
    ("nodeagent capture --anonymize -o node.tar.zst", "without names, addresses and serial numbers"),
)
SHOWN_AFTER_S = 1.0
"""Progress is shown on a terminal if it takes longer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent capture`."""
    parser.add_argument("-o", "--output", metavar="FILE", help='default: nodeagent-HOST-TIME.tar.zst; "-": to a pipe')
    parser.add_argument("--anonymize", action="store_true", help="replace names, UUIDs, addresses and serial numbers")
    parser.add_argument("--root", metavar="DIR", default="/", help="read the machine from a captured tree")
    parser.add_argument("--kubelet-dir", metavar="DIR", help="kubelet's folder (default: the configuration's)")
    parser.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
    add_facts(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from nodeagent.cli.node.capture import archive
    from nodeagent.cli.node.capture.anonymize import anonymized
    from nodeagent.cli.node.capture.collect import gather, host_name
    from nodeagent.cli.shared.capture_format import MANIFEST

    progress = _Progress()
    with contextlib.closing(progress):
        found, host = gather(_node(args), progress.step), host_name()
        if args.anonymize:
            progress.step("names")
            found.members, names = anonymized(found.members, host)
            host = names.name("node", host)
            found.missing = {names.text(name): names.text(why) for name, why in found.missing.items()}
        manifest = found.manifest(host=host, anonymized=args.anonymize)
        path = args.output or _file_name("anonymous" if args.anonymize else host, found.at_s)
        progress.step("writing it")
        archive.write(path, (MANIFEST, msgspec.json.encode(manifest)), found.members, found.at_s)
    for name, why in sorted(manifest.missing.items()):
        print(f"nodeagent: not captured: {name}: {why}", file=sys.stderr)
    if path != "-":
        print(path)
    return 0


def _node(args: argparse.Namespace) -> Node:
    from nodeagent.cli.node.capture import collect
    from nodeagent.cli.shared.source import check_root
    from nodeagent.config.load import load as load_config
    from nodeagent.config.schema import Config

    if args.root != "/":
        check_root(args.root)
    file = config_file_of(args)
    config = load_config(file) if file is not None else Config()
    return collect.Node(
        root=args.root,
        socket=args.socket or SOCKET,
        state_dir=state_dir_of(args),
        kubelet_dir=Path(args.kubelet_dir or config.kubelet_dir),
        config=config,
        config_file=file,
    )


def _file_name(host: str, at_s: float) -> str:
    return f"nodeagent-{host}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(at_s))}.tar.zst"


class _Progress:
    """What is being read, on a terminal, once it takes long."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._shown = False

    def step(self, name: str) -> None:
        """Note what comes next."""
        if time.monotonic() - self._began_s > SHOWN_AFTER_S and sys.stderr.isatty():
            self._shown = True
            print(f"\r\x1b[Kcapturing {name}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
